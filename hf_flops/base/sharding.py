"""Models whose weights lie elsewhere: spread over processes by `fully_shard`, or offloaded."""

from __future__ import annotations

from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` has been applied to a module."""
    return hasattr(module, "set_reshard_after_forward")


def fetches_weights(model: nn.Module) -> bool:
    """Return whether every forward of a model fetches weights: sharded or offloaded ones."""
    return any(map(is_sharded, model.modules())) or any(p.is_meta for p in model.parameters())


def sharded_root(model: nn.Module) -> nn.Module | None:
    """Return the innermost module that contains all sharded ones, or None if there are none."""
    root: nn.Module | None = None
    module: nn.Module | None = model
    while module is not None and any(map(is_sharded, module.modules())):
        root = module
        if is_sharded(module):
            break
        inside = [child for child in module.children() if any(map(is_sharded, child.modules()))]
        # a list of layers has no forward of its own
        module = next(iter(inside), None) if len(inside) == 1 else None
        module = None if isinstance(module, nn.ModuleList) else module
    return root
