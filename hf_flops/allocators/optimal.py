"""The optimal allocator: integer counts in proportion to predicted sigmas, calibrated on past
steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.state import State
from .base import SampleFeatures
from .gain import GainAverage, predicted_gain
from .history import History
from .learner import Learner
from .observation import observe
from .regression import Regression
from .rounding import optimal_counts
from .trust import Calibration

_MOST_VARIANCE = 1.0  # of log sigma: exploration multiplies a sample's share by e at most


class Optimal(Learner):
    """`n_i ∝ sigma_i`, integer-exact, with sigma predicted from the clean forward and the deltas of
    past steps.

    log sigma is regressed on the logarithms of residual norm, loss and length, and each sample's
    own past deviations (if samples have ids) are added. The first step uses the residual norm
    itself. If predictions are not better than equal counts, they are flattened, at most to equal
    counts. While the predicted gain over equal counts, averaged over recent batches, is below
    `least_gain`, counts are equal.

    Args:
        decay: of the statistics of past steps, per step.
        least_gain: 1 for counts that follow the predictions however small the gain.

    Examples:
        >>> import torch
        >>> from hf_flops.allocators import Optimal, SampleFeatures
        >>> residuals = torch.tensor([0.1, 0.1, 0.2, 0.8])
        >>> features = SampleFeatures(losses=torch.ones(4), residuals=residuals)
        >>> Optimal().counts(features, budget=24).tolist()
        [2, 2, 4, 16]
        >>> Optimal(least_gain=2).counts(features, budget=24).tolist()
        [6, 6, 6, 6]
    """

    def __init__(self, decay: float = 0.95, least_gain: float = 1.5) -> None:
        super().__init__()
        self.decay, self.least_gain = decay, least_gain
        self._regression, self._history = Regression(decay), History()
        self._calibration, self._gain = Calibration(decay), GainAverage(decay)

    def predict(self, features: SampleFeatures) -> Tensor:
        """Return (B,) float64: `sqrt(E sigma_i^2)` given the past, up to a constant of the batch.

        J is linear in sigma_i^2, so its expectation is least for counts in proportion to this root.
        If log sigma is normal with mean m and variance v, it is `exp(m + v)`: samples with an
        uncertain sigma get more queries.
        """
        logarithm = self._regression.predict(features)
        if features.ids is not None:
            mean, variance = self._history.effects(features.ids)
            logarithm = logarithm + mean + variance.clamp(max=_MOST_VARIANCE)
        return (logarithm - logarithm.max()).exp()

    def _shares(self, features: SampleFeatures) -> Tensor:
        """Return (B,) float64, what counts should be proportional to."""
        sigma = self.predict(features)
        if self._gain.including(predicted_gain(sigma)) < self.least_gain:
            return torch.ones_like(sigma)
        return sigma**self._calibration.power

    def _counts(self, features: SampleFeatures, budget: int) -> Tensor:
        return optimal_counts(self._shares(features), budget)

    def _learn_features(self, features: SampleFeatures) -> None:
        self._gain.update(predicted_gain(self.predict(features)))

    def _calibrate(self, features: SampleFeatures, counts: Tensor, squares: Tensor) -> None:
        self._calibration.update(self.predict(features), int(counts.sum()), squares)

    def _learn(self, features: SampleFeatures, counts: Tensor, squares: Tensor) -> None:
        self._calibrate(features, counts, squares)
        seen = observe(squares, counts)
        errors = self._regression.update(features, seen)
        if features.ids is not None:
            self._history.update(
                features.ids, errors, seen.variance, self._regression.spread, self.decay
            )

    def _parts(self) -> State:
        return {
            "regression": self._regression,
            "history": self._history,
            "calibration": self._calibration,
            "gain": self._gain,
        }

    def _state(self) -> State:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def _load(self, state: State) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
