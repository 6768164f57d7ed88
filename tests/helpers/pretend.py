"""A pretend accelerator: torch's PrivateUse1 device, with its memory and its arithmetic on the CPU.

Its tensors are ordinary tensors of another device, with real storage, sizes and strides: DLPack
hands the memory of a CPU tensor over under the other device's name, and back. One fallback kernel
runs every operation on the CPU. It refuses tensors of two devices, as a GPU does, and counts what
makes the host of a GPU wait: values and tensors that are read back, results whose size depends on
values, and blocking copies to the device.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils import backend_registration

if not hasattr(backend_registration, "_DummyBackendModule"):
    pytest.skip("this version of torch has no devices in Python", allow_module_level=True)
NAME = "pretend"
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
}
# these take indices of the CPU too, and wait for their copy
_INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}
_SOURCES = ("/hf_flops/", "/transformers/", "/accelerate/", "/peft/")


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


_NO_KERNELS = {"aten::empty", "aten::empty_strided", "aten::as_strided", "aten::view"}


class Waits:
    """Counts how often the host waited for the device, by the line that made it wait, and what it
    launched.
    """

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    @property
    def number(self) -> int:
        """How often the host waited so far."""
        return self.lines.total()

    @property
    def kernels(self) -> int:
        """How many operations were launched that a GPU has a kernel for."""
        return sum(count for name, count in self.launches.items() if name not in _NO_KERNELS)

    def add(self, what: str) -> None:
        """Count a wait at the innermost line of a library that users know."""
        frame = sys._getframe(2)
        while frame.f_back and not any(name in frame.f_code.co_filename for name in _SOURCES):
            frame = frame.f_back
        file = Path(frame.f_code.co_filename)
        self.lines[f"{file.parent.name}/{file.name}:{frame.f_lineno} {what}"] += 1


_waits = Waits()
_largest = math.inf
"""How many numbers a new tensor may have."""


def _is_ours(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _to_host(value: Any) -> Any:
    """Return a tensor's memory as the CPU's, and our device as the CPU."""
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return _renamed(value, _CPU) if _is_ours(value) else value


@dataclass(frozen=True)
class _Facts:
    """What is to be known of an operation: its name, whether it takes numbers of the CPU as it
    takes values, the positions of its tensors, and the names of its results.
    """

    name: str
    pointwise: bool
    tensors: tuple[int, ...]
    results: tuple[str, ...]

    @classmethod
    @cache
    def of(cls, op: Any) -> _Facts:
        """Look an operation up."""
        given = list(enumerate(op._schema.arguments))
        return cls(
            op._schema.name,
            torch.Tag.pointwise in op.tags,
            tuple(i for i, argument in given if str(argument.type) == "Tensor"),
            tuple(argument.name for _, argument in given if argument.is_out),
        )


def _check(facts: _Facts, tensors: list[Tensor]) -> None:
    """Refuse two devices; numbers of the CPU are values, and indices may lie there."""
    strangers = [tensor for tensor in tensors if not _is_ours(tensor)]
    if facts.name in _INDEXING:
        if strangers or any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            _waits.add(facts.name)
        strangers = [t for t in strangers if t is tensors[0] or t.dtype.is_floating_point]
    if any(tensor.dim() > 0 or not facts.pointwise for tensor in strangers):
        raise Mixed(f"{facts.name} got tensors of {[str(tensor.device) for tensor in tensors]}")


class _Loan:
    """The tensors of one operation, as the CPU sees them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.owners: dict[int, Tensor] = {}

    def lent(self, value: Any) -> Any:
        """Return an argument for the CPU."""
        if isinstance(value, Tensor):
            self.tensors.append(value)
            host = _to_host(value)
            self.owners[id(host)] = value
            return host
        if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, bool)):
            return type(value)([self.lent(each) for each in value])
        return _to_host(value)

    def returned(self, value: Any) -> Any:
        """Return a result for our device."""
        if isinstance(value, (list, tuple)):
            return type(value)([self.returned(each) for each in value])
        if not isinstance(value, Tensor):
            return value
        if id(value) in self.owners:
            return self.owners[id(value)]
        if value.numel() > _largest:
            raise torch.OutOfMemoryError(f"no room for {tuple(value.shape)}")
        return _renamed(value, _OTHER)


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    facts, loan = _Facts.of(op), _Loan()
    given = [loan.lent(value) for value in args]
    named = {name: loan.lent(value) for name, value in kwargs.items()}
    _check(facts, loan.tensors)
    if facts.name in _SIZED:
        _waits.add(facts.name)
    _waits.launches[facts.name] += 1
    if isinstance(named.get("generator"), torch.Generator):
        raise Mixed(f"{op} got a generator of the CPU")
    for i in facts.tensors:  # torch passes numbers in the place of tensors as they are
        if i < len(given) and isinstance(given[i], (bool, int, float)):
            given[i] = torch.tensor(given[i])
    # memory that DLPack hands over cannot grow, so an empty result gets new memory
    grown = {name: named[name] for name in facts.results if named[name].numel() == 0}
    named |= {name: torch.empty_like(host) for name, host in grown.items()}
    result = op(*given, **named)
    for name, host in grown.items():
        loan.owners[id(named[name])] = loan.owners[id(host)]
        loan.owners[id(host)].data = _renamed(named[name], _OTHER)
    return loan.returned(result)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    blocks = not _is_ours(target) or not (_is_ours(source) or non_blocking)
    if blocks and source.numel():
        _waits.add(f"copy to {target.device.type}")
    _waits.launches["aten::copy_"] += 1
    _to_host(target).copy_(_to_host(source))
    return target


def _set(target: Tensor, storage: Any) -> Tensor:
    """Let a tensor show all numbers of a storage, as `torch.save` does."""
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    target.data = _renamed(torch.frombuffer(memory, dtype=target.dtype), _OTHER)
    return target


class _Module(backend_registration._DummyBackendModule):
    """What torch, accelerate and transformers ask of a device's module."""

    shown = False  # or data loaders of other tests would pin memory

    def is_available(self) -> bool:
        """Return whether a test trains on the device."""
        return self.shown

    def get_rng_state(self, device: object = None) -> Tensor:
        """Return the state of the generator that the device has not got."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        """Take a state from `get_rng_state`."""

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
    aten.impl("set_.source_Storage", _set, "PrivateUse1")
    convolve = partial(_fallback, torch.ops.aten.convolution.default)
    aten.impl("convolution_overrideable", convolve, "PrivateUse1")
    return [everything, aten]


_libraries: list[torch.library.Library] = []


def install() -> torch.device:
    """Register the device, once in a process, and return it."""
    if not _libraries:
        _libraries.extend(_register())
    return torch.device(NAME, 0)


OPTIONS = {"use_cpu": False, "dataloader_pin_memory": False}
"""Arguments of a Trainer on the device, which has no pinned memory."""


_deepcopy = Tensor.__deepcopy__


def _copied(tensor: Tensor, memo: dict) -> Tensor:
    """Copy a tensor deeply; torch would copy a storage, which the device has not got."""
    if not (type(tensor) is Tensor and _is_ours(tensor)):
        return _deepcopy(tensor, memo)
    memo[id(tensor)] = tensor.detach().clone()
    return memo[id(tensor)]


def _loaded(load: Any, *args: Any, **kwargs: Any) -> Any:
    return load(*args, **{**kwargs, "map_location": "cpu"})


class Shown:
    """A context in which a Trainer with `OPTIONS` takes the device, until it is hidden."""

    def __enter__(self) -> Shown:
        install()
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("ACCELERATE_TORCH_DEVICE", NAME)
        self.patch.setattr(_module, "shown", True)
        # memory of the device is that of tensors, so what is loaded comes by way of the CPU
        self.patch.setattr(torch, "load", partial(_loaded, torch.load))
        self.patch.setattr(Tensor, "__deepcopy__", _copied)
        return self

    def hide(self) -> None:
        """Hide the device from what comes next."""
        self.patch.undo()
        AcceleratorState._reset_state(reset_partial_state=True)

    def __exit__(self, *exception: object) -> None:
        self.hide()


@contextmanager
def limited(largest: float) -> Iterator[None]:
    """Return a context in which memory runs out for a tensor of more than so many numbers."""
    global _largest
    before, _largest = _largest, largest
    try:
        yield
    finally:
        _largest = before


@contextmanager
def waits() -> Iterator[Waits]:
    """Return a context that yields the count of what happens inside."""
    global _waits
    before, _waits = _waits, Waits()
    try:
        yield _waits
    finally:
        _waits = before
