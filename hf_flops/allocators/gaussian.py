"""The Gaussian allocator: a Gaussian policy over the batch, with parameters learned by the
likelihood-ratio method.

References:
    Ren et al. (2025), FLOPS, arXiv 2410.05966, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SampleFeatures, equal_counts, finite
from .likelihood_ratio import DRAWS, PolicyLearner, gradient, private_generator
from .rounding import one_and_share, proxy, rounded

_PURPOSE = 1
_NUGGET = 1e-2  # added to the kernel's diagonal, which equal losses would make singular


def standardised(losses: Tensor) -> Tensor:
    """Return losses (B,) float64 with mean 0 and variance 1 in the batch; zeros if all are
    equal.
    """
    losses = finite(losses)
    losses = losses / losses.abs().max().clamp(min=1e-300)  # squares of huge losses would overflow
    spread = losses.std(correction=0)
    return (losses - losses.mean()) / spread if float(spread) > 1e-9 else torch.zeros_like(losses)


class GaussianPolicy:
    """`u ~ N(mu, Sigma)`: mu linear in the standardised losses, Sigma an RBF kernel on them (FLOPS
    §4).

    mu_i = intercept + slope x_i and Sigma_ij = variance (exp(-(x_i - x_j)^2 / (2 length^2)) +
    nugget [i = j]).

    Args:
        parameters: (4,) float64: intercept, slope, log variance, log length.
        x: (B,) float64, standardised losses.
    """

    def __init__(self, parameters: Tensor, x: Tensor) -> None:
        intercept, slope, log_variance, log_length = parameters.tolist()
        self.x, self.mean = x, intercept + slope * x
        squares = (x[:, None] - x).square() * torch.exp(
            torch.tensor(-2 * log_length, dtype=torch.float64)
        )
        variance = torch.exp(torch.tensor(log_variance, dtype=torch.float64))
        kernel = torch.exp(-0.5 * squares)
        self.by_log_length = variance * kernel * squares  # dSigma / d log length
        kernel.diagonal().add_(_NUGGET)
        self.factor = torch.linalg.cholesky(variance * kernel)

    def draw(self, normals: Tensor) -> Tensor:
        """Turn standard normal numbers (K, B) into draws u (K, B)."""
        return torch.addmm(self.mean, normals, self.factor.T)

    def score(self, normals: Tensor) -> Tensor:
        """Return (K, 4) derivatives of `log p(u)` by the parameters, at `u = draw(normals)`."""
        # With r = u - mu and a = Sigma^-1 r = L^-T normals: d log p = a . dmu + (a' dSigma a -
        # tr(Sigma^-1 dSigma)) / 2.
        a = torch.linalg.solve_triangular(self.factor.T, normals.T, upper=True)
        trace = (torch.cholesky_inverse(self.factor) * self.by_log_length).sum()
        by_length = 0.5 * ((a * (self.by_log_length @ a)).sum(0) - trace)
        by_variance = 0.5 * (normals.square().sum(1) - len(self.x))
        return torch.stack([a.sum(0), self.x @ a, by_variance, by_length], dim=1)


class Gaussian(PolicyLearner):
    """Counts from a Gaussian policy with four parameters, which learns how queries should depend on
    losses.

    A draw u is clamped at 0, each sample gets one query, and the rest of the budget is divided in
    proportion to u. After each step the parameters descend on the proxy objective J of many draws,
    by the likelihood-ratio method, with the step's squared deltas. Counts are those of the policy's
    mean, not of a draw: J is convex in the counts, so a draw is worse (Jensen), and it would not
    help exploration, since J of any counts can be computed afterwards.

    Args:
        rate: step size of the parameters.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import Gaussian, SampleFeatures
        >>> features = SampleFeatures(losses=torch.tensor([1.0, 2.0, 3.0, 6.0]))
        >>> allocator = Gaussian()
        >>> allocator.counts(features, budget=16).tolist()
        [4, 4, 4, 4]
        >>> squares = torch.tensor([0.1, 0.2, 1.0, 9.0])
        >>> for step in range(1, 30):
        ...     allocator.update(features, torch.full((4,), 4), squares)
        ...     features = SampleFeatures(features.losses, step=step)
        >>> allocator.counts(features, budget=16).tolist()
        [1, 2, 4, 9]
    """

    def __init__(self, rate: float = 0.03) -> None:
        bounds = [(0.0, 10.0), (-10.0, 10.0), (-6.0, 0.0), (-2.0, 2.0)]
        super().__init__([1.0, 0.0, -2.0, 0.0], rate, bounds)  # slope 0: equal counts

    def _counts(self, features: SampleFeatures, budget: int) -> Tensor:
        intercept, slope = self._descent.values[:2].tolist()
        shares = intercept + slope * standardised(features.losses)
        if bool((shares == shares[0]).all()):
            return equal_counts(len(shares), budget)
        return rounded(one_and_share(shares, budget), budget)

    def _learn(self, features: SampleFeatures, counts: Tensor, squares: Tensor) -> None:
        slope = self.slope(features, int(counts.sum()), squares, DRAWS)
        self._descent.step(slope)
        # Only ratios of shares matter: fix their scale, which would drift otherwise.
        values = self._descent.values
        scale = values[:2].norm().clamp(min=1e-6)
        values[:2] /= scale
        values[2] = (values[2] - 2 * scale.log()).clamp(-6.0, 0.0)

    def slope(self, features: SampleFeatures, budget: int, squares: Tensor, draws: int) -> Tensor:
        """Return the likelihood-ratio gradient (4,) of `E J(n) / J(equal counts)` by the
        parameters.

        Args:
            features: of a finished step.
            budget: queries of that step.
            squares: (B,) float64 estimates of sigma_i^2 up to a common factor.
            draws: how many to take.
        """
        policy = GaussianPolicy(self._descent.values, standardised(features.losses))
        generator = private_generator(features, _PURPOSE)
        normals = torch.randn(draws, len(squares), generator=generator, dtype=torch.float64)
        values = proxy(squares, one_and_share(policy.draw(normals), budget))
        return gradient(policy.score(normals), values * (budget / len(squares) / squares.sum()))
