"""The command line of the recipes: options, YAML files, and what is wrong with them in one
sentence.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from transformers import AutoConfig, HfArgumentParser

from hf_flops import ConfigurationError, FlopsTrainingArguments
from hf_flops.errors import FlopsError, in_one_line
from recipes.help_text import help_text


def option(
    default: Any, help: str, choices: Collection[str] | None = None, least: int | None = None
) -> Any:
    """Return a dataclass's field as an option of the command line; one with a list as default takes
    several values.
    """
    given = {"help": help, "choices": choices and list(choices), "least": least}
    metadata = {name: value for name, value in given.items() if value is not None}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Recipe:
    """Base class of a recipe's own arguments, which are made with `option`."""

    def __post_init__(self) -> None:
        for own in fields(self):  # type: ignore[arg-type]
            at_least(own.metadata.get("least"), self, own.name)


@dataclass
class RecipeDefaults(FlopsTrainingArguments):
    """Training arguments with the defaults that all recipes have."""

    learning_rate: float | str | None = option(
        None, "A number or 'auto'; default: what was best for each method."
    )
    save_strategy: str = "no"
    report_to: str = "none"


@dataclass
class ImageDefaults(RecipeDefaults):
    """Training arguments with the defaults of the recipes on images."""

    rows_per_forward: int | str | None = 256
    per_device_train_batch_size: int = 32
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    logging_strategy: str = "epoch"


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
    except (yaml.YAMLError, SafetensorError) as error:
        raise ConfigurationError(f"{what} is damaged: {in_one_line(error)}.") from error
    except Exception as error:  # what the stock arguments make of values of another type
        raise ConfigurationError(f"{what} cannot be used: {in_one_line(error)}.") from error


def at_least(least: int | None, given: Any, *names: str) -> None:
    """Refuse numbers that are too small; a value of None stands for a default, and a bound of None
    for none.

    Raises:
        ConfigurationError: one is.
    """
    for name in names:
        value = getattr(given, name)
        if None not in (least, value) and not value >= least:
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
        reason = (
            error.__cause__
            if isinstance(error, DatasetGenerationError) and error.__cause__
            else error
        )
        other = "" if Path(name).exists() else f"is none of {', '.join(known)}, and "
        raise ConfigurationError(
            f"{name!r} {other}failed to load as a folder or a data set of the Hub: "
            f"{in_one_line(reason)}."
        ) from error


def reach_hub(recipe: Any, *names: str) -> None:
    """Fetch the configurations of the models that options name, before any work, and announce the
    models that are not here yet.

    Raises:
        ConfigurationError: there is no such model, or no connection.
    """
    for name in names:
        model = getattr(recipe, name)
        if model is None or Path(model).exists():
            continue
        with usable(f"--{name} {model}"):
            here = isinstance(try_to_load_from_cache(model, "config.json"), str)
            if not here and not is_offline_mode():
                print(f"Downloading {model} from the Hub into {HF_HUB_CACHE}", file=sys.stderr)
            AutoConfig.from_pretrained(model)


class RecipeParser(HfArgumentParser):
    """A parser that raises what is wrong with a value."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an option."""
        options.pop("least", None)  # for `Recipe`
        return super().add_argument(*names, **options)


def parse(
    kinds: Sequence[Any],
    description: str,
    methods: Collection[str],
    arguments: list[str] | None = None,
) -> Any:
    """Read a recipe's arguments, which name methods to `compare`, and its trainer's from a YAML
    file and the command line.

    Raises:
        ConfigurationError: a value cannot be used, or the file cannot be read.
        SystemExit: what argparse refuses, or help was asked for.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = RecipeParser(
        list(kinds),
        description=description.split("\n\n")[0],
        usage="%(prog)s [FILE.yaml] [OPTIONS]",
        epilog="Options override those of the file.",
        exit_on_error=False,
    )
    if {"-h", "--help", "--help_all"} & set(arguments):
        if "--help_all" in arguments:
            parser.print_help()
        else:
            print(f"usage: {parser.prog} [FILE.yaml] [OPTIONS]\n\n{help_text(kinds, description)}")
        parser.exit()
    what, given = "One of the options", arguments
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        with usable(arguments[0]):
            given = [*read_file(parser, kinds, arguments[0]), *arguments[1:]]
        what = arguments[0] if len(arguments) == 1 else f"{arguments[0]} with the options"
    try:
        with usable(what):
            recipe, args, *_, others = parser.parse_args_into_dataclasses(
                given, return_remaining_strings=True
            )
    except ConfigurationError as error:
        if isinstance(error.__cause__, argparse.ArgumentError):
            parser.error(str(error.__cause__))
        raise
    if others:
        stray = f"{others[0]} is not understood: options begin with --, and a YAML file comes first"
        parser.error(no_option(others[0], kinds) if others[0].startswith("-") else stray)
    if unknown := [method for method in recipe.compare if method not in methods]:
        parser.error(f"--compare {unknown[0]} is unknown: choose among {', '.join(methods)}")
    at_least(
        1,
        args,
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    )
    at_least(0, args, "learning_rate")
    return recipe, args


def no_option(name: str, kinds: Sequence[Any]) -> str:
    """Return what to say of an option that there is not, with the nearest one that there is."""
    plain = name.partition("=")[0].lstrip("-").replace("-", "_")
    dashes = "--" if name.startswith("-") else ""
    known = [field.name for kind in kinds for field in fields(kind) if field.init]
    near = difflib.get_close_matches(plain, known, n=1)
    hint = f"did you mean {dashes}{near[0]}?" if near else "see --help_all"
    return f"{name} is no option: {hint}"


def read_file(parser: HfArgumentParser, kinds: Sequence[Any], path: str) -> list[str]:
    """Return the options of a YAML file as words of the command line; what has no words becomes the
    parser's default.

    Raises:
        ArgumentError, OSError, ValueError, YAMLError: one is not as it should be, or the file is
            not.
    """
    given = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=PlainLoader)
    if not isinstance(given, dict):
        raise ValueError("it has no options by name, such as `seed: 1`")
    known = {field.name for kind in kinds for field in fields(kind) if field.init}
    if unknown := [name for name in given if name not in known]:
        raise ValueError(no_option(unknown[0], kinds).rstrip("?"))
    words = []
    for name, value in given.items():
        if value is None or value == []:
            if not takes(kinds, name, type(value)):
                raise ValueError(f"{name} has no value: leave it out for its default")
            parser.set_defaults(**{name: value})
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    # wrong values are the file's, whatever the command line says
    _, others = parser.parse_known_args(words)
    if others:
        raise ValueError(f"{others[0]} is one value too many")
    return words


def takes(kinds: Sequence[Any], name: str, kind: type) -> bool:
    """Return whether an option may be of a type, None or list."""
    owner = next(one for one in kinds if name in {field.name for field in fields(one)})
    hint = get_type_hints(owner)[name]
    return kind in {get_origin(part) or part for part in (hint, *get_args(hint))}


class PlainLoader(yaml.SafeLoader):
    """Reads YAML as its version 1.2 does: yes, no, on and off are words, and 1e1 is a number."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, regexp) for tag, regexp in pairs if not tag.endswith((":bool", ":float"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node, which is no alias: a few lines of those can stand for gigabytes."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"options have no aliases, such as *{self.peek_event().anchor}")
        return super().compose_node(parent, index)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """Return a number, whole where it is one, for options that count."""
        number = self.construct_yaml_float(node)
        return int(number) if math.isfinite(number) and number == int(number) else number


PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_number)


def start(main: Callable[[], Any]) -> None:
    """Run a recipe that was called as a script: what cannot work ends in a sentence, as with
    hf-flops.
    """
    try:
        main()
    except FlopsError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
