"""Sums that are bitwise equal in any order: multiples of 2^-30, cut into three digits."""

from __future__ import annotations

import torch
from torch import Tensor

DIGIT = 2.0**-15
ROWS = 512  # digits times signs of so many rows add up exactly in float32: 2^15 x 2^9 = 2^24


def accumulator(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over rows: float64, if the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64


def rounded(coefficients: Tensor, unit: float = DIGIT**2) -> Tensor:
    """Round to multiples of a power of two, so that sums of them are exact."""
    return (coefficients.to(accumulator(coefficients.device)) / unit).round() * unit


def cut(coefficients: Tensor) -> Tensor:
    """Cut numbers (R, M) into integers (R, 3 M): multiples of 1, of `DIGIT`, and of its square."""
    values = coefficients.to(accumulator(coefficients.device))
    high = values.round()
    middle = ((values - high) * 2.0**15).round()
    return torch.cat([high, middle, ((values - high - middle * 2.0**-15) * 2.0**30).round()], 1)
