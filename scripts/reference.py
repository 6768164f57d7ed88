"""Writes what follows from the code: docs/options.md, docs/cli.md, the help of the recipes, and the
notebook of the tutorial.

A test makes sure that they are up to date. A new option needs an entry in `GROUPS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_flops import FlopsArgumentsMixin
from hf_flops.cli import compare, doctor, plot, replay
from hf_flops.cli.main import COMMANDS
from hf_flops.trainer.presets import CHOICES, PRESETS
from recipes import alignment, prompt_tuning, vit
from recipes.help_text import help_text

RECIPES = {
    "vit": ("vit", vit),
    "prompt": ("prompt_tuning", prompt_tuning),
    "align": ("alignment", alignment),
}
PARSERS = {"compare": compare, "doctor": doctor, "plot": plot, "replay": replay}

# group: option: (unit, an example of it)
GROUPS: dict[str, dict[str, tuple[str, object]]] = {
    "What is trained, and how far": {
        "preset": ("a name", "mezo"),
        "learning_rate": ("parameter change per step, roughly, with Adam", 1e-2),
        "learning_rate_search": ("yes or no", True),
        "lora_parts": ("a name", "B"),
        "closed_form_head": ("a name", "gradient"),
    },
    "Budget": {
        "queries_per_sample": ("rows per sample and step", 16),
        "max_queries": ("rows of the run", 100_000),
    },
    "Estimate": {
        "allocator": ("a name", "uniform"),
        "estimator": ("a name", "antithetic"),
        "control_variate": ("a name", "logit_jacobian"),
        "delta_clip": ("robust standard deviations", 1.5),
    },
    "Noise": {
        "perturbation": ("a name", "rowwise"),
        "noise": ("a name", "rank_one"),
        "perturbation_scale": ("standard deviations of the noise, as parameters are", 2e-2),
        "noise_seed": ("a whole number", 7),
    },
    "Speed": {
        "rows_per_forward": ("rows", 256),
        "late_expansion": ("yes or no", False),
        "prefix_cache": ("a name", "memory"),
    },
    "Memory": {
        "memory_limit_gb": ("gigabytes (1e9 bytes)", 8.0),
        "prefix_cache_gb": ("gigabytes (1e9 bytes)", 16.0),
    },
    "Several processes": {"reduce": ("a name", "scalars")},
    "Reports": {"pictures": ("yes or no", False), "trajectory_log": ("yes or no", True)},
}
OPTIONS_HEAD = """# Options

All fields that `FlopsTrainingArguments` adds to `transformers.TrainingArguments`, whose own fields
work as usual, except those that belong to a backward pass. [How to choose](choosing.md) says which
values suit which task; the [glossary](glossary.md) defines the terms. On a command line of the
[recipes](cli.md) every option has the same name with two dashes. This page is written by
`scripts/reference.py`.
"""
CLI_HEAD = """# Command line

`pip install 'hf_flops[recipes]'` installs the command `hf-flops` with all that it needs. An unknown
option is refused with the nearest one. This page is written by `scripts/reference.py`.

| command | what it does |
| --- | --- |
"""


def options_page() -> str:
    """Return docs/options.md."""
    fields = {field.name: field for field in dataclasses.fields(FlopsArgumentsMixin)}
    parts = [OPTIONS_HEAD]
    for group, options in GROUPS.items():
        parts.append(f"## {group}\n")
        parts += [described(fields[name], *about) for name, about in options.items()]
    return "\n".join(parts)


def described(field: dataclasses.Field[Any], unit: str, example: object) -> str:
    """Return the entry of an option."""
    choices = CHOICES.get(field.name)
    values = ", ".join(f"`{choice}`" for choice in choices) if choices else str(field.type)
    lines = {
        "default": default_of(field),
        "one of" if choices else "type": values if choices else f"`{values}`",
        "unit": unit,
        "example": f"`FlopsTrainingArguments({field.name}={example!r})`",
    }
    if choices:
        del lines["unit"]
    about = "\n".join(f"- {name}: {value}" for name, value in lines.items())
    return f"### `{field.name}`\n\n{field.metadata['help']}\n\n{about}\n"


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return the default of an option, which the preset may decide."""
    if field.default is not None:
        return f"`{field.default!r}`"
    if field.name not in PRESETS["flops"]:
        return "none, see above"
    mezo, ours = (PRESETS[preset][field.name] for preset in ("mezo", "flops"))
    return f"`{ours!r}`" + (f" (`{mezo!r}` with `preset='mezo'`)" if mezo != ours else "")


def cli_page() -> str:
    """Return docs/cli.md."""
    rows = [f"| `hf-flops {name}` | {what} |" for name, (_, what) in COMMANDS.items()]
    parts = [CLI_HEAD + "\n".join(rows) + "\n"]
    for name in COMMANDS:
        parts.append(f"## hf-flops {name}\n")
        if name in PARSERS:
            parts += [PARSERS[name].parser().description or "", "", table(PARSERS[name].parser())]
            continue
        file, module = RECIPES[name]
        usage = f"usage: hf-flops {name} [FILE.yaml] [OPTIONS]\n\n"
        parts.append(f"```text\n{usage}{recipe_help(module)}```\n")
        parts.append(f"The same from a checkout: `python recipes/{file}.py`.\n")
    return "\n".join(parts)


def recipe_help(module: Any) -> str:
    """Return the help of a recipe."""
    kinds = module.RecipeArguments, module.RecipeTrainingArguments
    return help_text(kinds, str(module.__doc__)) + "\n"


def table(parser: argparse.ArgumentParser) -> str:
    """Return the options of a command as a table."""
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        name = ", ".join(action.option_strings) or action.metavar or action.dest
        rows.append(f"| `{name}` | {formatter._expand_help(action)} |")
    tail = f"\n\n{parser.epilog}" if parser.epilog else ""
    return "\n".join(["| option | what it is |", "| --- | --- |", *rows]) + tail + "\n"


def notebook() -> str:
    """Return the tutorial as a notebook: a cell for each block of code and for the text between."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    cells = []
    for i, part in enumerate(re.split(r"```python\n(.*?)```\n", text, flags=re.DOTALL)):
        cell = {"id": f"cell-{i}", "metadata": {}, "source": part.strip().splitlines(keepends=True)}
        code = {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append({**(code if i % 2 else {"cell_type": "markdown"}), **cell})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    version = {"nbformat": 4, "nbformat_minor": 5}
    return json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, **version}, indent=1)


def pages() -> dict[Path, str]:
    """Return the content of every file that is written here."""
    help_files = {
        ROOT / "recipes" / "help" / f"{file}.txt": recipe_help(module)
        for file, module in RECIPES.values()
    }
    docs = {"options.md": options_page(), "cli.md": cli_page()}
    help_files[ROOT / "examples" / "tutorial.ipynb"] = notebook() + "\n"
    return {**help_files, **{ROOT / "docs" / name: text for name, text in docs.items()}}


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
