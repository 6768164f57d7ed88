"""Sums that are the same bits in whatever order they are taken: of multiples of 2^-30, cut into
three digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGIT = 2.0**-15  # of one
ROWS = 512  # whose digits, times signs, float32 adds up without rounding: 2^15 x 2^9 = 2^24


def accumulator(device: torch.device) -> torch.dtype:
    """Return the type that sums over rows are kept in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def rounded(coefficients: Tensor, unit: float = DIGIT**2) -> Tensor:
    """Round to multiples of a power of two, so that sums of them are exact."""
    return (coefficients.to(accumulator(coefficients.device)) / unit).round() * unit


def cut(coefficients: Tensor) -> Tensor:
    """Cut numbers (R, M) into (R, 3 M) whole numbers: wholes, multiples of `DIGIT`, and multiples
    of its square.
    """
    values = coefficients.to(accumulator(coefficients.device))
    high = values.round()
    middle = ((values - high) * 2.0**15).round()
    return torch.cat([high, middle, ((values - high - middle * 2.0**-15) * 2.0**30).round()], 1)
