"""What checkpoints and logs hold: plain values by name, and the bytes of tensors."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Any]
"""Plain values by name, which JSON can hold; the state of a part may hold tensors among them."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor; those of a contiguous CPU tensor are shared and writable."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
