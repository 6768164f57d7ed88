"""Splits rows of a batch into texts and the answers that complete them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError


@dataclass(frozen=True)
class Split:
    """The rows of a batch, split where their answers begin.

    Attributes:
        text: (R, T) int64, right-aligned, so that continuations directly follow it.
        text_mask: (R, T) int64, zero on padding.
        answer: (R, A) int64, left-aligned; A is 0 if no token is to be predicted.
        targets: (R, A) int64, the labels of the answer, -100 beyond its end.
    """

    text: Tensor
    text_mask: Tensor
    answer: Tensor
    targets: Tensor

    def keys(self) -> list[bytes]:
        """Return a key for each row; equal texts have equal keys for any padding."""
        lengths = self.text_mask.sum(1).tolist()
        return [
            row[len(row) - n :].tobytes()
            for row, n in zip(self.text.cpu().numpy(), lengths, strict=True)
        ]


def split(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Split:
    """Split every row into its text (label -100) and its answer (labelled), without padding.

    Args:
        input_ids: (R, L) int64, padded on either side.
        attention_mask: (R, L), zero on padding; None if there is none.
        labels: (R, L) int64; None if everything is text.

    Raises:
        ConfigurationError: a row has no text, no answer, or text after the start of its answer.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    answer = torch.zeros_like(input_ids, dtype=torch.bool) if labels is None else labels != -100
    text = real.bool() & ~answer
    for fine, what in (
        (text.any(1), "has no text before its answer, where a suffix prompt needs some to follow"),
        (answer.any(1) | (labels is None), "has no answer: all its labels are -100"),
        (
            ~(text & (answer.cumsum(1) > 0)).any(1),
            "has labels in the middle of its text: label the tokens at its end only, all others "
            "with -100",
        ),
    ):
        if not bool(fine.all()):
            raise ConfigurationError(f"Row {int((~fine).nonzero()[0])} of the batch {what}.")
    last = text.long().argsort(dim=1, stable=True)[:, -int(text.sum(1).max()) :]
    first = (~answer).long().argsort(dim=1, stable=True)[:, : int(answer.sum(1).max())]
    targets = first if labels is None else labels.gather(1, first)
    return Split(
        input_ids.gather(1, last), text.gather(1, last).long(), input_ids.gather(1, first), targets
    )
