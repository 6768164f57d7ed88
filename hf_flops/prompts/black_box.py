"""A soft prompt before or after the text of a model that runs elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ..engines.base import Engine
from ..errors import ConfigurationError, EngineError
from ..objectives.elementwise import mean_cross_entropy


@runtime_checkable
class Generator(Protocol):
    """An engine that also continues rows."""

    def generate(
        self, inputs_embeds: Tensor, attention_mask: Tensor, max_tokens: int, temperature: float
    ) -> list[list[int]]:
        """Return the tokens that continue each row, the likeliest ones if the temperature is 0."""


def tokens_of(name: str, values: Iterable[SupportsIndex], size: int) -> list[int]:
    """Return tokens, if each is a row of a table of that size."""
    try:
        tokens = [operator.index(token) for token in values]
    except TypeError:  # not a sequence, or not of whole numbers
        tokens = [-1]
    if not all(0 <= token < size for token in tokens):
        raise ConfigurationError(
            f"{name}={values!r} must be tokens, whole numbers from 0 to {size - 1}."
        )
    return tokens


def sampling(
    max_new_tokens: int = 16,
    do_sample: bool = False,
    temperature: float = 1.0,
    num_beams: int = 1,
    **options: object,
) -> dict[str, Any]:
    """Return the options of transformers' `generate` in the words of engines."""
    if num_beams != 1:
        raise ConfigurationError(f"num_beams={num_beams!r}: engines have no beam search.")
    temperature = temperature if do_sample else 0.0
    return {**options, "max_tokens": max_new_tokens, "temperature": temperature}


class LabelWords(nn.Module):
    """The classes of texts as tokens that an engine scores.

    Args:
        words: the token of each of C classes; None if texts have no classes but a reward.
        size: of the vocabulary.

    Raises:
        ConfigurationError: the tokens are not different ones of the vocabulary, or one only.
    """

    tokens: Tensor

    def __init__(self, words: Sequence[int] | None, size: int) -> None:
        super().__init__()
        self.given = words is not None
        # without classes, the checks of the first batch look at the scores of some other tokens
        found = (
            list(range(min(8, size))) if words is None else tokens_of("label_words", words, size)
        )
        if len(set(found)) < max(2, len(found)):
            raise ConfigurationError(f"label_words={found!r} must be two or more different tokens.")
        self.register_buffer("tokens", torch.tensor(found))

    def classes(self, labels: Tensor | None, rows: int) -> Tensor | None:
        """Return labels as `cross_entropy` takes them: classes (R,), or probabilities (R, C); None
        if there are no classes.

        Raises:
            ConfigurationError: the labels are not classes.
        """
        if labels is None or not self.given:
            return None
        count = len(self.tokens)
        if labels.is_floating_point() and labels.shape == (rows, count):
            return labels
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (rows,):
            raise ConfigurationError(
                f"labels of {labels.dtype} in the shape {tuple(labels.shape)} are not the classes "
                f"of {rows} rows."
            )
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= count))]
        if len(wrong):
            raise ConfigurationError(
                f"labels hold {wrong[0].item()}, but label_words are of classes 0 to {count - 1}."
            )
        return labels.long()

    def outputs(
        self,
        engine: object,
        answer: object,
        labels: Tensor | None,
        rows: int,
        items: Tensor | int | None,
    ) -> CausalLMOutput:
        """Return an engine's answer, scores (R, C), as logits, with their loss if there are labels.

        Raises:
            EngineError: the answer has another shape, or is no tensor at all.
        """
        if not isinstance(answer, Tensor):
            try:
                answer = torch.tensor(answer)  # of NumPy
            except (TypeError, ValueError, RuntimeError) as error:
                raise EngineError(
                    f"{engine!r} answered with a {type(answer).__name__}, not with scores."
                ) from error
        if answer.shape != (wanted := (rows, len(self.tokens))):
            raise EngineError(
                f"{engine!r} answered with the shape {tuple(answer.shape)}, where {wanted} was "
                "wanted."
            )
        logits = answer.to(self.tokens.device)
        loss = None if labels is None else mean_cross_entropy(logits, labels, items)
        return CausalLMOutput(loss=loss, logits=logits)


class BlackBoxPromptModel(nn.Module):
    """P trainable virtual tokens before or after texts that an engine continues.

    Args:
        engine: the model; see `Engine`.
        embeddings: (V, D) the model's input embeddings, which are not trained.
        label_words: the token of each of C classes; None to train for a reward of generated texts
            (`GeneratedMetric`).
        num_virtual_tokens: P.
        init_tokens: initial tokens of the prompt, repeated as needed; otherwise random ones.
        precision: relative error of losses due to the engine's rounding, 3e-2 for int8.
        after: whether the prompt comes after the text, where it learns with fewer rows, instead of
            before; an engine with a cache of prefixes then runs each text once.

    Raises:
        ConfigurationError: fewer than one virtual token, tokens outside the table, or label words
            that are not different.

    Examples:
        >>> import torch
        >>> from hf_flops import BlackBoxPromptModel
        >>> def engine(inputs_embeds, attention_mask, token_ids):
        ...     return (inputs_embeds * attention_mask[:, :, None]).sum(1) @ table[token_ids].T
        >>> table = torch.rand(10, 4)  # input embeddings of 10 tokens
        >>> model = BlackBoxPromptModel(engine, table, label_words=[3, 7], num_virtual_tokens=2)
        >>> model(torch.tensor([[1, 2, 5]]), labels=torch.tensor([0])).logits.shape
        torch.Size([1, 2])
    """

    embeddings: Tensor
    accepts_loss_kwargs = True  # Trainer's name for `num_items_in_batch`
    config = None  # Trainer's card asks for it
    measures_noise = True  # whether epsilon survives the engine's rounding

    def __init__(
        self,
        engine: Engine,
        embeddings: Tensor,
        label_words: Sequence[int] | None = None,
        num_virtual_tokens: int = 8,
        init_tokens: Sequence[int] | None = None,
        precision: float = 1e-4,
        after: bool = False,
    ) -> None:
        super().__init__()
        self.precision, self.after = precision, after
        if type(num_virtual_tokens) is not int or num_virtual_tokens < 1:
            raise ConfigurationError(
                f"num_virtual_tokens={num_virtual_tokens!r} must be a whole number, 1 or more."
            )
        self.engine = engine
        table = embeddings.detach().float()
        self.label_words = LabelWords(label_words, len(table))
        start = tokens_of("init_tokens", () if init_tokens is None else init_tokens, len(table))
        if start:
            tokens = torch.tensor((start * num_virtual_tokens)[:num_virtual_tokens])
        else:
            tokens = torch.randint(len(table), (num_virtual_tokens,))
        self.prompt = nn.Embedding.from_pretrained(table[tokens].clone(), freeze=False)
        self.register_buffer("embeddings", table, persistent=False)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Run texts (R, T), padded on either side; labels are (R,) classes, and logits (R, C).

        Raises:
            ConfigurationError: the labels are not classes.
            EngineError: the engine failed, or its answer has another shape than (R, C).
        """
        labels = self.label_words.classes(labels, len(input_ids))
        answer = self.engine(
            *self._rows(input_ids, attention_mask), self.label_words.tokens.tolist()
        )
        return self.label_words.outputs(
            self.engine, answer, labels, len(input_ids), num_items_in_batch
        )

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> list[list[int]]:
        """Return the tokens that the engine generates after each row; options are those that
        `generate` of transformers has for sampling.

        Raises:
            ConfigurationError: the engine only scores, or beams are asked for.
        """
        if not isinstance(self.engine, Generator):
            raise ConfigurationError(
                f"{self.engine!r} scores tokens and generates none: use a TorchEngine or vLLM."
            )
        return self.engine.generate(*self._rows(input_ids, attention_mask), **sampling(**options))

    def _rows(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return embeddings (R, T + P, D) of text and prompt, padded at the right, and the mask."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        index = torch.arange(self.prompt.num_embeddings, device=input_ids.device)
        index = index.expand(len(input_ids), -1)
        parts = [(self.prompt(index), torch.ones_like(index)), (self.embeddings[input_ids], mask)]
        rows, mask = (
            torch.cat(both, 1) for both in zip(*(parts[::-1] if self.after else parts), strict=True)
        )
        order = (mask == 0).long().argsort(dim=1, stable=True)  # padding goes to the right
        rows = rows.gather(1, order[:, :, None].expand_as(rows))
        return rows.float(), mask.gather(1, order).long()
