"""Random counts that may be zero: with few queries per sample, not every sample is worth one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.prng import seeds, uniforms
from ..errors import ConfigurationError
from .base import SampleFeatures
from .optimal import Optimal

_FLOOR = 0.1  # share of the queries that all samples get alike: no weight exceeds 10 equal ones
_PURPOSE = 2**40  # no query has this number, so no noise has this seed


class OptimalWithZeros(Optimal):
    """`Optimal` for two or three rows per sample: a sample may get no query in a step.

    Sample i has the expected count `n p_i` of n queries, `p_i = 0.9 sigma_i / sum sigma + 0.1 / B`.
    Its count is that number rounded up or down at random (systematic sampling: one uniform number,
    a function of seed, step and position, decides for the whole batch). Its rows have the weight
    `1 / (n p_i)`, so the estimate is unbiased over the draw (Horvitz and Thompson). Below
    `least_gain` all p_i are equal. Predictions are not calibrated as those of `Optimal` are,
    because the samples with queries do not represent the others.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import OptimalWithZeros, SampleFeatures
        >>> residuals = torch.tensor([0.1, 0.1, 0.2, 0.8])
        >>> features = SampleFeatures(losses=torch.ones(4), residuals=residuals)
        >>> allocator = OptimalWithZeros()
        >>> allocator.expected_counts(features, budget=4)
        tensor([0.4000, 0.4000, 0.7000, 2.5000], dtype=torch.float64)
        >>> allocator.counts(features, budget=4).tolist()
        [0, 1, 1, 2]

    References:
        Horvitz and Thompson (1952), A generalization of sampling without replacement from a finite
        universe; Madow (1949), On the theory of systematic sampling, II.
    """

    def expected_counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """See `RandomisedAllocator.expected_counts`."""
        self._learn_up_to(features.step)
        shares = self._shares(features)
        return budget * ((1 - _FLOOR) * shares / shares.sum() + _FLOOR / len(shares))

    def _counts(self, features: SampleFeatures, budget: int) -> Tensor:
        if budget < 1:
            raise ConfigurationError(f"A budget of {budget} queries cannot be divided.")
        number = uniforms(seeds(features.seed, features.step, features.position, _PURPOSE))
        return systematic_counts(self.expected_counts(features, budget), budget, float(number[0]))

    def _calibrate(self, features: SampleFeatures, counts: Tensor, squares: Tensor) -> None:
        del features, counts, squares


def systematic_counts(expected: Tensor, budget: int, start: float) -> Tensor:
    """Round expected counts up or down so that they sum to the budget; over a uniform start, their
    mean is the expected count.

    Sample i owns a stretch of length `expected[i]` of the line from 0 to the budget; its count is
    the number of points start, start + 1, ... in it.

    Args:
        expected: (B,) float64, positive, summing to the budget up to rounding errors.
        budget: number of points.
        start: in [0, 1).

    Returns:
        (B,) int64.
    """
    before = (expected.cumsum(0) - start).ceil().long().clamp(0, budget)
    before[-1] = budget
    return before.diff(prepend=torch.zeros(1, dtype=torch.int64))
