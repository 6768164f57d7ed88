"""How far rounding alone moves a loss."""

from __future__ import annotations

import torch
from torch import nn


def precision_of(model: nn.Module, *, autocast: bool = False) -> float:
    """Return the relative error that a loss may have from rounding alone; a model may say so itself
    as `precision`.
    """
    own = getattr(model, "precision", None)
    if isinstance(own, float):
        return own
    half = any(
        parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()
    )
    return 3e-2 if half or autocast else 1e-4
