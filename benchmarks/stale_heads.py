"""What it costs that a head is solved on features of past adapters.

    python benchmarks/stale_heads.py

The run is learning.py's on permuted digits. Before each optimizer step with queries, the loss of
its clean rows under the head in use is compared with the loss under a head solved for the adapter
of the moment, on new features of all training samples. A sample's weight in the head in use is
`kept` after as many others as there are. What that costs the adapter shows where the new head takes
the other's place before each step, without charge.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from records import ROOT, Record, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from heads import QUIET
from learning_tasks import TASKS, Task, features, head_of

from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.estimators import ClosedFormHead, HeadSolver, feature_solver
from hf_flops.objectives import RowLosses

KEPT = (1.0, 0.5, 0.25)
MANY_ITERATIONS = 50
SOLUTIONS = 5  # from one adapter to the next, so that the new head has converged
ROWS, RATE, QUERIES, SEEDS = 20_000, 0.03, 8, (1, 2, 3)


class FreshHead:
    """A head solved as the trainer's, but on new features of all training samples alike."""

    def __init__(self, model: Any, task: Task) -> None:
        self.model, self.task = model, task
        layer = copy.deepcopy(head_of(model))
        self.layer, self.solver = layer, HeadSolver()
        self.solver.bind(ClosedFormHead(layer, {"weight": "weight", "bias": "bias"}))

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (N, C) of all training samples, by the head in use and by the new one."""
        x, labels = features(self.model, self.task.train), self.task.train["labels"]
        targets = F.one_hot(labels, self.task.classes).double()
        one = torch.ones(len(x))
        losses = RowLosses(
            one, one, targets=targets, weights=torch.ones_like(targets), mean="softmax"
        )
        kept, feature_solver.KEPT = feature_solver.KEPT, 1.0
        self.solver.add(x, losses, list(range(len(x))))
        for _ in range(SOLUTIONS):
            self.solver.solve()
        feature_solver.KEPT = kept
        with torch.no_grad():
            return head_of(self.model)(x), self.layer(x)


class Compared(FlopsTrainer):
    """Compares the two heads on each batch before its step."""

    def begin(self, task: Task, *, adopts: bool) -> None:
        """Watch a run on a task, which may use the new head; call before training."""
        self.task, self.fresh, self.adopts = task, FreshHead(self.model, task), adopts
        self.losses: list[list[float]] = []  # of the batch by either head, then of all samples

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `Trainer.training_step`."""
        if self.ledger.last_step is not None and not self.session.method.clean_only:
            index, labels = inputs["sample_id"], self.task.train["labels"]
            both = [F.cross_entropy(x, labels, reduction="none") for x in self.fresh.logits()]
            means = [x[i].mean().item() for i in (index, slice(None)) for x in both]
            self.losses.append(means)
            if self.adopts:
                head_of(self.model).load_state_dict(self.fresh.layer.state_dict())
        return super().training_step(model, inputs, *args, **kwargs)


class Budget(TrainerCallback):
    """Stops a run when its rows are used up."""

    trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.trainer.ledger.all_rows >= ROWS


def measure(task: Task, kept: float, seed: int, *, adopts: bool = False) -> dict[str, Any]:
    """Train with one weight of old samples; return mean losses."""
    before, feature_solver.KEPT = feature_solver.KEPT, kept
    args = FlopsTrainingArguments(
        output_dir="outputs/stale_heads",
        per_device_train_batch_size=task.batch,
        dataloader_drop_last=True,
        max_steps=10**6,  # the callback stops
        learning_rate=RATE,
        lr_scheduler_type="constant",
        seed=seed,
        queries_per_sample=QUERIES,
        perturbation_scale=task.scale,
        rows_per_forward=task.forward_rows,
        **QUIET,
    )
    budget = Budget()
    trainer = Compared(task.model(seed), args, train_dataset=task.samples, callbacks=[budget])
    budget.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.begin(task, adopts=adopts)
    trainer.train()
    feature_solver.KEPT = before
    losses = np.array(trainer.losses)
    names = ("batch, head in use", "batch, new head", "all, head in use", "all, new head")
    found = dict(zip(names, losses.mean(0).round(4).tolist(), strict=True))
    excess = losses[:, 0] - losses[:, 1]
    error = excess.std(ddof=1) / len(excess) ** 0.5
    last = dict(zip(names[2:], losses[-1, 2:].round(4).tolist(), strict=True))
    return {
        **found,
        "batch, excess": round(float(excess.mean()), 4),
        "its standard error": round(float(error), 4),
        "at the end": last,
        "steps": len(losses),
        "rows": trainer.ledger.all_rows,
    }


def main() -> None:
    """Measure and keep the results."""
    quiet()
    record, task = Record("stale_heads"), TASKS["permuted"]()
    usual, first = feature_solver.ITERATIONS, SEEDS[0]
    settings = [(kept, usual, first, False) for kept in KEPT]
    settings += [(0.5, MANY_ITERATIONS, first, False)]
    settings += [(0.5, usual, seed, False) for seed in SEEDS[1:]]
    settings += [(0.5, usual, seed, True) for seed in SEEDS]
    for kept, iterations, seed, adopts in settings:
        feature_solver.ITERATIONS = iterations
        found = measure(task, kept, seed, adopts=adopts)
        name = f"kept {kept}, {iterations} iterations, seed {seed}{', new head' if adopts else ''}"
        print(f"{name}: {found}", flush=True)
        record.keep(name, {**found, "rate": RATE, "rows per sample": QUERIES})


if __name__ == "__main__":
    main()
