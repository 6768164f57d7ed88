"""The likelihood-ratio (score function) method: improve a policy from the values of its draws, without derivatives of them.

`grad E J(n) = E [(J(n) - baseline) grad log p(n)]`, for any baseline that does not depend on the draw. Draws cost no forward
pass, because J of any counts follows from the sigmas that a finished step has shown.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..counters import seeds
from ..rows import Features

DRAWS = 128


def private_generator(features: Features, purpose: int) -> torch.Generator:
    """Return a generator whose stream is a function of seed, step, position and purpose alone."""
    return torch.Generator().manual_seed(int(seeds(features.seed, features.step, features.position, purpose)[0]))


def gradient(scores: Tensor, values: Tensor) -> Tensor:
    """Return the likelihood-ratio estimate (P,) of the gradient of the mean value.

    The baseline of a draw is the mean of the other draws' values, which keeps the estimate unbiased.

    Args:
        scores: (K, P) derivatives of a draw's log probability by the parameters.
        values: (K,) of the draws, K > 1.
    """
    advantages = (values - values.mean()) * (len(values) / (len(values) - 1))
    return advantages @ scores / len(values)


class Descent:
    """Adam for a handful of numbers, with a state of plain lists.

    Args:
        start: initial values (P,).
        rate: how far a value moves per step at most, about.
        bounds: P pairs (least, greatest).

    References:
        Kingma & Ba (2015), arXiv 1412.6980, algorithm 1.
    """

    def __init__(self, start: list[float], rate: float, bounds: list[tuple[float, float]]) -> None:
        self.values = torch.tensor(start, dtype=torch.float64)
        self.rate = rate
        self._least, self._greatest = torch.tensor(bounds, dtype=torch.float64).T
        self._mean, self._square, self._steps = torch.zeros_like(self.values), torch.zeros_like(self.values), 0

    def step(self, slope: Tensor) -> None:
        """Move the values against a gradient (P,)."""
        self._steps += 1
        self._mean = 0.9 * self._mean + 0.1 * slope
        self._square = 0.99 * self._square + 0.01 * slope.square()
        mean, square = self._mean / (1 - 0.9**self._steps), self._square / (1 - 0.99**self._steps)
        moved = self.values - self.rate * mean / (square.sqrt() + 1e-12)
        self.values = torch.minimum(torch.maximum(moved, self._least), self._greatest)

    def state_dict(self) -> dict[str, Any]:
        """Return values and moments as JSON-serialisable values."""
        return {
            "values": self.values.tolist(),
            "mean": self._mean.tolist(),
            "square": self._square.tolist(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        self.values, self._mean, self._square = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("values", "mean", "square")
        )
        self._steps = state["steps"]
