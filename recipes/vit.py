"""Adapt a vision transformer to new classes with forward passes only.

With no arguments, a small ViT that knows half of the classes of Fashion-MNIST (where it is missing,
of digits) learns the other half by LoRA and a new head. Any ViT and data set of the Hub will do:

    python recipes/vit.py recipes/vit.yaml --method mezo --compare flops backprop
    python recipes/vit.py --model google/vit-base-patch16-224-in21k --dataset beans --lora_rank 8
    torchrun --nproc_per_node 2 recipes/vit.py --use_cpu true --per_device_train_batch_size 16

It ends with a table (report.md, results.json), a picture (report.png) and the adapters.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import Trainer, set_seed

# also when hf_flops is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_flops import FlopsTrainer
from hf_flops.trainer import PRESETS
from recipes import common, images, runs, solved_head, vit_report
from recipes.common import option

METHODS = [*PRESETS, "backprop"]
# Best of a grid on the validation split; "flops" by the training loss with a solved head as well.
LEARNING_RATES = {
    "digits": {"flops": 6e-2, "mezo": 4e-2, "flops-authors": 4e-2, "backprop": 8e-2},
    "fashion_mnist": {"flops": 3e-2, "mezo": 2e-2, "flops-authors": 2e-2, "backprop": 2e-2},
}


@dataclass
class RecipeArguments(common.Recipe):
    """What is trained on what, and what it is compared with."""

    model: str | None = option(None, "Hub id or folder; default: the small pre-trained ViT.")
    dataset: str = option("auto", images.DATASETS)
    method: str = option("flops", "What trains the adapter.", METHODS)
    compare: list[str] = option([], f"Run beside it on the same rows: {', '.join(METHODS)}.")
    per_class: int | None = option(
        None, "Images per class, 0: all; default: few of Fashion-MNIST.", least=0
    )
    lora_rank: int = option(2, "Rank of LoRA on the attention's queries and values.", least=1)
    train_lora_a: bool = option(False, "Train lora_A as well: twice as many parameters.")
    shuffle_patches: bool = option(
        False, "Put each image's patches in one fixed random order, new to the backbone."
    )


@dataclass
class RecipeTrainingArguments(common.ImageDefaults):
    """Training arguments with defaults for this recipe."""

    output_dir: str | None = "outputs/vit"
    num_train_epochs: float = 10
    per_device_eval_batch_size: int = 256
    eval_strategy: str = "epoch"
    eval_on_start: bool = True


parse = partial(common.parse, [RecipeArguments, RecipeTrainingArguments], __doc__, METHODS)


def load_data(recipe: RecipeArguments, seed: int) -> tuple[str, Any, dict[str, Any]]:
    """Load the task and the path of its backbone, and preprocess every image once."""
    with common.usable(f"--dataset {recipe.dataset}"):
        task = images.few(images.load_images(recipe.dataset, seed=seed), recipe.per_class)
    with common.usable(f"--model {recipe.model or '(the small ViT)'}"):
        path = recipe.model or images.pretrained_vit(task)
        model, processor = images.load_vit(path, task)
    if recipe.shuffle_patches:
        processor = images.PatchShuffler(processor, model.config)
    with common.usable(f"--dataset {recipe.dataset}"):
        return path, task, images.pixel_parts(task, processor)


def adapter_model(recipe: RecipeArguments, path: str, task: Any, seed: int) -> Any:
    """Load the backbone and put LoRA and a new head on it, the same for every method."""
    set_seed(seed)
    model, _ = images.load_vit(path, task)
    images.check_lora_layers(model, path)
    lora = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    model = get_peft_model(
        model, LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, **lora)
    )
    if not recipe.train_lora_a:
        runs.freeze(model, "lora_A")
    return model


def trainer_for(method: str, model: Any, args: Any, train: Any, validation: Any) -> Trainer:
    """Build the trainer of a method: the stock one for backprop, ours with a preset otherwise."""
    options = {"data_collator": images.collate, "compute_metrics": runs.accuracy}
    options |= {"train_dataset": train, "eval_dataset": validation}
    if method == "backprop":
        return Trainer(model, runs.stock_arguments(args), **options)
    return FlopsTrainer(
        model, replace(args, preset=method, **dict.fromkeys(PRESETS[method])), **options
    )


def run(
    method: str, recipe: Any, args: Any, path: str, task: Any, data: Any
) -> tuple[runs.Outcome, Any]:
    """Train the adapter with one method and test it."""
    rate = LEARNING_RATES.get(task.name, LEARNING_RATES["fashion_mnist"])[method]
    model, args = (
        adapter_model(recipe, path, task, args.seed),
        runs.method_arguments(args, method, rate),
    )
    trainer = trainer_for(method, model, args, data["train"], data["validation"])
    before = runs.tested(trainer, data["test"])
    loss = partial(solved_head.training_loss, model, data["train"])
    found = runs.train(trainer, args.resume_from_checkpoint, loss)
    trainer.save_model()
    runs.write_card(trainer, task.name)
    return runs.Outcome(
        method=method, before=before, after=runs.tested(trainer, data["test"]), **found
    ), trainer


def main(arguments: list[str] | None = None) -> None:
    """Run the method, and those that it is compared with."""
    recipe, args = parse(arguments)
    methods = runs.begin(args, [recipe.method, *recipe.compare])
    common.reach_hub(recipe, "model")
    with args.main_process_first():
        path, task, data = load_data(recipe, args.seed)
    untrained = adapter_model(recipe, path, task, args.seed).to(args.device)
    frozen = solved_head.frozen_adapter(untrained, data)
    found = [
        run(method, recipe, args, path, task, data)
        for method in runs.announced(methods, args, task)
    ]
    if args.process_index == 0:
        vit_report.report(recipe, args, task, frozen, found)


if __name__ == "__main__":
    common.start(main)
