"""What modules return, taken apart into leaves: copied, repeated for rows, joined."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..base.batch import hollow
from ..base.transfer import onto

Leaf: TypeAlias = Any
"""A tensor or a plain value among what a module returns."""
Output: TypeAlias = tuple[list[Leaf], TreeSpec]


def clone(leaf: Leaf) -> Leaf:
    """Return a contiguous copy of a tensor; other leaves are returned as they are."""
    return leaf.clone(memory_format=torch.contiguous_format) if torch.is_tensor(leaf) else leaf


def placeholder(leaf: Leaf) -> Leaf:
    """Return NaN in the shape of a tensor, without its memory; integers are copied."""
    if torch.is_tensor(leaf) and leaf.is_floating_point():
        return hollow(leaf, leaf.shape)
    return clone(leaf)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Return (a + b, ...) for (a, ...) and (b, ...); placeholders still take no memory."""
    if any(first.stride()):
        return torch.cat([first, second])
    return first[:1].expand(len(first) + len(second), *first.shape[1:])


def repeat(leaf: Tensor, samples: int, owner: Tensor) -> Tensor:
    """Repeat (B * m, ...) for rows: (R * m, ...).

    Args:
        leaf: of B samples; m is a whole number.
        samples: B.
        owner: (R,) int64, the sample of each row.
    """
    times, tail = len(leaf) // samples, leaf.shape[1:]
    if not any(leaf.stride()):
        return leaf[:1].expand(len(owner) * times, *tail)
    rows = leaf.reshape(samples, times, *tail).index_select(0, onto(owner, leaf.device))
    return rows.flatten(0, 1)
