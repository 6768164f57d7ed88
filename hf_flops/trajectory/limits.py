"""What a log may ask for: it may be forged, and must neither run code nor exhaust the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..base.state import whole
from ..errors import FlopsError, TrajectoryError, in_one_line

MOST_THREADS = 512
MOST_NUMBERS = 2**31  # of all initial tensors
MOST_NOISE = 2**32  # numbers of the noise of a chunk of rows, which is drawn at once
DEVICES = ("cpu", "cuda", "mps", "xpu")
_KINDS = ("float16", "bfloat16", "float32", "float64", "int64", "int32", "uint8", "bool")


@contextmanager
def refused(path: str | Path, what: str) -> Iterator[None]:
    """Turn an error inside the context, which reads what a log says, into one that names it.

    Raises:
        TrajectoryError: the log says something that no run has written.
    """
    try:
        yield
    except FlopsError:
        raise
    except Exception as error:  # there is no end of what a forged log can cause
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise TrajectoryError(f"{path} is damaged or forged: {what}: {reason}.") from error


def threads(value: object) -> int:
    """Return a number of threads that a machine may have."""
    return whole(value, 1, MOST_THREADS)


def device(value: object) -> str:
    """Return the type of a device."""
    if value not in DEVICES:
        raise ValueError(f"{value!r:.50} is none of the devices {', '.join(DEVICES)}")
    return str(value)


def dtype(value: object) -> torch.dtype:
    """Return a dtype by its name."""
    if value not in _KINDS:
        raise ValueError(f"{value!r:.50} is none of the dtypes {', '.join(_KINDS)}")
    kind: torch.dtype = getattr(torch, value)
    return kind


def check_tensors(tensors: dict[str, Any]) -> None:
    """Refuse initial tensors of too many numbers; tensors: name → (shape, dtype)."""
    sizes = [prod(whole(length) for length in shape) for shape, _ in tensors.values()]
    whole(sum(sizes), most=MOST_NUMBERS)


def check_chunks(lengths: list[int], rows: int, parameters: int) -> None:
    """Refuse chunks that are not of so many rows, or whose noise has too many numbers."""
    if sum(whole(length, 1) for length in lengths) != rows:
        raise ValueError(f"the chunks have {sum(lengths)} rows, the batch {rows}")
    whole(max(lengths, default=0) * parameters, most=MOST_NOISE)
