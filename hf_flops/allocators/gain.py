"""The gain of optimal over equal counts that predicted sigmas promise."""

from __future__ import annotations

from torch import Tensor

from ..base.state import State, number


def predicted_gain(sigma: Tensor) -> float:
    """Return `mean(sigma^2) / mean(sigma)^2` of sigmas (B,): the variance of equal counts over that
    of the best counts, 1 or more.
    """
    sigma = sigma.double()
    return float(sigma.square().mean() / sigma.mean().square())


class GainAverage:
    """The average gain of recent batches.

    Args:
        decay: of past batches, per batch.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._total = self._batches = 0.0

    def including(self, gain: float) -> float:
        """Return the average with one more batch, which is not recorded."""
        return (self.decay * self._total + gain) / (self.decay * self._batches + 1)

    def update(self, gain: float) -> None:
        """Record the gain of a finished batch."""
        self._total = self.decay * self._total + gain
        self._batches = self.decay * self._batches + 1

    def state_dict(self) -> State:
        """Return the sums as JSON-serialisable values."""
        return {"total": self._total, "batches": self._batches}

    def load_state_dict(self, state: State) -> None:
        """Load a state from `state_dict`."""
        self._total, self._batches = number(state["total"]), number(state["batches"], 0)
