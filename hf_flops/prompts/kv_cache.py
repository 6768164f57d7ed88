"""A key/value cache of texts that many rows share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..base.completion import Split
from ..base.transfer import onto
from ..errors import ConfigurationError
from ..objectives.base import ModelOutputs


@dataclass(frozen=True, eq=False)
class Ending:
    """The tokens of R rows after their texts.

    Attributes:
        tokens: (R, S, D) embeddings.
        kept: (R, S) int64, zero on padding.
        last: A, number of logits per row.
    """

    tokens: Tensor
    kept: Tensor
    last: int


def run(model: nn.Module, cache: DynamicCache, **inputs: object) -> ModelOutputs:
    """Call a model on a cache with the inputs that its forward accepts, because some do not accept
    `position_ids`.
    """
    names = inspect.signature(model.forward).parameters
    # transformers renamed it in 5.24
    inputs["cache" if "cache" in names else "past_key_values"] = cache
    return model(**{name: value for name, value in inputs.items() if name in names})


def _state(prompt: nn.Embedding) -> Hashable:
    """Return what tells a prompt from others without reading it, None while it may be perturbed."""
    weight = prompt.weight
    if "forward" in vars(prompt) or prompt._forward_hooks or prompt._forward_pre_hooks:
        return None
    return id(weight), weight.data_ptr(), weight._version


class TextCache:
    """The keys and values of U texts, of which rows that begin with them are continuations.

    It contains `2 x layers x key/value heads x head size x T` numbers per text.

    Args:
        base: a causal language model of transformers.
        texts: R rows; each distinct text runs through `base` once.
        keys: R keys, equal for equal texts.
        prompt: the virtual tokens that follow texts.
        ending: of the R rows, to run in the same forward; ignored if a layer has a sliding window.

    Attributes:
        mask: (U, T) int64, zero on padding.
        logits: (U, A, V) of the ending's last tokens; None if it was not run.

    Raises:
        ConfigurationError: the model keeps anything but keys and values.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        texts: Split,
        keys: Sequence[Hashable],
        prompt: nn.Embedding,
        ending: Ending | None = None,
    ) -> None:
        # the first row of each text
        first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
        self._place = {key: place for place, key in enumerate(first)}
        rows = torch.tensor(list(first.values()))
        self._texts, self._prompt, self._ran = texts.rows(rows), prompt, _state(prompt)
        device = prompt.weight.device
        ids, self.mask = onto(self._texts.text, device), onto(self._texts.text_mask, device)
        self._cache = DynamicCache(config=base.config)
        ending = None if self.sliding else ending
        self.logits = None
        mask, own = self.mask, {"input_ids": ids}
        if ending is not None:
            index = onto(rows, ending.tokens.device)
            embeddings = [base.get_input_embeddings()(ids), ending.tokens[index]]
            own = {"inputs_embeds": torch.cat(embeddings, 1)}
            own["logits_to_keep"] = (
                torch.arange(-ending.last, 0, device=device) + own["inputs_embeds"].shape[1]
            )
            mask = torch.cat([mask, ending.kept[index]], 1)
        outputs = run(
            # without the head: nothing is predicted inside the text
            base if ending is not None else base.base_model,
            self._cache,
            **own,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        if ending is not None:
            self.logits = outputs.logits[:, -ending.last :]
            self._cache.crop(-ending.tokens.shape[1])
        kinds = {type(layer) for layer in self._cache.layers}
        if (
            not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
            or self._cache.get_seq_length() != ids.shape[1]
        ):
            raise ConfigurationError(
                f"{type(base).__name__} keeps more than keys and values of its text, which a "
                "suffix prompt cannot continue: use prompt tuning from PEFT."
            )

    def __contains__(self, keys: Sequence[Hashable]) -> bool:
        return all(key in self._place for key in keys)

    @property
    def sliding(self) -> bool:
        """Whether a layer attends to a sliding window only."""
        return any(getattr(layer, "is_sliding", False) for layer in self._cache.layers)

    def known(self, place: Tensor, rows: Split) -> Tensor | None:
        """Return the logits (R, A, V) of rows, which continue the texts (R,) by the prompt and an
        answer, if these were run with the texts, else None.
        """
        state = _state(self._prompt)
        if self.logits is None or torch.is_grad_enabled() or state is None or state != self._ran:
            return None
        ran = self._texts.rows(place)
        if not (ran.answer.equal(rows.answer) and ran.targets.equal(rows.targets)):
            return None
        return self.logits[onto(place, self.logits.device), : max(1, rows.answer.shape[1])]

    def rows(self, keys: Sequence[Hashable]) -> Tensor:
        """Return (R,) int64, the text of each row, on the host."""
        return torch.tensor([self._place[key] for key in keys])

    def take(self, rows: Tensor) -> tuple[DynamicCache, Tensor]:
        """Return the cache for a forward of rows that continue the texts (R,), and its mask (R,
        T).
        """
        cache = copy.copy(self._cache)
        cache.layers = [_Continued(layer, rows) for layer in self._cache.layers]
        return cache, self.mask[rows]


class _Continued(DynamicLayer):
    """A layer of a cache whose rows are copied when attention needs them, so that copies exist for
    one layer at a time.

    Args:
        layer: keys and values (U, heads, slots, head size) of the texts.
        rows: (R,) int64, the text of each row.
    """

    def __init__(self, layer: Any, rows: Tensor) -> None:
        super().__init__()
        self.layer, self.rows, self.is_sliding = layer, rows, layer.is_sliding

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return the texts' keys and values followed by new ones (R, heads, S, head size); nothing
        is kept.
        """
        del args, kwargs
        rows = self.rows.to(key_states.device)
        return _extended(self.layer.keys, rows, key_states), _extended(
            self.layer.values, rows, value_states
        )

    def get_seq_length(self) -> int:
        """Return the number of tokens of the texts."""
        return self.layer.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the slots that attention uses."""
        return self.layer.get_mask_sizes(query_length)


def _extended(kept: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Return selected rows of (U, heads, slots, size) followed by (R, heads, S, size), copied
    once.
    """
    if torch.is_grad_enabled():
        return torch.cat([kept.index_select(0, rows), new], -2)
    slots = kept.shape[-2]
    joined = new.new_empty(*new.shape[:-2], slots + new.shape[-2], new.shape[-1])
    torch.index_select(kept, 0, rows, out=joined[..., :slots, :])
    joined[..., slots:, :] = new
    return joined
