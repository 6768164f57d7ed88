"""A soft prompt before or after the text of a model that runs elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Protocol, SupportsIndex

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ..errors import ConfigurationError, EngineError
from ..objectives.elementwise import mean_cross_entropy


class Engine(Protocol):
    """A language model that only returns outputs."""

    def __call__(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits (R, V) of what follows each row's last real token.

        Args:
            inputs_embeds: (R, T, D) float32.
            attention_mask: (R, T) int64, zero on padding, which is at the right.
        """


def _tokens(name: str, values: Iterable[SupportsIndex], size: int) -> list[int]:
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


class BlackBoxPromptModel(nn.Module):
    """P trainable virtual tokens before or after texts that an engine continues.

    Args:
        engine: the model; see `Engine`.
        embeddings: (V, D) the model's input embeddings, which are not trained.
        label_words: the token of each of C classes.
        num_virtual_tokens: P.
        init_tokens: initial tokens of the prompt, repeated as needed; otherwise random ones.
        precision: relative error of losses due to the engine's rounding, 3e-2 for int8.
        after: whether the prompt comes after the text, where it learns with fewer rows, instead of
            before.

    Raises:
        ConfigurationError: fewer than one virtual token, tokens outside the table, or label words
            that are not different.

    Example:
        >>> import torch
        >>> from hf_flops.engines import BlackBoxPromptModel
        >>> def engine(inputs_embeds, attention_mask):
        ...     return (inputs_embeds * attention_mask[:, :, None]).sum(1) @ table.T
        >>> table = torch.rand(10, 4)  # input embeddings of 10 tokens
        >>> model = BlackBoxPromptModel(engine, table, label_words=[3, 7], num_virtual_tokens=2)
        >>> model(torch.tensor([[1, 2, 5]]), labels=torch.tensor([0])).logits.shape
        torch.Size([1, 2])
    """

    embeddings: Tensor
    label_words: Tensor
    accepts_loss_kwargs = True  # Trainer's name for `num_items_in_batch`

    def __init__(
        self,
        engine: Engine,
        embeddings: Tensor,
        label_words: Sequence[int],
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
        words = _tokens("label_words", label_words, len(table))
        if len(set(words)) < max(2, len(words)):
            raise ConfigurationError(f"label_words={words!r} must be two or more different tokens.")
        if start := _tokens("init_tokens", () if init_tokens is None else init_tokens, len(table)):
            tokens = torch.tensor((start * num_virtual_tokens)[:num_virtual_tokens])
        else:
            tokens = torch.randint(len(table), (num_virtual_tokens,))
        self.prompt = nn.Embedding.from_pretrained(table[tokens].clone(), freeze=False)
        self.register_buffer("embeddings", table, persistent=False)
        self.register_buffer("label_words", torch.tensor(words))

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
            EngineError: the answer has another shape than (R, V), or is no tensor at all.
        """
        if labels is not None:
            labels = self._classes(labels, len(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        index = torch.arange(self.prompt.num_embeddings, device=input_ids.device).expand(
            len(input_ids), -1
        )
        parts = [(self.prompt(index), torch.ones_like(index)), (self.embeddings[input_ids], mask)]
        rows, mask = (
            torch.cat(both, 1) for both in zip(*(parts[::-1] if self.after else parts), strict=True)
        )
        order = (mask == 0).long().argsort(dim=1, stable=True)  # padding goes to the right
        rows = rows.gather(1, order[:, :, None].expand_as(rows))
        with torch.no_grad():
            answer = self.engine(rows.float(), mask.gather(1, order).long())
        wanted = (len(input_ids), len(self.embeddings))
        if not isinstance(answer, Tensor):
            try:
                answer = torch.tensor(answer)  # of NumPy
            except (TypeError, ValueError, RuntimeError) as error:
                raise EngineError(
                    f"{self.engine!r} answered with a {type(answer).__name__}, not with logits."
                ) from error
        if answer.shape != wanted:
            raise EngineError(
                f"{self.engine!r} answered with the shape {tuple(answer.shape)}, where {wanted} "
                "was wanted."
            )
        logits = answer.to(rows.device)[:, self.label_words]
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(
            loss=mean_cross_entropy(logits, labels, num_items_in_batch), logits=logits
        )

    def _classes(self, labels: Tensor, rows: int) -> Tensor:
        """Return labels as `cross_entropy` takes them: classes (R,), or probabilities (R, C)."""
        count = len(self.label_words)
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
