"""Equal counts: the baseline."""

from __future__ import annotations

from torch import Tensor

from .base import Memoryless, SampleFeatures, equal_counts


class Uniform(Memoryless):
    """The same number of queries for every sample.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import SampleFeatures, Uniform
        >>> features = SampleFeatures(losses=torch.tensor([1.0, 2.0, 3.0, 6.0]))
        >>> Uniform().counts(features, budget=10).tolist()
        [3, 3, 2, 2]
    """

    needs_clean = False

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        return equal_counts(len(features.losses), budget)
