"""From shares to counts: the proxy objective, its integer optimum, and rounding to the budget.

References:
    Ren et al. (2025), FLOPS, arXiv 2410.05966, section 4.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .base import check_budget, equal_counts

_GREEDY = 32  # queries that are cheaper to grant one by one than to bisect for


def proxy(squares: Tensor, counts: Tensor) -> Tensor:
    """Return `J(n) = sum_i sigma_i^2 / n_i`, the variance that counts leave (FLOPS §4).

    Args:
        squares: (B,) sigma_i^2, up to a common factor.
        counts: (..., B), whole or not.

    Returns:
        (...,) float64.
    """
    return (squares.double() / counts).sum(-1)


def proportional(shares: Tensor, budget: int) -> Tensor:
    """Return real counts `max(1, c share_i)` that sum to the budget: what `n_i ∝ share_i` means
    with at least one query each.

    Args:
        shares: (B,) float64, non-negative.
        budget: at least B.

    Returns:
        (B,) float64.
    """
    counts = torch.full_like(shares, budget / len(shares))
    above = shares > 0
    while bool(above.any()):
        counts = torch.where(
            above, shares * ((budget - int((~above).sum())) / shares[above].sum()), 1.0
        )
        if bool((counts >= 1).all()):
            break
        above &= counts >= 1
    return counts


def one_and_share(shares: Tensor, budget: int) -> Tensor:
    """Return real counts: one query for each sample, and the rest of the budget in proportion to
    the shares.

    Args:
        shares: (..., B) float64; negative ones count as 0, and if all do, all are equal.
        budget: at least B.

    Returns:
        (..., B) float64, each at least 1, summing to the budget up to rounding errors.
    """
    samples = shares.shape[-1]
    shares = shares.clamp(min=0)
    total = shares.sum(-1, keepdim=True)
    shares = torch.where(total > 0, shares / total.clamp(min=1e-300), 1.0 / samples)
    return 1 + (budget - samples) * shares


def rounded(counts: Tensor, budget: int) -> Tensor:
    """Round real counts that sum to the budget by largest remainder, so that they still do.

    Args:
        counts: (B,) float64, each at least 1.
        budget: at least B.

    Returns:
        (B,) int64, each at least 1.
    """
    check_budget(len(counts), budget)
    whole = counts.floor().long().clamp(min=1)
    missing = budget - int(whole.sum())
    order = (counts - whole).argsort(descending=missing > 0, stable=True)
    # With a huge budget, rounding errors may leave more than B queries: take turns.
    while missing:
        turn = order if missing > 0 else order[whole[order] > 1]
        turn = turn[: abs(missing)]
        whole[turn] += 1 if missing > 0 else -1
        missing = budget - int(whole.sum())
    return whole


def _granted(spread: np.ndarray, threshold: float) -> np.ndarray:
    """Return how many queries each sample gets before the gain of one more falls to `threshold` or
    below.
    """
    # n gains over n - 1 by spread^2 / (n (n - 1)): solve for n, then undo rounding by comparing
    # directly.
    squares = spread**2
    counts = np.floor((1 + np.sqrt(1 + 4 * squares / threshold)) / 2).clip(1)
    counts += squares / (counts * (counts + 1)) > threshold
    counts -= (counts > 1) & (squares / np.maximum(counts * (counts - 1), 1) <= threshold)
    return counts.clip(1)


def optimal_counts(sigma: Tensor, budget: int) -> Tensor:
    """Minimise `J(n) = sum_i sigma_i^2 / n_i` over integers n_i >= 1 that sum to `budget`, exactly.

    J is separable and convex, so giving each next query to the sample with the largest gain
    `sigma_i^2 / (n_i (n_i + 1))` is optimal (Fox 1966; the integer counterpart of Neyman's n_i ∝
    sigma_i, FLOPS §4). A bisection on the gain grants almost all queries at once; the greedy rule
    grants the last few.

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
    # Relative gains below 1e-9 would only order queries of negligible samples, and cost precision.
    spread = np.where(finite, spread / largest, 1.0).clip(1e-9)
    # Log gains at which more than the budget, and none, is granted.
    low, high = math.log(1e-18 / (4.0 * budget * budget)), 0.0
    counts = np.ones(samples, dtype=np.int64)
    while budget - counts.sum() > _GREEDY and high - low > 1e-12:
        middle = (low + high) / 2
        granted = _granted(spread, math.exp(middle)).astype(np.int64)
        if granted.sum() > budget:
            low = middle
        else:
            high, counts = middle, granted
    for _ in range(budget - int(counts.sum())):
        counts[np.argmax(spread**2 / (counts * (counts + 1)))] += 1
    return torch.from_numpy(counts)
