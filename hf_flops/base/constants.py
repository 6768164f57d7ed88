"""Values that a computation holds constant, for backpropagation: forward passes would move them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from .patching import Call

Value: TypeAlias = Tensor | float
_DETACHES = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_NUMBERS = (Tensor.item, Tensor.__float__)


class Constants(TorchFunctionMode):
    """Finds the floating-point values that a computation holds constant: what `detach` returns and
    what is computed inside `torch.no_grad`, where other functions read it, and Python's numbers.

    Args:
        held: values of an earlier run, which are read in place of those of this run.

    Attributes:
        values: of this run, in the order in which they are read.
        paused: whether nothing is noted for now.

    Example:
        >>> import torch
        >>> from hf_flops.base.constants import Constants
        >>> with Constants() as constants:
        ...     x = torch.tensor([2.0])
        ...     _ = x * x.detach()
        >>> with Constants(constants.values):
        ...     x = torch.tensor([3.0])
        ...     x * x.detach()
        tensor([6.])
    """

    def __init__(self, held: Sequence[Value] | None = None) -> None:
        super().__init__()
        self.held, self.paused = held, False
        self.values: list[Value] = []
        self._gradients = True  # no `no_grad` is open
        self._constant = WeakIdKeyDictionary()

    def __enter__(self) -> Constants:
        self._gradients = torch.is_grad_enabled()
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Call, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and not self.paused:
            self._gradients = bool(args[0])
        # an autograd.Function's own forward is no constant, though it runs without gradients
        own = self._gradients and not torch.is_grad_enabled()
        if self.paused or own:
            return func(*args, **kwargs)
        inside = not torch.is_grad_enabled()
        if not inside:
            args, kwargs = tree_map_only(Tensor, self._read, (args, kwargs))
        result = func(*args, **kwargs)
        if func in _NUMBERS and isinstance(result, float):
            return self._noted(result)
        if inside or func in _DETACHES:
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            for leaf in tree_leaves(result):  # x.float() may be x itself
                if torch.is_tensor(leaf) and leaf.is_floating_point() and id(leaf) not in given:
                    self._constant[leaf] = True
        return result

    def _read(self, tensor: Tensor) -> Any:
        return self._noted(tensor) if tensor in self._constant else tensor

    def _noted(self, value: Value) -> Value:
        """Note a value and return the one to read."""
        number = len(self.values)
        self.values.append(value)
        if self.held is None:
            return value
        if number >= len(self.held) or _shape(self.held[number]) != _shape(value):
            raise ValueError("the loss holds other values constant than before")
        return self.held[number]


def same_values(first: Sequence[Value], second: Sequence[Value]) -> bool:
    """Return whether two runs hold the same values."""
    return len(first) == len(second) and all(
        torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        for one, other in zip(first, second, strict=True)
    )


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(value.shape) if torch.is_tensor(value) else ()
