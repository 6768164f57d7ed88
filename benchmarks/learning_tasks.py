"""Tasks of benchmarks/learning.py: each leaves an adapter something to gain beyond a converged
head on the frozen backbone; `learning.py --gap` measures how much.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recipes.assets import minilm, sentences
from recipes.images import (
    load_images,
    load_vit,
    patch_order,
    pixel_parts,
    pretrained_vit,
    reorder_patches,
)
from recipes.vit import RecipeArguments, adapter_model

NOISE_SEED = 0


@dataclass(frozen=True)
class Task:
    """A model with LoRA's B matrices and a linear head, and its data.

    Attributes:
        name: on the command line.
        model: seed → a new model; lora_A and nothing else depends on the seed.
        train: tensors (N, ...) by name.
        test: tensors (M, ...) by name.
        classes: how many.
        budget: rows of a forward-only run.
        tuning_budget: rows of each run of the grid.
        batch: samples of a step.
        scale: epsilon of every forward-only method.
        forward_rows: rows of the model's fastest forward.
        points: evaluations of a run, log-spaced.
    """

    name: str
    model: Callable[[int], nn.Module]
    train: dict[str, Tensor]
    test: dict[str, Tensor]
    classes: int
    budget: int
    tuning_budget: int
    batch: int = 32
    scale: float = 1e-3
    forward_rows: int = 128
    points: int = 18

    @property
    def backprop_budget(self) -> int:
        """Rows of a run by backprop, which defines what there is to gain: eight epochs."""
        return 8 * len(self.train["labels"])

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The training samples, one by one, with their numbers."""
        return [
            {**{name: value[i] for name, value in self.train.items()}, "sample_id": i}
            for i in range(len(self.train["labels"]))
        ]


def head_of(model: nn.Module) -> nn.Linear:
    """Return the layer that computes the logits."""
    return next(
        module
        for name, module in model.named_modules()
        if name.endswith("classifier.modules_to_save.default")
    )


def adapter_of(model: nn.Module) -> list[nn.Linear]:
    """Return LoRA's B layers, which are all that is trained beside the head."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_B." in name
    ]


@torch.no_grad()
def features(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """Return the inputs (N, H) of the head for all samples of a split."""
    found: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    was = model.training
    model.eval()
    try:
        for index in torch.arange(len(data["labels"])).split(128):
            model(**{name: value[index] for name, value in data.items() if name != "labels"})
    finally:
        hook.remove()
        model.train(was)
    return torch.cat(found)


def _digits() -> tuple[Callable[[int], nn.Module], list[dict[str, Tensor]]]:
    """Return the small ViT with LoRA's B matrices (rank 2; queries and values of all layers), and
    the splits; validation images are added to the test split.
    """
    task = load_images("digits", seed=0)
    path = pretrained_vit(task)
    parts = pixel_parts(task, load_vit(path, task)[1])
    pixels = {
        name: dict(zip(("pixel_values", "labels"), part.tensors, strict=True))
        for name, part in parts.items()
    }
    held_out = {
        key: torch.cat([pixels["validation"][key], pixels["test"][key]])
        for key in ("pixel_values", "labels")
    }
    return partial(adapter_model, RecipeArguments(), path, task), [pixels["train"], held_out]


def permuted(size: int = 2, **budgets: int) -> Task:
    """Digits whose patches are in one fixed random order."""
    model, splits = _digits()
    order = patch_order(*splits[0]["pixel_values"].shape[-2:], size)
    train, test = (
        {**split, "pixel_values": reorder_patches(split["pixel_values"], size, order)}
        for split in splits
    )
    return Task("permuted", model, train, test, 5, **budgets)


def noisy(draws: int = 4, **budgets: int) -> Task:
    """Half of a digit plus Gaussian noise of standard deviation 0.6, four draws per image."""
    model, splits = _digits()
    generator = torch.Generator().manual_seed(NOISE_SEED)
    train, test = (
        {name: value.repeat_interleave(draws, 0) for name, value in split.items()}
        for split in splits
    )
    for split in (train, test):
        pixels = split["pixel_values"]
        split["pixel_values"] = 0.5 * pixels + 0.6 * torch.randn(pixels.shape, generator=generator)
    return Task("noisy", model, train, test, 5, **budgets)


class _Given(nn.Module):
    """Stands where embeddings were, of a model that is given hidden states."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Tensor:
        return inputs_embeds


@torch.no_grad()
def _hidden(model: Any, layer: int, texts: list[str], tokens: int) -> dict[str, Tensor]:
    """Return what goes into a layer of MiniLM for texts cut or filled to so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    cut = {"truncation": True, "max_length": tokens, "padding": "max_length"}
    found = tokenizer(texts, return_tensors="pt", **cut)
    kept: list[Tensor] = []
    hook = model.bert.encoder.layer[layer].register_forward_pre_hook(
        lambda module, args: kept.append(args[0])
    )
    for index in torch.arange(len(texts)).split(100):
        model(input_ids=found["input_ids"][index], attention_mask=found["attention_mask"][index])
    hook.remove()
    return {"inputs_embeds": torch.cat(kept), "attention_mask": found["attention_mask"]}


def reviews(layers: int = 1, tokens: int = 24, number: int = 2000, **budgets: int) -> Task:
    """MiniLM with LoRA's B matrices (rank 2; queries and values) in its last layers, on the
    sentiment of movie reviews.

    The layers below are frozen whatever the method, so they have run once, for all.
    """
    base = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).eval()

    def model(seed: int) -> nn.Module:
        set_seed(seed)
        own = copy.deepcopy(base)
        own.bert.embeddings = _Given()
        own.bert.encoder.layer = own.bert.encoder.layer[-layers:]
        for parameter in own.classifier.parameters():
            nn.init.zeros_(parameter)
        lora = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
        adapted = get_peft_model(own, LoraConfig(r=2, lora_alpha=4, **lora))
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        return adapted

    found = sentences()
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    splits = []
    for index in (order[:number], order[-2000:]):
        hidden = _hidden(base, -layers, [found[i][0] for i in index], tokens)
        splits.append({**hidden, "labels": torch.tensor([found[i][1] for i in index])})
    return Task("reviews", model, *splits, classes=2, points=10, **budgets)


TASKS: dict[str, Callable[[], Task]] = {
    "permuted": partial(permuted, budget=300_000, tuning_budget=100_000),
    "noisy": partial(noisy, budget=300_000, tuning_budget=100_000),
    "reviews": partial(reviews, budget=100_000, tuning_budget=30_000),
}
