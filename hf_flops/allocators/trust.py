"""How far predicted sigmas can be trusted: what they would have saved in finished steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.state import State
from .rounding import proportional, proxy

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Calibration:
    """Chooses the power that predicted sigmas are taken to, from 0 (equal counts) to 1 (full
    trust).

    Each finished step shows what every power would have left of the variance of equal counts; the
    least on average wins. It is judged before the step enters the prediction, so that only
    foresight counts.

    Args:
        decay: how much of the past is kept from one step to the next.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # Ratios J(power) / J(equal counts), summed, and their number: in favour of full trust, but
        # not for long.
        self._ratios, self._steps = (
            torch.tensor([1 - 0.05 * level for level in LEVELS], dtype=torch.float64),
            1.0,
        )

    @property
    def power(self) -> float:
        """The power that has served best."""
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
        """Return what each power has left of the variance of equal counts, on average."""
        return dict(zip(LEVELS, (self._ratios / self._steps).tolist(), strict=True))

    def state_dict(self) -> State:
        """Return the averages as JSON-serialisable values."""
        return {"ratios": self._ratios.tolist(), "steps": self._steps}

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self._ratios, self._steps = (
            torch.tensor(state["ratios"], dtype=torch.float64),
            state["steps"],
        )
