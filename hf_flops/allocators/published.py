"""The allocator of the code published with FLOPS, for comparison."""

from __future__ import annotations

from torch import Tensor

from .base import Memoryless, SampleFeatures
from .bernoulli import halved_counts, published_probability


class AuthorsBernoulli(Memoryless):
    """The heuristic of the code published with FLOPS, for comparison; its estimate is biased.

    A sample whose loss is below the batch mean keeps half its queries with probability p: 0.3 in
    the first epoch, then 0.01. The freed queries go to the other samples. Rows have no weight
    `1 / n_i`, so samples with many queries count for more, and rows are shuffled into groups of the
    batch size that share one noise each.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import AuthorsBernoulli, SampleFeatures
        >>> features = SampleFeatures(losses=torch.tensor([1.0, 2.0, 3.0, 6.0]))
        >>> AuthorsBernoulli().counts(features, budget=16).tolist()
        [2, 2, 6, 6]

    References:
        https://github.com/RTkenny/FLOPS-Forward-Learning-with-OPtimal-Sampling, `allocator.py` and
        `trainer_a.py`.
    """

    weighted = False
    shuffled = True

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        return halved_counts(features, published_probability(features.epoch), budget)
