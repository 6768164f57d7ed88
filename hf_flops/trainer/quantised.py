"""Quantised bases: the stock trainer accepts them, and their layers compute as in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def quantised_base_allowed(model: nn.Module | None) -> Iterator[None]:
    """Let the stock trainer accept a quantised model, which forward passes can train.

    The stock check skips models that carry an adapter of their own, so the model claims to carry
    one inside the context.
    """
    flag = "_hf_peft_config_loaded"
    if (
        not isinstance(model, nn.Module)
        or not getattr(model, "is_quantized", False)
        or flag in vars(model)
    ):
        yield
        return
    setattr(model, flag, True)
    try:
        yield
    finally:
        delattr(model, flag)


def rounds_in_evaluation(module: nn.Module) -> bool:
    """Return whether a module is an 8-bit layer of bitsandbytes.

    On CPUs these round activations to 8 bits in evaluation mode, with columns of outliers that
    depend on all rows: differences drown, and rows are not independent. In training mode they
    multiply by the dequantised weights.
    """
    return hasattr(vars(module).get("state"), "has_fp16_weights")


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers from packing their weights for inference, or unpack them.

    On processors with bfloat16 products they pack in the first forward in evaluation mode, for
    good. Packed, they round activations, outputs and scales to bfloat16; and reading `state_dict`,
    as saving does, unpacks them with their scales in the wrong order, or, quantised twice, rounded
    once more.
    """
    module: Any
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        module.support_avx512bf16_for_cpu = False
        packed = getattr(module.weight, "quant_state", None)
        if getattr(packed, "packing_format_for_cpu", False):
            module.state_dict()
            state = module.weight.quant_state
            if state.absmax.ndim == 2:  # still (columns of blocks, rows), as packed
                state.absmax = state.absmax.T.flatten().float()
