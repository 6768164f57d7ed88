"""Equal counts: the yardstick."""

from __future__ import annotations

from torch import Tensor

from .base import Memoryless, SampleFeatures, equal_counts


class Uniform(Memoryless):
    """The same number of queries for every sample."""

    needs_clean = False

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        return equal_counts(len(features.losses), budget)
