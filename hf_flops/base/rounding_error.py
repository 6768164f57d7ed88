"""The relative error of losses due to rounding."""

from __future__ import annotations

import torch
from torch import nn


def precision_of(model: nn.Module, *, autocast: bool = False) -> float:
    """Return the relative error of a loss due to rounding; a model can set it as `precision`."""
    if isinstance(precision := getattr(model, "precision", None), float):
        return precision
    half = any(
        parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()
    )
    return 3e-2 if half or autocast else 1e-4
