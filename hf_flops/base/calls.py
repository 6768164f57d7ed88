"""Which modules a computation calls, and their recorded outputs in place of later calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .constants import Constants, Value
from .patching import Call

Leaf: TypeAlias = tuple[nn.Module, int, int]
"""A tensor that a module has returned: the module, the number of the call, the tensor's index."""


@dataclass(eq=False)
class CallTree:
    """A call of a module, with the calls that it made; the root belongs to no module.

    Attributes:
        module: that was called.
        output: what it returned.
        children: the calls that it made itself, in order.
    """

    module: nn.Module | None = None
    output: object = None
    children: list[CallTree] = field(default_factory=list)

    @classmethod
    def of(cls, run: Callable[[], object]) -> CallTree:
        """Return the calls of a computation."""
        root = cls()
        stack = [root]

        def begin(module: nn.Module, args: object) -> None:
            call = cls(module)
            stack[-1].children.append(call)
            stack.append(call)

        def end(module: nn.Module, args: object, output: object) -> None:
            stack.pop().output = output

        with ExitStack() as hooks:
            hooks.callback(register_module_forward_pre_hook(begin).remove)
            hooks.callback(register_module_forward_hook(end, always_call=True).remove)
            run()
        return root


def per_row_modules(first: CallTree, second: CallTree, rows: tuple[int, int]) -> list[nn.Module]:
    """Return the outermost modules all of whose outputs have one number of entries per row.

    Args:
        first: the calls for some rows.
        second: the same calls for another number of rows.
        rows: both numbers.
    """
    found: dict[nn.Module, None] = {}
    for one, other in zip(first.children, second.children, strict=False):
        entries = _entries(one.output, rows[0])
        if one.module is not None and entries and entries == _entries(other.output, rows[1]):
            found[one.module] = None
        else:
            found.update(dict.fromkeys(per_row_modules(one, other, rows)))
    return list(found)


def _entries(output: object, rows: int) -> list[int]:
    """Return how many entries per row each tensor of an output has; nothing if one has no rows."""
    found = []
    for leaf in tree_flatten(output)[0]:
        if torch.is_tensor(leaf):
            if leaf.dim() == 0 or len(leaf) == 0 or len(leaf) % rows:
                return []
            found.append(len(leaf) // rows)
        elif not isinstance(leaf, (int, float, str, bool, type(None))):
            return []
    return found


class Tape:
    """Records the outputs of modules, and returns them when the modules are called again.

    Args:
        modules: each call of which is recorded, but not the calls that it makes.

    Attributes:
        outputs: the leaves of what each call of a module has returned, in order.
        constant: modules with the numbers of those calls that were made without gradients.
    """

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self.modules = modules
        self.outputs: dict[nn.Module, list[tuple[list[object], TreeSpec]]] = {}
        self.constant: set[tuple[nn.Module, int]] = set()

    @contextmanager
    def recording(
        self, known: Callable[[nn.Module, int], object | None] = lambda module, number: None
    ) -> Iterator[None]:
        """Record outputs inside the context; no module runs with gradients.

        Args:
            known: returns the output of a call that need not be made, by the call's number.
        """
        self.outputs = {module: [] for module in self.modules}
        busy = False

        def call(module: nn.Module, original: Call, *args: object, **kwargs: object) -> object:
            nonlocal busy
            if busy:
                return original(*args, **kwargs)
            number = len(self.outputs[module])
            if not torch.is_grad_enabled():
                self.constant.add((module, number))
            output = known(module, number)
            if output is None:
                busy = True
                try:
                    with torch.no_grad():
                        output = original(*args, **kwargs)
                finally:
                    busy = False
            # another container: the caller may write into its own
            self.outputs[module].append(tree_flatten(output))
            return output

        with replaced_calls(self.modules, call):
            yield

    @contextmanager
    def playing(self, change: Callable[[Leaf, object], object]) -> Iterator[None]:
        """Return recorded outputs in place of calls inside the context.

        Args:
            change: maps each leaf of an output to what is returned in its place.
        """
        used = dict.fromkeys(self.modules, 0)

        def call(module: nn.Module, original: Call, *args: object, **kwargs: object) -> object:
            number = used[module]
            used[module] += 1
            if number >= len(self.outputs[module]):
                raise ValueError(f"{type(module).__name__} is called more often for one row")
            leaves, spec = self.outputs[module][number]
            return tree_unflatten(
                [change((module, number, i), leaf) for i, leaf in enumerate(leaves)], spec
            )

        with replaced_calls(self.modules, call):
            yield

    def leaves(self) -> Iterator[tuple[Leaf, Tensor]]:
        """Yield the floating-point tensors among the outputs."""
        for module, calls in self.outputs.items():
            for number, (leaves, _) in enumerate(calls):
                for i, leaf in enumerate(leaves):
                    if torch.is_tensor(leaf) and leaf.is_floating_point():
                        yield (module, number, i), leaf


def constants_of(
    model: nn.Module, run: Callable[[Constants], object], held: Sequence[Value] | None = None
) -> tuple[list[Tensor], list[Value]]:
    """Return what a computation takes from a model without gradients, inside `torch.no_grad`, and
    the other values that it holds constant: see `Constants`.

    No module of the model runs with gradients.

    Args:
        model: the model.
        run: does the computation inside a context.
        held: see `Constants`.
    """
    own, found, before = set(model.modules()), list[Tensor](), list[bool]()
    constants = Constants(held)

    def begin(module: nn.Module, args: object) -> None:
        if module in own:
            constants.paused = True
            before.append(torch.is_grad_enabled())
            torch.set_grad_enabled(False)

    def end(module: nn.Module, args: object, output: object) -> None:
        if module not in own:
            return
        torch.set_grad_enabled(before.pop())
        constants.paused = bool(before)
        if not before and not torch.is_grad_enabled():
            found.extend(leaf for leaf in tree_flatten(output)[0] if torch.is_tensor(leaf))

    with ExitStack() as hooks, torch.enable_grad():
        hooks.callback(register_module_forward_pre_hook(begin).remove)
        hooks.callback(register_module_forward_hook(end, always_call=True).remove)
        run(constants)
    return found, constants.values


@contextmanager
def replaced_calls(modules: Collection[nn.Module], call: Call) -> Iterator[None]:
    """Replace what calling a module does, hooks included, by `call(module, original, ...)`."""
    with ExitStack() as stack:
        for module in modules:
            before, original = module.__dict__.get("_call_impl"), module._call_impl
            module._call_impl = partial(call, module, original)  # type: ignore[method-assign]
            stack.callback(_restore, module, before)
        yield


def _restore(module: nn.Module, before: Call | None) -> None:
    del module._call_impl
    if before is not None:
        module._call_impl = before  # type: ignore[method-assign]


def is_half(value: object) -> bool:
    """Return whether something is a tensor of 16-bit floats."""
    return torch.is_tensor(value) and value.dtype in (torch.float16, torch.bfloat16)


def rows_of(rows: int, part: slice, factors: Tensor | None, name: Leaf, leaf: object) -> object:
    """Return some rows of a tensor, 16-bit floats in float32; others as they are.

    Args:
        rows: of the tensor.
        part: those that are returned.
        factors: (r,) by which they are multiplied, small ones after division by their standard
            deviation.
        name: of the tensor.
        leaf: the tensor, or something else.
    """
    del name
    if not torch.is_tensor(leaf):
        return leaf
    entries = len(leaf) // rows
    values = leaf[part.start * entries : part.stop * entries]
    if not leaf.is_floating_point():
        return values
    values = values.float() if is_half(values) else values
    if factors is None:
        return values
    shape = (-1, *[1] * (leaf.dim() - 1))
    values = values / leaf.to(values).std(unbiased=False).clamp(1e-6, 1.0)
    return values * factors.to(values).repeat_interleave(entries).view(shape)
