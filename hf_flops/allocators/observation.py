"""Observations of log sigma from a step's squared deltas, with their variance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# lower bound of mean squares, relative to the largest; a smaller one would dominate as a logarithm
_LEAST = 1e-6


class Observed(NamedTuple):
    """Noisy observations of log sigma.

    Attributes:
        values: (B,) float64, unbiased for log sigma_i up to a constant of the batch.
        variance: (B,) float64, of their noise.
    """

    values: Tensor
    variance: Tensor


def observe(squares: Tensor, counts: Tensor) -> Observed:
    """Turn mean squared deltas of n_i queries into observations of log sigma_i.

    A delta is close to Gaussian, so the mean of n squares is sigma^2 chi2_n / n. Its logarithm has
    the mean `2 log sigma + digamma(n/2) - log(n/2)` and the variance `trigamma(n/2)`, about 2/n,
    so few queries get little weight.

    Args:
        squares: (B,) float64, non-negative, not all 0.
        counts: (B,) int64, queries n_i.
    """
    half = counts.double() / 2
    logarithm = squares.clamp(min=_LEAST * float(squares.max())).log()
    return Observed(
        0.5 * (logarithm - torch.digamma(half) + half.log()), 0.25 * torch.polygamma(1, half)
    )
