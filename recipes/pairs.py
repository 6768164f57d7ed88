"""Images with sentences for the alignment recipe: templates, batches, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_flops import ConfigurationError
from recipes.images import ImageTask, pixel_dataset

TRAINED_TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "this is a {}.",
    "an image that shows a {}.",
    "the item in the photo is a {}.",
    "a cropped photo of the {}.",
)
HELD_OUT_TEMPLATES = (
    "a blurry photo of a {}.",
    "here we see a {} on a plain background.",
    "a product shot of the {}, for sale.",
    "somebody bought a {} and took this photo.",
)
LOSSES = ("pairs", "classes")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = {
    "fashion_mnist": {
        "T-shirt/top": "t-shirt",
        "Trouser": "pair of trousers",
        "Sandal": "sandal",
        "Sneaker": "sneaker",
        "Bag": "handbag",
        "Ankle boot": "ankle boot",
    },
    "digits": {str(i): word for i, word in enumerate(DIGITS)},
}


def class_words(task: ImageTask) -> list[str]:
    """Return what sentences call the classes."""
    known = WORDS.get(task.name, {})
    return [known.get(name, name.lower().replace("_", " ")) for name in task.class_names]


@dataclass
class Sentences:
    """What texts a model is shown.

    Attributes:
        words: what the classes are called.
        tokenizer: of the model.
        context: trained tokens that each text starts with.
        longest: tokens that a text may have.
        padding: how short texts are filled up.
    """

    words: list[str]
    tokenizer: Any
    context: tuple[int, ...] = ()
    longest: int = 64
    padding: bool | str = True

    def texts(self, template: str, classes: Sequence[int]) -> list[str]:
        """Return the sentences of some classes."""
        return [template.format(self.words[index]) for index in classes]

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (C, T) of texts, after the start token the trained
        context.
        """
        options = {
            "max_length": self.longest - len(self.context),
            "truncation": True,
            "return_tensors": "pt",
        }
        given = self.tokenizer(texts, padding=self.padding, **options)
        found = {name: given[name] for name in ("input_ids", "attention_mask")}
        if self.context:
            own = torch.tensor(self.context).expand(len(texts), -1)
            added = {"input_ids": own, "attention_mask": torch.ones_like(own)}
            found = {
                name: torch.cat([value[:, :1], added[name], value[:, 1:]], 1)
                for name, value in found.items()
            }
        return found


@dataclass
class PairCollator:
    """Makes batches of images with sentences; the template depends on the samples alone, so all
    methods see the same.

    Attributes:
        sentences: of the classes.
        classes: those that are trained, as numbers.
        loss: "pairs" (each image with the sentence of its class) or "classes" (with the sentences
            of all classes).
    """

    sentences: Sentences
    classes: list[int]
    loss: str = "pairs"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigurationError(
                f"The loss {self.loss!r} is unknown: choose among {', '.join(LOSSES)}."
            )

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Make a batch."""
        labels = torch.stack([row["labels"] for row in rows])
        ids = torch.stack([row["sample_id"] for row in rows])
        template = TRAINED_TEMPLATES[int(ids.sum()) % len(TRAINED_TEMPLATES)]
        batch: dict[str, Any] = {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "sample_id": ids,
        }
        if self.loss == "pairs":
            return {
                **batch,
                **self.sentences.tokens(self.sentences.texts(template, labels.tolist())),
                "return_loss": True,
            }
        place = {label: index for index, label in enumerate(self.classes)}
        batch["labels"] = torch.tensor([place[label] for label in labels.tolist()])
        return {**batch, **self.sentences.tokens(self.sentences.texts(template, self.classes))}


class PixelRows(torch.utils.data.Dataset):
    """Rows of preprocessed images, with labels and their numbers."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {
            "pixel_values": self.pixels[row],
            "labels": self.labels[row],
            "sample_id": torch.tensor(row),
        }


def pixel_rows(
    dataset: Any, processor: Any, classes: Sequence[int], per_class: int, seed: int
) -> PixelRows:
    """Preprocess the first images of some classes, in an order that the seed fixes."""
    labels = np.asarray(dataset["label"])
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = np.concatenate([order[labels[order] == label][: per_class or None] for label in classes])
    rows = pixel_dataset(dataset.select(np.sort(kept)), processor)
    found = [rows[index] for index in range(len(rows))]
    return PixelRows(
        *(torch.stack([row[name] for row in found]) for name in ("pixel_values", "labels"))
    )


@torch.no_grad()
def embed(
    model: nn.Module, rows: PixelRows, sentences: Sentences, texts: list[str]
) -> tuple[Tensor, Tensor]:
    """Return normalised embeddings of images (N, D) and texts (C, D)."""
    base = getattr(model, "get_base_model", lambda: model)()
    training, _ = model.training, model.eval()
    images = [
        _features(base.get_image_features, pixel_values=part) for part in rows.pixels.split(256)
    ]
    accepted = sentences.tokens(texts)
    found = torch.cat(images), _features(base.get_text_features, **accepted)
    model.train(training)
    return tuple(F.normalize(part.float(), dim=1) for part in found)  # type: ignore[return-value]


def _features(method: Callable[..., Any], **inputs: Tensor) -> Tensor:
    found = method(**inputs)
    return found if torch.is_tensor(found) else found.pooler_output


def scores(
    model: nn.Module, rows: PixelRows, sentences: Sentences, classes: list[int]
) -> dict[str, float]:
    """Measure a model on images of some classes, with the sentences of the held-out templates.

    Zero-shot accuracy is the mean over these templates, each alone. A sentence or an image is found
    if one of those ranked first, or of the first five, has the right class: image to text among all
    sentences, text to image among all images.
    """
    texts = [text for template in HELD_OUT_TEMPLATES for text in sentences.texts(template, classes)]
    owner = torch.tensor(classes * len(HELD_OUT_TEMPLATES))
    images, sentence = embed(model, rows, sentences, texts)
    similar = images @ sentence.T  # (N, templates x classes)
    by_template = similar.view(len(images), len(HELD_OUT_TEMPLATES), len(classes)).argmax(2)
    right = torch.tensor(classes)[by_template] == rows.labels[:, None]
    found = {"accuracy": float(right.float().mean())}
    for name, ranked, own, others in (
        ("image_to_text", similar, rows.labels, owner),
        ("text_to_image", similar.T, owner, rows.labels),
    ):
        for most in (1, 5):
            best = others[ranked.topk(min(most, ranked.shape[1]), 1).indices]
            found[f"{name}_{most}"] = float((best == own[:, None]).any(1).float().mean())
    return found
