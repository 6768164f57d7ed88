"""Late expansion: what the noise does not reach runs once per sample of the batch, not once per
query row.

Query rows repeat samples, and a module whose output depends on no perturbed parameter computes the
same for every repeat. Such a module runs on the batch alone; in the other forwards of the step its
`forward` returns the recorded output, repeated for the rows. The model's inputs stay those of all
rows, so masks, positions, labels and keywords need no care.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..base.batch import Inputs, batch_size, take
from ..base.padding import columns_of
from ..base.patching import Call, replaced_forward
from .leaves import Output, clone, joined, placeholder, repeat


class _Recorded(Exception):
    """Stops a forward that has nothing left to record."""


@dataclass(frozen=True, eq=False)
class ReusePlan:
    """Which modules run once per step and sample, and what is known about their outputs: see
    `choose_reuse`.

    By default there are none, and the model runs as it is.

    Attributes:
        modules: each with one flag per leaf of its output: True if the leaf's first dimension holds
            the rows (or, row-major, rows times a whole number), False if the leaf is the same for
            any rows. A module is called once in a forward and calls none of the others.
        pass_through: modules whose output is read by others of `modules` only; NaN is handed on in
            its place, without memory.
        recomputed: small modules whose output follows from those of others: what is kept over steps
            does not include them.
        unread_inputs: inputs that nothing but `modules` reads: rows are given NaN in their place,
            without memory.
        crop_padding: whether recorded outputs may be cut where a chunk has less padding than the
            batch; None until it is known.
        token_axes: which leaves of the modules' outputs have the batch's columns (tokens) as their
            second dimension.
    """

    modules: Mapping[nn.Module, tuple[bool, ...]] = field(default_factory=dict)
    pass_through: frozenset[nn.Module] = frozenset()
    recomputed: frozenset[nn.Module] = frozenset()
    unread_inputs: frozenset[str] = frozenset()
    crop_padding: bool | None = None
    token_axes: frozenset[tuple[nn.Module, int]] = frozenset()

    @property
    def spans_steps(self) -> bool:
        """Whether outputs are kept from one step to the next."""
        return False

    def recording(self, forward: Call) -> Recording:
        """Return the context in which the plan is followed for one step; `forward` runs the
        model.
        """
        return Recording(self, forward)


@dataclass(frozen=True)
class _Run:
    """A forward in progress: (R,) int64, the recorded sample of each row, None while recording; see
    `Recording.rows`.
    """

    owner: Tensor | None
    cut: slice | None
    stops: bool  # once all outputs are recorded


class Recording:
    """Outputs of one step: a context in which the modules of a plan run once per sample.

    They have another `forward` inside, and nothing is left on the model or kept outside. The batch
    is recorded by the first forward that `batch` returns, or by `record`; forwards that `rows`
    returns use what is recorded.

    Args:
        plan: what runs once.
        forward: runs the model.
    """

    def __init__(self, plan: ReusePlan, forward: Call) -> None:
        self.plan, self.forward = plan, forward
        self.outputs: dict[nn.Module, Output] = {}
        self._samples = self._columns = 0
        # (B,) where each sample of the batch is in the record; None where all are
        self._position: Tensor | None = None
        self._run: _Run | None = None
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for module in self.plan.modules:
                stack.enter_context(replaced_forward(module, partial(self._stand_in, module)))
            self._patches = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.outputs.clear()
        self._patches.close()

    @property
    def complete(self) -> bool:
        """Whether the outputs of all modules are recorded."""
        return len(self.outputs) == len(self.plan.modules)

    @property
    def unread_inputs(self) -> frozenset[str]:
        """Inputs that rows need not be given, now that all outputs are recorded."""
        return self.plan.unread_inputs if self.complete else frozenset()

    def recall(self, inputs: Inputs, ids: Sequence[int] | None) -> None:
        """Take up what earlier steps recorded of the batch, its samples' ids given, if the plan
        spans steps.
        """

    def batch(self, inputs: Inputs, owner: Tensor | None = None, samples: int = 0) -> Call:
        """Return a forward, to be called on the batch, that records; on anything else the model
        runs as it is.

        Args:
            inputs: the batch, or a part of it.
            owner: (b,) int64, which samples the part has; rows may then repeat these only. None for
                the batch itself.
            samples: B, if it is a part.
        """
        if owner is not None:
            self._position = torch.full((samples,), -1).index_put(
                (owner,), torch.arange(len(owner))
            )
        return self._forward_of(inputs)

    def rows(self, inputs: Inputs, owner: Tensor, cut: slice | None = None) -> Call:
        """Return a forward, to be called on the rows of a chunk, that uses what is recorded; else
        as `batch`.

        Args:
            inputs: the rows.
            owner: (R,) int64, the sample of the batch that each row repeats.
            cut: which of the batch's columns (tokens) the rows have, None for all.
        """
        if cut is not None and not self.plan.crop_padding:
            return self.forward
        return self._forward_of(inputs, owner, cut)

    def record(self, inputs: Inputs) -> None:
        """Run the batch no further than to the last module's output, where no clean forward would
        record it.
        """
        if not self.complete:
            with suppress(_Recorded):
                self._forward_of(inputs, stops=True)(inputs)

    def extend(self, inputs: Inputs, owner: Tensor) -> None:
        """Record what is lacking of the samples that rows repeat, where the record is of a part of
        the batch.

        Args:
            inputs: the batch.
            owner: (R,) int64, the samples of the rows.
        """
        position = (
            torch.full((batch_size(inputs),), -1) if self._position is None else self._position
        )
        new = owner.unique()
        new = new[position[new] < 0]
        if not self.plan.modules or not len(new) or (self._position is None and self.complete):
            return
        before, known = dict(self.outputs), self._samples if self.complete else 0
        self.outputs.clear()
        self._position = None
        self.record(take(inputs, new))
        if known and self.complete:
            self.outputs.update(
                {module: self._joined(module, before[module]) for module in self.plan.modules}
            )
        self._position = position.index_put((new,), torch.arange(known, known + len(new)))
        self._samples = known + len(new)

    def adopt(self, plan: ReusePlan) -> None:
        """Go on by a plan that says more about the same modules."""
        self.plan = plan

    def token_axes(self) -> frozenset[tuple[nn.Module, int]]:
        """Return which recorded leaves have a second dimension as long as the batch has columns,
        maybe by chance.
        """
        return frozenset(
            (module, i)
            for module, (leaves, _) in self.outputs.items()
            for i, leaf in enumerate(leaves)
            if torch.is_tensor(leaf) and leaf.dim() > 2 and leaf.shape[1] == self._columns
        )

    def works_without(self, module: nn.Module, check: Callable[[], bool], *, hollow: bool) -> bool:
        """Put NaN in place of a recorded output, or let its module run again, and leave it so where
        a check still holds.

        Outputs of whole numbers, which know no NaN, are left in place.
        """
        output = self.outputs.get(module)
        if output is None:
            return False
        leaves, spec = output
        if hollow and any(
            torch.is_tensor(leaf) and not leaf.is_floating_point() for leaf in leaves
        ):
            return False
        del self.outputs[module]
        if hollow:
            self.outputs[module] = ([placeholder(leaf) for leaf in leaves], spec)
        if check():
            return True
        self.outputs[module] = output
        return False

    def _forward_of(
        self,
        inputs: Inputs,
        owner: Tensor | None = None,
        cut: slice | None = None,
        *,
        stops: bool = False,
    ) -> Call:
        def run(given: Inputs) -> object:
            if given is not inputs:
                return self.forward(given)
            if owner is None:
                self._samples, self._columns = batch_size(inputs), columns_of(inputs)
            self._run = _Run(
                owner if owner is None or self._position is None else self._position[owner],
                cut,
                stops,
            )
            try:
                return self.forward(given)
            finally:
                self._run = None

        return run

    def _stand_in(self, module: nn.Module, original: Call) -> Call:
        def forward(*args: object, **kwargs: object) -> object:
            if self._run is not None and module in self.outputs:
                return self._repeated(module, self._run)
            output = original(*args, **kwargs)
            if self._run is not None and self._run.owner is None:
                self._keep(module, output, self._run)
            return output

        return forward

    def _keep(self, module: nn.Module, output: object, run: _Run) -> None:
        leaves, spec = tree_flatten(output)
        # A copy, because what follows may write into the output.
        copy = placeholder if module in self.plan.pass_through else clone
        self.outputs[module] = ([copy(leaf) for leaf in leaves], spec)
        if run.stops and self.complete:
            raise _Recorded

    def _repeated(self, module: nn.Module, run: _Run) -> object:
        leaves, spec = self.outputs[module]
        owner = torch.arange(self._samples) if run.owner is None else run.owner
        if run.cut is not None:  # down to the columns of the chunk
            axes = self.plan.token_axes
            leaves = [
                leaf[:, run.cut] if (module, i) in axes else leaf for i, leaf in enumerate(leaves)
            ]
        pairs = zip(leaves, self.plan.modules[module], strict=True)
        return tree_unflatten(
            [repeat(leaf, self._samples, owner) if rows else clone(leaf) for leaf, rows in pairs],
            spec,
        )

    def _joined(self, module: nn.Module, before: Output) -> Output:
        """Put what was recorded of a module for further samples behind what was before."""
        after, spec = self.outputs[module]
        pairs = zip(before[0], after, self.plan.modules[module], strict=True)
        return [joined(old, new) if rows else old for old, new, rows in pairs], spec
