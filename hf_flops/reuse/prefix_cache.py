"""Prefix cache: frozen layers run once per sample, and their outputs are kept over epochs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar
from weakref import finalize

import torch
from torch import Tensor, nn

from ..base.batch import ROW, Inputs, batch_size, take
from ..base.padding import columns_of
from ..base.patching import Call
from ..base.state import raw_bytes
from ..errors import ConfigurationError
from .late_expansion import Recording, ReusePlan
from .leaves import Leaf, Output, repeat

Layout = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Sample:
    """Identity of one sample: its id in the data set, the names, shapes and dtypes of its inputs
    (padding included), and a hash of their content.
    """

    id: int
    layout: Layout
    content: bytes


def identify(inputs: Inputs, ids: Sequence[int]) -> list[Sample]:
    """Identify the samples of a batch; ids: (B,)."""
    # the position in the batch is not part of a sample
    inputs = {name: value for name, value in inputs.items() if name != ROW}
    per_row = {
        k: v
        for k, v in inputs.items()
        if isinstance(v, (list, tuple)) or (torch.is_tensor(v) and v.dim() > 0)
    }
    shared = [(name, repr(value)) for name, value in inputs.items() if name not in per_row]
    samples = []
    for i, number in enumerate(ids):
        values_of_sample = [(name, values[i]) for name, values in per_row.items()]
        layout: list[tuple[str, object]] = [
            (name, (tuple(value.shape), value.dtype) if torch.is_tensor(value) else None)
            for name, value in values_of_sample
        ]
        content = blake2b(digest_size=16)
        for _, value in values_of_sample:
            content.update(raw_bytes(value) if torch.is_tensor(value) else repr(value).encode())
        samples.append(Sample(number, (*layout, *shared), content.digest()))
    return samples


class SampleStore:
    """Keeps tensors by sample; a sample with other padding is a different one.

    Args:
        gigabytes: total size; samples that no longer fit are not kept.
        folder: of an unnamed temporary file, which is deleted when the run ends; None for memory.

    Attributes:
        patterns: the modules' outputs for samples of a layout, with empty tensors in place of those
            that are kept by sample.
    """

    def __init__(self, gigabytes: float, folder: Path | None = None) -> None:
        self.room = int(gigabytes * 1e9)
        self._file: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            # it lives as long as the store
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            finalize(self, self._file.close)
        # content of the inputs, and the tensors or their places in the file
        self._entries: dict[tuple[int, Layout], tuple[bytes, list[Any] | None]] = {}
        self.patterns: dict[Layout, dict[nn.Module, Output]] = {}

    def get(self, sample: Sample) -> list[Tensor] | None:
        """Return the tensors of a sample, on the CPU, or None.

        Raises:
            ConfigurationError: the inputs of the sample have changed.
        """
        content, entry = self._entries.get((sample.id, sample.layout), (sample.content, None))
        if content != sample.content:
            raise ConfigurationError(
                f"The inputs of sample {sample.id} have changed since they were kept: "
                "prefix_cache cannot be used with data augmentation, random masks or ids that are "
                "not unique; set prefix_cache=None."
            )
        if entry is None or self._file is None:
            return entry
        return [self._read(*where) for where in entry]

    def put(self, sample: Sample, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors of a sample, if there is room."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        key = (sample.id, sample.layout)
        if size <= self.room and key not in self._entries:
            self.room -= size
            entry = [
                self._write(t) if self._file else t.detach().to("cpu", copy=True) for t in tensors
            ]
            self._entries[key] = sample.content, entry

    def _write(self, tensor: Tensor) -> tuple[int, torch.Size, torch.dtype]:
        start = self._file.seek(0, 2)
        self._file.write(raw_bytes(tensor))
        return start, tensor.shape, tensor.dtype

    def _read(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(raw_bytes(tensor))
        return tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedPlan(ReusePlan):
    """Late expansion with outputs of the batch's samples from earlier epochs.

    Modules in `pass_through` and `recomputed` are not kept: the former are not read, and the latter
    run again on kept outputs. No module may depend on a trainable parameter.

    Attributes:
        store: keeps the outputs.
    """

    store: SampleStore
    spans_steps: ClassVar[bool] = True

    @classmethod
    def of(cls, plan: ReusePlan, store: SampleStore) -> CachedPlan:
        """Return a plan with a store."""
        return cls(**vars(plan), store=store)

    def recording(self, forward: Call) -> CachedRecording:
        """See `ReusePlan`."""
        return CachedRecording(self, forward)

    def leaves(self) -> list[tuple[nn.Module, int]]:
        """Return the leaves that are kept by sample: modules, and indices of their leaves."""
        return [
            (module, i)
            for module, flags in self.modules.items()
            if module not in self.pass_through | self.recomputed
            for i, rows in enumerate(flags)
            if rows
        ]


class CachedRecording(Recording):
    """A recording that starts from kept outputs; new ones are kept when the step ends."""

    plan: CachedPlan

    def __init__(self, plan: CachedPlan, forward: Call) -> None:
        super().__init__(plan, forward)
        self._new: list[Sample] = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self.complete:
                self._keep_samples(self._new)
        finally:
            super().__exit__(kind, error, trace)

    def recall(self, inputs: Inputs, ids: Sequence[int] | None) -> None:
        """Restore the outputs of the batch; samples without kept outputs are run.

        Raises:
            ConfigurationError: the samples have no ids, or the inputs of one have changed.
        """
        if ids is None or len(ids) != batch_size(inputs):
            raise ConfigurationError(
                "prefix_cache needs to know the samples: add a column sample_id to the data set."
            )
        samples, self._columns = identify(inputs, ids), columns_of(inputs)
        entries = [self.plan.store.get(sample) for sample in samples]
        missing = [i for i, entry in enumerate(entries) if entry is None]
        if len(missing) == len(samples):
            self._new = samples  # the clean forward records them
            return
        if missing:
            self.record(take(inputs, torch.tensor(missing)))
            if not self.complete:
                return
            for i, entry in zip(
                missing, self._keep_samples([samples[i] for i in missing]), strict=True
            ):
                entries[i] = entry
        self._restore(samples[0].layout, [entry for entry in entries if entry is not None])

    def _keep_samples(self, samples: Sequence[Sample]) -> list[list[Tensor]]:
        """Keep the recorded outputs of these samples, which are all in the record; return them."""
        store, leaves, entries = self.plan.store, self.plan.leaves(), []
        for i, sample in enumerate(samples):
            entry = [
                repeat(self.outputs[module][0][leaf], self._samples, torch.tensor([i]))
                for module, leaf in leaves
            ]
            store.put(sample, entry)
            entries.append(entry)
        if samples and samples[0].layout not in store.patterns:
            store.patterns[samples[0].layout] = {
                module: ([self._pattern(module, i, leaf) for i, leaf in enumerate(outputs)], spec)
                for module, (outputs, spec) in self.outputs.items()
                if module not in self.plan.recomputed
            }
        return entries

    def _pattern(self, module: nn.Module, index: int, leaf: Leaf) -> Leaf:
        if not self.plan.modules[module][index]:
            return leaf
        return (
            repeat(leaf, self._samples, torch.tensor([0]))
            if module in self.plan.pass_through
            else leaf.new_empty(0)
        )

    def _restore(self, layout: Layout, entries: Sequence[list[Tensor]]) -> None:
        """Fill the record of the step from the kept tensors of each sample."""
        self.outputs.clear()
        self._samples = 1
        everyone = torch.zeros(len(entries), dtype=torch.int64)
        for module, (leaves, spec) in self.plan.store.patterns[layout].items():
            hollow, rows = module in self.plan.pass_through, self.plan.modules[module]
            outputs = [
                repeat(leaf, 1, everyone) if hollow and row else leaf
                for leaf, row in zip(leaves, rows, strict=True)
            ]
            self.outputs[module] = outputs, spec
        for index, (module, leaf) in enumerate(self.plan.leaves()):
            outputs = self.outputs[module][0]
            outputs[leaf] = torch.cat([entry[index] for entry in entries]).to(outputs[leaf].device)
        self._samples = len(entries)
