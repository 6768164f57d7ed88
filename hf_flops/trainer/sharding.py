"""Models that `fully_shard` has spread over processes: the base stays sharded, and each process has
the whole of what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..base.sharding import is_sharded


def replicate_trainable(model: nn.Module) -> None:
    """Take trainable tensors out of the groups in which `fully_shard` gathers parameters.

    `fully_shard(..., ignored_params=...)` leaves them out from the start.
    """
    for state, group in list(_groups(model)):
        for sharded in [each for each in group.fsdp_params if each.sharded_param.requires_grad]:
            sharded._setattr_on_modules(nn.Parameter(sharded.sharded_param.detach().full_tensor()))
            sharded._post_load_hook_handle.remove()
            group.fsdp_params.remove(sharded)
        if not group.fsdp_params:
            state._fsdp_param_groups.remove(group)


def reshard(model: nn.Module) -> None:
    """Drop gathered weights in every process.

    The process that saves the model drops its own, and would be alone to gather them again.
    """
    for module in filter(is_sharded, model.modules()):
        module.reshard()  # type: ignore[operator]


def _groups(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield each state of `fully_shard` with each of its groups of parameters."""
    for module in filter(is_sharded, model.modules()):
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        for group in state._fsdp_param_groups:
            yield state, group
