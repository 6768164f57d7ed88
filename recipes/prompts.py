"""Texts, templates and label words: how a language model is asked for a class, and what may be
tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput

from hf_flops import ConfigurationError, LabelHeadModel, SuffixPromptModel
from hf_flops.objectives.elementwise import mean_cross_entropy
from recipes import sums
from recipes.assets import sentences, smollm2
from recipes.common import load_hub

DOMAINS = {  # of the embedded sentences; see `recipes.assets.sentences`
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}
PARTS = ("train", "validation", "test")
ADAPTERS = ("suffix", "prompt", "prefix", "lora")
Texts = list[tuple[str, int]]


@dataclass(frozen=True)
class TextTask:
    """Texts and their classes, split once for all."""

    name: str
    train: Texts
    validation: Texts
    test: Texts

    def __str__(self) -> str:
        return f"{len(self.train):,} texts of {self.name}"

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return 1 + max(
            label for part in (self.train, self.validation, self.test) for _, label in part
        )


def load_texts(
    domain: str, *, validation: int, test: int, per_class: int = 0, seed: int = 0
) -> TextTask:
    """Load and split the sentences of an embedded domain, or a data set of the Hub with columns
    `text` and `label`.

    Args:
        domain: a name in `DOMAINS`, "sums", or a Hub id.
        validation: texts to choose by.
        test: texts to report on.
        per_class: training texts of each class, 0 for all.
        seed: which texts the few are; the test texts are always the same.

    Raises:
        ConfigurationError: there is no such data set, or its columns are not texts and classes.
    """
    if domain in DOMAINS:
        rows = sentences(DOMAINS[domain])
    elif domain == sums.DOMAIN:
        rows = sums.texts()
    else:
        data = load_hub(domain, DOMAINS, split="train")
        if not {"text", "label"} <= {*data.column_names}:
            raise ConfigurationError(
                f"{domain!r} has the columns {', '.join(data.column_names)}: it needs text and "
                "label."
            )
        rows = list(zip(data["text"], data["label"], strict=True))
        check_texts(domain, rows)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    validation, test = min(validation, len(rows) // 4), min(test, len(rows) // 4)
    train = rows[validation + test :]
    if per_class:
        order = np.random.default_rng(seed).permutation(len(train))
        labels = np.array([label for _, label in train])[order]
        train = [
            train[i] for label in np.unique(labels) for i in order[labels == label][:per_class]
        ]
    return TextTask(domain, train, rows[:validation], rows[validation : validation + test])


def load_task(recipe: Any, seed: int) -> TextTask:
    """Load the texts that the recipe's arguments name."""
    sizes = {
        "validation": recipe.validation_texts,
        "test": recipe.test_texts,
        "per_class": recipe.per_class,
    }
    return load_texts(recipe.domain, seed=seed, **sizes)


def check_texts(name: str, rows: Texts) -> None:
    """Refuse texts that are empty or none, labels that do not count classes, and too few of either.

    Raises:
        ConfigurationError: there are such.
    """
    for row, (text, label) in enumerate(rows):
        if not isinstance(text, str) or not text.strip():
            raise ConfigurationError(
                f"{name!r} has the text {text!r} in row {row}: every row needs one."
            )
        if not isinstance(label, int) or label < 0:
            raise ConfigurationError(
                f"{name!r} has the label {label!r} in row {row}: labels must be whole numbers "
                "from 0, in the order of the label words."
            )
    classes = len({label for _, label in rows})
    if len(rows) < 4 or classes < 2:
        raise ConfigurationError(
            f"{name!r} has {len(rows)} texts of {classes} classes: it needs 4 or more of 2 or more."
        )


def label_tokens(tokenizer: Any, words: list[str], classes: int) -> list[int]:
    """Return the token of each class's word.

    Raises:
        SystemExit: a word is missing, is not one token, or stands for two classes.
    """
    if len(words) != classes:
        raise SystemExit(
            f"--label_words names {len(words)} words ({words}), but there are {classes} classes."
        )
    tokens = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise SystemExit(
                f"The label word {word!r} is {len(ids)} tokens ({pieces}): choose a word that is "
                "one token."
            )
        if ids[0] in tokens:
            raise SystemExit(
                f"The label word {word!r} stands for two classes: choose different words."
            )
        tokens.append(ids[0])
    return tokens


@dataclass(frozen=True)
class Template:
    """How a text is put to the model: `form` with {text} in it; what follows {text} is where the
    answer comes.

    Attributes:
        tokenizer: the model's.
        form: such as "{text} It was".
        most: tokens of a text that are kept.
        chat: whether everything up to the text is a message of a user, in the model's chat
            template.
    """

    tokenizer: Any
    form: str
    most: int
    chat: bool = False

    def __post_init__(self) -> None:
        if self.form.count("{text}") != 1:
            raise SystemExit(f"--template {self.form!r} must have {{text}} in it, once.")
        if self.chat and not self.tokenizer.chat_template:
            raise SystemExit("--chat needs a model whose tokenizer has a chat template.")

    @property
    def tail(self) -> list[int]:
        """The tokens after the text."""
        return self.tokenizer(self.form.partition("{text}")[2], add_special_tokens=False)[
            "input_ids"
        ]

    def head(self, text: str) -> list[int]:
        """Return the tokens up to the text, included."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > self.most:
            text = self.tokenizer.decode(ids[: self.most])
        filled = self.form.partition("{text}")[0] + text
        if self.chat:
            message = [{"role": "user", "content": filled}]
            filled = self.tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        return self.tokenizer(filled, add_special_tokens=not self.chat)["input_ids"]

    def rows(self, texts: Texts, *, tail: bool) -> list[dict[str, Any]]:
        """Return the samples of a data set, with or without what follows the text."""
        end = self.tail if tail else []
        return [
            {"input_ids": self.head(text) + end, "labels": label, "sample_id": i}
            for i, (text, label) in enumerate(texts)
        ]


def by_length(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples by length, so that batches of an evaluation have little padding."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


class WordClassifier(nn.Module):
    """A causal language model, with or without an adapter, as a classifier: the likeliest of a few
    words follows the text.

    Args:
        model: the model.
        words: the token of each of C classes.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: Any, words: list[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("words", torch.tensor(words))

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Run texts (R, T), padded at the right; labels are (R,) classes and logits (R, C)."""
        # from the end, as virtual tokens come first
        last = attention_mask.sum(1) - attention_mask.shape[1] - 1
        places, index = torch.unique(last, return_inverse=True)
        logits = self.model(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=places
        ).logits
        logits = logits[torch.arange(len(index), device=index.device), index][:, self.words]
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(
            loss=mean_cross_entropy(logits, labels, num_items_in_batch), logits=logits
        )

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save the adapter."""
        self.model.save_pretrained(folder, **options)


def load_model(path: str | None, dtype: str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from the Hub or a folder; None for the
    embedded SmolLM2.
    """
    path = path or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), tokenizer


def adapted(
    kind: str,
    model: Any,
    template: Template,
    words: list[int],
    *,
    virtual_tokens: int,
    init_text: str | None,
    lora_rank: int,
    label_head: bool = False,
) -> nn.Module:
    """Put an adapter on a model: a prompt after or before the text, a prefix in every layer, or
    LoRA.

    A prompt starts as the first tokens of `init_text`, repeated as needed; an empty text leaves
    random tokens. One after the text replaces what the template has there. With `label_head`, a
    trainable head that starts as the label words gives the logits.

    Raises:
        ConfigurationError: the kind is unknown.
    """
    if kind not in ADAPTERS:
        raise ConfigurationError(
            f"The adapter {kind!r} is unknown: choose among {', '.join(ADAPTERS)}."
        )
    if kind == "suffix":
        return SuffixPromptModel(
            model,
            virtual_tokens,
            init_text or None,
            template.tokenizer,
            label_words=words,
            label_head=label_head,
        )
    config: Any
    if kind == "prompt":
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
    elif kind == "prefix":
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)
    else:
        names = (
            ["q_proj", "v_proj"]
            if any("q_proj" in name for name, _ in model.named_modules())
            else None
        )
        config = LoraConfig(
            task_type="CAUSAL_LM", r=lora_rank, lora_alpha=2 * lora_rank, target_modules=names
        )
    adapter = get_peft_model(model, config)
    if kind == "prompt" and init_text:
        tokens = (
            template.tokenizer(init_text, add_special_tokens=False)["input_ids"] * virtual_tokens
        )
        with torch.no_grad():
            start = model.get_input_embeddings().weight[tokens[:virtual_tokens]]
            adapter.prompt_encoder["default"].embedding.weight.copy_(start)
    return LabelHeadModel(adapter, words) if label_head else WordClassifier(adapter, words)
