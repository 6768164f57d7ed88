"""Trainable parameters of 16-bit models in float32, so that small updates are not rounded away."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_map

HALF = (torch.float16, torch.bfloat16)


def keep_masters(model: nn.Module) -> list[str]:
    """Convert trainable 16-bit parameters of a frozen 16-bit model to float32; return names.

    Their modules compute in float32 from then on: a hook widens their inputs, and another narrows
    their outputs, unless nothing in 16 bits follows, as after a head. The other parameters of these
    modules become float32 too, such as the frozen weight beside a trained bias. PEFT does the same
    for LoRA, but not for `modules_to_save`, biases or layer-norm tuning. The hooks stay as long as
    the model does, so evaluation and generation work too; saved weights are ordinary float32
    tensors, which load into a 16-bit model.
    """
    frozen = [id(p) for p in model.parameters() if not p.requires_grad and p.dtype in HALF]
    trainable = {
        id(p): name for name, p in model.named_parameters() if p.requires_grad and p.dtype in HALF
    }
    if not frozen or not trainable:
        return []  # a model that is trained as a whole keeps its precision
    modules, wide = list(model.modules()), set(trainable)
    while (
        more := {id(p) for module in modules if _holds(module, wide) for p in _halves(module)}
        - wide
    ):
        wide |= more
    last_frozen = max(i for i, module in enumerate(modules) if _holds(module, set(frozen)))
    for index, module in enumerate(modules):
        if _holds(module, wide):
            narrow = _halves(module)[0].dtype
            module.register_forward_pre_hook(_widen_inputs, with_kwargs=True)
            if index < last_frozen:
                module.register_forward_hook(partial(_narrow_output, narrow))
    for parameter in model.parameters():
        if id(parameter) in wide:
            parameter.data = parameter.data.float()
    return list(trainable.values())


def _holds(module: nn.Module, parameters: set[int]) -> bool:
    return any(id(parameter) in parameters for parameter in module._parameters.values())


def _halves(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters in 16 bits."""
    return [
        parameter
        for parameter in module._parameters.values()
        if parameter is not None and parameter.dtype in HALF
    ]


def _cast(value: object, dtype: torch.dtype, kinds: tuple[torch.dtype, ...]) -> object:
    return value.to(dtype) if torch.is_tensor(value) and value.dtype in kinds else value


def _widen_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tree_map(lambda value: _cast(value, torch.float32, HALF), (args, kwargs))


def _narrow_output(dtype: torch.dtype, module: nn.Module, args: tuple, out: object) -> object:
    return tree_map(lambda value: _cast(value, dtype, (torch.float32,)), out)
