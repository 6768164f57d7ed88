"""The relative error of losses due to rounding."""

from __future__ import annotations

import torch
from torch import nn


def precision_of(model: nn.Module, *, autocast: bool = False) -> float:
    """Return the relative error of a loss due to rounding; a model can set it as `precision`."""
    own = getattr(model, "precision", None)
    if isinstance(own, float):
        return own
    half = any(
        parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()
    )
    return 3e-2 if half or autocast else 1e-4
