"""A pretend accelerator: torch's PrivateUse1 device, with its memory and its arithmetic on the CPU.

Its tensors are ordinary tensors of another device, with real storage, sizes and strides: DLPack
hands the memory of a CPU tensor over under the other device's name, and back. One fallback kernel
runs every operation on the CPU. It refuses tensors of two devices, as a GPU does, and counts what
makes the host of a GPU wait: values and tensors that are read back, results whose size depends on
values, and blocking copies to the device.
"""

from __future__ import annotations

import ctypes
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "pretend"
DEVICE = torch.device("privateuseone", 0)
# what a GPU must finish before the host learns the size of the result
_SIZED = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::equal",
    "aten::_local_scalar_dense",
    "aten::_linalg_svd",
    "aten::linalg_qr",
    "aten::linalg_cholesky_ex.check",
}
# these take indices of the CPU too, and wait for their copy
_INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}
_SOURCES = ("hf_flops", "transformers", "accelerate", "peft")


class Mixed(RuntimeError):
    """An operation got tensors of two devices."""


class _Managed(ctypes.Structure):
    """The first fields of DLPack's tensor: where the memory lies."""

    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int), ("index", ctypes.c_int))


_CPU, _OTHER = 1, 12  # kinds of devices in DLPack
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _renamed(tensor: Tensor, kind: int) -> Tensor:
    """Return a tensor of the same memory that belongs to another kind of device."""
    capsule = torch._C._to_dlpack(tensor.detach())
    place = _Managed.from_address(_pointer(capsule, b"dltensor"))
    place.kind, place.index = kind, 0
    return torch._C._from_dlpack(capsule)


class Waits:
    """Counts how often the host waited for the device, by the line that made it wait."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    @property
    def number(self) -> int:
        """How often the host waited so far."""
        return self.lines.total()

    def add(self, what: str) -> None:
        """Count a wait at the innermost line of a library that users know."""
        frames = traceback.extract_stack()[:-2]
        known = [f for f in frames if any(f"/{name}/" in f.filename for name in _SOURCES)]
        frame = (known or frames)[-1]
        folder = Path(frame.filename)
        self.lines[f"{folder.parent.name}/{folder.name}:{frame.lineno} {what}"] += 1


_waits = Waits()


def _is_ours(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _is_number(value: object) -> bool:
    """Return whether torch passed a number in the place of a tensor."""
    return isinstance(value, (bool, int, float))


def _to_host(value: Any) -> Any:
    """Return a tensor's memory as the CPU's, and our device as the CPU."""
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return _renamed(value, _CPU) if _is_ours(value) else value


def _check(op: Any, tensors: list[Tensor]) -> None:
    """Refuse two devices; numbers of the CPU are values, and indices may lie there."""
    name = op._schema.name
    strangers = [tensor for tensor in tensors if not _is_ours(tensor)]
    if name in _INDEXING:
        strangers = [tensor for tensor in strangers if tensor.dtype.is_floating_point]
        if any(not _is_ours(t) or t.dtype == torch.bool for t in tensors[1:]):
            _waits.add(name)
    if any(tensor.dim() > 0 or torch.Tag.pointwise not in op.tags for tensor in strangers):
        raise Mixed(f"{op} got tensors of {[str(tensor.device) for tensor in tensors]}")


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    tensors: list[Tensor] = []
    tree_map(lambda v: tensors.append(v) if isinstance(v, Tensor) else None, (args, kwargs))
    _check(op, tensors)
    if op._schema.name in _SIZED:
        _waits.add(op._schema.name)
    _waits.launches[op._schema.name] += 1
    ours: dict[int, Tensor] = {}

    def lent(value: Any) -> Any:
        host = _to_host(value)
        if host is not value and isinstance(value, Tensor):
            ours[id(host)] = value
        return host

    args, kwargs = tree_map(lent, (args, kwargs))
    args = tuple(
        torch.tensor(value) if str(argument.type) == "Tensor" and _is_number(value) else value
        for value, argument in zip(args, op._schema.arguments, strict=False)
    )
    # memory that DLPack hands over cannot grow, so an empty result gets new memory
    grown = {
        argument.name: kwargs[argument.name]
        for argument in op._schema.arguments
        if argument.is_out and kwargs[argument.name].numel() == 0
    }
    kwargs |= {name: torch.empty_like(host) for name, host in grown.items()}
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise Mixed(f"{op} got a generator of the CPU")

    def returned(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return ours[id(value)] if id(value) in ours else _renamed(value, _OTHER)

    result = op(*args, **kwargs)
    for name, host in grown.items():
        ours[id(kwargs[name])] = ours[id(host)]
        ours[id(host)].data = _renamed(kwargs[name], _OTHER)
    return tree_map(returned, result)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not _is_ours(target) or not (_is_ours(source) or non_blocking):
        _waits.add(f"copy to {target.device.type}")
    _to_host(target).copy_(_to_host(source))
    return target


class _Module(backend_registration._DummyBackendModule):
    """What torch, accelerate and transformers ask of a device's module."""

    shown = False  # or data loaders of other tests would pin memory

    def is_available(self) -> bool:
        """Return whether a test trains on the device."""
        return self.shown

    def device_count(self) -> int:
        """Return the number of devices."""
        return 1

    def current_device(self) -> int:
        """Return the only device."""
        return 0

    def synchronize(self, device: object = None) -> None:
        """Wait for the device."""
        _waits.add("synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the dtypes of autocast."""
        return [torch.bfloat16, torch.float16]


_module = _Module()


def _register() -> list[torch.library.Library]:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _module)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_fallback, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("copy_", _copy, "PrivateUse1")
    convolve = partial(_fallback, torch.ops.aten.convolution.default)
    aten.impl("convolution_overrideable", convolve, "PrivateUse1")
    return [everything, aten]


_libraries: list[torch.library.Library] = []


def install() -> torch.device:
    """Register the device, once in a process, and return it."""
    if not _libraries:
        _libraries.extend(_register())
    return torch.device(NAME, 0)


@contextmanager
def trained_on() -> Iterator[torch.device]:
    """Return a context in which a Trainer takes the device, where `options` are its arguments."""
    device = install()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_TORCH_DEVICE", NAME)
            patch.setattr(_module, "shown", True)
            yield device
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


OPTIONS = {"use_cpu": False, "dataloader_pin_memory": False}
"""Arguments of a Trainer on the device: memory that is pinned is one of CUDA's."""


@contextmanager
def waits() -> Iterator[Waits]:
    """Return a context that yields the count of what happens inside."""
    global _waits
    before, _waits = _waits, Waits()
    try:
        yield _waits
    finally:
        _waits = before
