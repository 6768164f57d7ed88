"""Allocators: how many queries each sample of a batch deserves.

Counts are fixed before the noise is drawn: an allocator sees the clean forward and the past only. That, and the weight
`1 / n_i` of every row, keeps the gradient estimate unbiased whatever an allocator does.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .counters import seeds, uniforms
from .errors import ConfigurationError
from .rows import Features


class Allocator(Protocol):
    """Gives each sample its number of queries.

    Attributes:
        needs_clean: whether the clean forward must run before counts can be given.
        weighted: whether rows carry the unbiased weight `1 / n_i`.
        shuffled: whether rows are cut at random into groups that share noise, instead of one group per query.
    """

    needs_clean: bool
    weighted: bool
    shuffled: bool

    def counts(self, features: Features, budget: int) -> Tensor:
        """Return (B,) int64, each at least 1, summing to `budget`."""
        ...

    def update(self, features: Features, counts: Tensor, mean_squares: Tensor) -> None:
        """Learn from a finished step; mean_squares: (B,) mean of each sample's squared deltas (NaN where none)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as JSON-serialisable values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        ...


def check_budget(samples: int, budget: int) -> None:
    """Refuse a budget that leaves a sample without a query."""
    if samples < 1 or budget < samples:
        raise ConfigurationError(f"A budget of {budget} queries cannot give each of {samples} samples at least one.")


def equal_counts(samples: int, budget: int) -> Tensor:
    """Split a budget evenly; the first samples take the remainder. Returns (B,) int64."""
    check_budget(samples, budget)
    return torch.tensor([budget // samples + (i < budget % samples) for i in range(samples)])


def _granted(spread: np.ndarray, threshold: float) -> np.ndarray:
    """Return how many queries each sample gets before the gain of one more falls to `threshold` or below."""
    # n gains over n - 1 by spread^2 / (n (n - 1)): solve for n, then undo rounding by comparing directly.
    squares = spread**2
    counts = np.floor((1 + np.sqrt(1 + 4 * squares / threshold)) / 2).clip(1)
    counts += squares / (counts * (counts + 1)) > threshold
    counts -= (counts > 1) & (squares / np.maximum(counts * (counts - 1), 1) <= threshold)
    return counts.clip(1)


def optimal_counts(sigma: Tensor, budget: int) -> Tensor:
    """Minimise `J(n) = sum_i sigma_i^2 / n_i` over integers n_i >= 1 that sum to `budget`, exactly.

    J is separable and convex, so giving each next query to the sample with the largest gain
    `sigma_i^2 / (n_i (n_i + 1))` is optimal (Fox 1966; the integer counterpart of Neyman's n_i ∝ sigma_i, FLOPS §4). A
    bisection on the gain grants almost all queries at once; the greedy rule grants the last few.

    Args:
        sigma: (B,) non-negative; values that are not finite count as the largest finite one.
        budget: at least B.

    Returns:
        (B,) int64.
    """
    samples = len(sigma)
    check_budget(samples, budget)
    spread = np.abs(sigma.detach().cpu().double().numpy())
    finite = np.isfinite(spread)
    largest = spread[finite].max(initial=0.0)
    if largest == 0.0:
        return equal_counts(samples, budget)
    # Relative gains below 1e-9 would only order queries of samples that count for nothing, and cost precision.
    spread = np.where(finite, spread / largest, 1.0).clip(1e-9)
    low, high = (
        math.log(1e-18 / (4.0 * budget * budget)),
        0.0,
    )  # gains at which more than the budget, and none, is granted
    while _granted(spread, math.exp(high)).sum() > budget or high - low > 1e-12:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _granted(spread, math.exp(middle)).sum() > budget:
            low = middle
        else:
            high = middle
    counts = _granted(spread, math.exp(high)).astype(np.int64)
    for _ in range(budget - int(counts.sum())):
        counts[np.argmax(spread**2 / (counts * (counts + 1)))] += 1
    return torch.from_numpy(counts)


class Uniform:
    """The same number of queries for every sample."""

    needs_clean = False
    weighted = True
    shuffled = False

    def counts(self, features: Features, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        return equal_counts(len(features.losses), budget)

    def update(self, features: Features, counts: Tensor, mean_squares: Tensor) -> None:
        """Equal counts learn nothing."""
        del features, counts, mean_squares

    def state_dict(self) -> dict[str, Any]:
        """See `Allocator.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Allocator.load_state_dict`."""
        del state


class Optimal:
    """`n_i ∝ sigma_i`, integer-exact, with sigma from what the clean forward shows.

    For losses whose derivative by the model's outputs is known (cross-entropy: `||softmax - onehot||`), that residual
    norm is taken for sigma: by the chain rule a sample's gradient norm is the residual norm times that of a Jacobian
    which varies much less between samples. Elsewhere sigma is a power of the loss, fitted to the deltas of past steps.

    Args:
        decay: how much the statistics of the fit keep from one step to the next.
    """

    needs_clean = True
    weighted = True
    shuffled = False

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self._sums = torch.zeros(6, dtype=torch.float64)  # 1, x, y, x², x y, y² over past samples

    def counts(self, features: Features, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        sigma = features.residuals
        return optimal_counts(self._fitted(features) if sigma is None else sigma, budget)

    def _fitted(self, features: Features) -> Tensor:
        """Return `loss^b` (B,) with b from the regression of log RMS delta on log loss; ones until it says anything."""
        weight, x, y, xx, xy, _ = self._sums.tolist()
        if weight < 2 * len(features.losses) or xx - x * x / weight <= 1e-9 * weight:
            return torch.ones_like(features.losses)
        slope = (xy - x * y / weight) / (xx - x * x / weight)
        return _log_losses(features).mul(min(max(slope, 0.0), 2.0)).exp()

    def update(self, features: Features, counts: Tensor, mean_squares: Tensor) -> None:
        """See `Allocator.update`."""
        del counts
        x, y = _log_losses(features), 0.5 * mean_squares.double().log()
        known = x.isfinite() & y.isfinite()
        x, y = x[known], y[known]
        terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])
        self._sums = self.decay * self._sums + terms.sum(1)

    def state_dict(self) -> dict[str, Any]:
        """See `Allocator.state_dict`."""
        return {"sums": self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Allocator.load_state_dict`."""
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)


def _log_losses(features: Features) -> Tensor:
    """Return (B,) float64 log loss sums, kept off minus infinity."""
    return features.losses.detach().cpu().double().clamp(min=1e-6).log()


class AuthorsBernoulli(Uniform):
    """The heuristic of the code published with FLOPS, for comparison; its estimate is biased.

    A sample whose loss is below the batch mean keeps half its queries with probability p: 0.3 in the first epoch, then
    0.01. What is freed goes to the other samples. Rows carry no weight `1 / n_i`, so samples with many queries pull
    harder, and rows are shuffled into groups as large as the batch that share one noise each.

    References:
        https://github.com/RTkenny/FLOPS-Forward-Learning-with-OPtimal-Sampling, `allocator.py` and `trainer_a.py`.
    """

    needs_clean = True
    weighted = False
    shuffled = True

    def counts(self, features: Features, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        samples = len(features.losses)
        counts = equal_counts(samples, budget)
        probability = 0.3 if features.epoch < 1 else 0.01
        positions = np.arange(features.position, features.position + samples)
        drawn = torch.from_numpy(uniforms(seeds(features.seed, features.step, positions)))
        losses = features.losses.cpu()
        halved = (losses < losses.mean()) & (drawn < probability) & (counts > 1)
        counts[halved] //= 2
        others = torch.nonzero(~halved).flatten()
        freed = budget - int(counts.sum())
        counts[others] += freed // len(others)
        # Where the published code draws who gets the remainder, the samples with the smallest numbers do.
        counts[others[drawn[others].argsort()[: freed % len(others)]]] += 1
        return counts


ALLOCATORS: dict[str, type[Allocator]] = {
    "optimal": Optimal,
    "uniform": Uniform,
    "authors_bernoulli": AuthorsBernoulli,
}
