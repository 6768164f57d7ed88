"""State dicts of a model around a frozen base: the base's weights are neither saved nor missed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def drop_base(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Take the base model's weights out of a state dict: they are not ours to save."""
    del module, metadata
    for name in [name for name in state if name.startswith(f"{prefix}base.")]:
        del state[name]


def ignore_missing_base(module: nn.Module, keys: Any) -> None:
    """Take the base model's weights out of what a state dict lacks."""
    del module
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith("base.")]
