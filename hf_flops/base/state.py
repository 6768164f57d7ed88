"""What checkpoints and logs hold: plain values by name, and the bytes of tensors."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Any]
"""Plain values by name, which JSON can hold; the state of a part may hold tensors among them."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor; those of a contiguous CPU tensor are shared and writable."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data


def number(value: Any, least: float = -math.inf, most: float = math.inf) -> Any:
    """Return a value of a state if it is a finite number in a range.

    Raises:
        ValueError: it is not.
    """
    fine = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (fine and math.isfinite(value) and least <= value <= most):
        raise ValueError(f"{value!r:.50} is no number from {least:g} to {most:g}")
    return value


def whole(value: object, least: int = 0, most: int = 2**63 - 1) -> int:
    """Return a value of a state if it is a whole number in a range.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.50} is no whole number from {least} to {most}")
    return value


def flag(value: object) -> bool:
    """Return a value of a state if it is True or False.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not bool:
        raise ValueError(f"{value!r:.50} is neither true nor false")
    return value


def vector(values: object, *shape: int) -> Tensor:
    """Return nested lists of a state as a float64 tensor if it has a shape and finite numbers.

    Raises:
        ValueError: it has not.
    """
    return tensor(torch.tensor(values, dtype=torch.float64), *shape)


def tensor(value: Any, *shape: int) -> Tensor:
    """Return a tensor of a state if it has a shape and finite numbers; -1 stands for any length.

    Raises:
        ValueError: it has not.
    """
    found = tuple(finite(value).shape)
    if len(found) != len(shape) or any(
        wanted not in (-1, length) for wanted, length in zip(shape, found, strict=True)
    ):
        raise ValueError(f"a tensor has the shape {found}, not {shape}")
    return value


def finite(value: object) -> Tensor:
    """Return a value of a state if it is a tensor of finite numbers.

    Raises:
        ValueError: it is not.
    """
    if not torch.is_tensor(value) or not bool(value.isfinite().all()):
        raise ValueError(f"{value!r:.50} is no tensor of finite numbers")
    return value
