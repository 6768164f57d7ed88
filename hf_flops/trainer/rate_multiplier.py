"""A factor of the schedule's learning rates, in force during optimizer steps only."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RateMultiplier(TrainerCallback):
    """Multiplies the rates for each optimizer step, and restores those of the schedule after it.

    Attributes:
        multiplier: factor of the schedule's rates.
    """

    multiplier = 1.0

    def __init__(self) -> None:
        self._stock: list[float] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Multiply the rates."""
        groups = kwargs["optimizer"].param_groups
        self._stock = [group["lr"] for group in groups]
        if self.multiplier != 1:
            for group in groups:
                group["lr"] = group["lr"] * self.multiplier

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the schedule's rates."""
        for group, rate in zip(kwargs["optimizer"].param_groups, self._stock, strict=True):
            group["lr"] = rate

    def scaled(self, logs: dict[str, float]) -> dict[str, float]:
        """Return a log in which the learning rate is the one in use."""
        if "learning_rate" not in logs:
            return logs
        rate = logs["learning_rate"] * self.multiplier
        return {**logs, "learning_rate": rate, "learning_rate_multiplier": self.multiplier}
