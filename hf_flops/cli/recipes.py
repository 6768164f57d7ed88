"""`hf-flops vit`, `prompt` and `align`: the recipes of a checkout or of an installed package."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..errors import ConfigurationError

PACKAGE = Path(__file__).resolve().parent.parent


def folder_of(name: str) -> Path:
    """Return the folder in which the package of the recipes lies.

    Raises:
        ConfigurationError: the recipe was not installed.
    """
    for folder in (PACKAGE / "bundled", PACKAGE.parent):
        if (folder / "recipes" / f"{name}.py").is_file():
            return folder
    raise ConfigurationError(
        f"The recipe {name} is not installed: install hf_flops again, or run it from a checkout."
    )


def recipe(name: str) -> ModuleType:
    """Return the module of a recipe.

    Raises:
        ConfigurationError: it was not installed.
    """
    folder = str(folder_of(name))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(f"recipes.{name}")


def run(name: str, command: str, arguments: list[str] | None = None) -> int:
    """Run a recipe as a subcommand; returns the exit code."""
    arguments = sys.argv[2:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments) and "--help_all" not in arguments:
        # written by scripts/reference.py: to ask the recipe would import transformers
        text = (folder_of(name) / "recipes" / "help" / f"{name}.txt").read_text(encoding="utf-8")
        print(f"usage: hf-flops {command} [FILE.yaml] [OPTIONS]\n\n{text}", end="")
        raise SystemExit(0)
    # the recipe's help names what was called
    before, sys.argv = sys.argv, [f"hf-flops {command}", *arguments]
    try:
        recipe(name).main(arguments)
    finally:
        sys.argv = before
    return 0


vit = partial(run, "vit", "vit")
prompt = partial(run, "prompt_tuning", "prompt")
align = partial(run, "alignment", "align")
