"""What the recipes have in common: the command line, the stock trainer's arguments, the accuracy."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any

from transformers import HfArgumentParser, TrainingArguments


def accuracy(prediction: Any) -> dict[str, float]:
    """Compute the share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def check_compared(args: Any, methods: Collection[str]) -> None:
    """Refuse backprop by several processes: the stock trainer would be measured before it trains, and then not be wrapped.

    Raises:
        ValueError: names the number of processes.
    """
    if args.world_size > 1 and "backprop" in methods:
        raise ValueError(f"backprop is for comparison by one process, not {args.world_size}: leave it out, or start one.")


def stock_arguments(args: Any, **changes: Any) -> TrainingArguments:
    """Return the part of the arguments that the stock trainer knows."""
    stock = {name: getattr(args, name) for name in TrainingArguments.__dataclass_fields__ if name[0] != "_"}
    return TrainingArguments(**{**stock, **changes})


def parse(kinds: Sequence[Any], description: str, methods: Collection[str], arguments: list[str] | None = None) -> Any:
    """Read a recipe's arguments, which name methods to `compare`, and its trainer's from the command line or a YAML file."""
    parser = HfArgumentParser(list(kinds), description=description.split("\n")[0])
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(arguments[0])
    recipe, args = parser.parse_args_into_dataclasses(arguments)
    if unknown := [method for method in recipe.compare if method not in methods]:
        parser.error(f"--compare {unknown[0]} is unknown: choose among {', '.join(methods)}")
    return recipe, args
