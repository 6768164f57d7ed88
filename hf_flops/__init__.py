"""Fine-tune any PEFT adapter with forward passes only, and give each sample the queries that it
deserves.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .base.rows import BatchPosition
    from .contrastive import ContrastiveLoss
    from .core.estimate import estimate_gradient
    from .core.method import Method, StepResult
    from .diagnosis import Diagnosis, doctor
    from .errors import (
        ConfigurationError,
        EngineError,
        FlopsError,
        NonFiniteError,
        ObjectiveError,
        ProcessError,
        StorageError,
        TrajectoryError,
    )
    from .objectives import CallableObjective, GeneratedMetric, MacroF1, Metric, Objective
    from .prompts.black_box import BlackBoxPromptModel
    from .prompts.black_box_lora import BlackBoxLoraModel
    from .prompts.label_head import LabelHeadModel
    from .prompts.suffix_prompt import SuffixPromptModel
    from .prompts.visual_prompt import VisualPrompt
    from .trainer import (
        FlopsArgumentsMixin,
        FlopsTrainer,
        FlopsTrainerMixin,
        FlopsTrainingArguments,
    )

_HOMES = {
    "BatchPosition": "base.rows",
    "BlackBoxLoraModel": "prompts.black_box_lora",
    "BlackBoxPromptModel": "prompts.black_box",
    "CallableObjective": "objectives.base",
    "ConfigurationError": "errors",
    "ContrastiveLoss": "contrastive.loss",
    "Diagnosis": "diagnosis.diagnosis",
    "EngineError": "errors",
    "FlopsArgumentsMixin": "trainer.args",
    "FlopsError": "errors",
    "FlopsTrainer": "trainer.trainer",
    "FlopsTrainerMixin": "trainer.trainer",
    "FlopsTrainingArguments": "trainer.args",
    "GeneratedMetric": "objectives.generation",
    "LabelHeadModel": "prompts.label_head",
    "MacroF1": "objectives.macro_f1",
    "Method": "core.method",
    "Metric": "objectives.metrics",
    "NonFiniteError": "errors",
    "Objective": "objectives.base",
    "ObjectiveError": "errors",
    "ProcessError": "errors",
    "StepResult": "core.method",
    "StorageError": "errors",
    "SuffixPromptModel": "prompts.suffix_prompt",
    "TrajectoryError": "errors",
    "VisualPrompt": "prompts.visual_prompt",
    "doctor": "diagnosis.diagnosis",
    "estimate_gradient": "core.estimate",
}

__all__ = [
    "BatchPosition",
    "BlackBoxLoraModel",
    "BlackBoxPromptModel",
    "CallableObjective",
    "ConfigurationError",
    "ContrastiveLoss",
    "Diagnosis",
    "EngineError",
    "FlopsArgumentsMixin",
    "FlopsError",
    "FlopsTrainer",
    "FlopsTrainerMixin",
    "FlopsTrainingArguments",
    "GeneratedMetric",
    "LabelHeadModel",
    "MacroF1",
    "Method",
    "Metric",
    "NonFiniteError",
    "Objective",
    "ObjectiveError",
    "ProcessError",
    "StepResult",
    "StorageError",
    "SuffixPromptModel",
    "TrajectoryError",
    "VisualPrompt",
    "__version__",
    "doctor",
    "estimate_gradient",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: the engine works without transformers."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
