"""Splits rows of a batch into texts and the answers that complete them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .batch import samples_of


@dataclass(frozen=True)
class Split:
    """The rows of a batch on the host, split where their answers begin.

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
            row[len(row) - n :].tobytes() for row, n in zip(self.text.numpy(), lengths, strict=True)
        ]

    def rows(self, index: Tensor) -> Split:
        """Return rows (R,) without columns that are padding in all of them."""
        mask, targets = self.text_mask[index], self.targets[index]
        text = slice(mask.shape[1] - int(mask.sum(1).max()), None)
        answer = slice(int((targets != -100).sum(1).max()) if targets.shape[1] else 0)
        return Split(
            self.text[index][:, text],
            mask[:, text],
            self.answer[index][:, answer],
            targets[:, answer],
        )


@dataclass(frozen=True)
class BatchSplit:
    """The split of a batch, from which those of rows are taken without a transfer.

    Attributes:
        inputs: the batch's token ids, attention mask and labels.
        split: of its samples.
    """

    inputs: tuple[Tensor | None, ...]
    split: Split

    def of(self, *rows: Tensor | None) -> Split | None:
        """Return the split of rows of the inputs, None if `take` did not make them."""
        found = None
        for own, batch in zip(map(_tokens, rows), map(_tokens, self.inputs), strict=True):
            if own is None and batch is None:
                continue
            owner = None if own is None or batch is None else samples_of(own, batch)
            if owner is None or (found is not None and not found.equal(owner)):
                return None
            found = owner
        return None if found is None else self.split.rows(found)


def _tokens(values: Tensor | None) -> Tensor | None:
    """Return values of tokens; classes (R,) as labels are none."""
    return None if values is None or values.dim() == 1 else values


def split(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Split:
    """Split every row into its text (label -100) and its answer (labelled), without padding.

    Args:
        input_ids: (R, L) int64, padded on either side.
        attention_mask: (R, L), zero on padding; None if there is none.
        labels: (R, L) int64; None, or classes (R,), if everything is text.

    Raises:
        ConfigurationError: a row has no text, no answer, or text after the start of its answer.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    labels = _tokens(labels)
    given = [input_ids, real.to(input_ids), *([] if labels is None else [labels])]
    input_ids, real, *wanted = torch.stack(given).cpu()  # one transfer
    answer = wanted[0] != -100 if wanted else torch.zeros_like(input_ids, dtype=torch.bool)
    text = real.bool() & ~answer
    for fine, what in (
        (text.any(1), "has no text before its answer, where a suffix prompt needs some to follow"),
        (answer.any(1) | (not wanted), "has no answer: all its labels are -100"),
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
    targets = wanted[0].gather(1, first) if wanted else first
    return Split(
        input_ids.gather(1, last), text.gather(1, last).long(), input_ids.gather(1, first), targets
    )
