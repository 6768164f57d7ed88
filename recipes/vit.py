"""Adapt a vision transformer to new classes with forward passes only.

With no arguments, a small ViT that was pre-trained on half of the classes of Fashion-MNIST (where it is installed; of
scikit-learn's digits elsewhere) learns the other half through LoRA and a new head, without a backward pass. With a
connection, any vision transformer and data set of the Hub take their place:

    python recipes/vit.py
    python recipes/vit.py --method mezo --compare flops backprop --output_dir outputs/mezo
    python recipes/vit.py --model google/vit-base-patch16-224-in21k --dataset beans --lora_rank 8
    python recipes/vit.py recipes/vit.yaml
    torchrun --nproc_per_node 2 recipes/vit.py --use_cpu true --per_device_train_batch_size 16

It ends with a table (report.md, results.json), a picture (report.png) and the adapters.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when hf_flops is not installed

from hf_flops import ConfigurationError, FlopsTrainer, FlopsTrainingArguments
from hf_flops.args import PRESETS
from hf_flops.memory import PeakMemory
from hf_flops.plots import save_report
from recipes import common
from recipes.common import accuracy, stock_arguments
from recipes.images import ImageTask, PixelDataset, collate, load_images, load_vit, pixel_dataset, pretrained_vit

METHODS = [*PRESETS, "backprop"]
# Best of a grid on the validation split, the same for every method: benchmarks/vit_learning_rates.py.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "digits": {"flops": 4e-2, "mezo": 2e-2, "flops-authors": 4e-2, "backprop": 8e-2},
    "fashion_mnist": {"flops": 2e-2, "mezo": 2e-2, "flops-authors": 2e-2, "backprop": 2e-2},
}


@dataclass
class RecipeArguments:
    """What is trained on what, and what it is compared with."""

    model: str | None = field(default=None, metadata={"help": "Hub id or folder; default: the small pre-trained ViT."})
    dataset: str = field(
        default="auto", metadata={"help": "'digits', 'fashion_mnist', 'auto' (the latter where installed) or a Hub id."}
    )
    method: str = field(default="flops", metadata={"help": "What trains the adapter.", "choices": METHODS})
    compare: list[str] = field(
        default_factory=list, metadata={"help": f"Methods to run beside it on the same rows: {', '.join(METHODS)}."}
    )
    per_class: int | None = field(
        default=None, metadata={"help": "Training images per class, 0 for all; default: 100 of Fashion-MNIST, else all."}
    )
    lora_rank: int = field(default=2, metadata={"help": "Rank of LoRA on the attention's queries and values."})
    train_lora_a: bool = field(
        default=False, metadata={"help": "Train lora_A as well; without it there are half as many parameters."}
    )

    def __post_init__(self) -> None:
        common.at_least(1, self, "lora_rank")
        common.at_least(0, self, "per_class")


@dataclass
class RecipeTrainingArguments(FlopsTrainingArguments):
    """Training arguments with defaults for this recipe; the learning rate depends on method and data set."""

    output_dir: str | None = "outputs/vit"
    learning_rate: float | str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: the best of the same grid for each method, on the validation split."}
    )
    num_train_epochs: float = 10
    queries_per_sample: int | str | None = 32
    rows_per_forward: int | str | None = 256
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 256
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    eval_strategy: str = "epoch"
    save_strategy: str = "no"
    logging_strategy: str = "epoch"
    report_to: str = "none"


@dataclass
class Outcome:
    """What one method reached."""

    method: str
    learning_rate: float
    parameters: int
    before: float
    after: float
    rows: int
    seconds: float
    peak_megabytes: float
    steps: int
    curve: list[tuple[float, float]]

    @property
    def rows_per_second(self) -> float:
        """Rows through the model per second of training, evaluation included."""
        return self.rows / self.seconds


class Curve(TrainerCallback):
    """Records (rows, validation accuracy) at every evaluation."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.points: list[tuple[float, float]] = []

    @property
    def rows(self) -> int:
        """Rows through the model in training so far: one per sample and epoch for backprop."""
        if hasattr(self.trainer, "ledger"):
            return self.trainer.ledger.all_rows
        return round((self.trainer.state.epoch or 0) * len(self.trainer.train_dataset))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self.rows and "eval_accuracy" in metrics:
            self.points.append((self.rows, metrics["eval_accuracy"]))


def adapter_model(recipe: RecipeArguments, path: str, task: ImageTask, seed: int) -> torch.nn.Module:
    """Load the backbone and put LoRA and a new head on it, the same for every method.

    Raises:
        ConfigurationError: it has no such layers.
    """
    set_seed(seed)
    model, _ = load_vit(path, task)
    if not any(name.endswith((".q_proj", ".v_proj")) for name, _ in model.named_modules()):
        raise ConfigurationError(
            f"--model {path} is a {type(model).__name__}, without the attention layers q_proj and v_proj that LoRA is for: "
            "choose a vision transformer."
        )
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(model, config)
    if not recipe.train_lora_a:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    return model


def trainer_for(
    method: str, model: torch.nn.Module, args: RecipeTrainingArguments, curve: Curve, train: Any, validation: Any
) -> Trainer:
    """Build the trainer of a method: the stock one for backprop, ours with a preset for the rest."""
    options: dict[str, Any] = {
        "model": model,
        "train_dataset": train,
        "eval_dataset": validation,
        "data_collator": collate,
        "compute_metrics": accuracy,
        "callbacks": [curve],
    }
    if method == "backprop":
        trainer: Trainer = Trainer(args=stock_arguments(args), **options)
    else:
        trainer = FlopsTrainer(args=replace(args, preset=method, **dict.fromkeys(PRESETS[method])), **options)
    curve.trainer = trainer
    return trainer


def run(
    method: str, recipe: RecipeArguments, args: RecipeTrainingArguments, path: str, task: ImageTask, data: dict[str, Any]
) -> tuple[Outcome, Trainer]:
    """Train the adapter with one method and test it."""
    model = adapter_model(recipe, path, task, args.seed)
    best = LEARNING_RATES.get(task.name, LEARNING_RATES["fashion_mnist"])[method]
    rate = best if args.learning_rate is None else args.learning_rate
    own = replace(args, learning_rate=rate, output_dir=str(common.output_folder(args, method)))
    curve = Curve()
    trainer = trainer_for(method, model, own, curve, data["train"], data["validation"])
    before = trainer.evaluate(data["test"], metric_key_prefix="test")["test_accuracy"]
    with PeakMemory() as memory:
        start = time.perf_counter()
        trainer.train(args.resume_from_checkpoint)
        seconds = time.perf_counter() - start
    after = trainer.evaluate(data["test"], metric_key_prefix="test")["test_accuracy"]
    trainer.save_model()
    trainer.save_state()  # for hf-flops plot
    outcome = Outcome(
        method=method,
        learning_rate=rate,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        before=before,
        after=after,
        rows=curve.rows,
        seconds=seconds,
        peak_megabytes=memory.megabytes,
        steps=trainer.state.global_step,
        curve=curve.points,
    )
    return outcome, trainer


def table(outcomes: list[Outcome]) -> str:
    """Lay outcomes out as a Markdown table."""
    lines = [
        "| method | accuracy before | after | rows | rows/s | peak memory | seconds | steps | learning rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {o.method} | {o.before:.1%} | **{o.after:.1%}** | {o.rows:,} | {o.rows_per_second:,.0f} "
        f"| +{o.peak_megabytes:,.0f} MB | {o.seconds:.0f} | {o.steps:,} | {o.learning_rate:g} |"
        for o in outcomes
    ]
    return "\n".join(lines)


def verdict(outcomes: list[Outcome]) -> str:
    """Say how far each forward-only method went on the way from the untrained adapter to backprop."""
    reference = next((o for o in outcomes if o.method == "backprop"), None)
    if reference is None or reference.after <= reference.before:
        return ""
    ways = [
        f"{o.method} went {(o.after - o.before) / (reference.after - o.before):.0%} of the way from the untrained adapter "
        "to backprop with the same adapter and epochs."
        for o in outcomes
        if o is not reference
    ]
    return "\n".join(ways)


def query_images(trainer: FlopsTrainer, task: ImageTask, most: int = 8) -> dict[str, Any]:
    """Collect the queries per step of every training image, and the images with the most and the fewest."""
    mean = {sample: queries / steps for sample, (steps, queries) in trainer.ledger.sample_queries.items()}
    order = sorted(mean, key=mean.__getitem__, reverse=True)

    def pictures(samples: list[int]) -> tuple[list[np.ndarray], list[str]]:
        rows = [task.train[sample] for sample in samples]
        names = [task.class_names[int(row["label"])] for row in rows]
        counts = [f"{mean[sample]:.0f} quer{'y' if round(mean[sample]) == 1 else 'ies'} a step" for sample in samples]
        captions = [f"class {name}\n{count}" for name, count in zip(names, counts, strict=True)]
        return [np.asarray(row["image"]) for row in rows], captions

    return {
        "mean_queries": [mean[sample] for sample in order],
        "average": sum(mean.values()) / len(mean),
        "images": {
            "These images got the most queries": pictures(order[:most]),
            "These got the fewest": pictures(order[-most:]),
        },
    }


def report(folder: Path, task: ImageTask, recipe: RecipeArguments, runs: list[tuple[Outcome, Trainer]]) -> None:
    """Write the table, the figures as JSON and the picture, and print the table."""
    outcomes = [outcome for outcome, _ in runs]
    text = f"{table(outcomes)}\n\n{verdict(outcomes)}"
    print(f"\n{text}\n")
    notes = (
        f"Data: {task.name}, classes {', '.join(task.class_names)}; {outcomes[0].parameters:,} trained parameters; accuracy "
        "on the test split. Rows: images through the model in training, clean forwards and checks included; a row of "
        "backprop also costs a backward pass. Seconds include the evaluations; peak memory is what training added to the "
        "process.\n"
    )
    (folder / "report.md").write_text(f"# Adapting a ViT\n\n{text}\n\n{notes}\n![report](report.png)\n")
    record = {
        "recipe": asdict(recipe),
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1))
    queried = next((trainer for _, trainer in runs if hasattr(trainer, "ledger")), None)
    extra = query_images(queried, task) if queried is not None else {}
    save_report(folder / "report.png", {o.method: o.curve for o in outcomes if o.curve}, outcomes[0].before, **extra)
    print(f"Report: {folder / 'report.md'}\nPicture: {folder / 'report.png'}")


def parse(arguments: list[str] | None = None) -> tuple[RecipeArguments, RecipeTrainingArguments]:
    """Read the command line, or a YAML file named on it."""
    return common.parse([RecipeArguments, RecipeTrainingArguments], __doc__, METHODS, arguments)


def load_data(recipe: RecipeArguments, seed: int) -> tuple[str, ImageTask, dict[str, PixelDataset]]:
    """Load the task and the path of its backbone, and preprocess every image once."""
    with common.usable(f"--dataset {recipe.dataset}"):
        task = load_images(recipe.dataset, seed=seed)
    per_class = {"fashion_mnist": 100}.get(task.name, 0) if recipe.per_class is None else recipe.per_class
    if per_class:
        labels = np.asarray(task.train["label"])
        kept = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(len(task.class_names))])
        task = replace(task, train=task.train.select(np.sort(kept)))
    with common.usable(f"--model {recipe.model or '(the small ViT)'}"):
        path = recipe.model or pretrained_vit(task)
        _, processor = load_vit(path, task)
    with common.usable(f"--dataset {recipe.dataset}"):
        parts = {part: pixel_dataset(getattr(task, part), processor) for part in ("train", "validation", "test")}
    return path, task, parts


def main(arguments: list[str] | None = None) -> None:
    """Run the method, and those that it is compared with."""
    recipe, args = parse(arguments)
    methods = common.begin(args, [recipe.method, *recipe.compare])
    with args.main_process_first():
        path, task, data = load_data(recipe, args.seed)
    runs, first = [], args.process_index == 0
    for method in methods:
        if first:
            print(f"\n=== {method}: {len(data['train']):,} images of {', '.join(task.class_names)}")
        runs.append(run(method, recipe, args, path, task, data))
    if first:
        report(Path(str(args.output_dir)), task, recipe, runs)


if __name__ == "__main__":
    common.start(main)
