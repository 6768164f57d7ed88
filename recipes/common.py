"""What the recipes have in common: the command line, the stock trainer's arguments, the accuracy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_flops import FlopsArgumentsMixin

# What --help shows of the stock trainer's arguments, beside the recipe's own and those of forward-only training.
STOCK = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("eval_strategy", "save_strategy", "seed", "use_cpu"),
)


def accuracy(prediction: Any) -> dict[str, float]:
    """Compute the share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def begin(args: Any, methods: Sequence[str]) -> tuple[Path, list[str]]:
    """Make the output folder; returns it and the methods to run, each once.

    Raises:
        ValueError: backprop by several processes: the stock trainer is measured before it trains, and then not wrapped.
    """
    transformers_logging.disable_progress_bar()  # of loading and saving; training keeps its own
    if args.world_size > 1 and "backprop" in methods:
        raise ValueError(f"backprop is for comparison by one process, not {args.world_size}: leave it out, or start one.")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, list(dict.fromkeys(methods))


def stock_arguments(args: Any, **changes: Any) -> TrainingArguments:
    """Return the part of the arguments that the stock trainer knows."""
    stock = {name: getattr(args, name) for name in TrainingArguments.__dataclass_fields__ if name[0] != "_"}
    return TrainingArguments(**{**stock, **changes})


def parse(kinds: Sequence[Any], description: str, methods: Collection[str], arguments: list[str] | None = None) -> Any:
    """Read a recipe's arguments, which name methods to `compare`, and its trainer's from the command line or a YAML file."""
    parser = HfArgumentParser(list(kinds), description=description.split("\n")[0])
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help", "--help_all"} & set(arguments):
        print_help(parser, kinds[0], everything="--help_all" in arguments)
        parser.exit()
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(arguments[0])
    recipe, args = parser.parse_args_into_dataclasses(arguments)
    if unknown := [method for method in recipe.compare if method not in methods]:
        parser.error(f"--compare {unknown[0]} is unknown: choose among {', '.join(methods)}")
    return recipe, args


def print_help(parser: HfArgumentParser, recipe: Any, *, everything: bool) -> None:
    """Print the arguments that matter here, or everything that the stock trainer takes."""
    shown = {"help", *STOCK, *(field.name for kind in (recipe, FlopsArgumentsMixin) for field in fields(kind))}
    for action in parser._actions:
        if not everything and (action.dest not in shown or action.option_strings[0].startswith("--no_")):
            action.help = argparse.SUPPRESS
    parser.usage = "%(prog)s [OPTIONS], or %(prog)s FILE.yaml with options by name"
    parser.epilog = "Every option of transformers' TrainingArguments works too: --help_all lists them."
    parser.print_help()
