"""Online ridge regression of log sigma on features of the clean forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.state import State, number, vector
from .base import SampleFeatures, finite
from .observation import Observed

_LEAST = 1e-4  # lower bound of features, relative to the batch's largest value
_PRIOR = 4.0  # precision of a coefficient's prior: standard deviation 1/2


def columns(features: SampleFeatures) -> Tensor:
    """Return (B, 3) float64: log residual norm, log loss and log length; zeros if unknown."""

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
    """Bayesian linear regression with forgetting; only differences within a batch are used.

    The prior is `sigma_i ∝ residual norm`: by the chain rule a sample's gradient norm is its
    residual norm times that of a Jacobian, which varies less between samples.

    Args:
        decay: of the statistics of past steps, per step.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._prior = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        # weighted sums of x x' and x y over past samples
        self._inner = torch.zeros(3, 3, dtype=torch.float64)
        self._outer = torch.zeros(3, dtype=torch.float64)
        # Squared errors minus the variance of the observations, and their number; the prior counts
        # as 10.
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

    def update(self, features: SampleFeatures, observed: Observed) -> Tensor:
        """Update with a step; return (B,) errors of the prediction before the update."""
        weights = 1 / (self.spread + observed.variance)

        def centred(values: Tensor) -> Tensor:
            return values - weights @ values / weights.sum()

        errors = centred(observed.values - self.predict(features))
        x = centred(columns(features))
        self._inner = self.decay * self._inner + x.T @ (weights[:, None] * x)
        self._outer = self.decay * self._outer + x.T @ (weights * centred(observed.values))
        self._misfit = self.decay * self._misfit + float(
            (errors.square() - observed.variance).sum()
        )
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
        """Load a state from `state_dict`."""
        inner = vector(state["inner"], 3, 3)
        if float(torch.linalg.eigvalsh(inner).min()) < -0.5 * _PRIOR:
            raise ValueError("the sums of products have a negative eigenvalue")
        self._inner, self._outer = inner, vector(state["outer"], 3)
        self._misfit, self._seen = number(state["misfit"]), number(state["seen"], 1e-300)
