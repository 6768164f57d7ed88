"""Computations that are done once per sample, or once per token with a label, not once per row."""

from __future__ import annotations

from .independence import choose_reuse
from .labelled_logits import LastLogits, with_last_logits
from .late_expansion import Recording, ReusePlan
from .prefix_cache import CachedPlan, SampleStore

__all__ = [
    "CachedPlan",
    "LastLogits",
    "Recording",
    "ReusePlan",
    "SampleStore",
    "choose_reuse",
    "with_last_logits",
]
