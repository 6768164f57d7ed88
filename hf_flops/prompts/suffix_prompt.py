"""A soft prompt after the text: the text runs once, and queries run the virtual tokens and the
answer only.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import align_module_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import PushToHubMixin

from ..base.batch import Inputs
from ..base.completion import BatchSplit, Split, split
from ..base.rounding_error import precision_of
from ..base.transfer import onto
from ..errors import ConfigurationError
from ..objectives.elementwise import mean_cross_entropy
from .base_weights import drop_base, ignore_missing_base
from .initial import initial_embeddings
from .kv_cache import Ending, TextCache
from .label_head import hidden_states, label_head_of
from .packing import Packing, continued, may_be_packed

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "suffix_prompt.json"


class SuffixPromptModel(nn.Module, PushToHubMixin):
    """A frozen causal language model with P trainable virtual tokens between every row's text and
    its answer.

    Attention is causal and the base is frozen, so the prompt does not affect the text's keys and
    values. They are computed once per call for all rows that begin with the text, or once per step
    inside `cached_texts`, where rows of the same text share one sequence if the model allows it. If
    parameters of the base are trainable, every row runs its own text.

    Args:
        model: any causal language model of transformers with a cache of keys and values; it is
            frozen.
        num_virtual_tokens: P.
        init_text: a text whose tokens, repeated as needed, initialise the prompt; otherwise random
            tokens do.
        tokenizer: encodes `init_text`.
        label_words: the token of each of C classes; then labels (R,) are classes and logits
            (R, C).
        label_head: whether these logits are those of a trainable linear head, which starts as the
            output layer's rows of `label_words`; see `LabelHeadModel`.

    Raises:
        ConfigurationError: not a model of transformers, fewer than one virtual token, `init_text`
            without a tokenizer, or `label_head` without `label_words`.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_flops import SuffixPromptModel
        >>> config = LlamaConfig(vocab_size=40, hidden_size=64, num_hidden_layers=1)
        >>> model = SuffixPromptModel(LlamaForCausalLM(config), num_virtual_tokens=4)
        >>> labels = torch.tensor([[-100, -100, 7, 8]])  # a text of two tokens, and its answer
        >>> model(torch.tensor([[5, 6, 7, 8]]), labels=labels).logits.shape
        torch.Size([1, 2, 40])
    """

    label_words: Tensor | None
    accepts_loss_kwargs = True  # Trainer's name for `num_items_in_batch`

    def __init__(
        self,
        model: PreTrainedModel,
        num_virtual_tokens: int = 8,
        init_text: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        label_words: Sequence[int] | None = None,
        label_head: bool = False,
    ) -> None:
        super().__init__()
        if not issubclass(type(model), PreTrainedModel):
            raise ConfigurationError(
                f"A {type(model).__name__} cannot be continued from a cache: give a causal "
                "language model of transformers, of a PEFT model what merge_and_unload() returns."
            )
        if not isinstance(num_virtual_tokens, int) or num_virtual_tokens < 1:
            raise ConfigurationError(
                f"num_virtual_tokens={num_virtual_tokens!r} must be a whole number, 1 or more."
            )
        if label_head and label_words is None:
            raise ConfigurationError("label_head=True needs label_words=, a token per class.")
        embeddings = model.get_input_embeddings()
        with align_module_device(embeddings):  # accelerate may have offloaded them
            words = embeddings.get_parameter("weight")
            start = initial_embeddings(words, num_virtual_tokens, init_text, tokenizer)
        self.base: Any = model.requires_grad_(False)
        # An embedding, because there are per-row rules for it: each row looks up all P entries.
        self.prompt = nn.Embedding.from_pretrained(start, freeze=False)
        self.register_buffer(
            "label_words",
            None if label_words is None else torch.tensor(label_words, device=start.device),
        )
        self.head = label_head_of(model, label_words) if label_head and label_words else None
        self.model_tags: list[str] = []
        self.texts: TextCache | None = None
        self._batch: BatchSplit | None = None
        # whether rows of a text may share a sequence; None until checked
        self.packs: bool | None = None
        self.register_state_dict_post_hook(drop_base)
        self.register_load_state_dict_post_hook(ignore_missing_base)

    @property
    def config(self) -> PreTrainedConfig:
        """The base model's configuration."""
        return self.base.config

    def add_model_tags(self, tags: Sequence[str]) -> None:
        """Add tags for the model card."""
        self.model_tags += [tag for tag in tags if tag not in self.model_tags]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Run text, prompt and answer of every row.

        Args:
            input_ids: (R, L) int64, padded on either side.
            attention_mask: (R, L), zero on padding.
            labels: (R, L), -100 on the text; the answer, at the end of a row, has labels. Or, with
                `label_words`, (R,) classes, and all of `input_ids` is text.
            num_items_in_batch: divisor of the summed losses; None for their mean.

        Returns:
            The loss if there are labels, and logits: (R, A, V) of the answers' tokens,
            left-aligned; (R, 1, V) of the next token without labels; (R, C) of the classes.

        Raises:
            ConfigurationError: a row has no text, no answer, labels in the middle, or more tokens
                than the model takes.
        """
        rows = self._split(input_ids, attention_mask, labels)
        head = self._head(rows)
        with hidden_states(self.base, when=head is not None):
            logits = self._logits(rows)
        if head is not None:
            logits = head(logits[:, -1].to(head.weight.dtype))
        elif self.label_words is not None and rows.answer.shape[1] == 0:
            logits = logits[:, -1, self.label_words]
        if labels is None:
            return CausalLMOutput(logits=logits)
        targets = labels if labels.dim() == 1 else onto(rows.targets, labels.device)
        loss = mean_cross_entropy(logits.flatten(0, -2), targets.flatten(), num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)

    @contextmanager
    def cached_texts(self, inputs: Inputs, *, clean: bool = False) -> Iterator[None]:
        """Keep the keys and values of a batch's texts for all forwards inside the context.

        Args:
            inputs: the batch.
            clean: whether the same forward also runs the samples with the unperturbed prompt.
        """
        before = self.texts, self._batch
        try:
            if self._shares():
                given = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
                rows = self._split(*given)
                self._batch = BatchSplit(given, rows)
                ending = self._ending(rows) if clean else None
                with hidden_states(self.base, when=self._head(rows) is not None):
                    self.texts = self._read(rows, rows.keys(), ending)
                if self.packs is None:
                    prompt = self.prompt.weight.to(self.base.dtype)
                    self.packs = may_be_packed(
                        self.base, self.texts, prompt, precision_of(self.base)
                    )
            yield
        finally:
            self.texts, self._batch = before

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: object
    ) -> Tensor:
        """Return the tokens (R, .) generated after text and prompt; options of the base's
        `generate`.
        """
        rows = self._split(input_ids, attention_mask, None)
        text, mask = (onto(part, input_ids.device) for part in (rows.text, rows.text_mask))
        embeddings = torch.cat(
            [self.base.get_input_embeddings()(text), self._prompts(len(input_ids))], 1
        )
        mask = F.pad(mask, (0, self.prompt.num_embeddings), value=1)
        return self.base.generate(inputs_embeds=embeddings, attention_mask=mask, **options)

    def save_pretrained(self, save_directory: str | Path, **options: object) -> None:
        """Write prompt and head (safetensors) and their configuration (JSON) to a folder, without
        the base.
        """
        del options
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE)
        base, tokens = self.config.name_or_path, self.prompt.num_embeddings
        config = {"base_model_name_or_path": base, "num_virtual_tokens": tokens}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, model: PreTrainedModel, folder: str | Path) -> Self:
        """Load a prompt from `save_pretrained` or a Trainer's checkpoint, for a base model."""
        state = load_file(Path(folder, WEIGHTS_FILE))
        words = state.get("label_words")
        loaded = cls(
            model,
            len(state["prompt.weight"]),
            label_words=None if words is None else words.tolist(),
            label_head="head.weight" in state,
        )
        loaded.load_state_dict(state)
        return loaded

    def _split(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> Split:
        """Split rows into texts and answers; with classes (R,) as labels there is no answer."""
        if labels is not None and labels.dim() == 1 and self.label_words is None:
            raise ConfigurationError(
                f"Labels of shape {tuple(labels.shape)} are classes: give label_words=, a token "
                "each."
            )
        given = input_ids, attention_mask, labels
        if self._batch is not None and (known := self._batch.of(*given)) is not None:
            return known
        rows = split(*given)
        text, answer = int(rows.text_mask.sum(1).max()), rows.answer.shape[1]
        prompt = self.prompt.num_embeddings
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and text + prompt + answer > most:
            raise ConfigurationError(
                f"A text of {text} tokens, {prompt} virtual tokens and an answer of {answer} are "
                f"more than the {most} that the model takes: truncate the text."
            )
        return rows

    def _head(self, rows: Split) -> nn.Linear | None:
        """Return the head, if rows are scored by classes: they have no answer."""
        return self.head if rows.answer.shape[1] == 0 else None

    def _shares(self) -> bool:
        """Return whether rows can share keys and values of texts: no base parameter is trained."""
        return not any(parameter.requires_grad for parameter in self.base.parameters())

    def _read(
        self, rows: Split, keys: Sequence[Hashable], ending: Ending | None = None
    ) -> TextCache:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._shares()):
            return TextCache(self.base, rows, keys, self.prompt, ending)

    def _ending(self, rows: Split) -> Ending:
        """Return prompt and answer of each row, without the last token, which predicts nothing."""
        device, prompt = self.prompt.weight.device, self.prompt.num_embeddings
        answer = onto(rows.answer[:, :-1], device)
        tokens = torch.cat(
            [self._prompts(len(answer)), self.base.get_input_embeddings()(answer)], 1
        )
        kept = F.pad((rows.targets[:, :-1] != -100).long(), (prompt, 0), value=1)
        return Ending(tokens, onto(kept, device), max(1, rows.answer.shape[1]))

    def _prompts(self, rows: int) -> Tensor:
        """Return the prompt of each row, (R, P, D), in the base's dtype; noise is added before."""
        index = torch.arange(self.prompt.num_embeddings, device=self.prompt.weight.device)
        return self.prompt(index.expand(rows, -1)).to(self.base.dtype)

    def _logits(self, rows: Split) -> Tensor:
        """Return the logits (R, A or 1, V) of the answers' tokens, or of the next one."""
        keys = rows.keys() if self._shares() else range(len(rows.text))
        texts = self.texts
        if texts is None or keys not in texts:
            texts = self._read(rows, keys)
        place = texts.rows(keys)
        known = texts.known(place, rows)
        if known is not None:
            return known
        ending = self._ending(rows)
        packs = texts is self.texts and self.packs
        size = ending.tokens.shape[1]
        packing = (
            Packing.cheapest(place, size, rows.text.shape[1]) if packs else Packing.of(place, 1)
        )
        return continued(self.base, texts, packing, ending.tokens, ending.kept, ending.last)
