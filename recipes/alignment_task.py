"""The data of the alignment recipe, with what it takes to make a model for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from recipes import common
from recipes.assets import minilm
from recipes.images import ImageTask, load_images, pretrained_vit
from recipes.pairs import PairCollator, PixelRows, Sentences, class_words, pixel_rows
from recipes.two_towers import load_processor, text_shape, trained_context


@dataclass
class Task:
    """Data and what it takes to make a model for it.

    Attributes:
        train, validation, test: images with labels.
        sentences: of the classes.
        classes: name → those that are tested on, the trained ones first.
        collate: makes batches.
        path: of the model, or of both encoders.
    """

    images: ImageTask
    train: PixelRows
    validation: PixelRows
    test: dict[str, PixelRows]
    sentences: Sentences
    classes: dict[str, list[int]]
    collate: PairCollator
    path: str | tuple[str, str]

    def __str__(self) -> str:
        return f"{len(self.train):,} images of {', '.join(self.sentences.words)}"


def named(recipe: Any, tower: str) -> str:
    """Return the option that a tower's model comes from, with its value."""
    option = "model" if recipe.model else f"{tower}_model"
    return f"--{option} {getattr(recipe, option) or '(the embedded one)'}"


def load_task(recipe: Any, seed: int) -> Task:
    """Load data, processors and sentences; the seed fixes which images are trained on."""
    data = f"--dataset {recipe.dataset}"
    with common.usable(data):
        images = load_images(recipe.dataset, seed=seed, every_class=True)
    with common.usable(named(recipe, "vision")):
        vision = (
            recipe.model
            or recipe.vision_model
            or pretrained_vit(load_images(images.name, seed=seed))
        )
    with common.usable(
        f"--image_processor {recipe.image_processor}"
        if recipe.image_processor
        else named(recipe, "vision")
    ):
        processor = load_processor(recipe.image_processor or vision)
    with common.usable(named(recipe, "text")):
        text = recipe.model or recipe.text_model or minilm()
        tokenizer = AutoTokenizer.from_pretrained(text)
        shape = text_shape(recipe.model) if recipe.model else ()
    count = len(images.class_names)
    base = list(range({"all": count, "base": -(-count // 2)}[recipe.classes]))
    classes = {recipe.classes: base}
    if recipe.classes == "base":
        classes["new"] = [label for label in range(count) if label not in base]
    context = trained_context(tokenizer, recipe.prompt_size) if recipe.adapter == "context" else ()
    sentences = Sentences(class_words(images), tokenizer, context, *shape)
    shots = recipe.shots or (16 if recipe.model else 100)
    per_class = -(-recipe.test_images // count)
    own = ((images.train, shots), (images.validation, 50))
    with common.usable(data):
        parts = [pixel_rows(part, processor, base, most, seed) for part, most in own]
        test = {
            name: pixel_rows(images.test, processor, own, per_class, 0)
            for name, own in classes.items()
        }
    collate = PairCollator(sentences, base, recipe.loss or ("classes" if recipe.model else "pairs"))
    return Task(images, *parts, test, sentences, classes, collate, recipe.model or (vision, text))
