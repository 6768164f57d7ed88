"""What each allocator is worth on real gradients: the variance of the estimate along real
fine-tuning runs.

Backprop trains an adapter; at every step, gradients of single samples (by autograd) tell what the
estimate of that step would have varied by with the counts of every allocator, all at the same
number of rows, clean rows charged. Allocators learn from deltas drawn with those gradients, as in a
forward-only run. At some steps the estimate is run for real, some times, and its error against
autograd's gradient stands beside the variance that was computed.

    python benchmarks/allocation.py            # both tasks, three seeds
    python benchmarks/allocation.py --quick    # the shape of it in minutes
    python benchmarks/allocation.py --queries 2  # few rows: counts of zero pay
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradients import SampleGradients  # isort: skip
from records import ROOT, Record, quiet  # isort: skip
from tasks import TASKS, Task  # isort: skip

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import (
    ALLOCATORS,
    Optimal,
    RandomisedAllocator,
    SampleFeatures,
    TwoRoundAllocator,
    equal_counts,
    optimal_counts,
    proxy,
)
from hf_flops.estimators import ESTIMATORS
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.reporting.comparison_plots import pyplot

BATCH, QUERIES = 32, 16
ORACLE, SHARED, MEZO = "oracle (true norms)", "shared noise", "shared noise, pairs (MeZO)"
ALWAYS = "optimal, whatever its gain"
WINDOWS = {"at initialisation": (0, 1), "steps 1-20": (1, 21), "after step 100": (100, None)}


@dataclass
class Race:
    """All allocators side by side on the batches of one run.

    Attributes:
        curves: name → variance over that of equal counts, step by step.
    """

    seed: int
    queries: int = QUERIES
    allocators: dict[str, Any] = field(
        default_factory=lambda: {
            ALWAYS: Optimal(least_gain=1.0),
            **{name: kind() for name, kind in ALLOCATORS.items()},
        }
    )
    curves: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def step(self, features: SampleFeatures, gradients: Tensor) -> None:
        """Add a batch; gradients: (B, d) of its samples."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + features.step)
        squares, budget = gradients.double().square().sum(1), BATCH * (self.queries - 1)
        equal = float(proxy(squares, equal_counts(BATCH, budget)))
        whole = float(gradients.double().sum(0).square().sum())
        self.curves[ORACLE].append(
            float(proxy(squares, optimal_counts(squares.sqrt(), budget))) / equal
        )
        # Differences to the clean row leave 15 directions of 16 rows, pairs leave 8.
        self.curves[SHARED].append(whole / (self.queries - 1) / equal)
        self.curves[MEZO].append(whole / (self.queries // 2) / equal)
        for name, allocator in self.allocators.items():
            self.curves[name].append(
                self._variance(allocator, features, gradients, squares, budget, generator) / equal
            )

    def _variance(
        self,
        allocator: Any,
        features: SampleFeatures,
        gradients: Tensor,
        squares: Tensor,
        budget: int,
        generator: torch.Generator,
    ) -> float:
        plan = (
            allocator.pilot(features, budget) if isinstance(allocator, TwoRoundAllocator) else None
        )
        if plan is None:
            counts = allocator.counts(features, budget)
            randomised = isinstance(allocator, RandomisedAllocator)
            mean = allocator.expected_counts(features, budget) if randomised else counts
            found = proxy(squares, mean)
            if not allocator.weighted:  # the mean square error of a biased estimate
                weight = counts.double() * BATCH / budget
                bias = ((weight - 1)[:, None] * gradients.double()).sum(0).square().sum()
                found = (weight.square() * squares / counts).sum() + bias / (gradients.shape[1] + 1)
        else:
            pilot, shares = plan
            seen = mean_squares(squares, pilot, generator)
            second = allocator.second_counts(
                features, seen, pilot, shares, budget - int(pilot.sum())
            )
            found = proxy(squares * shares**2, pilot) + proxy(squares * (1 - shares) ** 2, second)
            counts = pilot + second
        allocator.update(features, counts, mean_squares(squares, counts, generator))
        return float(found)


def mean_squares(squares: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Draw means of n_i squared deltas: a delta is the gradient along the noise, so normal with
    variance ||g_i||^2.
    """
    normal = torch.randn(len(squares), int(counts.max()), generator=generator, dtype=torch.float64)
    asked = torch.arange(normal.shape[1]) < counts[:, None]
    return squares * (normal.square() * asked).sum(1) / counts


def measured(
    task: Task,
    inputs: dict[str, Tensor],
    features: SampleFeatures,
    race: Race,
    truth: Tensor,
    draws: int,
) -> dict[str, float]:
    """Return the mean square error of real estimates, by allocator; truth: (d,) autograd's
    gradient.
    """
    names, found = ParameterVector.of(task.model).names, {}
    names_of = ("uniform", "optimal", "optimal_with_zeros", "gaussian", "two_stage", SHARED)
    for name in names_of:
        kind, allocator = (
            ({"shared": names}, "uniform") if name == SHARED else ({"rowwise": names}, name)
        )
        errors = []
        for draw in range(draws):
            for parameter in task.model.parameters():
                parameter.grad = None
            own = ALLOCATORS[allocator]()  # a copy: real steps must not teach the one of the race
            own.load_state_dict(json.loads(json.dumps(race.allocators[allocator].state_dict())))
            method = Method(
                TappedLoss(),
                perturb(task.model, **kind),
                ESTIMATORS["one_sided"](),
                own,
                race.queries,
                1e-3,
                rows_per_forward=128,
            )
            place = BatchPosition(
                seed=1000 + draw, step=features.step, epoch=features.epoch, ids=features.ids
            )
            estimate_gradient(
                lambda rows: ((out := task.model(**rows)).loss, out), inputs, method, place
            )
            vector = ParameterVector.of(task.model)
            found_gradient = torch.cat(
                [parameter.grad.flatten() for parameter in vector.parameters]
            )
            errors.append(float((found_gradient - truth).double().square().sum()))
        found[name] = float(np.mean(errors))
    return found


def run(
    task: Task, seed: int, steps: int, check: set[int], draws: int, queries: int
) -> dict[str, Any]:
    """Fine-tune by backprop with the race beside it."""
    gradients_of, race, checks = SampleGradients(task.model), Race(seed, queries), []
    optimizer = torch.optim.AdamW(gradients_of.vector.parameters, task.learning_rate)
    for step, (inputs, ids) in zip(range(steps), task.batches(seed, BATCH), strict=False):
        optimizer.zero_grad()
        gradients, seen = gradients_of(inputs)
        epoch = step * BATCH / len(task.data["labels"])
        features = SampleFeatures(
            seen.sums, seen.residuals, step, 0, epoch, seed, lengths=seen.counts.float(), ids=ids
        )
        if step in check:
            kept = [parameter.grad for parameter in gradients_of.vector.parameters]
            found = measured(task, inputs, features, race, gradients.mean(0), draws)
            for parameter, gradient in zip(gradients_of.vector.parameters, kept, strict=True):
                parameter.grad = gradient
        race.step(features, gradients)
        if step in check:
            equal = float(
                proxy(
                    gradients.double().square().sum(1), equal_counts(BATCH, BATCH * (queries - 1))
                )
            )
            computed = {name: curve[-1] for name, curve in race.curves.items()}
            # Rademacher noise: E ||delta z||^2 = d ||g||^2, up to terms of higher order
            dimension = gradients.shape[1]
            checks.append(
                {
                    "step": step,
                    "measured": {
                        name: error / (dimension * equal / BATCH**2)
                        for name, error in found.items()
                    },
                    "computed": {name: computed[name] for name in found},
                }
            )
        optimizer.step()
        if step % 25 == 0:
            print(
                f"{task.name}, seed {seed}, step {step}: loss {float(features.losses.mean()):.3f}",
                flush=True,
            )
    return {"seed": seed, "curves": race.curves, "checks": checks}


def costs(task: Task, samples: int = 256, queries: int = 64, repeats: int = 9) -> dict[str, float]:
    """Return what each allocator costs in a step of `samples * queries` rows, as a share of the
    rows' plain inference.

    Both sides are timed in turn; medians.
    """
    generator = torch.Generator().manual_seed(0)
    inputs, _ = next(task.batches(0, BATCH))
    allocators, budget = (
        {name: kind() for name, kind in ALLOCATORS.items()},
        samples * (queries - 1),
    )
    times: dict[str, list[float]] = defaultdict(list)
    for step in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            task.model(**inputs)
        times["row"].append((time.perf_counter() - start) / BATCH)
        residuals = torch.rand(samples, generator=generator)
        features = SampleFeatures(
            residuals, residuals, step, lengths=torch.ones(samples), ids=tuple(range(samples))
        )
        for name, allocator in allocators.items():
            squares = residuals * torch.rand(samples, generator=generator)
            start = time.perf_counter()
            plan = (
                allocator.pilot(features, budget)
                if isinstance(allocator, TwoRoundAllocator)
                else None
            )
            counts = allocator.counts(features, budget)
            if plan is not None:
                left = budget - int(plan[0].sum())
                counts = plan[0] + allocator.second_counts(features, squares, *plan, left)
            allocator.update(features, counts, squares)
            times[name].append(time.perf_counter() - start)
    row = float(np.median(times.pop("row")))
    return {name: float(np.median(own)) / (row * samples * queries) for name, own in times.items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return, by window of steps and name, mean variance over that of equal counts, and its
    standard error over seeds.
    """
    table: dict[str, dict[str, list[float]]] = {}
    for title, (first, last) in WINDOWS.items():
        table[title] = {}
        for name in runs[0]["curves"]:
            means = np.array([np.mean(run["curves"][name][first:last]) for run in runs])
            error = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else float("nan")
            table[title][name] = [float(means.mean()), error]
    return table


def main() -> None:
    """Run the tasks, print a table, write results/allocation.json and docs/allocation.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--draws",
        type=int,
        default=4,
        help="real estimates per allocator at the steps that are checked",
    )
    parser.add_argument("--queries", type=int, default=QUERIES, help="rows per sample")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer draws")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.draws = options.seeds[:1], 120, 2
    quiet()
    record = Record("allocation", indent=None)
    for name in options.tasks:
        runs = []
        for seed in options.seeds:
            check = {0, options.steps - 1} if seed == options.seeds[0] else set()
            task = TASKS[name](seed)
            runs.append(run(task, seed, options.steps, check, options.draws, options.queries))
        found = {
            "summary": summary(runs),
            "costs": costs(TASKS[name](0)),
            "runs": runs,
            "batch": BATCH,
            "queries_per_sample": options.queries,
        }
        few = options.queries != QUERIES
        record.keep(f"{name}, {options.queries} rows per sample" if few else name, found)
        report(name, found)
    whole = {name: found for name, found in record.entries.items() if name in TASKS}
    draw(whole, ROOT / "docs" / "allocation.png")


def report(name: str, record: dict[str, Any]) -> None:
    """Print a task's table in Markdown, and how real estimates compare with computed variances."""
    summaries = record["summary"]
    print(
        f"\n{name}: variance over that of equal counts\n\n"
        f"| | {' | '.join(summaries)} |\n"
        f"|{' --- |' * (len(summaries) + 1)}"
    )
    for row in next(iter(summaries.values())):
        cells = [
            f"{mean:.2f} ± {error:.2f}" for mean, error in (s[row] for s in summaries.values())
        ]
        print(f"| {row} | {' | '.join(cells)} |")
    print(
        "\ncost, share of a step of 256 x 64 rows:",
        {name: f"{cost:.2%}" for name, cost in record["costs"].items()},
    )
    for check in record["runs"][0]["checks"]:
        pairs = {
            name: f"{check['measured'][name]:.2f} ({check['computed'][name]:.2f})"
            for name in check["measured"]
        }
        print(f"step {check['step']}, real estimates (computed):", pairs)


TITLES = {"fashion": "Small ViT, Fashion-MNIST", "reviews": "MiniLM, movie reviews"}
COLOURS = {  # equal counts and ours as in the figures of results.md
    "uniform": "#f59e0b",
    "bernoulli": "#7c3aed",
    "loss_proportional": "#15803d",
    "gaussian": "#38bdf8",
    "two_stage": "#fb7185",
    "optimal": "#c2410c",
    ORACLE: "black",
}


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the variance along the runs, mean over seeds, smoothed over nine steps."""
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(record), figsize=(5.5 * len(record), 4), layout="constrained", sharey=True
    )
    for axes, (name, own) in zip(np.atleast_1d(panels), record.items(), strict=True):
        for row, colour in COLOURS.items():
            curve = np.mean([run["curves"][row] for run in own["runs"]], 0)
            smooth = np.convolve(np.pad(curve, 4, mode="edge"), np.ones(9) / 9, mode="valid")
            style = ":" if row == ORACLE else "-"
            axes.plot(smooth, label=row, linewidth=1.6, color=colour, linestyle=style)
        axes.set(
            title=TITLES[name],
            xlabel="backprop steps done",
            ylabel="variance over that of equal counts",
            ylim=(0, 1.25),
        )
    np.atleast_1d(panels)[-1].legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
