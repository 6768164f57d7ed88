"""What an engine is: a language model that only returns outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

Prompt: TypeAlias = Tensor | list[int]
"""Embeddings (T, D), or T tokens."""


class Engine(Protocol):
    """A language model that scores tokens; any callable of this form is one."""

    def __call__(
        self, inputs_embeds: Tensor, attention_mask: Tensor, token_ids: Sequence[int]
    ) -> Tensor:
        """Return scores (R, C) of C tokens after each row's last real token: logits, up to a
        constant for each row, as log-probabilities are.

        Args:
            inputs_embeds: (R, T, D) float32.
            attention_mask: (R, T) int64, zero on padding, which is at the right.
            token_ids: C tokens.
        """


def finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite."""
    return bool(tensor.isfinite().all())


def without_padding(inputs_embeds: Tensor, attention_mask: Tensor) -> list[Prompt]:
    """Return the embeddings (T, D) of each row's real tokens, on the CPU."""
    embeds, mask = inputs_embeds.cpu(), attention_mask.cpu().bool()
    return [row[real] for row, real in zip(embeds, mask, strict=True)]
