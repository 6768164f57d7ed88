"""Batches: how many samples there are, and the inputs of the rows that repeat them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import ObjectiveError
from .transfer import onto

MAIN_INPUTS = (
    "labels",
    "input_ids",
    "pixel_values",
    "inputs_embeds",
    "input_features",
    "input_values",
)
Inputs: TypeAlias = Mapping[str, Any]
"""A batch as a model takes it: tensors (B, ...), lists of B entries, or values that all samples
share, by name.
"""
# an attribute of rows: the batch's tensor that they were taken from, and (R,) the sample of each
_SOURCE = "_hf_flops_source"
# an input with each row's index in the batch, for losses that compare rows with the whole batch
ROW = "row_of_batch"


def batch_size(inputs: Inputs) -> int:
    """Return the number of samples in a batch, from its labels or its main input."""
    tensors = {
        name: value for name, value in inputs.items() if torch.is_tensor(value) and value.dim() > 0
    }
    if not tensors:
        raise ObjectiveError(
            f"The batch contains no tensor to count samples by (its keys are {sorted(inputs)})."
        )
    name = next((name for name in MAIN_INPUTS if name in tensors), next(iter(tensors)))
    return len(tensors[name])


def misaligned(inputs: Inputs) -> list[str]:
    """Return the names of inputs without one entry per sample, which cannot be repeated per row."""
    samples = batch_size(inputs)
    return [
        name
        for name, value in inputs.items()
        if (torch.is_tensor(value) and value.dim() > 0 and len(value) != samples)
        or (isinstance(value, (list, tuple)) and len(value) != samples)
    ]


def hollow(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return NaN in a shape, with a tensor's dtype and device; it takes no memory."""
    return like.new_full((), float("nan")).expand(*shape)


def take(inputs: Inputs, owner: Tensor, unread: Collection[str] = ()) -> dict[str, Any]:
    """Return the inputs of rows that repeat samples of a batch.

    Args:
        inputs: the batch; tensors (B, ...), lists of B entries, or values that all samples share.
        owner: (R,) int64.
        unread: names of floating-point tensors that are replaced by NaN, which takes no memory.

    Returns:
        The inputs of a forward pass of R rows.
    """

    def repeat(name: str, value: Any) -> Any:
        if name in unread:
            return hollow(value, (len(owner), *value.shape[1:]))
        if torch.is_tensor(value) and value.dim() > 0:
            return _marked(value.index_select(0, onto(owner, value.device)), value, owner)
        if isinstance(value, (list, tuple)):
            return [value[i] for i in owner.tolist()]
        return value

    return {name: repeat(name, value) for name, value in inputs.items()}


def samples_of(rows: Tensor, batch: Tensor) -> Tensor | None:
    """Return (R,), on the host, which sample of a batch's tensor each row is; None if `take` did
    not make them of it, so that only their values would tell.
    """
    if rows is batch:
        return torch.arange(len(batch))
    source, owner = getattr(rows, _SOURCE, (None, None))
    return owner if source is batch else None


def crop(rows: Tensor, columns: slice) -> Tensor:
    """Return the columns (R, L) of rows that hold more than padding, contiguous, as some models
    require.
    """
    return _marked(rows[:, columns].contiguous(), rows, torch.arange(len(rows)))


def _marked(rows: Tensor, source: Tensor, owner: Tensor) -> Tensor:
    """Note where rows come from, see `samples_of`; return them."""
    batch, samples = getattr(source, _SOURCE, (source, None))
    setattr(rows, _SOURCE, (batch, owner if samples is None else samples[owner]))
    return rows
