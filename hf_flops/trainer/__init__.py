"""FlopsTrainer: `transformers.Trainer` with a training step that only runs the model forward."""

from __future__ import annotations

from .args import FlopsArgumentsMixin, FlopsTrainingArguments
from .presets import PRESETS
from .trainer import FlopsTrainer, FlopsTrainerMixin

__all__ = [
    "PRESETS",
    "FlopsArgumentsMixin",
    "FlopsTrainer",
    "FlopsTrainerMixin",
    "FlopsTrainingArguments",
]
