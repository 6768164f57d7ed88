"""The Bernoulli allocator: each easy sample gives half of its queries away with a given
probability.

References:
    Ren et al. (2025), FLOPS, arXiv 2410.05966, section 4.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..base.prng import seeds, uniforms
from ..errors import ConfigurationError
from .base import SampleFeatures, equal_counts, finite
from .likelihood_ratio import DRAWS, PolicyLearner, gradient, private_generator
from .rounding import proxy

_PURPOSE = 2
SCHEDULES = ("learned", "published")


def published_probability(epoch: float) -> float:
    """Return the probability of halving in the code published with FLOPS: 0.3 in the first epoch,
    then 0.01.
    """
    return 0.3 if epoch < 1 else 0.01


def easy_samples(losses: Tensor) -> Tensor:
    """Return (B,) bool: which losses are below the mean of the batch; never all of them."""
    losses = finite(losses)
    # After rounding, the mean of equal losses may be above all of them.
    return (losses < losses.mean()) & (losses < losses.max())


def halved_counts(features: SampleFeatures, probability: float, budget: int) -> Tensor:
    """Halve the queries of each easy sample with a probability, and divide the freed queries among
    the others.

    The random numbers are a function of seed, step and position alone.

    Returns:
        (B,) int64, each at least 1, summing to the budget.
    """
    samples = len(features.losses)
    counts = equal_counts(samples, budget)
    positions = np.arange(features.position, features.position + samples)
    drawn = torch.from_numpy(uniforms(seeds(features.seed, features.step, positions)))
    halved = easy_samples(features.losses) & (drawn < probability) & (counts > 1)
    counts[halved] //= 2
    others = torch.nonzero(~halved).flatten()
    freed = budget - int(counts.sum())
    counts[others] += freed // len(others)
    # The remainder goes to the samples with the smallest random numbers; the published code draws
    # again for it.
    counts[others[drawn[others].argsort()[: freed % len(others)]]] += 1
    return counts


class Bernoulli(PolicyLearner):
    """Halves, with probability p, the queries of each sample whose loss is below the batch's mean;
    the other samples get the rest.

    p is learned by the likelihood-ratio method on the proxy objective J, from the squared deltas of
    finished steps. Rows carry the weight `1 / n_i`, so that the estimate is unbiased (unlike that
    of `AuthorsBernoulli`).

    Args:
        schedule: "learned", or "published": 0.3 in the first epoch, then 0.01.
        rate: step size of the logit of p.

    Raises:
        ConfigurationError: the schedule is unknown.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import Bernoulli, SampleFeatures
        >>> features = SampleFeatures(losses=torch.tensor([1.0, 2.0, 3.0, 6.0]))
        >>> Bernoulli(schedule="published").counts(features, budget=16).tolist()
        [2, 2, 6, 6]
    """

    def __init__(self, schedule: str = "learned", rate: float = 0.1) -> None:
        if schedule not in SCHEDULES:
            raise ConfigurationError(
                f"schedule={schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}."
            )
        self.schedule = schedule
        super().__init__([math.log(0.3 / 0.7)], rate, [(-5.0, 5.0)])

    def probability(self, epoch: float) -> float:
        """Return p."""
        return (
            published_probability(epoch)
            if self.schedule == "published"
            else float(self._descent.values.sigmoid())
        )

    def _counts(self, features: SampleFeatures, budget: int) -> Tensor:
        return halved_counts(features, self.probability(features.epoch), budget)

    def _learn(self, features: SampleFeatures, counts: Tensor, squares: Tensor) -> None:
        if self.schedule == "learned":
            self._descent.step(self.slope(features, int(counts.sum()), squares, DRAWS))

    def slope(self, features: SampleFeatures, budget: int, squares: Tensor, draws: int) -> Tensor:
        """Return the likelihood-ratio gradient (1,) of `E J(n) / J(equal counts)` by the logit of
        p.

        Args:
            features: of a finished step.
            budget: queries of that step.
            squares: (B,) float64 estimates of sigma_i^2 up to a common factor.
            draws: how many to take.
        """
        easy, probability = easy_samples(features.losses), self.probability(features.epoch)
        generator = private_generator(features, _PURPOSE)
        drawn = torch.rand(draws, len(squares), generator=generator, dtype=torch.float64)
        halved = easy & (drawn < probability)
        values = proxy(squares, _real_counts(halved, budget)) * (
            budget / len(squares) / squares.sum()
        )
        # d log p(halved) / d logit
        score = (halved.double() - probability)[:, easy].sum(1, keepdim=True)
        return gradient(score, values)


def _real_counts(halved: Tensor, budget: int) -> Tensor:
    """Return the counts (K, B) float64 of K draws (K, B), without rounding the freed queries."""
    samples = halved.shape[1]
    half = max(budget // samples // 2, 1)
    number = halved.sum(1, keepdim=True)
    return torch.where(halved, float(half), (budget - half * number) / (samples - number))
