"""Calibration of predicted sigmas by the variance that they would have saved in finished steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.state import State, number, vector
from .rounding import proportional, proxy

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Calibration:
    """Chooses the power that predicted sigmas are taken to, from 0 (equal counts) to 1 (full
    trust).

    Each finished step gives the ratio of every power's variance to that of equal counts; the power
    with the smallest average is used. Predictions are evaluated before they learn from the step, so
    that only foresight counts.

    Args:
        decay: of the averages, per step.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # Sums of J(power) / J(equal counts), and their number; a weak prior favours full trust.
        self._ratios = torch.tensor([1 - 0.05 * level for level in LEVELS], dtype=torch.float64)
        self._steps = 1.0

    @property
    def power(self) -> float:
        """The power with the smallest average ratio."""
        return LEVELS[int(self._ratios.argmin())]

    def update(self, sigma: Tensor, budget: int, squares: Tensor) -> None:
        """Compare a prediction (B,), made beforehand, with the mean squared deltas (B,) of a
        step.
        """
        equal = squares.sum() * len(squares) / budget
        ratios = [
            float(proxy(squares, proportional(sigma**level, budget)) / equal) for level in LEVELS
        ]
        self._ratios = self.decay * self._ratios + torch.tensor(ratios, dtype=torch.float64)
        self._steps = self.decay * self._steps + 1

    def ratios(self) -> dict[float, float]:
        """Return the average ratio of each power's variance to that of equal counts."""
        return dict(zip(LEVELS, (self._ratios / self._steps).tolist(), strict=True))

    def state_dict(self) -> State:
        """Return the averages as JSON-serialisable values."""
        return {"ratios": self._ratios.tolist(), "steps": self._steps}

    def load_state_dict(self, state: State) -> None:
        """Load a state from `state_dict`."""
        self._ratios = vector(state["ratios"], len(LEVELS))
        self._steps = number(state["steps"], 1e-300)
