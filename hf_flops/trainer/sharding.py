"""Models that `fully_shard` has spread over processes: the base stays sharded, and each process has
the whole of what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..base.sharding import is_sharded
from ..errors import ConfigurationError


def replicate_trainable(model: nn.Module) -> None:
    """Take trainable tensors out of the groups in which `fully_shard` gathers parameters.

    `fully_shard(..., ignored_params=...)` leaves them out from the start.
    """
    reshard(model)
    for state, group in list(_groups(model)):
        for sharded in [each for each in group.fsdp_params if each.sharded_param.requires_grad]:
            sharded._setattr_on_modules(nn.Parameter(sharded.sharded_param.detach().full_tensor()))
            sharded._post_load_hook_handle.remove()
            group.fsdp_params.remove(sharded)
        if not group.fsdp_params:
            state._fsdp_param_groups.remove(group)


def refuse_tensor_parallelism(model: nn.Module) -> None:
    """Refuse a model whose layers are divided among processes, as by transformers'
    `DistributedConfig(tp_size=...)`.

    Raises:
        ConfigurationError: it is one.
    """
    gathered = {id(each.sharded_param) for _, group in _groups(model) for each in group.fsdp_params}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in gathered:
            raise ConfigurationError(
                f"{name} is divided among processes by tensor parallelism, in which all run every "
                "row together, but each has rows of its own here: apply torch's fully_shard to "
                "the model instead, or load it with DistributedConfig(fsdp_size=...)."
            )


def reshard(model: nn.Module) -> None:
    """Drop gathered weights in every process.

    The process that saves the model drops its own, and would be alone to gather them again.
    """
    for module in filter(is_sharded, model.modules()):
        module.reshard()  # type: ignore[operator]


def _groups(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield each state of `fully_shard` with each of its groups of parameters."""
    modules: Any = filter(is_sharded, model.modules())
    # modules that are gathered together share a state
    for state in dict.fromkeys(module._get_fsdp_state() for module in modules):
        for group in state._fsdp_param_groups:
            for each in group.fsdp_params:
                each.reset_sharded_param()  # it may have been loaded since
            yield state, group
