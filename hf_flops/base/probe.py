"""Probes: change something, run the model and compare. An exception under the change means no."""

from __future__ import annotations

import logging
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import in_one_line
from .batch import Inputs
from .patching import Call

logger = logging.getLogger(__name__)
# Exceptions that a model may raise because of a change; others are passed on to the user.
FAILURES = (ValueError, RuntimeError, IndexError, TypeError, AttributeError)


def agree(values: Tensor, wanted: Tensor, tolerance: float, size: float | None = None) -> bool:
    """Return whether `|values - wanted| <= tolerance * (size + |wanted|)` for each number.

    NaN agrees with NaN, if there is at least one finite number to compare.

    Args:
        values: numbers of any shape.
        wanted: the expected numbers.
        tolerance: relative error due to rounding.
        size: magnitude of the numbers in the computation, 1 for losses; None for the largest of
            `wanted`.
    """
    finite = wanted[wanted.isfinite()]
    if not len(finite):
        return False
    atol = tolerance * (float(finite.abs().max()) if size is None else size)
    return torch.allclose(values, wanted, rtol=tolerance, atol=atol, equal_nan=True)


class Attempt:
    """A context that catches `FAILURES`, logs them and ends the block.

    Args:
        otherwise: the consequence of a failure, for the log; None if the caller logs it.

    Attributes:
        reason: of the failure; None if there was none.
    """

    def __init__(
        self, otherwise: str | None, failures: tuple[type[Exception], ...] = FAILURES
    ) -> None:
        self.otherwise, self.failures = otherwise, failures
        self.reason: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, self.failures):
            return False
        self.refuse(f"{type(error).__name__}: {in_one_line(error)}")
        return True

    def refuse(self, reason: str) -> None:
        """Record and log the reason of a failure."""
        self.reason = reason
        if self.otherwise is not None:
            logger.info("%s: %s.", self.otherwise, reason)


class Probe:
    """Checks whether the losses of rows are the same after a change.

    Args:
        objective: what is minimised; returns `RowLosses`.
        forward: runs the model.
        inputs: of the rows.
        tolerance: relative error of a loss due to rounding.
        size: see `agree`.
    """

    def __init__(
        self,
        objective: Call,
        forward: Call,
        inputs: Inputs,
        tolerance: float,
        size: float | None = 1.0,
    ) -> None:
        self.objective, self.forward, self.inputs = objective, forward, inputs
        self.tolerance, self.size = tolerance, size

    @cached_property
    def losses(self) -> Any:
        """The losses without a change."""
        return self.objective(self.forward, self.inputs)

    def difference(
        self,
        otherwise: str | None = None,
        *,
        objective: Call | None = None,
        forward: Call | None = None,
        inputs: Inputs | None = None,
    ) -> str | None:
        """Return why losses differ with another objective, forward or inputs; None if they agree.

        Args:
            otherwise: see `Attempt`.
            objective: in place of the probe's own.
            forward: in place of its own.
            inputs: in place of its own.
        """
        with Attempt(otherwise) as attempt:
            wanted = self.losses
            changed = (objective or self.objective)(
                forward or self.forward, self.inputs if inputs is None else inputs
            )
            if not (
                changed.counts.equal(wanted.counts)
                and agree(changed.sums, wanted.sums, self.tolerance, self.size)
            ):
                attempt.refuse("the losses were not the same")
        return attempt.reason
