"""The rule of last resort: a layer runs once for each row, with that row's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..base.patching import Call
from .base import ParameterVector
from .rules import Noise, RowMismatch
from .shared import displaced


def looped(
    layer: nn.Module, method: Call, noise: Noise, scale: float, *args: object, **kwargs: object
) -> Tensor:
    """Run a method of a layer row by row: valid for every layer that maps rows to rows.

    The layer loses its large matrix products; the rest of the model still runs all rows together.

    Args:
        layer: the layer, or the owner of a prompt.
        method: its `forward` (x (R * m, ...), ...), or its `get_prompt` (R * m, ...).
        noise: (R, *shape) by the tensor's name within the layer.
        scale: factor of the noise.
        args: arguments of the method; tensors as long as the first one, and a batch size, are cut
            into rows.
        kwargs: likewise.
    """
    rows = len(next(iter(noise.values())))
    first = args[0] if args else next(iter(kwargs.values()))
    length = len(first) if torch.is_tensor(first) and first.dim() else first
    if not isinstance(length, int) or length % rows:
        raise RowMismatch(f"{type(layer).__name__} does not get {rows} rows")
    size = length // rows

    def cut(value: object, row: int) -> object:
        if torch.is_tensor(value) and value.dim() and len(value) == length:
            return value[row * size : (row + 1) * size]
        return size if value is first else value

    vector = ParameterVector([(name, layer.get_parameter(name)) for name in noise])
    flat = torch.cat([values.flatten(1) for values in noise.values()], 1) * scale
    outputs = []
    for row in range(rows):
        with displaced(vector, flat[row]):
            outputs.append(
                method(*(cut(v, row) for v in args), **{k: cut(v, row) for k, v in kwargs.items()})
            )
    if not all(torch.is_tensor(piece) and piece.dim() and len(piece) == size for piece in outputs):
        raise RowMismatch(f"{type(layer).__name__} does not map rows to rows")
    return torch.cat(outputs)


def recurrent(
    layer: nn.RNNBase, method: Call, noise: Noise, scale: float, x: Tensor, hx: object = None
) -> tuple[Tensor, Any]:
    """`nn.RNN`, `nn.GRU` and `nn.LSTM` row by row.

    Args:
        layer: the layer.
        method: its `forward`.
        noise: (R, *shape) by the tensor's name.
        scale: factor of the noise.
        x: (R, T, in), or (T, R, in) unless `batch_first`.
        hx: states (L, R, H), or a pair of them.
    """
    rows, axis = len(next(iter(noise.values()))), 0 if layer.batch_first else 1
    if not torch.is_tensor(x) or x.dim() != 3 or x.shape[axis] % rows:
        raise RowMismatch(f"{type(layer).__name__} does not get {rows} rows")
    inputs, size = x.chunk(rows, axis), x.shape[axis] // rows
    vector = ParameterVector([(name, layer.get_parameter(name)) for name in noise])
    flat = torch.cat([values.flatten(1) for values in noise.values()], 1) * scale
    outputs, states = list[Tensor](), list[Any]()
    for row, part in enumerate(inputs):
        own = tree_map(lambda state, row=row: state.narrow(1, row * size, size), hx)
        with displaced(vector, flat[row]):
            output, state = method(part.contiguous(), own)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, axis), tree_map(lambda *each: torch.cat(each, 1), *states)
