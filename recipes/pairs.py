"""Images with sentences for the alignment recipe: templates, two encoders made one model, batches, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

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
WORDS = {
    "fashion_mnist": {
        "T-shirt/top": "t-shirt",
        "Trouser": "pair of trousers",
        "Sandal": "sandal",
        "Sneaker": "sneaker",
        "Bag": "handbag",
        "Ankle boot": "ankle boot",
    },
    "digits": dict(zip("0123456789", "zero one two three four five six seven eight nine".split(), strict=True)),
}


def class_words(task: ImageTask) -> list[str]:
    """Return what sentences call the classes."""
    known = WORDS.get(task.name, {})
    return [known.get(name, name.lower().replace("_", " ")) for name in task.class_names]


class Pooled(nn.Module):
    """An encoder whose pooled output is its first token, or the mean of its real ones; for models without a trained pooler.

    A frozen text encoder remembers what it made of a sentence.

    Args:
        encoder: returns `last_hidden_state` (R, T, D), or (R, D, H, W).
        pooling: "first" or "mean".
    """

    def __init__(self, encoder: PreTrainedModel, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling, self.config = encoder, pooling, encoder.config
        self._known: dict[bytes, Tensor] = {}

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the pooled hidden state (R, D)."""
        if input_ids is None:
            pooled = self._pooled({"pixel_values": pixel_values}, None)
        elif attention_mask is None or any(parameter.requires_grad for parameter in self.encoder.parameters()):
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            pooled = self._pooled({name: value for name, value in given.items() if value is not None}, attention_mask)
        else:
            pooled = self._remembered(input_ids, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=pooled.unsqueeze(1), pooler_output=pooled)

    def _pooled(self, given: dict[str, Any], mask: Tensor | None) -> Tensor:
        hidden = self.encoder(**given).last_hidden_state
        if hidden.dim() == 4:
            return hidden.mean((2, 3))
        if self.pooling == "first":
            return hidden[:, 0]
        weights = torch.ones_like(hidden[..., :1]) if mask is None else mask.unsqueeze(-1).to(hidden)
        return (hidden * weights).sum(1) / weights.sum(1)

    @torch.no_grad()
    def _remembered(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        keys = [row[kept].numpy().tobytes() for row, kept in zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)]
        new = [index for index, key in enumerate(keys) if key not in self._known]
        if new:
            training, _ = self.encoder.training, self.encoder.eval()  # a frozen encoder has no use for dropout
            found = self._pooled({"input_ids": input_ids[new], "attention_mask": attention_mask[new]}, attention_mask[new])
            self.encoder.train(training)
            self._known.update((keys[index], row.clone()) for index, row in zip(new, found, strict=True))
        return torch.stack([self._known[key] for key in keys])


def dual_encoder(vision: str, text: str, dimension: int, seed: int) -> VisionTextDualEncoderModel:
    """Put new projections on any two encoders: the first token of the images, the mean of the texts' tokens."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the loading report presents heads that are left out as a fault
    try:
        towers = [Pooled(_encoder(path), pooling) for path, pooling in ((vision, "first"), (text, "mean"))]
    finally:
        transformers_logging.set_verbosity(verbosity)
    configs = (tower.config for tower in towers)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(*configs, projection_dim=dimension)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTextDualEncoderModel(config, *towers).eval()


def _encoder(path: str) -> PreTrainedModel:
    try:
        return AutoModel.from_pretrained(path, add_pooling_layer=False)
    except TypeError:
        return AutoModel.from_pretrained(path)


def load_processor(path: str) -> Any:
    """Load a model's image processor.

    Raises:
        ValueError: it has none.
    """
    try:
        return AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path!r} has no image processor (preprocessor_config.json), so what its images should look like is unknown: "
            "name a model that has one with --image_processor."
        ) from error


def is_contrastive(path: str) -> bool:
    """Return whether a model has two towers of its own, as CLIP and SigLIP do."""
    config = AutoConfig.from_pretrained(path)
    return hasattr(config, "vision_config") and hasattr(config, "text_config") and hasattr(config, "projection_dim") or (
        config.model_type.startswith("siglip") and hasattr(config, "text_config")
    )


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
        """Return input_ids and attention_mask (C, T) of texts, after the start token the trained context."""
        options = {"max_length": self.longest - len(self.context), "truncation": True, "return_tensors": "pt"}
        given = self.tokenizer(texts, padding=self.padding, **options)
        found = {name: given[name] for name in ("input_ids", "attention_mask")}
        if self.context:
            own = torch.tensor(self.context).expand(len(texts), -1)
            found = {n: torch.cat([v[:, :1], own if n == "input_ids" else torch.ones_like(own), v[:, 1:]], 1) for n, v in found.items()}
        return found


@dataclass
class PairCollator:
    """Makes batches of images with sentences; the template depends on the batch's samples alone, so all methods see the same.

    Attributes:
        sentences: of the classes.
        classes: those that are trained, as numbers.
        loss: "pairs" (each image with the sentence of its class) or "classes" (with the sentences of all classes).
    """

    sentences: Sentences
    classes: list[int]
    loss: str = "pairs"

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Make a batch."""
        labels = torch.stack([row["labels"] for row in rows])
        ids = torch.stack([row["sample_id"] for row in rows])
        template = TRAINED_TEMPLATES[int(ids.sum()) % len(TRAINED_TEMPLATES)]
        batch: dict[str, Any] = {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "sample_id": ids}
        if self.loss == "pairs":
            return {**batch, **self.sentences.tokens(self.sentences.texts(template, labels.tolist())), "return_loss": True}
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
        return {"pixel_values": self.pixels[row], "labels": self.labels[row], "sample_id": torch.tensor(row)}


def pixel_rows(dataset: Any, processor: Any, classes: Sequence[int], per_class: int, seed: int) -> PixelRows:
    """Preprocess the first images of some classes, in an order that the seed fixes."""
    labels = np.asarray(dataset["label"])
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = np.concatenate([order[labels[order] == label][: per_class or None] for label in classes])
    rows = pixel_dataset(dataset.select(np.sort(kept)), processor)
    found = [rows[i] for i in range(len(rows))] if rows.tensors is None else None
    pixels, targets = rows.tensors if found is None else (torch.stack([r[k] for r in found]) for k in ("pixel_values", "labels"))
    return PixelRows(pixels, targets)


@torch.no_grad()
def embed(model: nn.Module, rows: PixelRows, sentences: Sentences, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return normalised embeddings of images (N, D) and texts (C, D)."""
    base = getattr(model, "get_base_model", lambda: model)()
    training, _ = model.training, model.eval()
    images = [_features(base.get_image_features, pixel_values=part) for part in rows.pixels.split(256)]
    accepted = sentences.tokens(texts)
    found = torch.cat(images), _features(base.get_text_features, **accepted)
    model.train(training)
    return tuple(F.normalize(part.float(), dim=1) for part in found)  # type: ignore[return-value]


def _features(method: Callable[..., Any], **inputs: Tensor) -> Tensor:
    found = method(**inputs)
    return found if torch.is_tensor(found) else found.pooler_output


def scores(model: nn.Module, rows: PixelRows, sentences: Sentences, classes: list[int]) -> dict[str, float]:
    """Measure a model on images of some classes, with the sentences of the held-out templates.

    Zero-shot accuracy is the mean over these templates, each alone. A sentence or an image is found if one of those ranked
    first, or of the first five, has the right class: image to text among all sentences, text to image among all images.
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
