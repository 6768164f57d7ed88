"""`hf-flops vit`, `prompt` and `align`: the recipes of a checkout or of an installed package."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError

PACKAGE = Path(__file__).resolve().parent.parent


def recipe(name: str) -> Any:
    """Return the module of a recipe.

    Raises:
        ConfigurationError: it was not installed.
    """
    for folder in (PACKAGE / "bundled", PACKAGE.parent):
        if (folder / "recipes" / f"{name}.py").is_file():
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            return import_module(f"recipes.{name}")
    raise ConfigurationError(
        f"The recipe {name} is not installed: install hf_flops again, or run it from a checkout."
    )


def run(name: str, command: str, arguments: list[str] | None = None) -> int:
    """Run a recipe as a subcommand; returns the exit code."""
    arguments = sys.argv[2:] if arguments is None else arguments
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
