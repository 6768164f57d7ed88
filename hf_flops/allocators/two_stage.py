"""Two rounds of queries: the deltas of a pilot determine how the rest is divided."""

from __future__ import annotations

from torch import Tensor

from .base import SampleFeatures, equal_counts
from .observation import observe
from .optimal import Optimal
from .rounding import optimal_counts


class TwoStage(Optimal):
    """`Optimal` with a pilot round, which corrects the prediction before most of the budget is
    spent.

    Every sample gets the same few pilot queries. Their deltas and the prediction are combined,
    weighted by their precision, and determine the counts of the second round. The mean of either
    round is unbiased given the past, and so is `w_i pilot + (1 - w_i) second` for weights fixed
    beforehand: w_i is the pilot's share of the queries that the *prediction* gives the sample. (Its
    share of the actual queries would depend on the pilot's noise and bias the estimate.)

    Args:
        pilot: queries per sample in the pilot round; fewer if none would remain for the second.
        decay: see `Optimal`.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import SampleFeatures, TwoStage
        >>> features = SampleFeatures(losses=torch.ones(4))
        >>> allocator = TwoStage(pilot=2)
        >>> pilot, weights = allocator.pilot(features, budget=24)
        >>> pilot.tolist()
        [2, 2, 2, 2]
        >>> squares = torch.tensor([0.1, 0.1, 1.0, 9.0])  # measured in the pilot round
        >>> allocator.second_counts(features, squares, pilot, weights, budget=16).tolist()
        [3, 3, 4, 6]

    References:
        Neyman (1938), Contribution to the theory of sampling human populations, on double sampling.
    """

    def __init__(self, pilot: int = 2, decay: float = 0.95) -> None:
        super().__init__(decay, least_gain=1.0)
        self.queries = pilot

    def pilot(self, features: SampleFeatures, budget: int) -> tuple[Tensor, Tensor] | None:
        """See `TwoRoundAllocator.pilot`."""
        samples = len(features.losses)
        each = min(self.queries, budget // samples - 1)
        if each < 1 or samples == 1:
            return None
        planned = self.counts(features, budget - each * samples)
        return equal_counts(samples, each * samples), each / (each + planned.double())

    def second_counts(
        self, features: SampleFeatures, squares: Tensor, pilot: Tensor, shares: Tensor, budget: int
    ) -> Tensor:
        """See `TwoRoundAllocator.second_counts`."""
        logarithm = self.predict(features).log() * self._calibration.power
        squares = squares.detach().cpu().double()
        known = squares.isfinite()
        if int(known.sum()) > 1 and float(squares[known].sum()) > 0:
            # Both are known only up to a constant of the batch: compare deviations from means.
            observed, spread = observe(squares[known], pilot[known]), self._regression.spread
            trust = spread / (spread + observed.variance)
            surprise = observed.values - logarithm[known]
            logarithm[known] += trust * (surprise - surprise.mean())
        # The second round's contribution to the variance is (1 - w_i)^2 sigma_i^2 / n_i.
        return optimal_counts((1 - shares) * (logarithm - logarithm.max()).exp(), budget)
