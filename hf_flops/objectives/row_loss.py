"""Any loss, split into rows: the model runs once for all rows, and the loss once for each row, on
that row's part of the model's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batch import Inputs, batch_size, take
from ..base.calls import CallTree, Tape, is_half, per_row_modules, rows_of
from ..base.probe import FAILURES
from ..errors import in_one_line
from .base import Forward, Objective, RowLosses
from .elements import element_counts
from .elementwise import widen
from .model_loss import RowLossError

_EXACT = 1e-5  # relative error of a float32 loss that is summed in another order
_HALF = 3e-2  # of a 16-bit loss


class RowwiseLoss(Objective):
    """A loss of any form, split into rows by computing it again for each row alone.

    The model runs once. Its outputs are recorded, and `loss` is computed once for each row with the
    recorded outputs of that row in place of calls of the model. Modules whose outputs are not one
    entry (or a fixed number of entries) per row, such as a model that returns its own loss, run
    again on a row, with the recorded outputs of the modules that they call.

    A row's loss is multiplied by its number of elements, a statistic of its inputs (see
    `element_counts`). Each time, the weighted mean of rows' losses must be the loss of all rows.

    Args:
        loss: runs the model and computes the loss, without counting rows.
        forward: the same for whole batches; it may count rows.
        inputs: a batch of two or more different rows.

    Raises:
        RowLossError: the loss cannot be computed for single rows, or they do not add up to it.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.objectives import RowwiseLoss
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> def loss(inputs):
        ...     errors = (model(inputs["x"]).squeeze(1) - inputs["labels"]).abs()
        ...     return (inputs["weights"] * errors).sum() / inputs["weights"].sum(), None
        >>> inputs = {
        ...     "x": torch.tensor([[1.0], [2.0]]),
        ...     "labels": torch.zeros(2),
        ...     "weights": torch.tensor([1.0, 3.0]),
        ... }
        >>> losses = RowwiseLoss(loss, loss, inputs)(loss, inputs)
        >>> losses.sums.tolist(), losses.counts.tolist()
        ([1.0, 6.0], [1.0, 3.0])
    """

    def __init__(self, loss: Forward, forward: Forward, inputs: Inputs) -> None:
        self.loss = loss
        self.modules = modules_with_rows(forward, inputs)
        self.elements = element_counts(inputs)

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`."""
        del features
        tape = Tape(self.modules)
        with tape.recording():
            result, _ = forward(inputs)
        loss = scalar(result)
        tolerance = _HALF if is_half(result) else 10 * _EXACT
        parts = [row_of(inputs, row) for row in range(batch_size(inputs))]
        each = self._each(tape, parts)
        counts = self._counts(inputs, each)
        if _disagree(counts):
            self._confirm(tape, inputs, parts)
            counts = self._counts(inputs, each)
        for number in counts:
            if _is_mean(loss, each, number, tolerance):
                return RowLosses(torch.where(number > 0, each * number, 0.0), number)
        raise RowLossError(
            f"the loss {float(loss):.6g} is not the mean of the losses of its rows, by any number "
            "of elements that its inputs tell"
        )

    def _counts(self, inputs: Inputs, like: Tensor) -> list[Tensor]:
        """Return the numbers of elements (R,) of the rows by each statistic that may be right."""
        found = [count(inputs) for count in self.elements]
        return [number.to(like) for number in found if number is not None]

    def _each(self, tape: Tape, parts: Sequence[Inputs], factors: Tensor | None = None) -> Tensor:
        """Return the loss (R,) of each row alone, its recorded outputs times a factor (R,)."""
        found = list[Tensor]()
        with row_failures("the loss cannot be computed for one row"):
            for row, part in enumerate(parts):
                scale = None if factors is None else factors[row : row + 1]
                with tape.playing(partial(rows_of, len(parts), slice(row, row + 1), scale)):
                    found.append(scalar(self.loss(part)[0]))
        return torch.stack(found)

    def _confirm(self, tape: Tape, inputs: Inputs, parts: Sequence[Inputs]) -> None:
        """Keep only the statistics that are right for outputs that differ strongly between rows.

        Losses that hardly differ, as before the first step, have the same mean with any weights.
        """
        rows = len(parts)
        factors = torch.linspace(0.5, 4.0, rows).roll(rows // 2)
        with (
            row_failures("the loss cannot be computed from recorded outputs"),
            tape.playing(partial(rows_of, rows, slice(0, rows), factors)),
        ):
            loss = scalar(self.loss(inputs)[0])
        each = self._each(tape, parts, factors)
        if not bool(loss.isfinite()):
            return
        self.elements = [
            count
            for count in self.elements
            if (number := count(inputs)) is not None
            and _is_mean(loss, each, number.to(each), _EXACT)
        ]


def modules_with_rows(forward: Forward, inputs: Inputs) -> list[nn.Module]:
    """Return the outermost modules that a loss calls whose outputs have entries for each row.

    Raises:
        RowLossError: there is none.
    """
    with row_failures("the loss cannot be computed for two and for three rows"):
        pair, triple = (take(inputs, torch.tensor(index)) for index in ([0, 1], [0, 1, 0]))
        calls = CallTree.of(lambda: forward(pair)), CallTree.of(lambda: forward(triple))
    modules = per_row_modules(*calls, rows=(2, 3))
    if not modules:
        raise RowLossError("no module that the loss calls has outputs for each row")
    return modules


def row_of(inputs: Inputs, row: int) -> dict[str, Any]:
    """Return the inputs of one row, as views."""
    return {
        name: value[row : row + 1]
        if isinstance(value, (list, tuple)) or (torch.is_tensor(value) and value.dim() > 0)
        else value
        for name, value in inputs.items()
    }


@contextmanager
def row_failures(what: str) -> Iterator[None]:
    """Turn the exceptions that a loss may raise for rows that it was not written for into a
    `RowLossError`; memory that ran out is passed on.
    """
    try:
        yield
    except RowLossError:
        raise
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise RowLossError(f"{what} ({type(error).__name__}: {in_one_line(error)})") from error


def scalar(loss: Tensor | None) -> Tensor:
    """Return a scalar loss in 32 bits at least."""
    if loss is None:
        raise RowLossError("the loss is None")
    return widen(loss.detach()).reshape(())


def _disagree(counts: Sequence[Tensor]) -> bool:
    """Return whether numbers of elements differ in the weights that they give to rows."""
    weights = [number / number.sum() for number in counts]
    return any(not torch.allclose(weight, weights[0], equal_nan=True) for weight in weights[1:])


def _is_mean(loss: Tensor, each: Tensor, counts: Tensor, tolerance: float) -> bool:
    """Return whether a loss is the mean of the losses (R,) of rows with these numbers (R,) of
    elements, up to rounding; without any element, or with a loss that is not finite, it may not be.
    """
    if not bool((counts > 0).any()):
        return not bool(loss.isfinite()) or float(loss) == 0
    mean = torch.where(counts > 0, each * counts, 0.0).sum() / counts.sum()
    if not bool(mean.isfinite() & loss.isfinite()):
        return bool(mean.isfinite() == loss.isfinite())
    return abs(float(mean) - float(loss)) <= tolerance * max(1.0, abs(float(loss)))
