"""What virtual tokens start as."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigurationError


def initial_embeddings(
    words: Tensor,
    number: int,
    init_text: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tensor:
    """Return (number, D), at least float32: the embeddings of a text's tokens, repeated as needed,
    or of random ones.

    Args:
        words: (V, D) input embeddings.
        number: of virtual tokens.
        init_text: the text; None for random tokens.
        tokenizer: encodes it.

    Raises:
        ConfigurationError: there is a text but no tokenizer.
    """
    if init_text is None:
        tokens = torch.randint(len(words), (number,), device=words.device)
    elif tokenizer is None:
        raise ConfigurationError(f"init_text={init_text!r} needs tokenizer= to become tokens.")
    else:
        ids = tokenizer(init_text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor(ids, device=words.device).repeat(-(-number // len(ids)))[:number]
    start = words.detach()[tokens]
    return start if start.dtype == torch.float64 else start.float()
