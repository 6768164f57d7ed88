"""Free memory, and the peak memory of a block of code."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from pathlib import Path

import torch

_MEGABYTE = 2**20


def _number(path: str, name: str = "") -> float:
    """Return the number in a system file, or in its line that starts with `name`, or NaN."""
    try:
        lines = Path(path).read_text().splitlines()
        return float(
            next(line for line in lines if line.startswith(name)).removeprefix(name).split()[0]
        )
    except (OSError, StopIteration, ValueError, IndexError):
        return float("nan")


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a device, or NaN if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return float("nan")
    free = 1024 * _number("/proc/meminfo", "MemAvailable:")
    group = "/sys/fs/cgroup/memory"  # the limit of a container; cached files can be evicted
    used = _number(f"{group}.current") - _number(f"{group}.stat", "inactive_file ")
    # min() keeps `free` if the second argument is NaN
    return min(free, _number(f"{group}.max") - used)


def peak_memory() -> int | None:
    """Return the peak memory of the process in bytes, on the GPU if any; None if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = 1024 * _number("/proc/self/status", "VmHWM:")
    return None if math.isnan(peak) else int(peak)


class PeakMemory:
    """Measures peak memory above the start: `with PeakMemory() as memory: ...`.

    On a GPU this is torch's own count; elsewhere Linux's high-water mark of the resident set, reset
    at the start.

    Args:
        device: of the memory; by default the GPU if there is one.

    Attributes:
        megabytes: the peak above the start; NaN if unknown.
    """

    megabytes = _start = float("nan")

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = torch.cuda.is_available() if device is None else device.type == "cuda"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # of glibc only
            # freed memory that the system does not have back would count as used
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
            self._start = 1024 * _number("/proc/self/status", "VmRSS:")
        return self

    def __exit__(self, *exception: object) -> None:
        in_use = 1024 * _number("/proc/self/status", "VmHWM:")
        peak = torch.cuda.max_memory_allocated() if self._cuda else in_use
        self.megabytes = (peak - self._start) / _MEGABYTE
