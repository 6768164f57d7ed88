"""What the recipes have in common: the command line, the stock trainer's arguments, the accuracy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_flops import ConfigurationError, FlopsArgumentsMixin
from hf_flops.errors import FlopsError, in_one_line

# What --help shows of the stock trainer's arguments, beside the recipe's own and those of forward-only training.
STOCK = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("eval_strategy", "save_strategy", "seed", "use_cpu"),
)


def accuracy(prediction: Any) -> dict[str, float]:
    """Compute the share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Say in one sentence what is wrong with an option or a file that is read meanwhile.

    Raises:
        ConfigurationError: it cannot be used.
    """
    try:
        yield
    except FlopsError:  # has a sentence of its own
        raise
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, argparse.ArgumentError) as error:
        raise ConfigurationError(f"{what} cannot be used: {in_one_line(error)}.") from error
    except (yaml.YAMLError, SafetensorError) as error:
        raise ConfigurationError(f"{what} is damaged: {in_one_line(error)}.") from error


def at_least(least: int, given: Any, *names: str) -> None:
    """Refuse numbers that are too small; None stands for a default.

    Raises:
        ConfigurationError: one is.
    """
    for name in names:
        value = getattr(given, name)
        if value is not None and not value >= least:
            raise ConfigurationError(f"--{name} {value} must be {least} or more.")


def load_hub(name: str, known: Collection[str], **options: Any) -> Any:
    """Load a data set of the Hub, or of a folder, that is none of the known ones.

    Raises:
        ConfigurationError: it cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return load_dataset(name, **options)
    except (DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        other = "" if Path(name).exists() else f"is none of {', '.join(known)}, and "
        raise ConfigurationError(
            f"{name!r} {other}failed to load as a folder or a data set of the Hub: {in_one_line(reason)}."
        ) from error


def begin(args: Any, methods: Sequence[str]) -> list[str]:
    """Return the methods to run, each once.

    Raises:
        ConfigurationError: backprop by several processes: the stock trainer is measured before it trains, and then not
            wrapped; or a checkpoint to resume from, where there is none or several methods would.
    """
    transformers_logging.disable_progress_bar()  # of loading and saving; training keeps its own
    methods, checkpoint = list(dict.fromkeys(methods)), args.resume_from_checkpoint
    if args.world_size > 1 and "backprop" in methods:
        raise ConfigurationError(
            f"backprop is for comparison by one process, not {args.world_size}: leave it out, or start one."
        )
    if checkpoint and len(methods) > 1:
        raise ConfigurationError(
            f"--resume_from_checkpoint {checkpoint} is of one method, and {', '.join(methods)} would start from it: run one."
        )
    if checkpoint and not Path(checkpoint, "trainer_state.json").is_file():
        raise ConfigurationError(
            f"--resume_from_checkpoint {checkpoint} is no checkpoint: name a folder such as "
            f"{Path(args.output_dir, methods[0], 'checkpoint-100')}."
        )
    return methods


def output_folder(args: Any, method: str) -> Path:
    """Make and return the folder of a method's adapter, within the output folder.

    Raises:
        ConfigurationError: it cannot be made.
    """
    folder = Path(args.output_dir, method)
    with usable(f"--output_dir {args.output_dir}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def stock_arguments(args: Any, **changes: Any) -> TrainingArguments:
    """Return the part of the arguments that the stock trainer knows."""
    stock = {name: getattr(args, name) for name in TrainingArguments.__dataclass_fields__ if name[0] != "_"}
    return TrainingArguments(**{**stock, **changes})


def parse(kinds: Sequence[Any], description: str, methods: Collection[str], arguments: list[str] | None = None) -> Any:
    """Read a recipe's arguments, which name methods to `compare`, and its trainer's from the command line or a YAML file.

    Raises:
        ConfigurationError: a value cannot be used, or the file cannot be read.
        SystemExit: what argparse refuses, or help was asked for.
    """
    usage = "%(prog)s [OPTIONS], or %(prog)s FILE.yaml with options by name"
    parser = HfArgumentParser(list(kinds), description=description.split("\n")[0], usage=usage)
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help", "--help_all"} & set(arguments):
        print_help(parser, kinds[0], everything="--help_all" in arguments)
        parser.exit()
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        with usable(arguments[0]):
            recipe, args = parser.parse_dict(read_file(parser, arguments[0]))
    else:
        with usable("One of the options"):
            recipe, args, *_, others = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if others:
            parser.error(f"{others[0]} is not understood: options begin with --, and a YAML file comes alone")
    if unknown := [method for method in recipe.compare if method not in methods]:
        parser.error(f"--compare {unknown[0]} is unknown: choose among {', '.join(methods)}")
    at_least(1, args, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    at_least(0, args, "learning_rate")
    return recipe, args


def read_file(parser: HfArgumentParser, path: str) -> dict[str, Any]:
    """Read options from a YAML file as the command line would, with their types and choices.

    Raises:
        ArgumentError, OSError, ValueError, YAMLError: one is not as it should be, or the file is not.
    """
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(given, dict):
        raise ValueError("it has no options by name, such as `seed: 1`")
    actions = {action.dest: action for action in reversed(parser._actions)}
    if unknown := [name for name in given if name not in actions]:
        raise ValueError(f"{unknown[0]} is no option, see --help_all")
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        one = actions[name].nargs != "+"
        if values and value is not None and not isinstance(value, dict) and not (one and isinstance(value, list)):
            given[name] = parser._get_values(actions[name], [str(part) for part in values])
    return given


def start(main: Callable[[], Any]) -> None:
    """Run a recipe that was called as a script: what cannot work ends in a sentence, as with hf-flops."""
    try:
        main()
    except FlopsError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def print_help(parser: HfArgumentParser, recipe: Any, *, everything: bool) -> None:
    """Print the arguments that matter here, or everything that the stock trainer takes."""
    shown = {"help", *STOCK, *(field.name for kind in (recipe, FlopsArgumentsMixin) for field in fields(kind))}
    for action in parser._actions:
        if not everything and (action.dest not in shown or action.option_strings[0].startswith("--no_")):
            action.help = argparse.SUPPRESS
    parser.epilog = "Every option of transformers' TrainingArguments works too: --help_all lists them."
    parser.print_help()
