"""Rows and seconds to a target accuracy, and accuracy at a fixed budget: ours, each ingredient
removed, tuned opponents.

Every method trains the same adapter from the same start on the same batches. Its learning rate, and
the number of queries per sample of the forward-only ones, come from one grid, by the mean
validation accuracy along the run with seed 0. The best is then run with other seeds; their curves
are of the test split. The target is 90 % of the way from the untrained adapter to the best accuracy
of backprop with the same adapter. Every row through the model counts, clean ones too; seconds are
of the processor, summed over threads, in training without evaluations.

    python benchmarks/learning.py --task fashion
    python benchmarks/learning.py --quick
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from records import ROOT, Record, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from learning_tasks import TASKS, LearningTask  # isort: skip

from hf_flops import FlopsTrainer, FlopsTrainingArguments

OURS: dict[str, Any] = {"preset": "flops"}
SHARED = {
    "perturbation": "shared",
    "allocator": "uniform",
    "closed_form_head": False,
    "control_variate": "none",
}
METHODS: dict[str, dict[str, Any]] = {
    "flops": OURS,
    "flops, noise on the head": {**OURS, "closed_form_head": False},
    "flops, no control variate": {**OURS, "control_variate": "none"},
    "flops, equal counts": {**OURS, "allocator": "uniform"},
    "mezo": {"preset": "mezo"},
    "flops-authors": {"preset": "flops-authors"},
    # One-sided differences of Rademacher noise, and steps divided by the spread of the losses:
    # FZOO, arXiv 2506.09034.
    "fzoo": {**OURS, **SHARED, "estimator": "one_sided", "noise": "rademacher"},
    "backprop": {},
}
GRID = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
QUERIES = [4, 16]


@dataclass
class Run:
    """One training run.

    Attributes:
        curve: (rows, seconds, accuracy) at the start and at each evaluation.
    """

    rate: float
    queries: int
    seed: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean accuracy along the run."""
        return float(np.mean([accuracy for _, _, accuracy in self.curve[1:]]))

    @property
    def end(self) -> float:
        """Mean accuracy of the last two evaluations."""
        return float(np.mean([accuracy for _, _, accuracy in self.curve[-2:]]))

    def to(self, target: float) -> tuple[int, float] | None:
        """Return rows and seconds to the first point from which the mean of two evaluations is at
        the target or above.
        """
        for (rows, seconds, one), (_, _, two) in zip(
            self.curve, self.curve[1:] + self.curve[-1:], strict=True
        ):
            if (one + two) / 2 >= target and one >= target:
                return rows, seconds
        return None


class Watch(TrainerCallback):
    """Evaluates as training goes on, and stops the clock meanwhile."""

    def __init__(self, task: LearningTask, part: str, every: int, run: Run) -> None:
        self.task, self.part, self.every, self.run = task, part, every, run
        self.trainer: Any = None
        self.seconds, self.start = 0.0, 0.0

    def look(self, step: int) -> None:
        """Add a point to the curve."""
        rows = (
            self.trainer.ledger.rows if hasattr(self.trainer, "ledger") else step * self.task.batch
        )
        self.run.curve.append(
            (rows, self.seconds, self.task.accuracy(self.trainer.model, self.part))
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(0)
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.seconds += time.process_time() - self.start
            self.look(state.global_step)
            self.start = time.process_time()


class LossSpread(TrainerCallback):
    """Scales a step as FZOO's division by the spread of the losses does, up to a constant that the
    learning rate takes up.

    With K directions `||estimate||^2 ~ (d / K) mean(delta^2)`, and the mean of the estimate is
    small against it.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().clamp(min=1e-12)
        for gradient in gradients:
            gradient.div_(norm)


def train(
    method: str,
    task: LearningTask,
    run: Run,
    budget: int,
    part: str,
    points: int,
    name: str = "",
    **changes: Any,
) -> Run:
    """Train once, to so many rows, and watch one split at so many points.

    Args:
        method: one of `METHODS`.
        task: what is trained.
        run: learning rate, queries and seed; its curve is filled.
        budget: rows, of backprop too.
        part: the split to watch.
        points: how often.
        name: what to print in place of the method.
        changes: of the trainer's arguments; `callbacks` are added.
    """
    rows = task.batch if method == "backprop" else task.batch * run.queries
    steps = max(points, budget // rows)
    watch, normalised = Watch(task, part, max(1, steps // points), run), method == "fzoo"
    callbacks = [watch, *([LossSpread()] if normalised else []), *changes.pop("callbacks", [])]
    options: dict[str, Any] = {
        "output_dir": "outputs/learning",
        "per_device_train_batch_size": task.batch,
        "max_steps": steps,
        "learning_rate": run.rate,
        "seed": run.seed,
        "lr_scheduler_type": task.schedule,
        "warmup_steps": 0.05,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({"optim": "sgd", "max_grad_norm": 0.0} if normalised else {}),
        **changes,
    }
    common: dict[str, Any] = {"train_dataset": task.train, "callbacks": callbacks}
    model = task.model(run.seed)
    trainer: Any
    if method == "backprop":
        trainer = Trainer(model, TrainingArguments(**options), **common)
    else:
        own = {
            "perturbation_scale": task.scale,
            "queries_per_sample": run.queries,
            "rows_per_forward": 64,
        }
        args = FlopsTrainingArguments(**{**own, **METHODS[method], **options})
        trainer = FlopsTrainer(model, args, **common)
    watch.trainer = trainer
    trainer.train()
    print(
        f"{task.name:8} {name or method:26} lr {run.rate:<6g} q {run.queries:<3} seed {run.seed} "
        f"{part:10} mean {run.mean:.3f}, last {run.curve[-1][2]:.3f}, {run.curve[-1][0]:,} rows, "
        f"{run.curve[-1][1]:.0f} s",
        flush=True,
    )
    return run


def tuned(
    method: str, task: LearningTask, budget: int, grid: list[float], queries: list[int], points: int
) -> tuple[Run, dict[str, float]]:
    """Return the best run of the grid, and the mean validation accuracy of all; a grid of one is
    not run.
    """
    queries = [1] if method == "backprop" else queries
    if len(grid) == len(queries) == 1:
        return Run(grid[0], queries[0], 0), {}
    runs = [
        train(method, task, Run(rate, q, 0), budget, "validation", points)
        for q in queries
        for rate in grid
    ]
    return max(runs, key=lambda run: run.mean), {
        f"lr {run.rate:g}, q {run.queries}": run.mean for run in runs
    }


def main() -> None:
    """Tune, run, and write results/learning_<task>.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=TASKS, default="fashion")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budget", type=int, help="rows of each run")
    parser.add_argument(
        "--tuning_budget", type=int, help="rows of each run of the grid; by default as many"
    )
    parser.add_argument(
        "--again", action="store_true", help="take what an earlier run's grid found best"
    )
    parser.add_argument(
        "--like", choices=METHODS, help="take what an earlier run's grid found best for this method"
    )
    parser.add_argument("--label", default="", help="put behind the methods' names in the record")
    parser.add_argument("--points", type=int, default=16, help="evaluations of a run")
    parser.add_argument("--grid", nargs="+", type=float, default=GRID)
    parser.add_argument("--queries", nargs="+", type=int, default=QUERIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--quick", action="store_true", help="three methods, two rates, one seed: the shape of it"
    )
    options = parser.parse_args()
    if options.quick:
        options.methods, options.grid, options.seeds = (
            ["flops", "mezo", "backprop"],
            [1e-2, 3e-2],
            [1],
        )
        options.queries, options.budget = [4], 20_000
    quiet()
    task = TASKS[options.task]()
    budget = options.budget or task.budget
    record = Record(f"learning_{options.task}{'_quick' if options.quick else ''}", indent=None)
    wanted = {options.like} if options.like else set(options.methods) if options.again else set()
    if unknown := wanted - set(record.entries):
        option = "--like" if options.like else "--again"
        parser.error(
            f"{option}: benchmarks/results holds no run of {', '.join(sorted(unknown))} on "
            f"{options.task} yet"
        )
    for method in options.methods:
        share = 8 if method == "backprop" else 1
        first, limit = (options.tuning_budget or budget) // share, budget // share
        if wanted:
            found = record.entries[options.like or method]
            best, grid = (
                Run(found["rate"], found["queries"], 0),
                {} if options.like else found["validation"],
            )
        else:
            best, grid = tuned(method, task, first, options.grid, options.queries, options.points)
        anew = [replace(best, seed=seed, curve=[]) for seed in options.seeds]
        runs = [train(method, task, run, limit, "test", options.points) for run in anew]
        curves = {str(run.seed): run.curve for run in runs}
        name = method + options.label
        before = record.entries.get(name, {}) if wanted else {}
        # other seeds of the same length stay
        if (best.rate, best.queries) == (before.get("rate"), before.get("queries")):
            kept = {
                seed: curve
                for seed, curve in before["curves"].items()
                if curve[-1][0] == runs[0].curve[-1][0]
            }
            curves = kept | curves
        record.keep(
            name, {"rate": best.rate, "queries": best.queries, "validation": grid, "curves": curves}
        )


if __name__ == "__main__":
    main()
