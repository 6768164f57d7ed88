"""Real models and data that several benchmarks share: an adapter on a pre-trained model, and the
batches that train it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_flops.base.padding import TrimmedBatch
from recipes.assets import minilm, sentences
from recipes.images import load_images, load_vit, pixel_dataset, pretrained_vit
from recipes.vit import RecipeArguments, adapter_model

# of the training split: several epochs in a few hundred steps, so that samples come back
SENTENCES = 2_000


@dataclass(frozen=True)
class Task:
    """A model with an adapter, and its training data.

    Attributes:
        name: what it is called in tables.
        model: in evaluation mode.
        data: tensors of all training samples, (M, ...) each.
        learning_rate: that suits backprop with AdamW.
    """

    name: str
    model: nn.Module
    data: dict[str, Tensor]
    learning_rate: float

    def batches(
        self, seed: int, size: int
    ) -> Iterator[tuple[Mapping[str, Tensor], tuple[int, ...]]]:
        """Yield shuffled batches and their samples' ids, epoch after epoch, without end; padding is
        cut off.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(self.data["labels"]), generator=generator).split(size):
                if len(index) == size:
                    batch = {name: value[index] for name, value in self.data.items()}
                    yield TrimmedBatch(batch, frozenset(["right"])).whole, tuple(index.tolist())


def reviews(seed: int, rank: int = 8, **lora: Any) -> Task:
    """MiniLM (22.7M) with LoRA on queries and values and a new head, on the sentiment of movie
    reviews.
    """
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    options = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], **lora}
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **options)).eval()
    pairs = sentences()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[
        :SENTENCES
    ].tolist()
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    texts, labels = [pairs[i][0] for i in order], [pairs[i][1] for i in order]
    tokens = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    data = {
        **{name: tokens[name] for name in ("input_ids", "attention_mask")},
        "labels": torch.tensor(labels),
    }
    return Task("MiniLM, movie reviews", model, data, 1e-3)


def fashion(seed: int) -> Task:
    """The small ViT with LoRA's B matrices and a new head, on five new classes of Fashion-MNIST,
    100 images each.
    """
    task = load_images("fashion_mnist", seed=0)
    path = pretrained_vit(task)
    model = adapter_model(RecipeArguments(), path, task, seed).eval()
    labels = torch.tensor(task.train["label"])
    kept = torch.cat(
        [torch.nonzero(labels == c).flatten()[:100] for c in range(len(task.class_names))]
    )
    pixels = pixel_dataset(task.train.select(kept.tolist()), load_vit(path, task)[1])
    return Task(
        "small ViT, Fashion-MNIST",
        model,
        dict(zip(("pixel_values", "labels"), pixels.tensors, strict=True)),
        1e-2,
    )


TASKS = {"reviews": reviews, "fashion": fashion}
