"""What solvers of layers on kept features have in common: when they solve, and how."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

PRIMING_SAMPLES = 4096  # at most so many clean rows are run before the first query
PRIMING_SHARE = 0.1  # of the run's optimizer steps, at most
ITERATIONS = 10  # of L-BFGS per optimizer step, from the weights of the step before
KEPT = 0.5  # weight of a sample after as many others as there are kept samples
# precision of the Gaussian prior on a layer's outputs; the loss is a sum over samples
PRIOR = 0.003


class FeatureSolver:
    """Keeps the inputs of layers in clean forwards, and solves for the layers' weights after each
    optimizer step. No forward pass is needed.

    The layers have no learning rate: their exact gradients are in `.grad`, but where the optimizer
    moves them to is left again.

    While the adapter moves, the inputs of samples that were seen long ago are out of date: their
    weight halves whenever as many samples have been seen as are kept.

    While the kept samples are few, queries would be wasted on the gradient of layers that are about
    to move. So a run begins with *priming*: optimizer steps that run clean rows only, until the
    first epoch ends, 4,096 samples are known, or a tenth of the run is over.

    Args:
        agree: returns the tensor of process 0.

    Attributes:
        seen: samples that were added so far.
        objective: mean loss of the kept samples under the solved layers; None before the first
            solution.
    """

    def __init__(self, agree: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self.agree = agree
        self.objective: float | None = None
        self.seen = 0
        self._collecting, self._repeated = True, False
        self._new = False  # whether samples were added since the last step

    @property
    def samples(self) -> int:
        """The number of kept samples."""
        raise NotImplementedError

    def solve(self) -> None:
        """Move the weights to a minimum of the loss on the kept samples."""
        raise NotImplementedError

    def discard(self) -> None:
        """Do not solve after this optimizer step, which is not taken."""
        self._new = False

    def primes(self, step: int, steps: int) -> bool:
        """Return whether an optimizer step of a run of so many `steps` runs clean rows only."""
        return self._collecting and step + 1 <= PRIMING_SHARE * steps

    def finish_step(self, epoch: float) -> None:
        """Solve for the weights after an optimizer step, now that so many epochs are done."""
        if not self._new:
            return
        self._new = False
        self.solve()
        seen = self._repeated or epoch >= 1 - 1e-6
        self._collecting = not seen and self.samples < PRIMING_SAMPLES

    def age_weights(self, numbers: Collection[int]) -> Tensor:
        """Return weights (N,) float64 of samples, from how many came before each."""
        ages = (self.seen - torch.tensor(list(numbers)).double()) / self.samples
        return KEPT**ages


def minimise(theta: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Take some steps of L-BFGS in place.

    Args:
        theta: where to start.
        evaluate: theta → the objective and its gradient.
    """
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        objective, theta.grad = evaluate(theta)
        return float(objective)

    optimizer.step(closure)
