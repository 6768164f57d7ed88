"""Late expansion: what the noise does not reach runs once per sample of the batch, not once per query row.

Query rows repeat samples, and a module whose output depends on no perturbed parameter computes the same for every repeat.
Such a module runs on the batch alone; in the other forwards of the step its `forward` returns the recorded output, repeated
for the rows. The model's inputs stay those of all rows, so masks, positions, labels and keywords need no care.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .rows import batch_size, hollow, take

Call = Callable[..., Any]
Output = tuple[list[Any], TreeSpec]


class _Recorded(Exception):
    """Stops a forward that has nothing left to record."""


@contextmanager
def replaced_forward(module: nn.Module, make: Callable[[Call], Call]) -> Iterator[None]:
    """Let `module.forward` be what `make` makes of it for a while, on this instance alone."""
    before, original = module.__dict__.get("forward"), module.forward
    module.forward = wraps(original)(make(original))  # whoever asks for the signature gets the original one
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class Reuse:
    """Runs some modules of a model once per step and sample.

    Args:
        modules: each with one flag per leaf of its output: True if the leaf's first dimension holds the rows (or, row-major,
            rows times a whole number), False if the leaf is the same for any rows. A module is called once in a forward and
            calls none of the others. By default none: the model runs as it is.

    Attributes:
        unused: modules whose output is read by others of `modules` only; NaN is handed on in its place, without memory.
        derived: small modules whose output follows from those of others; see `find_derived`.
        unread: inputs that nothing but `modules` reads: rows are given NaN in their place, without memory.
        narrow: whether recorded outputs may be cut where a chunk has less padding than the batch; None until it is known.
        columned: which leaves of the modules' outputs have the batch's columns (tokens) as their second dimension.
        remembers: whether outputs are kept from one step to the next.
    """

    remembers = False

    def __init__(self, modules: Mapping[nn.Module, tuple[bool, ...]] | None = None) -> None:
        self.modules = dict(modules or {})
        self.unused: set[nn.Module] = set()
        self.derived: set[nn.Module] = set()
        self.unread: frozenset[str] = frozenset()
        self.narrow: bool | None = None
        self.columned: frozenset[tuple[nn.Module, int]] = frozenset()
        self._kept: dict[nn.Module, Output] = {}
        self._samples = self._columns = 0
        self._cut: slice | None = None
        self._owner: Tensor | None = None
        self._place: Tensor | None = None  # (B,) where each sample of the batch is in the record; None where all are
        self._running = self._stopping = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the modules' `forward` for one step; nothing is left on the model or kept after it."""
        with ExitStack() as stack:
            stack.callback(self._kept.clear)
            self._place = None
            for module in self.modules:
                stack.enter_context(replaced_forward(module, partial(self._stand_in, module)))
            yield

    def prepare(self, forward: Call, inputs: Mapping[str, Any], ids: Sequence[int] | None) -> None:
        """Called with the batch and its samples' ids before its forwards, for those who know some outputs already."""

    def through(
        self, forward: Call, inputs: Mapping[str, Any], owner: Tensor | None = None, cut: slice | None = None
    ) -> Call:
        """Return `forward` for an objective, to be called on `inputs`; on anything else the model runs as it is.

        Args:
            forward: runs the model.
            inputs: the batch, whose outputs are to be recorded, or the rows of a chunk.
            owner: (R,) int64, the sample of the batch that each row repeats; None for the batch itself.
            cut: which of the batch's columns (tokens) these inputs have, None for all.
        """
        if cut is not None and not self.narrow:
            return forward

        def run(given: Mapping[str, Any]) -> Any:
            if given is not inputs:
                return forward(given)
            self._running, self._cut = True, cut
            self._owner = owner if owner is None or self._place is None else self._place[owner]
            self._samples = batch_size(inputs) if owner is None else self._samples
            self._columns = columns_of(inputs) if owner is None else self._columns
            try:
                return forward(given)
            finally:
                self._running, self._owner, self._cut = False, None, None

        return run

    def record(self, forward: Call, inputs: Mapping[str, Any]) -> None:
        """Run the batch no further than to the last module's output, where no clean forward would record it."""
        if self.complete:
            return
        self._stopping = True
        try:
            self.through(forward, inputs)(inputs)
        except _Recorded:
            pass
        finally:
            self._stopping = False

    def of_samples(self, owner: Tensor, samples: int) -> None:
        """Say that the next record is of the samples `owner` (b,) of a batch of B; rows may then repeat these only."""
        self._place = torch.full((samples,), -1).index_put((owner,), torch.arange(len(owner)))

    def extend(self, forward: Call, inputs: Mapping[str, Any], owner: Tensor) -> None:
        """Record what is lacking of the samples that rows repeat, where the record is of a part of the batch.

        Args:
            forward: runs the model.
            inputs: the batch.
            owner: (R,) int64, the samples of the rows.
        """
        samples = batch_size(inputs)
        place = torch.full((samples,), -1) if self._place is None else self._place
        new = owner.unique()
        new = new[place[new] < 0]
        if not self.modules or not len(new) or (self._place is None and self.complete):
            return
        before, known = dict(self._kept), self._samples if self.complete else 0
        self._kept.clear()
        self._place = None
        self.record(forward, take(inputs, new))
        if known and self.complete:
            self._kept.update({module: self._joined(module, before[module]) for module in self.modules})
        self._place = place.index_put((new,), torch.arange(known, known + len(new)))
        self._samples = known + len(new)

    def _joined(self, module: nn.Module, before: Output) -> Output:
        """Put what was recorded of a module for further samples behind what was before."""
        after, spec = self._kept[module]
        pairs = zip(before[0], after, self.modules[module], strict=True)
        return [_behind(old, new) if rows else old for old, new, rows in pairs], spec

    def drop_unused(self, unnoticed: Callable[[], bool]) -> None:
        """Find `unused`: put NaN in place of one recorded output after the other, and ask if the model's outputs stay."""
        for module, output in list(self._kept.items()):
            self._kept[module] = ([_hollow(leaf) for leaf in output[0]], output[1])
            exact = any(torch.is_tensor(leaf) and not leaf.is_floating_point() for leaf in output[0])
            if not exact and unnoticed():
                self.unused.add(module)
            else:
                self._kept[module] = output

    def find_derived(self, unnoticed: Callable[[], bool]) -> None:
        """Find `derived`: let one small module after the other run again, and ask if the model's outputs stay."""
        size = {module: sum(parameter.numel() for parameter in module.parameters()) for module in self.modules}
        for module in self.modules:
            if module not in self.unused and 10 * size[module] < sum(size.values()):
                output = self._kept.pop(module)
                if unnoticed():
                    self.derived.add(module)
                else:
                    self._kept[module] = output

    @property
    def complete(self) -> bool:
        """Whether the outputs of all modules are recorded."""
        return len(self._kept) == len(self.modules)

    def _stand_in(self, module: nn.Module, original: Call) -> Call:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._running and module in self._kept:
                return self._repeated(module, torch.arange(self._samples) if self._owner is None else self._owner)
            output = original(*args, **kwargs)
            if self._running and self._owner is None:
                self._keep(module, output)
            return output

        return forward

    def _keep(self, module: nn.Module, output: Any) -> None:
        leaves, spec = tree_flatten(output)
        # A copy, because what follows may write into the output.
        copy = _hollow if module in self.unused else _clone
        self._kept[module] = ([copy(leaf) for leaf in leaves], spec)
        if self._stopping and self.complete:
            raise _Recorded

    def _repeated(self, module: nn.Module, owner: Tensor) -> Any:
        leaves, spec = self._kept[module]
        per_row = self.modules[module]
        if self._cut is not None:  # down to the columns of the chunk
            leaves = [leaf[:, self._cut] if (module, i) in self.columned else leaf for i, leaf in enumerate(leaves)]
        found = [self._repeat(leaf, owner) if rows else _clone(leaf) for leaf, rows in zip(leaves, per_row, strict=True)]
        return tree_unflatten(found, spec)

    def with_columns(self) -> frozenset[tuple[nn.Module, int]]:
        """Return which recorded leaves have a second dimension as long as the batch has columns, maybe by chance."""
        return frozenset(
            (module, i)
            for module, (leaves, _) in self._kept.items()
            for i, leaf in enumerate(leaves)
            if torch.is_tensor(leaf) and leaf.dim() > 2 and leaf.shape[1] == self._columns
        )

    def _repeat(self, leaf: Tensor, owner: Tensor) -> Tensor:
        """Repeat (B * m, ...) for the rows: (R * m, ...)."""
        times, tail = len(leaf) // self._samples, leaf.shape[1:]
        if not any(leaf.stride()):
            return leaf[:1].expand(len(owner) * times, *tail)
        owner = owner.to(leaf.device)
        if times == 1:
            return leaf.index_select(0, owner)
        return leaf.reshape(self._samples, times, *tail).index_select(0, owner).flatten(0, 1)


def columns_of(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens the texts of a batch have, padding included; 0 where there are none."""
    mask = inputs.get("attention_mask")
    return mask.shape[1] if torch.is_tensor(mask) and mask.dim() == 2 else 0


def _behind(old: Tensor, new: Tensor) -> Tensor:
    """Return (a + b, ...) for (a, ...) and (b, ...); what takes no memory still takes none."""
    return torch.cat([old, new]) if any(old.stride()) else old[:1].expand(len(old) + len(new), *old.shape[1:])


def _clone(leaf: Any) -> Any:
    return leaf.clone(memory_format=torch.contiguous_format) if torch.is_tensor(leaf) else leaf


def _hollow(leaf: Any) -> Any:
    """Return NaN in the shape of a tensor, without its memory; whole numbers know no NaN, they are copied."""
    if torch.is_tensor(leaf) and leaf.is_floating_point():
        return hollow(leaf, leaf.shape)
    return _clone(leaf)
