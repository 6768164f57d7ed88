"""Short runs that are watched by their accuracy, for benchmarks/doctor.py and studies.py.

The tasks of accuracy_tasks.py measure a linear head more than an adapter: what a method is worth is
in learning.py. Every row through the model counts, clean ones too; seconds are of the processor,
summed over threads, in training without evaluations.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from records import ROOT  # isort: skip

sys.path.insert(0, str(ROOT))

from accuracy_tasks import LearningTask  # isort: skip

from hf_flops import FlopsTrainer, FlopsTrainingArguments

OURS: dict[str, Any] = {"preset": "flops"}
SHARED = {
    "perturbation": "shared",
    "allocator": "uniform",
    "closed_form_head": "none",
    "control_variate": "none",
}
METHODS: dict[str, dict[str, Any]] = {
    "flops": OURS,
    "flops, noise on the head": {**OURS, "closed_form_head": "none"},
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
