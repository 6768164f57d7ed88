"""Padding: crops the columns of a batch of texts that no row of a chunk needs."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .batch import Inputs, crop, take
from .rows import Rows

SIDES = ("left", "right")
# inputs with one column per token
_PADDED = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")


def real_tokens(inputs: Inputs) -> Tensor | None:
    """Return (B, T) bool, the columns that each sample needs, or None if that is unknown.

    A column is needed if its attention mask is not zero or its label is not ignored; all columns of
    a sample are needed if a causal model predicts such a label from padding. The result is None if
    another input has T columns or the mask has another shape.
    """
    mask = inputs.get("attention_mask")
    if not torch.is_tensor(mask) or mask.dim() != 2:
        return None
    for name, value in inputs.items():
        wide = torch.is_tensor(value) and value.dim() > 1 and value.shape[1] == mask.shape[1]
        if wide and (name not in _PADDED or value.dim() != 2):
            return None
    real, labels = mask != 0, inputs.get("labels")
    if torch.is_tensor(labels) and labels.shape == mask.shape:
        counted = labels != -100
        real = real | counted | (counted[:, 1:] & (mask[:, :-1] == 0)).any(1, keepdim=True)
    return real.cpu()


def columns_of(inputs: Inputs) -> int:
    """Return how many columns (tokens) a batch has, padding included; 0 without texts."""
    mask = inputs.get("attention_mask")
    return mask.shape[1] if torch.is_tensor(mask) and mask.dim() == 2 else 0


def window(real: Tensor, sides: frozenset[str]) -> slice:
    """Return the columns that any of the rows (R, T) needs, cropped at the given sides only."""
    needed = torch.nonzero(real.any(0)).flatten()
    if not len(needed):
        return slice(0, real.shape[1])
    start = int(needed[0]) if "left" in sides else 0
    return slice(start, int(needed[-1]) + 1 if "right" in sides else real.shape[1])


def trim(inputs: Inputs, columns: slice) -> Inputs:
    """Crop every input with one column per token."""
    width = inputs["attention_mask"].shape[1]
    cropped = {
        name: crop(inputs[name], columns)
        for name in _PADDED
        if torch.is_tensor(inputs.get(name)) and inputs[name].shape[1:] == (width,)
    }
    return {**inputs, **cropped}


class TrimmedBatch:
    """The model's inputs for rows of a batch, without padding that none of them needs.

    Args:
        inputs: the batch; tensors (B, ...), lists of B entries, or values that all samples share.
        sides: where padding may be cropped, because a check has shown that losses do not depend on
            it.

    Attributes:
        whole: the inputs of the whole batch, without padding that no sample needs.
    """

    def __init__(self, inputs: Inputs, sides: frozenset[str]) -> None:
        self.inputs, self.sides = inputs, sides
        self.real = real_tokens(inputs) if sides else None
        self.window = slice(0, 1) if self.real is None else window(self.real, sides)
        self.whole = inputs if self.real is None else trim(inputs, self.window)

    @property
    def columns(self) -> int:
        """Number of columns of `whole`; 1 if unknown."""
        return self.window.stop - self.window.start

    def of(self, owner: Tensor, unread: Collection[str] = ()) -> tuple[Inputs, int, slice | None]:
        """Return the inputs of rows that repeat samples.

        Args:
            owner: (R,) int64, the sample of each row.
            unread: names of inputs that are replaced by NaN, unless columns are cropped.

        Returns:
            The inputs, their number of columns (1 if unknown), and their columns within `whole`,
            None for all.
        """
        if self.real is None:
            return take(self.inputs, owner, unread), 1, None
        columns = window(self.real[owner], self.sides)
        start, stop = columns.start - self.window.start, columns.stop - self.window.start
        cut = None if stop - start == self.columns else slice(start, stop)
        inputs = take(self.inputs, owner, unread if cut is None else ())
        return trim(inputs, columns), stop - start, cut

    def ordered(self, rows: Rows, *, within_groups: bool) -> Rows:
        """Sort rows by width, the widest first, so that chunks have little padding."""
        if self.real is None:
            return rows
        cut = [window(row[None], self.sides) for row in self.real]
        width = torch.tensor([columns.stop - columns.start for columns in cut])[rows.owner]
        group = rows.group if within_groups else torch.zeros_like(rows.group)
        return rows[torch.argsort(group * (self.real.shape[1] + 1) - width, stable=True)]
