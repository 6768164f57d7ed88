"""Online ridge regression of log sigma on what the clean forward shows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.state import State
from .base import SampleFeatures, finite
from .observation import Observed

_LEAST = 1e-4  # of the batch's largest value: what lies below is as good as nothing
_PRIOR = 4.0  # precision of the prior of a coefficient: it is trusted to about 1/2


def columns(features: SampleFeatures) -> Tensor:
    """Return (B, 3) float64: log residual norm, log loss and log length; zeros where unknown."""

    def logarithm(values: Tensor | None) -> Tensor:
        if values is None:
            return torch.zeros(len(features.losses), dtype=torch.float64)
        values = finite(values)
        return values.clamp(min=max(_LEAST * float(values.max()), 1e-300)).log()

    return torch.stack(
        [logarithm(values) for values in (features.residuals, features.losses, features.lengths)],
        dim=1,
    )


class Regression:
    """Bayesian linear regression with forgetting, within batches: levels that a whole batch shares
    are left out.

    The prior is `sigma_i ∝ residual norm`: by the chain rule a sample's gradient norm is its
    residual norm times that of a Jacobian which varies less between samples.

    Args:
        decay: how much of the past is kept from one step to the next.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._prior = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        # weighted sums of x x' and x y over past samples
        self._inner = torch.zeros(3, 3, dtype=torch.float64)
        self._outer = torch.zeros(3, dtype=torch.float64)
        # Squared errors beyond the noise of the observations, and their number; it starts as if 10
        # had been seen.
        self._misfit, self._seen = 2.5, 10.0

    @property
    def spread(self) -> float:
        """Variance of log sigma around the regression."""
        return min(max(self._misfit / self._seen, 0.01), 4.0)

    def predict(self, features: SampleFeatures) -> Tensor:
        """Return (B,) float64: log sigma up to a constant of the batch."""
        precision = self._inner + _PRIOR * torch.eye(3, dtype=torch.float64)
        coefficients = torch.linalg.solve(precision, self._outer + _PRIOR * self._prior)
        return columns(features) @ coefficients

    def update(self, features: SampleFeatures, seen: Observed) -> Tensor:
        """Learn from a step; returns (B,) errors of the prediction that was made before."""
        weights = 1 / (self.spread + seen.variance)

        def centred(values: Tensor) -> Tensor:
            return values - weights @ values / weights.sum()

        errors = centred(seen.values - self.predict(features))
        x = centred(columns(features))
        self._inner = self.decay * self._inner + x.T @ (weights[:, None] * x)
        self._outer = self.decay * self._outer + x.T @ (weights * centred(seen.values))
        self._misfit = self.decay * self._misfit + float((errors.square() - seen.variance).sum())
        self._seen = self.decay * self._seen + len(errors)
        return errors

    def state_dict(self) -> State:
        """Return the sums as JSON-serialisable values."""
        return {
            "inner": self._inner.tolist(),
            "outer": self._outer.tolist(),
            "misfit": self._misfit,
            "seen": self._seen,
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self._inner = torch.tensor(state["inner"], dtype=torch.float64)
        self._outer = torch.tensor(state["outer"], dtype=torch.float64)
        self._misfit, self._seen = state["misfit"], state["seen"]
