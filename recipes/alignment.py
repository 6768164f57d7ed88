"""Align images with texts with forward passes only.

With no arguments, a small ViT and MiniLM become one model of two towers: new projections, and LoRA
in the ViT, learn from 100 images of each class of Fashion-MNIST, each with a sentence about its
class, without a backward pass. Then images are classified by sentences that were not among those.
CLIP and SigLIP of the Hub learn from a few images of each class:

    python recipes/alignment.py --compare backprop
    python recipes/alignment.py --model openai/clip-vit-base-patch32 --dataset beans --shots 16
    python recipes/alignment.py --model openai/clip-vit-base-patch32 --dataset dtd \\
        --classes base --adapter border
    python recipes/alignment.py --vision_model facebook/dinov2-small \\
        --text_model sentence-transformers/all-MiniLM-L6-v2
    python recipes/alignment.py recipes/alignment.yaml

It ends with a table (report.md, results.json), a picture (report.png) and the model of each method.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModel, set_seed

# also when hf_flops is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_flops import ConfigurationError
from recipes import common, images, runs
from recipes.alignment_methods import LEARNING_RATES, METHODS, trainer_for
from recipes.alignment_report import AlignmentOutcome, report
from recipes.alignment_task import Task, load_task, named
from recipes.common import option
from recipes.pairs import LOSSES, scores
from recipes.two_towers import ADAPTERS, TOWERS, adapted, dual_encoder


@dataclass
class RecipeArguments(common.Recipe):
    """What is trained on what, and what it is compared with."""

    model: str | None = option(None, "CLIP, SigLIP or the like: Hub id or folder.")
    vision_model: str | None = option(None, "Image encoder; default: the small pre-trained ViT.")
    text_model: str | None = option(None, "Text encoder; default: all-MiniLM-L6-v2.")
    image_processor: str | None = option(None, "Model whose image processor to take.")
    projection_dim: int = option(32, "Width of new projections, for two encoders.", least=1)
    dataset: str = option("auto", images.DATASETS)
    shots: int | None = option(
        None, "Images per class; default: 16, or 100 for two encoders.", least=1
    )
    classes: str = option(
        "all",
        "Trained classes: 'base' is half of them, to test on 'new' ones too.",
        ("all", "base"),
    )
    loss: str | None = option(
        None, "'pairs' (image and sentence, for two encoders) or 'classes'.", LOSSES
    )
    adapter: str = option(
        "lora", "LoRA, a visual prompt, a trained 'context' of texts, or 'none'.", ADAPTERS
    )
    towers: str = option("image", "Where LoRA is: 'image', 'text' or 'both'.", TOWERS)
    lora_rank: int = option(
        2, "Rank of LoRA on queries and values; its B matrices are trained.", least=1
    )
    prompt_size: int = option(4, "Pixels of the border, or number of tokens.", least=1)
    test_images: int = option(1000, "Images to test on, 0 for all.", least=0)
    method: str = option("flops", "What trains the adapter.", METHODS)
    compare: list[str] = option([], f"Run beside it on the same rows: {', '.join(METHODS)}.")


@dataclass
class RecipeTrainingArguments(common.ImageDefaults):
    """Training arguments with defaults for this recipe."""

    output_dir: str | None = "outputs/alignment"
    num_train_epochs: float = 3
    queries_per_sample: int | str | None = 8

    def __post_init__(self) -> None:
        if self.queries_per_sample == "auto":
            raise ConfigurationError(
                "--queries_per_sample auto does not know how many clean rows images and texts "
                "need: give a number to align."
            )
        super().__post_init__()


parse = partial(common.parse, [RecipeArguments, RecipeTrainingArguments], __doc__, METHODS)


def adapted_model(recipe: RecipeArguments, task: Task, seed: int) -> Any:
    """Load the model and make what is to be trained trainable, the same for every method."""
    set_seed(seed)
    two = isinstance(task.path, tuple)
    options = {"towers": recipe.towers, "rank": recipe.lora_rank, "size": recipe.prompt_size}
    with common.usable(
        " with ".join(dict.fromkeys(named(recipe, tower) for tower in ("vision", "text")))
    ):
        model = (
            dual_encoder(*task.path, recipe.projection_dim, seed)
            if two
            else AutoModel.from_pretrained(task.path)
        )
        return adapted(
            model, recipe.adapter, projections=two, context=task.sentences.context, **options
        )


def evaluate(model: Any, task: Task) -> dict[str, dict[str, float]]:
    """Measure on the test images of each set of classes."""
    return {
        name: scores(model, task.test[name], task.sentences, own)
        for name, own in task.classes.items()
    }


def run(
    method: str, recipe: RecipeArguments, args: Any, task: Task
) -> tuple[AlignmentOutcome, Any]:
    """Train with one method and test."""
    model, args = (
        adapted_model(recipe, task, args.seed),
        runs.method_arguments(args, method, LEARNING_RATES[method]),
    )
    trainer = trainer_for(method, model, args, task.train, task.collate)
    before = evaluate(model, task)
    found = runs.train(trainer, args.resume_from_checkpoint)
    getattr(model, "save_pretrained", lambda folder: None)(args.output_dir)
    runs.write_card(trainer, task.images.name)
    validation = scores(model, task.validation, task.sentences, task.collate.classes)["accuracy"]
    after = evaluate(model, task)
    return AlignmentOutcome(
        method=method, before=before, after=after, validation=validation, **found
    ), model


def main(arguments: list[str] | None = None) -> list[AlignmentOutcome]:
    """Run the method, and those that it is compared with."""
    recipe, args = parse(arguments)
    methods = runs.begin(args, [recipe.method, *recipe.compare])
    common.reach_hub(recipe, "model", "vision_model", "text_model")
    task = load_task(recipe, args.seed)
    start = adapted_model(recipe, task, args.seed)
    found = [run(method, recipe, args, task) for method in runs.announced(methods, args, task)]
    report(recipe, args, task, start, found)
    return [outcome for outcome, _ in found]


if __name__ == "__main__":
    common.start(main)
