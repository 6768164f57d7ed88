"""Objectives of generated text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..base.batch import Inputs, batch_size
from ..base.completion import split
from ..base.transfer import onto
from ..errors import ConfigurationError, ObjectiveError
from .base import Forward, Objective, RowLosses
from .metrics import SmoothSurrogate, signed_losses

_GENERATION_INPUTS = ("input_ids", "attention_mask", "pixel_values", "input_features")


class GeneratedMetric(Objective):
    """A metric or reward of generated text; all rows of a forward are generated together.

    Args:
        what: "exact_match", which compares words with the text of the labels, or a function that
            maps (R texts, inputs) to R numbers.
        tokenizer: decodes tokens.
        greater_is_better: whether larger values are better.
        options: for the model's `generate`; the default is greedy, so that a row's text depends on
            its noise only.

    Raises:
        ConfigurationError: an unknown name.

    Examples:
        >>> import torch
        >>> from hf_flops.objectives import GeneratedMetric
        >>> def brevity(texts, inputs):
        ...     return torch.tensor([1.0 / len(text) for text in texts])
        >>> objective = GeneratedMetric(brevity, tokenizer=None)
        >>> inputs = {"input_ids": torch.tensor([[1, 2], [1, 3]])}
        >>> forward = lambda inputs: (None, ["Four", "Words"])  # in place of a model's `generate`
        >>> objective(forward, inputs).sums
        tensor([-0.2500, -0.2000])
    """

    generates = True
    piecewise_constant = True
    surrogate = SmoothSurrogate()

    def __init__(
        self,
        what: str | Callable[[list[str], Inputs], object],
        tokenizer: Any,
        *,
        greater_is_better: bool = True,
        **options: object,
    ) -> None:
        if isinstance(what, str) and what != "exact_match":
            raise ConfigurationError(
                f"GeneratedMetric({what!r}) is unknown: use exact_match or a function of texts "
                "and inputs."
            )
        self.what, self.tokenizer, self.sign = what, tokenizer, -1.0 if greater_is_better else 1.0
        self.options = {"do_sample": False, "num_beams": 1, **options}

    def run(self, model: nn.Module, inputs: Inputs) -> tuple[None, list[str]]:
        """Generate a text for every row, instead of running a forward pass."""
        generator: Any = model
        own = {name: inputs[name] for name in _GENERATION_INPUTS if name in inputs}
        labels = inputs.get("labels")
        config = getattr(generator, "config", None)  # a black box has none
        if (
            not getattr(config, "is_encoder_decoder", False)
            and torch.is_tensor(labels)
            and labels.dim() == 2
        ):
            # the prompt must not contain the answer
            rows = split(inputs["input_ids"], inputs.get("attention_mask"), labels)
            own["input_ids"] = onto(rows.text, labels.device)
            own["attention_mask"] = onto(rows.text_mask, labels.device)
        tokens, prompts = generator.generate(**own, **self.options), own.get("input_ids")
        if (
            prompts is not None
            and torch.is_tensor(tokens)
            and tokens.shape[1] >= prompts.shape[1]
            and tokens[:, : prompts.shape[1]].equal(prompts)
        ):
            tokens = tokens[:, prompts.shape[1] :]  # some models return the prompt too
        return None, self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def references(self, inputs: Inputs) -> list[str]:
        """Return the text of each row's labels (R, L), without those of -100."""
        labels = inputs.get("labels")
        if labels is None or labels.dim() != 2:
            raise ObjectiveError(
                f"GeneratedMetric({self.what!r}) compares with the text of labels (R, L), and "
                "there are none."
            )
        return self.tokenizer.batch_decode(
            [row[row != -100] for row in labels], skip_special_tokens=True
        )

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`; `forward` is `run` of the model."""
        del features
        _, texts = forward(inputs)
        if callable(self.what):
            scores = self.what(texts, inputs)
        else:
            scores = [
                exact_match(*pair) for pair in zip(texts, self.references(inputs), strict=True)
            ]
        return signed_losses(scores, self.sign, batch_size(inputs))


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def exact_match(text: str, wanted: str) -> float:
    """Return 1 if a text has the wanted words, ignoring case and punctuation, else 0."""
    return float(_words(text) == _words(wanted))
