"""Importance by the loss alone, as in batch selection: baselines for comparison.

Every sample gets at least one query, so that the estimate is unbiased.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import Memoryless, SampleFeatures, finite
from .rounding import optimal_counts


class LossProportional(Memoryless):
    """`n_i ∝ loss_i`, at least one query each; a negative loss counts as 0.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import LossProportional, SampleFeatures
        >>> features = SampleFeatures(losses=torch.tensor([1.0, 2.0, 3.0, 6.0]))
        >>> LossProportional().counts(features, budget=16).tolist()
        [1, 3, 4, 8]

    References:
        Katharopoulos & Fleuret (2018), arXiv 1803.00942, section 3.2, uses the loss as the usual
        proxy of the gradient norm.
    """

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        return optimal_counts(finite(features.losses).clamp(min=0), budget)


class LossRank(Memoryless):
    """`n_i ∝` the rank of the loss among the samples with the largest losses; the others get one
    query.

    Args:
        top: fraction of the batch that gets more than one query; 1 for all.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import LossRank, SampleFeatures
        >>> features = SampleFeatures(losses=torch.tensor([1.0, 2.0, 3.0, 6.0]))
        >>> LossRank(top=0.5).counts(features, budget=16).tolist()
        [1, 1, 5, 9]

    References:
        Loshchilov & Hutter (2016), Online Batch Selection, arXiv 1511.06343; Jiang et al. (2019),
        Selective-Backprop, arXiv 1910.00762.
    """

    def __init__(self, top: float = 1.0) -> None:
        if not 0 < top <= 1:
            raise ConfigurationError(
                f"top={top!r} must be a fraction of the batch, above 0 and at most 1."
            )
        self.top = top

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        losses = finite(features.losses)
        ordered = losses.sort().values
        # Ties share the mean of their ranks, 1 to B, so that equal losses get equal counts.
        ranks = (
            torch.searchsorted(ordered, losses)
            + torch.searchsorted(ordered, losses, right=True)
            + 1
        ) / 2
        return optimal_counts((ranks - (1 - self.top) * len(losses)).clamp(min=0), budget)
