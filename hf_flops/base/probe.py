"""Probes: change something, run the model, compare. Whatever fails under the change means no."""

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
# What a model raises where it minds a change; anything else reaches the user.
FAILURES = (ValueError, RuntimeError, IndexError, TypeError, AttributeError)


def agree(found: Tensor, wanted: Tensor, tolerance: float, size: float | None = None) -> bool:
    """Return whether `|found - wanted| <= tolerance * (size + |wanted|)` for each number.

    NaN agrees with NaN, as long as there is a finite number to compare.

    Args:
        found: numbers of any shape.
        wanted: what they should be, of the same shape.
        tolerance: the relative error that rounding may cause.
        size: how large the numbers are from which they were computed, 1 for losses; None for the
            largest of `wanted`.
    """
    finite = wanted[wanted.isfinite()]
    if not len(finite):
        return False
    atol = tolerance * (float(finite.abs().max()) if size is None else size)
    return torch.allclose(found, wanted, rtol=tolerance, atol=atol, equal_nan=True)


class Attempt:
    """A context in which something is tried: what fails ends the block, and is logged.

    Args:
        otherwise: what happens where the attempt fails, for the log; None where the caller says so
            itself.

    Attributes:
        reason: why it failed; None if it did not.
    """

    def __init__(self, otherwise: str | None) -> None:
        self.otherwise = otherwise
        self.reason: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, FAILURES):
            return False
        self.refuse(f"{type(error).__name__}: {in_one_line(error)}")
        return True

    def refuse(self, reason: str) -> None:
        """Say why the answer is no."""
        self.reason = reason
        if self.otherwise is not None:
            logger.info("%s: %s.", self.otherwise, reason)


class Probe:
    """Asks whether rows lose the same after a change.

    Args:
        objective: what is minimised; returns `RowLosses`.
        forward: runs the model.
        inputs: of the rows.
        tolerance: relative error of a loss that rounding alone can cause.
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
        """What the objective finds without a change."""
        return self.objective(self.forward, self.inputs)

    def difference(
        self,
        otherwise: str | None = None,
        *,
        objective: Call | None = None,
        forward: Call | None = None,
        inputs: Inputs | None = None,
    ) -> str | None:
        """Return why losses are not the same with another objective, forward or inputs; None where
        they are.

        Args:
            otherwise: see `Attempt`.
            objective: in place of the probe's own.
            forward: in place of its own.
            inputs: in place of its own.
        """
        with Attempt(otherwise) as attempt:
            wanted = self.losses
            found = (objective or self.objective)(
                forward or self.forward, self.inputs if inputs is None else inputs
            )
            if not (
                found.counts.equal(wanted.counts)
                and agree(found.sums, wanted.sums, self.tolerance, self.size)
            ):
                attempt.refuse("the losses were not the same")
        return attempt.reason
