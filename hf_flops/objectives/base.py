"""Objectives: from a forward pass to one loss sum per row.

Row losses are *sums* over a row's loss elements (tokens, labels, ...), so that dividing by the
number of elements of the whole optimizer step reproduces the mean that backpropagation would have
followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..base.batch import Inputs, batch_size
from ..errors import ObjectiveError
from .elementwise import widen

ModelOutputs: TypeAlias = Any
"""What the model's `forward` returns; an objective knows which attributes it reads."""
Forward = Callable[[Inputs], tuple[Tensor | None, ModelOutputs]]
"""Runs the model on a batch and returns its scalar loss (or None) and its outputs."""


@dataclass(frozen=True)
class RowLosses:
    """Losses of one forward pass of R rows.

    Attributes:
        sums: (R,) float32 or wider, the loss of each row summed over its elements.
        counts: (R,), number of loss elements of each row.
        residuals: (R,) norm of the derivative of a row's loss with respect to the model's outputs,
            if requested and known.
        logits: (R, K) input of the loss function for each row, if requested and known.
        slopes: (R, K) derivative of a row's loss with respect to its logits, if requested and
            known.

    Examples:
        >>> import torch
        >>> from hf_flops.objectives import RowLosses
        >>> losses = RowLosses(sums=torch.tensor([3.0, 1.0]), counts=torch.tensor([2.0, 2.0]))
        >>> float(losses.sums.sum() / losses.counts.sum())
        1.0
    """

    sums: Tensor
    counts: Tensor
    residuals: Tensor | None = None
    logits: Tensor | None = None
    slopes: Tensor | None = None
    targets: Tensor | None = None
    weights: Tensor | None = None
    mean: str | None = None

    @classmethod
    def joined(cls, parts: list[RowLosses]) -> RowLosses:
        """Concatenate the losses of consecutive forward passes."""
        if len(parts) == 1:
            return parts[0]

        def together(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        names = ("sums", "counts", "residuals", "logits", "slopes", "targets", "weights")
        joined = {name: together(name) for name in names}
        return cls(**joined, mean=parts[0].mean)  # type: ignore[arg-type]

    def without_rows(self) -> RowLosses:
        """Return the same fields with zero rows."""
        tensors = {name: values for name, values in vars(self).items() if torch.is_tensor(values)}
        empty: dict[str, Any] = {name: values[:0] for name, values in tensors.items()}
        return replace(self, **empty)


class Checks:
    """What is checked at the end of a step's forwards, so that the host need not wait for the
    device after each of them.

    Attributes:
        values: the numbers that `confirm` needs on the CPU.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def confirm(self, values: Sequence[Tensor]) -> None:
        """Raise an error if these values are wrong: by default they never are."""


class Objective:
    """What is minimised; a subclass defines `__call__` and overrides what differs from the
    defaults.

    Attributes:
        per_row: False if the loss belongs to the batch as a whole; then `sums` and `counts` have
            one entry.
        logits: whether row losses have logits, and slopes if features are requested.
        predictable: whether a control variate may use these logits.
        targets: whether row losses have targets and weights too, where they are known.
        needs_clean: whether clean (unperturbed) rows always run, because row losses depend on the
            rest of the batch.
        numbered: whether inputs must have each row's index in the batch, under `ROW`.
        piecewise_constant: whether small changes of the parameters do not change most row losses,
            as with an accuracy.
        generates: whether `run` generates text instead of running one forward pass.

    Examples:
        >>> import torch
        >>> class Size(Objective):
        ...     def __call__(self, forward, inputs, *, features=False):
        ...         sums = forward(inputs)[1].square().sum(1)
        ...         return RowLosses(sums, torch.ones_like(sums))
        >>> Size()(lambda inputs: (None, 2 * inputs["x"]), {"x": torch.ones(2, 3)}).sums
        tensor([12., 12.])
    """

    per_row: bool = True
    logits: bool = False
    predictable: bool = True
    targets: bool = False
    needs_clean: bool = False
    numbered: bool = False
    piecewise_constant: bool = False
    generates: bool = False

    @property
    def surrogate(self) -> Objective:
        """A smooth objective that depends on the same outputs, for the checks of the first batch:
        by default itself.
        """
        return self

    def run(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor | None, ModelOutputs]:
        """Run the model on a batch; return its scalar loss, if any, and its outputs."""
        outputs = model(**inputs)
        return getattr(outputs, "loss", None), outputs

    def look(self, forward: Forward, inputs: Inputs) -> None:
        """Learn from the first batch what the objective is like, before the checks; by default
        nothing.
        """
        del forward, inputs

    def deferred(self) -> AbstractContextManager[Checks]:
        """Return a context for the forwards of a step; it yields the checks that the caller then
        has to confirm: by default there are none.
        """
        return nullcontext(Checks())

    def bind_batch(self, clean: RowLosses, inputs: Inputs) -> tuple[Objective, RowLosses]:
        """Return the objective of a batch's queries, and the clean losses under that objective.

        Args:
            clean: clean losses under this objective.
            inputs: the batch.
        """
        del inputs
        return self, clean

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """Run the model on `inputs` and return the losses of its rows; `features`
        requests residuals too.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define __call__(forward, inputs, features=False)."
        )


class CallableObjective(Objective):
    """A user's function of the model's outputs: a loss, a metric, a reward; it needs no derivative.

    If all its values of the first batch are whole numbers, as those of a count of mistakes are, it
    is taken for piecewise constant: the default of `perturbation_scale` is then "auto".

    Args:
        function: maps (outputs, inputs) of R rows to (R,) losses to be minimised, or to a pair
            (sums, counts) of (R,) where rows have different numbers of elements.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from hf_flops.objectives import CallableObjective
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> inputs = {"logits": logits, "labels": torch.tensor([0, 0])}
        >>> forward = lambda inputs: (None, SimpleNamespace(logits=inputs["logits"]))
        >>> def hinge(outputs, inputs):
        ...     right = outputs.logits.gather(1, inputs["labels"][:, None]).squeeze(1)
        ...     return (1 - right).clamp(min=0)
        >>> CallableObjective(hinge)(forward, inputs).sums.tolist()
        [0.0, 1.0]
    """

    def __init__(self, function: Callable[[ModelOutputs, Inputs], object]) -> None:
        self.function = function
        self._has_logits = False

    @property
    def surrogate(self) -> Objective:
        """See `Objective`; small changes do not show in a function that moves in steps."""
        from .metrics import SmoothSurrogate

        return SmoothSurrogate() if self.piecewise_constant and self._has_logits else self

    def look(self, forward: Forward, inputs: Inputs) -> None:
        """Find out whether the values are whole numbers."""

        def seen(given: Inputs) -> tuple[Tensor | None, ModelOutputs]:
            loss, outputs = forward(given)
            self._has_logits = torch.is_tensor(getattr(outputs, "logits", None))
            return loss, outputs

        values = self(seen, inputs).sums
        values = values[values.isfinite()]
        self.piecewise_constant = len(values) > 0 and bool(values.frac().eq(0).all())

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`."""
        del features
        rows = batch_size(inputs)
        _, outputs = forward(inputs)
        value = self.function(outputs, inputs)
        sums, counts = value if isinstance(value, tuple) else (value, None)
        sums = widen(torch.as_tensor(sums))
        counts = torch.ones_like(sums) if counts is None else torch.as_tensor(counts).to(sums)
        for name, tensor in (("losses", sums), ("counts", counts)):
            if tensor.shape != (rows,):
                raise ObjectiveError(
                    f"The objective returned {name} of shape {tuple(tensor.shape)} for {rows} rows."
                )
        return RowLosses(sums, counts)
