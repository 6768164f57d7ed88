"""Align images with texts with forward passes only.

With no arguments, a small ViT and MiniLM become one model of two towers: new projections, and LoRA in the ViT, learn from
100 images of each class of Fashion-MNIST, each with a sentence about its class, without a backward pass. Then images are
classified by sentences that were not among those. CLIP and SigLIP of the Hub learn from a few images of each class:

    python recipes/alignment.py --compare backprop
    python recipes/alignment.py --model openai/clip-vit-base-patch32 --dataset beans --shots 16
    python recipes/alignment.py --model openai/clip-vit-base-patch32 --dataset dtd --shots 4 --classes base --adapter border
    python recipes/alignment.py --vision_model facebook/dinov2-small --text_model sentence-transformers/all-MiniLM-L6-v2
    python recipes/alignment.py recipes/alignment.yaml

It ends with a table (report.md, results.json), a picture (report.png) and the model of each method.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModel, AutoTokenizer, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when hf_flops is not installed

from hf_flops import ConfigurationError, FlopsTrainingArguments
from recipes import common
from recipes.alignment_methods import LEARNING_RATES, METHODS, trainer_for
from recipes.alignment_report import report
from recipes.assets import minilm
from recipes.images import ImageTask, load_images, pretrained_vit
from recipes.pairs import LOSSES, PairCollator, PixelRows, Sentences, class_words, pixel_rows, scores
from recipes.two_towers import ADAPTERS, TOWERS, adapted, dual_encoder, load_processor, text_shape, trained_context


@dataclass
class RecipeArguments:
    """What is trained on what, and what it is compared with."""

    model: str | None = field(default=None, metadata={"help": "CLIP, SigLIP or the like: Hub id or folder."})
    vision_model: str | None = field(default=None, metadata={"help": "Image encoder; default: the small pre-trained ViT."})
    text_model: str | None = field(default=None, metadata={"help": "Text encoder; default: all-MiniLM-L6-v2."})
    image_processor: str | None = field(default=None, metadata={"help": "Model whose image processor to take."})
    projection_dim: int = field(default=32, metadata={"help": "Width of new projections, for two encoders."})
    dataset: str = field(
        default="auto", metadata={"help": "'digits', 'fashion_mnist', 'auto' (the latter where installed) or a Hub id."}
    )
    shots: int | None = field(
        default=None, metadata={"help": "Training images per class; default: 16, or 100 for two encoders."}
    )
    classes: str = field(
        default="all",
        metadata={
            "help": "Classes to train: 'all', or 'base', the first half, to test on 'new' ones too.",
            "choices": ["all", "base"],
        },
    )
    loss: str | None = field(
        default=None,
        metadata={"help": "'pairs' (image and sentence, the default for two encoders) or 'classes'.", "choices": LOSSES},
    )
    adapter: str = field(
        default="lora",
        metadata={
            "help": "LoRA, a 'border' of pixels, 'tokens' beside patches, a trained 'context' of texts, or 'none'.",
            "choices": list(ADAPTERS),
        },
    )
    towers: str = field(
        default="image", metadata={"help": "Where LoRA is: 'image', 'text' or 'both'.", "choices": list(TOWERS)}
    )
    lora_rank: int = field(default=2, metadata={"help": "Rank of LoRA on queries and values; its B matrices are trained."})
    prompt_size: int = field(default=4, metadata={"help": "Pixels of the border, or number of tokens."})
    test_images: int = field(default=1000, metadata={"help": "Images to test on, 0 for all."})
    method: str = field(default="flops", metadata={"help": "What trains the adapter.", "choices": METHODS})
    compare: list[str] = field(
        default_factory=list, metadata={"help": f"Methods to run beside it on the same rows: {', '.join(METHODS)}."}
    )

    def __post_init__(self) -> None:
        common.at_least(1, self, "projection_dim", "shots", "lora_rank", "prompt_size")
        common.at_least(0, self, "test_images")


@dataclass
class RecipeTrainingArguments(FlopsTrainingArguments):
    """Training arguments with defaults for this recipe; the learning rate depends on the method."""

    output_dir: str | None = "outputs/alignment"
    learning_rate: float | str | None = field(
        default=None, metadata={"help": "Default: the best of a grid for each method."}
    )  # type: ignore[assignment]
    num_train_epochs: float = 3
    queries_per_sample: int | str | None = 8
    rows_per_forward: int | str | None = 256
    per_device_train_batch_size: int = 32
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    save_strategy: str = "no"
    logging_strategy: str = "epoch"
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.queries_per_sample == "auto":
            raise ConfigurationError(
                "--queries_per_sample auto does not know how many clean rows images and texts need: give a number to align."
            )
        super().__post_init__()


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


@dataclass
class Outcome:
    """What one method reached: scores by the set of classes they were measured on."""

    method: str
    learning_rate: float
    parameters: int
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    rows: int
    seconds: float
    steps: int
    validation: float = 0.0


def named(recipe: RecipeArguments, tower: str) -> str:
    """Return the option that a tower's model comes from, with its value."""
    option = "model" if recipe.model else f"{tower}_model"
    return f"--{option} {getattr(recipe, option) or '(the embedded one)'}"


def load_task(recipe: RecipeArguments, seed: int) -> Task:
    """Load data, processors and sentences; the seed fixes which images are trained on."""
    data = f"--dataset {recipe.dataset}"
    with common.usable(data):
        images = load_images(recipe.dataset, seed=seed, every_class=True)
    with common.usable(named(recipe, "vision")):
        vision = recipe.model or recipe.vision_model or pretrained_vit(load_images(images.name, seed=seed))
    with common.usable(f"--image_processor {recipe.image_processor}" if recipe.image_processor else named(recipe, "vision")):
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
        test = {name: pixel_rows(images.test, processor, own, per_class, 0) for name, own in classes.items()}
    collate = PairCollator(sentences, base, recipe.loss or ("classes" if recipe.model else "pairs"))
    return Task(images, *parts, test, sentences, classes, collate, recipe.model or (vision, text))


def adapted_model(recipe: RecipeArguments, task: Task, seed: int) -> nn.Module:
    """Load the model and make what is to be trained trainable, the same for every method."""
    set_seed(seed)
    single = isinstance(task.path, str)
    options = {"towers": recipe.towers, "rank": recipe.lora_rank, "size": recipe.prompt_size}
    names = dict.fromkeys(named(recipe, tower) for tower in ("vision", "text"))
    with common.usable(" with ".join(names)):
        model: Any = (
            AutoModel.from_pretrained(task.path) if single else dual_encoder(*task.path, recipe.projection_dim, seed)
        )
        return adapted(model, recipe.adapter, projections=not single, context=task.sentences.context, **options)


def evaluate(model: nn.Module, task: Task) -> dict[str, dict[str, float]]:
    """Measure on the test images of each set of classes."""
    return {name: scores(model, task.test[name], task.sentences, own) for name, own in task.classes.items()}


def run(method: str, recipe: RecipeArguments, args: RecipeTrainingArguments, task: Task) -> tuple[Outcome, nn.Module]:
    """Train with one method and test."""
    model = adapted_model(recipe, task, args.seed)
    rate = LEARNING_RATES[method] if args.learning_rate is None else args.learning_rate
    own = replace(args, learning_rate=rate, output_dir=str(common.output_folder(args, method)))
    trainer = trainer_for(method, model, own, task.train, task.collate)
    before, start = evaluate(model, task), time.perf_counter()
    trainer.train(args.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_state()  # for hf-flops plot
    ledger = getattr(trainer, "ledger", None)
    outcome = Outcome(
        method=method,
        learning_rate=rate,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        before=before,
        after=evaluate(model, task),
        rows=ledger.all_rows if ledger else round((trainer.state.epoch or 0) * len(task.train)),
        seconds=seconds,
        steps=trainer.state.global_step,
        validation=scores(model, task.validation, task.sentences, next(iter(task.classes.values())))["accuracy"],
    )
    return outcome, model


def parse(arguments: list[str] | None = None) -> tuple[RecipeArguments, RecipeTrainingArguments]:
    """Read the command line, or a YAML file named on it."""
    return common.parse([RecipeArguments, RecipeTrainingArguments], __doc__, METHODS, arguments)


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Run the method, and those that it is compared with."""
    recipe, args = parse(arguments)
    folder, methods = Path(str(args.output_dir)), common.begin(args, [recipe.method, *recipe.compare])
    task = load_task(recipe, args.seed)
    start = adapted_model(recipe, task, args.seed)
    runs = []
    for method in methods:
        print(f"\n=== {method}: {len(task.train):,} images of {', '.join(task.sentences.words)}")
        outcome, model = run(method, recipe, args, task)
        model.save_pretrained(folder / method) if hasattr(model, "save_pretrained") else None
        runs.append((outcome, model))
    (folder / "results.json").write_text(
        json.dumps({"recipe": asdict(recipe), "seed": args.seed, "outcomes": [asdict(o) for o, _ in runs]}, indent=1)
    )
    report(folder, task, start, runs)
    return [outcome for outcome, _ in runs]


if __name__ == "__main__":
    common.start(main)
