"""Small tasks of several benchmarks: a model with an adapter, and data in three splits."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_flops import SuffixPromptModel
from recipes.assets import minilm, sentences
from recipes.images import load_images, load_vit, pixel_dataset, pretrained_vit
from recipes.prompts import Template, label_tokens, load_model, load_texts
from recipes.vit import RecipeArguments, adapter_model


@dataclass(frozen=True)
class LearningTask:
    """A model with an adapter, and its data.

    Attributes:
        name: in tables.
        model: seed → a new model with an untrained adapter.
        splits: "train", "validation", "test" → tensors (M, ...) by name.
        budget: rows of a run.
        batch: samples of a step.
        scale: epsilon of every forward-only method; None for their default.
        schedule: of every method's learning rate.
    """

    name: str
    model: Callable[[int], nn.Module]
    splits: dict[str, dict[str, Tensor]]
    budget: int
    batch: int = 32
    scale: float | None = None
    schedule: str = "constant_with_warmup"

    @property
    def train(self) -> list[dict[str, Any]]:
        """The training samples, one by one, with their numbers."""
        data = self.splits["train"]
        return [
            {**{name: value[i] for name, value in data.items()}, "sample_id": i}
            for i in range(len(data["labels"]))
        ]

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: str) -> float:
        """Return the share of right answers on a split."""
        was, right, data = model.training, 0, self.splits[part]
        model.eval()
        for index in torch.arange(len(data["labels"])).split(100):
            batch = {name: value[index] for name, value in data.items()}
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        model.train(was)
        return right / len(data["labels"])


def fashion() -> LearningTask:
    """The small ViT with LoRA's B matrices and a new head, on five new classes of Fashion-MNIST,
    100 images each.
    """
    task = load_images("fashion_mnist", seed=0)
    path = pretrained_vit(task)
    labels = np.asarray(task.train["label"])
    kept = np.concatenate([np.flatnonzero(labels == c)[:100] for c in range(len(task.class_names))])
    _, processor = load_vit(path, task)
    splits = {}
    for part, data in (
        ("train", task.train.select(kept)),
        ("validation", task.validation),
        ("test", task.test),
    ):
        data = data.select(range(min(1000, len(data))))
        splits[part] = dict(
            zip(("pixel_values", "labels"), pixel_dataset(data, processor).tensors, strict=True)
        )
    return LearningTask(
        "Fashion", lambda seed: adapter_model(RecipeArguments(), path, task, seed), splits, 60_000
    )


class _Given(nn.Module):
    """Stands where embeddings were, of a model that is given hidden states."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Tensor:
        return inputs_embeds


def reviews() -> LearningTask:
    """MiniLM with LoRA's B matrices in the last layer and a new head, on the sentiment of movie
    reviews.

    The five layers below are frozen whatever the method, so they have run once, for all: rows cost
    the last layer.
    """
    base = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm())

    def model(seed: int) -> nn.Module:
        set_seed(seed)
        own = copy.deepcopy(base)
        own.bert.embeddings = _Given()
        own.bert.encoder.layer = own.bert.encoder.layer[-1:]
        own.classifier.reset_parameters()
        names = ["query", "value"]
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=names, modules_to_save=["classifier"]
        )
        adapted = get_peft_model(own, config)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        return adapted

    @torch.no_grad()
    def hidden(texts: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(
            texts, truncation=True, max_length=32, padding="max_length", return_tensors="pt"
        )
        layer, found = base.bert.encoder.layer[-1], list[Tensor]()
        hook = layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for index in torch.arange(len(texts)).split(100):
            base(
                input_ids=tokens["input_ids"][index], attention_mask=tokens["attention_mask"][index]
            )
        hook.remove()
        return {"inputs_embeds": torch.cat(found), "attention_mask": tokens["attention_mask"]}

    pairs = sentences()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    bounds = {"train": order[:2000], "validation": order[2000:2400], "test": order[2400:2900]}
    splits = {
        part: {
            **hidden([pairs[i][0] for i in index]),
            "labels": torch.tensor([pairs[i][1] for i in index]),
        }
        for part, index in bounds.items()
    }
    return LearningTask("reviews", model, splits, 24_000)


class _KeptTexts(SuffixPromptModel):
    """A suffix prompt that finds keys and values of its texts computed: rows cost prompt and
    answer.
    """

    def cached_texts(self, inputs: Any, *, clean: bool = False) -> AbstractContextManager[None]:
        return nullcontext()


def prompts(
    tokens: int = 2,
    start: str = " movie was",
    name: str = "prompts",
    *,
    texts: int = 512,
    label_head: bool = False,
) -> LearningTask:
    """SmolLM2-135M with a few virtual tokens behind movie reviews; " terrible" or " great" is to
    follow.

    With `label_head`, a linear head that starts as these words gives the logits.

    All layers of a text are frozen whatever the method, so texts have run once, for all: rows cost
    the prompt.
    """
    base, tokenizer = load_model(None, "float32")
    words = label_tokens(tokenizer, [" terrible", " great"], 2)
    task = load_texts("movies", validation=200, test=400, seed=0)
    parts = {"train": task.train[:texts], "validation": task.validation, "test": task.test}
    rows = [
        row
        for part in parts.values()
        for row in Template(tokenizer, "{text} It was", 32).rows(part, tail=False)
    ]
    found = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
    data = {**found, "labels": torch.tensor([row["labels"] for row in rows])}
    cut = {
        name: values.split([len(part) for part in parts.values()]) for name, values in data.items()
    }
    splits = {
        part: {name: pieces[i] for name, pieces in cut.items()} for i, part in enumerate(parts)
    }
    first = SuffixPromptModel(base, tokens, start, tokenizer, label_words=words)
    with torch.no_grad():
        whole = first._split(data["input_ids"], data["attention_mask"], None)
        kept = first._read(whole, whole.keys())
        with first.cached_texts({name: value[:8] for name, value in data.items()}):
            pass

    def model(seed: int) -> nn.Module:
        set_seed(seed)
        own = _KeptTexts(base, tokens, start, tokenizer, label_words=words, label_head=label_head)
        own.texts, own.packs = kept, first.packs
        return own

    return LearningTask(name, model, splits, 16_000, batch=8, scale=1e-2, schedule="linear")


def digits() -> LearningTask:
    """The small ViT with LoRA's B matrices and a new head, on five new classes of scikit-learn's
    digits.
    """
    task = load_images("digits", seed=0)
    path = pretrained_vit(task)
    _, processor = load_vit(path, task)
    splits = {
        part: dict(
            zip(
                ("pixel_values", "labels"),
                pixel_dataset(getattr(task, part), processor).tensors,
                strict=True,
            )
        )
        for part in ("train", "validation", "test")
    }
    return LearningTask(
        "digits", lambda seed: adapter_model(RecipeArguments(), path, task, seed), splits, 60_000
    )


TASKS: dict[str, Callable[[], LearningTask]] = {
    "fashion": fashion,
    "reviews": reviews,
    "digits": digits,
    "prompts": prompts,
    "prompts8": partial(prompts, 8, " All in all, the movie was just", "prompts8"),
}
