"""Late expansion: modules below the first perturbed one run once per sample, not once per row.

Query rows repeat samples, and a module whose output depends on no perturbed parameter returns the
same for every repeat. Such a module runs on the batch only; in the other forwards of the step its
`forward` returns the recorded output, repeated for the rows. The model still gets the inputs of all
rows, so masks, positions, labels and keyword arguments need no special treatment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..base.batch import Inputs, batch_size, take
from ..base.padding import columns_of
from ..base.patching import Call, replaced_forward
from .leaves import Output, clone, joined, placeholder, repeat


class _Recorded(Exception):
    """Stops a forward that has recorded everything."""


@dataclass(frozen=True, eq=False)
class ReusePlan:
    """The modules that run once per sample in a step, as `choose_reuse` found them.

    An empty plan changes nothing.

    Attributes:
        modules: each with one flag per leaf of its output: True if the leaf's first dimension is
            rows (or, row-major, rows times an integer), False if the leaf does not depend on the
            rows. Each is called once in a forward, and none calls another.
        pass_through: modules whose output is read only by others in `modules`; they return NaN
            placeholders, which take no memory.
        recomputed: small modules whose output can be computed from other recorded outputs; a cache
            over steps leaves them out.
        unread_inputs: inputs that only `modules` read; rows get NaN placeholders in their place.
        crop_padding: whether recorded outputs may be cropped for a chunk with less padding than the
            batch; None if unknown.
        token_axes: leaves whose second dimension is the batch's columns (tokens).
        stops_early: whether a forward that only records stops after the last module.
        spans_steps: whether outputs are kept for later steps.
    """

    modules: Mapping[nn.Module, tuple[bool, ...]] = field(default_factory=dict)
    pass_through: frozenset[nn.Module] = frozenset()
    recomputed: frozenset[nn.Module] = frozenset()
    unread_inputs: frozenset[str] = frozenset()
    crop_padding: bool | None = None
    token_axes: frozenset[tuple[nn.Module, int]] = frozenset()
    stops_early: bool = True
    spans_steps: ClassVar[bool] = False

    def recording(self, forward: Call) -> Recording:
        """Return a context that applies the plan to one step; `forward` runs the model."""
        return Recording(self, forward)


@dataclass(frozen=True)
class _Run:
    """A forward in progress; see `Recording.rows`."""

    owner: Tensor | None  # (R,) int64, the recorded sample of each row; None while recording
    cut: slice | None
    stops: bool  # as soon as all outputs are recorded


class Recording:
    """A context, for one step, in which the modules of a plan run once per sample.

    Inside, the modules' `forward` is replaced; afterwards the model is unchanged and no output is
    kept. The first forward from `batch`, or `record`, records the outputs of the batch; forwards
    from `rows` use them.

    Args:
        plan: the modules that run once per sample.
        forward: runs the model.

    Attributes:
        outputs: the recorded outputs by module.
    """

    def __init__(self, plan: ReusePlan, forward: Call) -> None:
        self.plan, self.forward = plan, forward
        self.outputs: dict[nn.Module, Output] = {}
        self._samples = self._columns = 0
        # (B,) index of each sample in the record, -1 if absent; None if all are there, in order
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
        """Inputs that rows do not need, once all outputs are recorded."""
        return self.plan.unread_inputs if self.complete else frozenset()

    def recall(self, inputs: Inputs, ids: Sequence[int] | None) -> None:
        """Restore what earlier steps recorded of samples `ids`, if the plan spans steps."""

    def batch(self, inputs: Inputs, owner: Tensor | None = None, samples: int = 0) -> Call:
        """Return a forward that records when it is called on `inputs`; other inputs run unchanged.

        Args:
            inputs: the batch, or a part of it.
            owner: (b,) int64, the samples of the part, which are the only ones that rows may
                repeat; None for the whole batch.
            samples: B, for a part.
        """
        if owner is not None:
            self._position = torch.full((samples,), -1).index_put(
                (owner,), torch.arange(len(owner))
            )
        return self._forward_of(inputs)

    def rows(self, inputs: Inputs, owner: Tensor, cut: slice | None = None) -> Call:
        """Return a forward that uses the recorded outputs when it is called on `inputs`.

        Args:
            inputs: of the rows of a chunk.
            owner: (R,) int64, the sample of the batch that each row repeats.
            cut: the columns (tokens) of the batch that the rows have; None for all.
        """
        if cut is not None and not self.plan.crop_padding:
            return self.forward
        return self._forward_of(inputs, owner, cut)

    def record(self, inputs: Inputs) -> None:
        """Record the batch without a clean forward: run the model up to the last module."""
        if not self.complete:
            with suppress(_Recorded):
                self._forward_of(inputs, stops=True)(inputs)

    def extend(self, inputs: Inputs, owner: Tensor) -> None:
        """Record the missing samples that rows repeat, if only a part of the batch is recorded.

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
        before = dict(self.outputs)
        known = self._samples if self.complete else 0
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
        """Continue with a plan that knows more about the same modules."""
        self.plan = plan

    def token_axes(self) -> frozenset[tuple[nn.Module, int]]:
        """Return the recorded leaves with as many entries along axis 1 as the batch has columns."""
        return frozenset(
            (module, i)
            for module, (leaves, _) in self.outputs.items()
            for i, leaf in enumerate(leaves)
            if torch.is_tensor(leaf) and leaf.dim() > 2 and leaf.shape[1] == self._columns
        )

    def works_without(self, module: nn.Module, check: Callable[[], bool], *, hollow: bool) -> bool:
        """Replace a recorded output by NaN (`hollow`), or remove it; keep that if a check holds.

        Outputs with integer tensors, which have no NaN, are not replaced.
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
        def run(batch: Inputs) -> object:
            if batch is not inputs:
                return self.forward(batch)
            if owner is None:
                self._samples, self._columns = batch_size(inputs), columns_of(inputs)
            self._run = _Run(
                owner if owner is None or self._position is None else self._position[owner],
                cut,
                stops,
            )
            try:
                return self.forward(batch)
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
        # A copy, because later modules may write into the output.
        copy = placeholder if module in self.plan.pass_through else clone
        self.outputs[module] = ([copy(leaf) for leaf in leaves], spec)
        if run.stops and self.plan.stops_early and self.complete:
            raise _Recorded

    def _repeated(self, module: nn.Module, run: _Run) -> object:
        leaves, spec = self.outputs[module]
        owner = torch.arange(self._samples) if run.owner is None else run.owner
        if run.cut is not None:
            leaves = [
                leaf[:, run.cut] if (module, i) in self.plan.token_axes else leaf
                for i, leaf in enumerate(leaves)
            ]
        rows = [
            repeat(leaf, self._samples, owner) if repeats else clone(leaf)
            for leaf, repeats in zip(leaves, self.plan.modules[module], strict=True)
        ]
        return tree_unflatten(rows, spec)

    def _joined(self, module: nn.Module, before: Output) -> Output:
        """Append a module's outputs for further samples to earlier ones."""
        after, spec = self.outputs[module]
        triples = zip(before[0], after, self.plan.modules[module], strict=True)
        return [joined(old, new) if rows else old for old, new, rows in triples], spec
