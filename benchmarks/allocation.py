"""What each allocator is worth on real gradients: the variance of the estimate along real fine-tuning runs.

Backprop trains an adapter; at every step, gradients of single samples (by autograd) tell what the estimate of that step
would have varied by with the counts of every allocator, all at the same number of rows, clean rows charged. Allocators
learn from deltas drawn with those gradients, as in a forward-only run. At some steps the estimate is run for real, some
times, and its error against autograd's gradient stands beside the variance that was computed.

    python benchmarks/allocation.py            # both tasks, three seeds
    python benchmarks/allocation.py --quick    # the shape of it in minutes
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from tasks import ROOT, TASKS, Task  # isort: skip

from hf_flops import Method, Place, estimate_gradient
from hf_flops.allocators import ALLOCATORS, Piloted, equal_counts, optimal_counts, proxy
from hf_flops.estimators import ESTIMATORS
from hf_flops.objectives import RowLosses, TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.rows import Features

BATCH, QUERIES = 32, 16
ORACLE, SHARED, MEZO = "oracle (true norms)", "shared noise", "shared noise, pairs (MeZO)"
WINDOWS = {"at initialisation": (0, 1), "steps 1-20": (1, 21), "after step 100": (100, None)}


class SampleGradients:
    """Gradients of single samples by one backward pass, for models whose trainable parameters are those of Linear layers."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.vector = model, ParameterVector.of(model)
        index = {id(parameter): i for i, parameter in enumerate(self.vector.parameters)}
        self.sites = {
            module: {name: index[id(p)] for name, p in module._parameters.items() if p is not None and id(p) in index}
            for module in model.modules()
            if isinstance(module, nn.Linear) and any(id(p) in index for p in module._parameters.values())
        }
        assert sum(len(names) for names in self.sites.values()) == len(self.vector.names)

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, RowLosses]:
        """Return (B, d) gradients of each sample's loss, and the losses; the mean gradient is left in `.grad`."""
        rows, kept = torch.zeros(len(inputs["labels"]), self.vector.size), []

        def forward(inputs: Any) -> tuple[Tensor, Any]:
            outputs = self.model(**inputs)
            kept.append(outputs.loss)
            return outputs.loss, outputs

        with self._watched(self.vector.views(rows)):
            losses = TappedLoss()(forward, inputs, features=True)
            kept[0].backward()
        rows *= len(rows)  # the loss is the mean over samples
        return rows, RowLosses(losses.sums.detach(), losses.counts, losses.residuals.detach())

    @contextmanager
    def _watched(self, views: list[Tensor]) -> Iterator[None]:
        def forward(module: nn.Module, args: tuple, out: Tensor) -> None:
            x = args[0].detach().reshape(len(views[0]), -1, args[0].shape[-1])

            def backward(slope: Tensor) -> None:
                slope = slope.reshape(len(x), -1, slope.shape[-1])
                for name, i in self.sites[module].items():
                    views[i].copy_(slope.transpose(1, 2) @ x if name == "weight" else slope.sum(1))

            out.register_hook(backward)

        handles = [module.register_forward_hook(forward) for module in self.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Race:
    """All allocators side by side on the batches of one run.

    Attributes:
        curves: name → variance over that of equal counts, step by step.
    """

    seed: int
    allocators: dict[str, Any] = field(default_factory=lambda: {name: kind() for name, kind in ALLOCATORS.items()})
    curves: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def step(self, features: Features, gradients: Tensor) -> None:
        """Add a batch; gradients: (B, d) of its samples."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + features.step)
        squares, budget = gradients.double().square().sum(1), BATCH * (QUERIES - 1)
        equal = float(proxy(squares, equal_counts(BATCH, budget)))
        whole = float(gradients.double().sum(0).square().sum())
        self.curves[ORACLE].append(float(proxy(squares, optimal_counts(squares.sqrt(), budget))) / equal)
        # Differences to the clean row leave 15 directions of 16 rows, pairs leave 8.
        self.curves[SHARED].append(whole / (QUERIES - 1) / equal)
        self.curves[MEZO].append(whole / (QUERIES // 2) / equal)
        for name, allocator in self.allocators.items():
            self.curves[name].append(self._variance(allocator, features, gradients, squares, budget, generator) / equal)

    def _variance(
        self, allocator: Any, features: Features, gradients: Tensor, squares: Tensor, budget: int, generator: torch.Generator
    ) -> float:
        plan = allocator.pilot(features, budget) if isinstance(allocator, Piloted) else None
        if plan is None:
            counts = allocator.counts(features, budget)
            found = proxy(squares, counts)
            if not allocator.weighted:  # the mean square error of a biased estimate
                weight = counts.double() * BATCH / budget
                bias = ((weight - 1)[:, None] * gradients.double()).sum(0).square().sum()
                found = (weight.square() * squares / counts).sum() + bias / (gradients.shape[1] + 1)
        else:
            pilot, shares = plan
            seen = mean_squares(squares, pilot, generator)
            second = allocator.second_counts(features, seen, pilot, shares, budget - int(pilot.sum()))
            found = proxy(squares * shares**2, pilot) + proxy(squares * (1 - shares) ** 2, second)
            counts = pilot + second
        allocator.update(features, counts, mean_squares(squares, counts, generator))
        return float(found)


def mean_squares(squares: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Draw means of n_i squared deltas: a delta is the gradient along the noise, so normal with variance ||g_i||^2."""
    normal = torch.randn(len(squares), int(counts.max()), generator=generator, dtype=torch.float64)
    asked = torch.arange(normal.shape[1]) < counts[:, None]
    return squares * (normal.square() * asked).sum(1) / counts


def measured(
    task: Task, inputs: dict[str, Tensor], features: Features, race: Race, truth: Tensor, draws: int
) -> dict[str, float]:
    """Return the mean square error of real estimates, by allocator; truth: (d,) autograd's gradient."""
    names, found = ParameterVector.of(task.model).names, {}
    for name in ("uniform", "optimal", "gaussian", "two_stage", SHARED):
        kind, allocator = ({"shared": names}, "uniform") if name == SHARED else ({"rowwise": names}, name)
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
                QUERIES,
                1e-3,
                rows_per_forward=128,
            )
            place = Place(seed=1000 + draw, step=features.step, epoch=features.epoch, ids=features.ids)
            estimate_gradient(lambda rows: ((out := task.model(**rows)).loss, out), inputs, method, place)
            vector = ParameterVector.of(task.model)
            found_gradient = torch.cat([parameter.grad.flatten() for parameter in vector.parameters])
            errors.append(float((found_gradient - truth).double().square().sum()))
        found[name] = float(np.mean(errors))
    return found


def run(task: Task, seed: int, steps: int, check: set[int], draws: int) -> dict[str, Any]:
    """Fine-tune by backprop with the race beside it."""
    gradients_of, race, checks = SampleGradients(task.model), Race(seed), []
    optimizer = torch.optim.AdamW(gradients_of.vector.parameters, task.learning_rate)
    for step, (inputs, ids) in zip(range(steps), task.batches(seed, BATCH), strict=False):
        optimizer.zero_grad()
        gradients, seen = gradients_of(inputs)
        epoch = step * BATCH / len(task.data["labels"])
        features = Features(seen.sums, seen.residuals, step, 0, epoch, seed, lengths=seen.counts.float(), ids=ids)
        if step in check:
            kept = [parameter.grad for parameter in gradients_of.vector.parameters]
            found = measured(task, inputs, features, race, gradients.mean(0), draws)
            for parameter, gradient in zip(gradients_of.vector.parameters, kept, strict=True):
                parameter.grad = gradient
        race.step(features, gradients)
        if step in check:
            equal = float(proxy(gradients.double().square().sum(1), equal_counts(BATCH, BATCH * (QUERIES - 1))))
            computed = {name: curve[-1] for name, curve in race.curves.items()}
            dimension = gradients.shape[1]  # Rademacher noise: E ||delta z||^2 = d ||g||^2, up to terms of higher order
            checks.append(
                {
                    "step": step,
                    "measured": {name: error / (dimension * equal / BATCH**2) for name, error in found.items()},
                    "computed": {name: computed[name] for name in found},
                }
            )
        optimizer.step()
        if step % 25 == 0:
            print(f"{task.name}, seed {seed}, step {step}: loss {float(features.losses.mean()):.3f}", flush=True)
    return {"seed": seed, "curves": race.curves, "checks": checks}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return, by window of steps and name, mean variance over that of equal counts, and its standard error over seeds."""
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--draws", type=int, default=4, help="real estimates per allocator at the steps that are checked")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer draws")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.draws = options.seeds[:1], 120, 2
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    path = ROOT / "benchmarks" / "results" / "allocation.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    for name in options.tasks:
        runs = []
        for seed in options.seeds:
            check = {0, options.steps - 1} if seed == options.seeds[0] else set()
            runs.append(run(TASKS[name](seed), seed, options.steps, check, options.draws))
        record[name] = {
            "summary": summary(runs), "runs": runs, "batch": BATCH, "queries_per_sample": QUERIES, "commit": commit,
            "torch": torch.__version__,
        }  # fmt: skip
        path.write_text(json.dumps(record))
        for title, rows in record[name]["summary"].items():
            print(f"\n{name}, {title}: variance over that of equal counts")
            for row, (mean, error) in rows.items():
                print(f"  {row:28} {mean:6.3f} ± {error:.3f}")
        for found in runs[0]["checks"]:
            print(f"  step {found['step']}, real estimates: {found['measured']}\n  computed: {found['computed']}")


if __name__ == "__main__":
    main()
