"""Per-row rules: the output of a module in which every row has different weights.

A rule maps `(module, input, output, noise, scale)` to the output at `theta + scale * noise`.
`noise` maps the attribute name of each trainable parameter of the module to (R, *shape). The
input's first dimension is R, or R times an integer if the model flattens rows with another
dimension, row-major. The R rows may be a part of those that go through the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..base.patching import Call

Noise = dict[str, Tensor]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Rule = Callable[[Any, Tensor, Tensor, Noise, float], Tensor]


class RowMismatch(ValueError):
    """A module's input is not laid out row by row."""


def by_row(values: Tensor, noise: Noise, *tail: int) -> Tensor:
    """View (R * m, ..., *tail) as (R, -1, *tail)."""
    rows = len(next(iter(noise.values())))
    if values.dim() == 0 or len(values) % rows:
        raise RowMismatch(f"an input of shape {tuple(values.shape)} does not contain {rows} rows")
    return values.reshape(rows, -1, *tail)


def linear(
    module: nn.Module,
    x: Tensor,
    out: Tensor,
    noise: Noise,
    scale: float,
    *,
    transposed: bool = False,
) -> Tensor:
    """`nn.Linear`: add `scale * (x @ weight.T + bias)` per row in place, as the output is new.

    Args:
        module: the layer.
        x: (R * m, .., in).
        out: (R * m, .., out).
        noise: weight (R, out, in), or its factors `weight.left` (R, out) and `weight.right`
            (R, in); bias (R, out).
        scale: epsilon.
        transposed: whether a weight is (in, out) instead.
    """
    result = by_row(out, noise, out.shape[-1])
    x = by_row(x, noise, x.shape[-1]).to(out.dtype)
    if "weight" in noise:
        weight = noise["weight"].to(out.dtype)
        weight = weight.transpose(1, 2) if transposed else weight
        # batched products are faster along the long side of the weight
        if weight.shape[1] < weight.shape[2]:
            result = result.add_(torch.bmm(weight, x.transpose(1, 2)).transpose(1, 2), alpha=scale)
        else:
            result = result.baddbmm_(x, weight.transpose(1, 2), alpha=scale)
    elif "weight.left" in noise:
        left, right = (
            noise[f"weight.{side}"].unsqueeze(1).to(out.dtype) for side in ("left", "right")
        )
        left, right = (right, left) if transposed else (left, right)
        result = result.addcmul_(
            torch.bmm(right, x.transpose(1, 2)).transpose(1, 2), left, value=scale
        )
    if "bias" in noise:
        result = result.add_(noise["bias"].unsqueeze(1).to(out.dtype), alpha=scale)
    return result.reshape(out.shape)


conv1d_gpt2 = partial(linear, transposed=True)
"""The `Conv1D` of GPT-2, a linear layer with its weight transposed: weight (in, out)."""
FACTORED = (linear, conv1d_gpt2)  # rules that take the factors of rank-one noise


def moved_linear(module: nn.Linear, x: Tensor, noise: Noise, scale: float) -> Tensor:
    """Return `nn.Linear`'s output for x (R * m, .., in) with perturbed weights for each row."""
    rows = by_row(x, noise, x.shape[-1])
    weight = torch.add(module.weight, noise["weight"].to(module.weight.dtype), alpha=scale)
    # batched products are faster along the long side of the weight
    if weight.shape[1] < weight.shape[2]:
        out = torch.bmm(weight, rows.transpose(1, 2)).transpose(1, 2).contiguous()
    else:
        out = torch.bmm(rows, weight.transpose(1, 2))
    if module.bias is not None:
        out = out + module.bias
    if "bias" in noise:
        out = out.add_(noise["bias"].unsqueeze(1).to(out.dtype), alpha=scale)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def convolution(module: Convolution, x: Tensor, out: Tensor, noise: Noise, scale: float) -> Tensor:
    """`nn.Conv1d/2d/3d`: the rows become groups of one grouped convolution."""
    batched = by_row(x, noise, *x.shape[1:])  # (R, m, C, ...)
    rows, repeats = batched.shape[:2]
    result = by_row(out, noise, *out.shape[1:])
    if "weight" in noise:
        x = batched.transpose(0, 1).reshape(repeats, rows * x.shape[1], *x.shape[2:])
        padding: str | int | tuple[int, ...] = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
        weight = noise["weight"].flatten(0, 1).to(x.dtype)
        shift = convolve(
            x, weight, None, module.stride, padding, module.dilation, rows * module.groups
        )
        shift = shift.reshape(repeats, rows, *out.shape[1:]).transpose(0, 1)
        result = torch.add(result, shift.to(out.dtype), alpha=scale)
    if "bias" in noise:
        bias = noise["bias"].view(rows, 1, -1, *[1] * (out.dim() - 2)).to(out.dtype)
        result = torch.add(result, bias, alpha=scale)
    return result.reshape(out.shape)


def embedding(module: nn.Embedding, x: Tensor, out: Tensor, noise: Noise, scale: float) -> Tensor:
    """`nn.Embedding`: weight (V, D), input any shape of indices."""
    indices = by_row(x, noise).unsqueeze(-1).expand(-1, -1, out.shape[-1])
    shift = noise["weight"].gather(1, indices).reshape(out.shape).to(out.dtype)
    return torch.add(out, shift, alpha=scale)


def _affine(normalised: Tensor, out: Tensor, noise: Noise, scale: float) -> Tensor:
    """Add `scale * (normalised * weight + bias)` per row."""
    result = out
    for name, factor in (("weight", normalised), ("bias", None)):
        if name in noise:
            size = noise[name][0].numel()
            shift = noise[name].reshape(-1, 1, size)
            if factor is not None:
                shift = by_row(factor, noise, size) * shift
            result = by_row(result, noise, size).add(shift.to(out.dtype), alpha=scale)
    return result.reshape(out.shape)


def layer_norm(module: nn.LayerNorm, x: Tensor, out: Tensor, noise: Noise, scale: float) -> Tensor:
    """`nn.LayerNorm`: weight and bias apply to the normalised input."""
    return _affine(F.layer_norm(x, module.normalized_shape, eps=module.eps), out, noise, scale)


def channel_norm(
    normalise: Callable[[Any, Tensor], Tensor],
    module: nn.Module,
    x: Tensor,
    out: Tensor,
    noise: Noise,
    scale: float,
) -> Tensor:
    """Norms of channels (R * m, C, ..): weight and bias (C,) apply to the normalised input."""
    result = by_row(out, noise, *out.shape[1:])  # (R, m, C, ..)
    for name, values in noise.items():
        shift = values.view(len(values), 1, -1, *[1] * (out.dim() - 2))
        if name == "weight":
            shift = by_row(normalise(module, x), noise, *out.shape[1:]) * shift
        result = torch.add(result, shift.to(out.dtype), alpha=scale)
    return result.reshape(out.shape)


def _batch_normalised(module: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """Normalise with the running statistics, as in evaluation mode."""
    return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


def _group_normalised(module: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, module.num_groups, eps=module.eps)


batch_norm = partial(channel_norm, _batch_normalised)
"""`nn.BatchNorm1d/2d/3d` in evaluation mode, with running statistics."""
group_norm = partial(channel_norm, _group_normalised)
"""`nn.GroupNorm`."""


def broadcast(
    module: nn.Module, method: Call, noise: Noise, scale: float, *args: object, **kwargs: object
) -> Any:
    """A module's own parameters, whose `forward` combines them with its input by broadcasting.

    Inside the method each is a tensor with a first dimension of rows: (1, ..) becomes (R, ..), and
    (..) becomes (R, 1, .., 1, ..) with as many dimensions as the input (R, ..).
    """
    x = next((each for each in (*args, *kwargs.values()) if torch.is_tensor(each)), None)
    rows = len(next(iter(noise.values())))
    if x is None or x.dim() == 0 or len(x) != rows:
        raise RowMismatch(f"{type(module).__name__} does not get {rows} rows")
    for name, values in noise.items():
        parameter = module._parameters[name]
        assert parameter is not None
        moved = torch.add(parameter.detach(), values.to(parameter), alpha=scale)
        shape = parameter.shape[1:] if parameter.shape[:1] == (1,) else parameter.shape
        ones = [1] * (0 if parameter.shape[:1] == (1,) else x.dim() - 1 - len(shape))
        # found before the parameter of that name
        module.__dict__[name] = moved.reshape(rows, *ones, *shape)
    try:
        return method(*args, **kwargs)
    finally:
        for name in noise:
            del module.__dict__[name]


def rms_norm(module: nn.Module, x: Tensor, out: Tensor, noise: Noise, scale: float) -> Tensor:
    """RMSNorm of any library: weight multiplies `x / rms(x)`."""
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    x = x if x.dtype == torch.float64 else x.float()
    mean_square = x.square().mean(-1, keepdim=True)
    normalised = x * torch.rsqrt(
        mean_square + (torch.finfo(x.dtype).eps if epsilon is None else epsilon)
    )
    return _affine(normalised, out, noise, scale)


_BY_TYPE: tuple[tuple[type | UnionType, Rule], ...] = (
    (nn.Linear, linear),
    (Convolution, convolution),
    (nn.LayerNorm, layer_norm),
    (nn.RMSNorm, rms_norm),
    (nn.GroupNorm, group_norm),
)


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule for a module's parameters, or None.

    The self-check of the first step compares the rule with an explicit change of parameters,
    because a subclass may override `forward`, or a parent may call the module in an unexpected way.
    """
    for kind, rule in _BY_TYPE:
        if isinstance(module, kind):
            return rule
    if isinstance(module, _BatchNorm):
        return batch_norm if module.track_running_stats else None
    if isinstance(module, nn.Embedding):
        return embedding if module.max_norm is None else None
    name = type(module).__name__
    if name == "Conv1D" and hasattr(module, "nf"):
        return conv1d_gpt2
    return rms_norm if name.endswith("RMSNorm") or name == "T5LayerNorm" else None
