"""The model's own loss, split into rows, or of the batch as a whole."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn._reduction import legacy_get_string
from torch.overrides import TorchFunctionMode

from ..base.batch import Inputs, batch_size
from ..base.patching import Call
from ..base.transfer import to_host
from ..errors import ObjectiveError
from .base import Checks, Forward, Objective, RowLosses
from .elementwise import (
    MEANS,
    Arguments,
    element_weights,
    linear_targets,
    slopes,
    squared_residuals,
    widen,
)


class RowLossError(ObjectiveError):
    """The model's own loss cannot be split into rows."""


@dataclass(frozen=True)
class _Caught:
    """One call of a loss function: (E,) losses and weights of its elements, and requested
    features.
    """

    losses: Tensor
    weights: Tensor
    squared_residuals: Tensor | None
    logits: Tensor | None
    slopes: Tensor | None
    targets: tuple[Tensor, Tensor] | None
    mean: str | None


class _WideLosses(TorchFunctionMode):
    """Computes the standard loss functions in float32 at least, because differences of 16-bit
    losses have too few digits.
    """

    functions: ClassVar = {
        function: inspect.signature(function)
        for function in (
            F.cross_entropy,
            F.nll_loss,
            F.mse_loss,
            F.binary_cross_entropy_with_logits,
        )
    }

    def __torch_function__(
        self, func: Call, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func not in self.functions:
            return func(*args, **(kwargs or {}))
        call = self.functions[func].bind(*args, **(kwargs or {}))
        call.apply_defaults()
        floating = {
            n: v for n, v in call.arguments.items() if torch.is_tensor(v) and v.is_floating_point()
        }
        return self.loss(
            func, {**call.arguments, **{name: widen(value) for name, value in floating.items()}}
        )

    def loss(self, function: Call, given: Arguments) -> Tensor:
        """Return the result of a loss function's call with these arguments."""
        return function(**given)


class _Tap(_WideLosses):
    """Intercepts calls of the standard loss functions and keeps their unreduced values."""

    def __init__(self, features: bool, logits: bool, targets: bool = False) -> None:
        super().__init__()
        self.features, self.logits, self.targets = features, logits, targets
        self.caught: list[_Caught] = []

    def loss(self, function: Call, given: Arguments) -> Tensor:
        reduction, legacy = given["reduction"], (given["size_average"], given["reduce"])
        if legacy != (None, None):
            reduction = legacy_get_string(*legacy)
        losses = function(**{**given, "size_average": None, "reduce": None, "reduction": "none"})
        name, target, ignored = function.__name__, given["target"], given.get("ignore_index", -100)
        weights = element_weights(name, losses, target, given.get("weight"), ignored)
        squared = (
            squared_residuals(name, given["input"], target, ignored) if self.features else None
        )
        logits = given["input"] if self.logits else None
        slope = slopes(name, given) if self.logits and self.features else None
        targets = linear_targets(name, given) if self.targets and self.features else None
        self.caught.append(
            _Caught(losses, weights, squared, logits, slope, targets, MEANS.get(name))
        )
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


class SameLoss(Checks):
    """Rows add up to the model's loss: it has no auxiliary term."""

    def __init__(self) -> None:
        super().__init__()
        self._tolerances: list[float] = []

    def add(self, loss: Tensor, mean: Tensor) -> None:
        """Check the model's loss against the mean of its elements."""
        self.values += [loss.detach(), mean.detach()]
        exact = loss.dtype in (torch.float32, torch.float64)
        self._tolerances.append(1e-4 if exact else 3e-2)

    def confirm(self, values: Sequence[Tensor]) -> None:
        """See `Checks`.

        Raises:
            RowLossError: they differ by more than rounding.
        """
        numbers = [float(value) for value in values]
        for loss, mean, tolerance in zip(
            numbers[::2], numbers[1::2], self._tolerances, strict=True
        ):
            known = math.isfinite(loss) or math.isfinite(mean)
            if known and not abs(loss - mean) <= tolerance * max(1.0, abs(mean)):
                raise RowLossError(
                    f"the model's loss {loss:.6g} is not the mean {mean:.6g} of its elements"
                )


class TappedLoss(Objective):
    """The model's own loss, split into rows by intercepting torch's loss functions.

    Works if the loss is one call of `cross_entropy`, `nll_loss`, `mse_loss` or
    `binary_cross_entropy_with_logits`, with no other term. The model itself shifts and masks its
    labels.

    Args:
        logits: whether to keep logits, and slopes if features are requested.

    Attributes:
        after: the module after which calls are intercepted; None for the whole forward, which makes
            every call of torch slower.
        predictable: whether a control variate may use the logits.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from torch.nn import functional as F
        >>> from hf_flops.objectives import TappedLoss
        >>> def forward(inputs):
        ...     loss = F.cross_entropy(inputs["logits"], inputs["labels"])
        ...     return loss, SimpleNamespace(loss=loss, logits=inputs["logits"])
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> inputs = {"logits": logits, "labels": torch.tensor([0, 0])}
        >>> TappedLoss()(forward, inputs).sums
        tensor([0.1269, 2.1269])
    """

    after: nn.Module | None = None
    _checks: SameLoss | None = None  # None: losses are checked at once

    def __init__(self, logits: bool = False) -> None:
        self.logits = logits

    @contextmanager
    def deferred(self) -> Iterator[Checks]:
        """See `Objective`."""
        before, checks = self._checks, SameLoss()
        self._checks = checks
        try:
            yield checks
        finally:
            self._checks = before

    def listen_late(self, model: nn.Module, forward: Forward, inputs: Inputs) -> None:
        """Find the last module that ends before the loss, and intercept calls from there on."""
        last: list[nn.Module] = []

        def ended(module: nn.Module, args: object, output: object) -> None:
            if not tap.caught:
                last[:] = [module]

        with ExitStack() as stack, _Tap(False, False) as tap:
            for module in model.modules():
                stack.callback(module.register_forward_hook(ended).remove)
            forward(inputs)
        self.after = last[0] if last else None

    def _listen(
        self, forward: Forward, inputs: Inputs, features: bool
    ) -> tuple[_Tap, Tensor | None]:
        tap, heard = _Tap(features, self.logits, self.targets), list[_Tap]()
        with ExitStack() as stack:

            def begin(*ended: object) -> None:
                if not heard:
                    heard.append(stack.enter_context(tap))

            if self.after is None:
                begin()
            else:
                stack.callback(self.after.register_forward_hook(begin).remove)
            loss, _ = forward(inputs)
        return tap, loss

    def _compare(self, loss: Tensor | None, mean: Tensor) -> None:
        """Require that rows add up to the model's loss, now or with the deferred checks."""
        if loss is None:
            raise RowLossError("the model returns no loss")
        checks = SameLoss() if self._checks is None else self._checks
        checks.add(loss, mean)
        if self._checks is None:
            checks.confirm(to_host(*checks.values))

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`."""
        rows = batch_size(inputs)
        tap, loss = self._listen(forward, inputs, features)
        if (
            not tap.caught and self.after is not None
        ):  # these inputs do not run that module before the loss
            self.after = None
            tap, loss = self._listen(forward, inputs, features)
        if len(tap.caught) != 1:
            raise RowLossError(
                f"the model's loss is made of {len(tap.caught)} calls of torch's loss functions, "
                "not one"
            )
        caught = tap.caught[0]
        if caught.losses.numel() % rows:
            raise RowLossError(
                f"the model's loss has {caught.losses.numel()} elements for {rows} rows"
            )
        sums = caught.losses.reshape(rows, -1).sum(1)
        counts = caught.weights.reshape(rows, -1).sum(1)
        self._compare(loss, sums.sum() / counts.sum())
        squared = caught.squared_residuals
        residuals = None if squared is None else squared.reshape(rows, -1).sum(1).sqrt()
        targets, weights = caught.targets or (None, None)
        logits, slope, targets, weights = (
            None if values is None else values.reshape(rows, -1)
            for values in (caught.logits, caught.slopes, targets, weights)
        )
        return RowLosses(sums, counts, residuals, logits, slope, targets, weights, caught.mean)


class BatchLoss(Objective):
    """The model's scalar loss of the whole batch: always valid, but blind to single samples.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from torch.nn import functional as F
        >>> from hf_flops.objectives import BatchLoss
        >>> def forward(inputs):
        ...     loss = F.cross_entropy(inputs["logits"], inputs["labels"])
        ...     return loss, SimpleNamespace(loss=loss, logits=inputs["logits"])
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> inputs = {"logits": logits, "labels": torch.tensor([0, 0])}
        >>> BatchLoss()(forward, inputs).sums
        tensor([1.1269])
    """

    per_row = False

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`."""
        del features
        with _WideLosses():
            loss, _ = forward(inputs)
        if loss is None:
            raise ObjectiveError(f"The model returns no loss for inputs {sorted(inputs)}.")
        loss = widen(loss).reshape(1)
        return RowLosses(loss, torch.ones_like(loss))
