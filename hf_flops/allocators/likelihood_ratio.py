"""The likelihood-ratio (score function) method: improves a policy from the values of its draws,
without their derivatives.

`grad E J(n) = E [(J(n) - baseline) grad log p(n)]`, for any baseline that does not depend on the
draw. Draws cost no forward pass, because J of any counts follows from the sigmas measured in a
finished step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.prng import seeds
from ..base.state import State, vector
from .base import SampleFeatures
from .learner import Learner

DRAWS = 128


def private_generator(features: SampleFeatures, purpose: int) -> torch.Generator:
    """Return a generator whose stream is a function of seed, step, position and purpose alone."""
    return torch.Generator().manual_seed(
        int(seeds(features.seed, features.step, features.position, purpose)[0])
    )


def gradient(scores: Tensor, values: Tensor) -> Tensor:
    """Return the likelihood-ratio estimate (P,) of the gradient of the mean value.

    The baseline of a draw is the mean of the other draws' values, which keeps the estimate
    unbiased.

    Args:
        scores: (K, P) derivatives of a draw's log probability by the parameters.
        values: (K,) of the draws, K > 1.
    """
    advantages = (values - values.mean()) * (len(values) / (len(values) - 1))
    return advantages @ scores / len(values)


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Descent:
    """Adam on a few numbers within bounds, with a state of plain lists.

    Args:
        start: initial values (P,).
        rate: learning rate, about the largest change of a value per step.
        bounds: P pairs (least, greatest).
    """

    def __init__(self, start: list[float], rate: float, bounds: list[tuple[float, float]]) -> None:
        self.values = torch.tensor(start, dtype=torch.float64)
        self._bounds = torch.tensor(bounds, dtype=torch.float64).T
        self._adam = torch.optim.Adam([self.values], lr=rate, betas=(0.9, 0.99), eps=1e-12)

    def step(self, slope: Tensor) -> None:
        """Move the values against a gradient (P,)."""
        self.values.grad = slope
        self._adam.step()
        self.values.clamp_(*self._bounds)

    def state_dict(self) -> State:
        """Return the values and Adam's moments as JSON-serialisable values."""
        moments = self._adam.state.get(self.values, {})
        return {
            "values": self.values.tolist(),
            **{name: moment.tolist() for name, moment in moments.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Load a state from `state_dict`."""
        least, most = self._bounds
        values = vector(state["values"], len(self.values))
        if bool((values < least).any() or (values > most).any()):
            raise ValueError(f"the values {values.tolist()} are out of bounds")
        moments = {} if len(state) == 1 else {name: state[name] for name in _MOMENTS}
        tensors = {
            name: vector(value, *(() if name == "step" else (len(values),)))
            for name, value in moments.items()
        }
        if any(bool((tensors[name] < 0).any()) for name in tensors if name != "exp_avg"):
            raise ValueError("a second moment or number of steps is negative")
        self.values.copy_(values)
        self._adam.state[self.values] = tensors


class PolicyLearner(Learner):
    """An allocator whose policy has a few parameters; for the arguments see `Descent`."""

    def __init__(self, start: list[float], rate: float, bounds: list[tuple[float, float]]) -> None:
        super().__init__()
        self._descent = Descent(start, rate, bounds)

    def _state(self) -> State:
        return self._descent.state_dict()

    def _load(self, state: State) -> None:
        self._descent.load_state_dict(state)
