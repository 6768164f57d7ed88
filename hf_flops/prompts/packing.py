"""Packs rows that continue the same text into one sequence, so that its keys and values are not
copied for each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base.probe import Attempt, agree
from ..base.transfer import onto
from .kv_cache import TextCache, run

MOST = 16  # rows per line; with more, masked attention between rows costs more than copies
_TOKEN = 50  # a token costs about as much as copying this number of keys and values


@dataclass(frozen=True)
class Packing:
    """A layout of R rows in L lines of N slots; the rows of a line continue the same text.

    It is found on the host, where the rows' texts are known.

    Attributes:
        texts: (L,) int64, the text of each line.
        line: (R,) int64, the line of each row.
        slot: (R,) int64, the slot of each row in its line.
        slots: N.
    """

    texts: Tensor
    line: Tensor
    slot: Tensor
    slots: int

    @classmethod
    def of(cls, rows: Tensor, slots: int) -> Packing:
        """Return a layout with lines of `slots` slots; rows: (R,) int64, the text of each row."""
        counts = torch.bincount(rows)
        lines = (counts + slots - 1).div(slots, rounding_mode="floor")
        order = rows.argsort(stable=True)
        rank = torch.empty_like(rows)
        rank[order] = (
            torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
        )
        first = (lines.cumsum(0) - lines)[rows]
        texts = torch.repeat_interleave(torch.arange(len(counts), device=rows.device), lines)
        return cls(texts, first + rank.div(slots, rounding_mode="floor"), rank % slots, slots)

    @classmethod
    def cheapest(cls, rows: Tensor, tokens: int, columns: int) -> Packing:
        """Return the layout with the lowest cost of empty slots and copies.

        Args:
            rows: (R,) int64, the text of each row.
            tokens: of a row.
            columns: of a text.
        """
        counts = torch.bincount(rows).tolist()

        def cost(slots: int) -> int:
            return sum(-(-count // slots) for count in counts) * (_TOKEN * slots * tokens + columns)

        return cls.of(rows, min(range(1, min(MOST, max(counts)) + 1), key=cost))

    def to(self, device: torch.device) -> Packing:
        """Return the layout on a device."""
        texts, line, slot = (onto(index, device) for index in (self.texts, self.line, self.slot))
        return Packing(texts, line, slot, self.slots)

    def pack(self, values: Tensor) -> Tensor:
        """Put (R, S, ...) into lines (L, N * S, ...); empty slots are zero."""
        lines = values.new_zeros(len(self.texts), self.slots, *values.shape[1:])
        return lines.index_put((self.line, self.slot), values).flatten(1, 2)

    def unpack(self, lines: Tensor) -> Tensor:
        """Take the rows (R, S, ...) out of lines (L, N * S, ...)."""
        return lines.unflatten(1, (self.slots, -1))[self.line, self.slot]

    def mask(self, text: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the additive attention mask (L, 1, N * S, T + N * S): a token attends to its text,
        and to its own row up to itself.

        Args:
            text: (L, T), zero on padding.
            kept: (R, S), zero on padding.
            dtype: of the scores.
        """
        lines, own = self.pack(kept).bool(), kept.shape[1]
        place = torch.arange(lines.shape[1], device=text.device)
        row = place.div(own, rounding_mode="floor")
        block = (row[:, None] == row) & (place[:, None] >= place)
        visible = torch.cat(
            [text.bool()[:, None].expand(-1, len(place), -1), lines[:, None] & block], 2
        )
        return torch.zeros(visible.shape, dtype=dtype, device=text.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )[:, None]


def continued(
    base: PreTrainedModel,
    texts: TextCache,
    packing: Packing,
    tokens: Tensor,
    kept: Tensor,
    last: int,
) -> Tensor:
    """Run rows that continue texts, and return the logits (R, last, V) of their last tokens.

    Args:
        base: a causal language model of transformers.
        texts: their keys and values.
        packing: how the rows are laid out.
        tokens: (R, S, D) embeddings.
        kept: (R, S) int64, zero on padding.
        last: number of logits per row.
    """
    size, packing = tokens.shape[1], packing.to(tokens.device)
    past, mask = texts.take(packing.texts)
    own = torch.arange(size, device=mask.device)
    # Indices, not a number: torch is slow if the head reads a slice, which is not contiguous.
    index = (
        torch.arange(packing.slots, device=mask.device)[:, None] * size + own[size - last :]
    ).flatten()
    single = packing.slots == 1
    outputs = run(
        base,
        past,
        inputs_embeds=packing.pack(tokens),
        attention_mask=torch.cat([mask, packing.pack(kept)], 1)
        if single
        else packing.mask(mask, kept, tokens.dtype),
        position_ids=mask.sum(1, keepdim=True) + own.repeat(packing.slots),
        use_cache=True,
        logits_to_keep=index,
    )
    logits = outputs.logits
    return packing.unpack(logits if logits.shape[1] == len(index) else logits[:, index])


@torch.no_grad()
def may_be_packed(
    base: PreTrainedModel, texts: TextCache, tokens: Tensor, precision: float = 1e-4
) -> bool:
    """Return whether packed rows have the same logits as single ones: not every model accepts a
    custom mask.

    Args:
        base: a causal language model of transformers.
        texts: keys and values of U texts.
        tokens: (S, D) embeddings.
        precision: relative error due to rounding.
    """
    if texts.sliding or getattr(base.config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    few = torch.tensor([0, len(texts.mask) - 1, 0, 0])
    rows = torch.stack([tokens, tokens, tokens.flip(0), 2 * tokens])
    kept = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
    with Attempt("Rows of a text are not packed into one sequence"):
        alone, together = (
            continued(base, texts, Packing.of(few, slots), rows, kept, 1) for slots in (1, 2)
        )
        return agree(together, alone, precision)
    return False
