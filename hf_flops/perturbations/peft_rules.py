"""Per-row rules for PEFT's layers whose parameters do not belong to a plain module.

Such a rule replaces a method of the layer: it maps `(layer, method, noise, scale, *arguments)` to
the method's result at `theta + scale * noise`, where `noise` maps a tensor's name within the layer
to (R, *shape). Layers are recognised by their attributes, so PEFT is not imported. Like every rule,
these are used only if the self-check confirms them.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.patching import Call
from .rules import Noise, RowMismatch, by_row

MethodRule = Call
Layer: TypeAlias = Any
"""A layer of PEFT, recognised by its attributes."""


def is_adapter_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer that PEFT wrapped around another."""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _moved(layer: Layer, name: str, noise: Noise, scale: float) -> Tensor:
    """Return a parameter with each row's noise added: (R, *shape)."""
    parameter = layer.get_parameter(name)
    if name in noise:
        return torch.add(parameter, noise[name].to(parameter.dtype), alpha=scale)
    return parameter.expand(len(next(iter(noise.values()))), *parameter.shape)


def ia3(
    layer: Layer,
    method: Call,
    noise: Noise,
    scale: float,
    x: Tensor,
    *args: object,
    **kwargs: object,
) -> Tensor:
    """IA3: a factor per input feature (feed-forward) or output feature, (R, 1, C, ...).

    References:
        Liu et al. (2022), T-Few, arXiv 2205.05638, section 3.3.
    """
    del method
    (name,) = noise
    factor = _moved(layer, name, noise, scale)
    factor = factor if factor.dim() > 3 else factor.flatten(1).unsqueeze(1)

    def scaled(values: Tensor) -> Tensor:
        tail = values.shape[1:] if factor.dim() > 3 else values.shape[-1:]
        return (by_row(values, noise, *tail) * factor).to(values.dtype).reshape(values.shape)

    if layer.is_feedforward:
        return layer.base_layer(scaled(x), *args, **kwargs)
    return scaled(layer.base_layer(x, *args, **kwargs))


def added_to_base(shift: Call) -> MethodRule:
    """Return the rule that adds a shift (R, tokens, out) to the output of the layer underneath.

    Args:
        shift: maps (layer, noise, scale, input, the output underneath) to the shift.
    """

    @wraps(shift)
    def rule(
        layer: Layer,
        method: Call,
        noise: Noise,
        scale: float,
        x: Tensor,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        out = layer.base_layer(x, *args, **kwargs)
        return (out + shift(layer, noise, scale, x, out).reshape(out.shape)).to(out.dtype)

    return rule


@added_to_base
def vera(layer: Layer, noise: Noise, scale: float, x: Tensor, out: Tensor) -> Tensor:
    """VeRA: `out + b * (B (d * (A x)))` with vectors b (out,) and d (rank,) beside frozen A and B.

    References:
        Kopiczko et al. (2024), VeRA, arXiv 2310.11454, equation 2.
    """
    adapter = layer.active_adapters[0]
    b = _moved(layer, f"vera_lambda_b.{adapter}", noise, scale).unsqueeze(1)
    d = _moved(layer, f"vera_lambda_d.{adapter}", noise, scale).unsqueeze(1)
    inner = F.linear(x.to(d.dtype), layer.vera_A[adapter][:, : layer.in_features].to(x.device))
    inner = by_row(inner, noise, inner.shape[-1]) * d
    return F.linear(inner, layer.vera_B[adapter][: layer.out_features].to(x.device)) * b


@added_to_base
def dora(layer: Layer, noise: Noise, scale: float, x: Tensor, out: Tensor) -> Tensor:
    """DoRA on a linear layer: `m / ||W + s B A|| * (W + s B A) x + bias`, norms of matrix rows.

    No row's W + s B A is ever formed: `||W_o + s b_o A||^2 = ||W_o||^2 + 2 s b_o (A W^T)_o + s^2
    b_o A A^T b_o` for output o, which costs what `rank` more tokens in each row would. The norm
    depends on A and B here, as in the model; PEFT's backward pass treats it as a constant.

    References:
        Liu et al. (2024), DoRA, arXiv 2402.09353, equation 5 and section 4.3.
    """
    adapter, base = layer.active_adapters[0], layer.base_layer
    a = _moved(layer, f"lora_A.{adapter}.weight", noise, scale)  # (R, rank, in)
    b = _moved(layer, f"lora_B.{adapter}.weight", noise, scale)  # (R, out, rank)
    magnitude = _moved(layer, f"lora_magnitude_vector.{adapter}.weight", noise, scale)  # (R, out)
    weight = (base.weight.T if getattr(layer, "fan_in_fan_out", False) else base.weight).to(a.dtype)
    factor = layer.scaling[adapter]
    cross = torch.matmul(a, weight.T).transpose(1, 2)  # (R, out, rank)
    square = weight.square().sum(1) + (
        b * (2 * factor * cross + factor**2 * b @ (a @ a.transpose(1, 2)))
    ).sum(2)
    ratio = (magnitude / square.clamp(min=0).sqrt()).unsqueeze(1)
    plain = by_row(out if base.bias is None else out - base.bias, noise, out.shape[-1])
    low = by_row(x.to(a.dtype), noise, x.shape[-1]) @ a.transpose(1, 2)
    return (ratio - 1) * plain + ratio * (factor * (low @ b.transpose(1, 2)))


def _embedding_scale(layer: Layer) -> Tensor | float:
    """Return the factor of the embeddings in some models (Gemma), else 1."""
    scale = getattr(layer, "_get_embed_scale", lambda: None)()
    return 1.0 if scale is None else scale


@added_to_base
def lora_embedding(layer: Layer, noise: Noise, scale: float, x: Tensor, out: Tensor) -> Tensor:
    """LoRA on `nn.Embedding`: A (rank, V) is looked up, then multiplied by B (D, rank)."""
    adapter = layer.active_adapters[0]
    b = _moved(layer, f"lora_embedding_B.{adapter}", noise, scale)
    name = f"lora_embedding_A.{adapter}"
    table = layer.get_parameter(name)
    indices = by_row(x, noise)  # (R, tokens)
    low = F.embedding(indices, table.T)
    if name in noise:
        # (R, rank, tokens)
        shift = noise[name].gather(2, indices.unsqueeze(1).expand(-1, len(table), -1))
        low = torch.add(low, shift.transpose(1, 2).to(low.dtype), alpha=scale)
    return low @ b.transpose(1, 2) * (layer.scaling[adapter] * _embedding_scale(layer))


def trainable_tokens(
    layer: Layer,
    method: Call,
    noise: Noise,
    scale: float,
    x: Tensor,
    *args: object,
    **kwargs: object,
) -> Tensor:
    """Trainable tokens: K trained rows (K, D) of a frozen embedding, or of a tied output layer."""
    ((name, rows),) = noise.items()
    out = method(x, *args, **kwargs)
    tokens = torch.as_tensor(layer.token_indices[name.split(".")[-1]], device=x.device)
    rows = rows.to(out.dtype)
    if isinstance(layer.base_layer, nn.Embedding):
        chosen = (by_row(x, noise).unsqueeze(-1) == tokens).to(out.dtype)
        shift = chosen @ rows * _embedding_scale(layer)
        return torch.add(out, shift.reshape(out.shape), alpha=scale)
    logits = by_row(x, noise, x.shape[-1]).to(out.dtype) @ rows.transpose(1, 2)
    return out.index_add(-1, tokens, logits.reshape(*out.shape[:-1], -1), alpha=scale)


def prompt(
    owner: Layer,
    method: Call,
    noise: Noise,
    scale: float,
    batch_size: int,
    *args: object,
    **kwargs: object,
) -> Tensor:
    """Prompt tuning: `get_prompt` returns the (P, D) virtual tokens, repeated for every row."""
    del owner
    (shift,) = noise.values()
    prompts = method(batch_size, *args, **kwargs)
    if batch_size % len(shift) or prompts.shape[1:] != shift.shape[1:]:
        raise RowMismatch(
            f"prompts of shape {tuple(prompts.shape)} for noise of shape {tuple(shift.shape)}"
        )
    return torch.add(
        prompts, shift.to(prompts.dtype).repeat_interleave(batch_size // len(shift), 0), alpha=scale
    )


_LAYERS: tuple[tuple[str, MethodRule, str], ...] = (
    # attribute of the layer, the rule, the method that it replaces
    ("ia3_l", ia3, "forward"),
    ("vera_lambda_b", vera, "forward"),
    ("trainable_tokens_delta", trainable_tokens, "forward_adapters"),
    ("lora_embedding_A", lora_embedding, "forward"),
)


def wrapper_rule(layer: Layer) -> tuple[MethodRule, str] | None:
    """Return the rule of one of PEFT's layers and the method that it replaces, or None."""
    if (
        not is_adapter_layer(layer)
        or len(layer.active_adapters) != 1
        or layer.disable_adapters
        or layer.merged
    ):
        return None
    adapter = layer.active_adapters[0]
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    if variant == "DoraLinearVariant" and not any(
        p.requires_grad for p in layer.base_layer.parameters()
    ):
        return dora, "forward"
    for name, rule, method in _LAYERS:
        if adapter in getattr(layer, name, ()):
            return (rule, method) if variant == "NoneType" else None
    return None
