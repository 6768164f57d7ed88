"""The library's lines in benchmarks/learning.py: the default, each ingredient removed, and a
control whose signal is destroyed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from learning_tasks import ROOT, Task
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(ROOT))

from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.estimators import OneSided

RANDOM_SIGN = "random sign"
OURS: dict[str, dict[str, Any]] = {
    "flops": {},
    "flops, equal counts": {"allocator": "uniform"},
    "flops, no control variate": {"control_variate": "none"},
    "flops, mean control variate": {"control_variate": "logit_jacobian"},
    "own noise, equal counts": {"allocator": "uniform", "control_variate": "none"},
    "flops, head by exact gradient": {"closed_form_head": "gradient"},
    RANDOM_SIGN: {"control_variate": "none"},
}
QUERIES = {
    "flops": (8, 4, 16),
    "flops, equal counts": (8, 4, 16),
    "flops, no control variate": (8, 4, 16),
    "flops, mean control variate": (8, 4, 16),
    "own noise, equal counts": (8, 4, 16),
    "flops, head by exact gradient": (8, 4, 16),
}

Look = Callable[[int, float, nn.Module], None]


class RandomSign(OneSided):
    """Forward differences whose signs are drawn anew: the adapter takes a random walk."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def deltas(self, losses: Tensor, clean: Tensor | None, scale: float) -> Tensor:
        """See `Estimator.deltas`."""
        found = super().deltas(losses, clean, scale)
        return found * (torch.randint(0, 2, found.shape, generator=self._generator) * 2 - 1)


class Watch(TrainerCallback):
    """Reports rows and seconds after each step, and stops at the budget."""

    def __init__(self, budget: int, look: Look) -> None:
        self.budget, self.look = budget, look
        self.trainer: Any = None
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds, rows = time.process_time() - self.start, self.trainer.ledger.all_rows
        self.look(rows, seconds, self.trainer.model)
        self.start = time.process_time() - seconds
        control.should_training_stop = rows >= self.budget


def train_ours(
    name: str, task: Task, rate: float, queries: int, seed: int, budget: int, look: Look
) -> None:
    """Train to a budget of rows, with one of `OURS`; see `train_opponent`."""
    watch = Watch(budget, look)
    args = FlopsTrainingArguments(
        output_dir="outputs/learning",
        per_device_train_batch_size=task.batch,
        dataloader_drop_last=True,
        max_steps=10**6,  # the callback stops
        learning_rate=rate,
        lr_scheduler_type="constant",
        seed=seed,
        queries_per_sample=queries,
        perturbation_scale=task.scale,
        rows_per_forward=task.forward_rows,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **OURS[name],
    )
    estimator = RandomSign(seed) if name == RANDOM_SIGN else None
    trainer = FlopsTrainer(
        task.model(seed), args, train_dataset=task.samples, callbacks=[watch], estimator=estimator
    )
    watch.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()
