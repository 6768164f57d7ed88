"""The help of a recipe: its own options, those of forward-only training, and some of the stock
trainer's, each with its default.

`scripts/reference.py` writes it to `recipes/help/`, where `hf-flops vit --help` reads it: that need
not import transformers.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

from hf_flops import FlopsArgumentsMixin
from hf_flops.trainer import PRESETS

WIDTH = 96
# What help shows of the stock trainer's options.
STOCK = {
    "output_dir": "Folder of the report and the adapters.",
    "num_train_epochs": "Passes over the training data.",
    "max_steps": "Optimizer steps, in place of num_train_epochs; -1: none.",
    "per_device_train_batch_size": "Samples of a training batch.",
    "per_device_eval_batch_size": "Samples of an evaluation batch.",
    "lr_scheduler_type": "How the learning rate changes: linear, cosine, constant, ...",
    "warmup_steps": "Steps until the learning rate is full; below 1, a share of all.",
    "optim": "The optimizer: adamw_torch, sgd, adafactor, ...",
    "weight_decay": "Weight decay of the optimizer.",
    "max_grad_norm": "Limit of the gradient's norm; 0: none.",
    "eval_strategy": "When to evaluate: no, steps or epoch.",
    "save_strategy": "When to save a checkpoint: no, steps or epoch.",
    "seed": "Seed of the run: data order, new parameters and noise.",
    "use_cpu": "Train on the CPU even if there is a GPU.",
}


def help_text(kinds: Sequence[Any], description: str) -> str:
    """Return the help of a recipe, without its first line.

    Args:
        kinds: dataclasses of the recipe's own arguments and of its trainer's.
        description: of the recipe.
    """
    own, training = ({each.name: each for each in dataclasses.fields(kind)} for kind in kinds[:2])
    forward_only = [each.name for each in dataclasses.fields(FlopsArgumentsMixin)]
    groups = {
        "this recipe": own.values(),
        "forward-only training": [training[name] for name in forward_only],
        "the stock trainer (--help_all lists all of its options)": [training[n] for n in STOCK],
    }
    lines = [description.split("\n\n")[0], "", "Options override those of the file."]
    for title, options in groups.items():
        lines += ["", f"{title}:"]
        for each in options:
            lines += entry(each)
    return "\n".join(lines)


def entry(option: dataclasses.Field[Any]) -> Iterator[str]:
    """Yield the lines of an option."""
    stock = FlopsArgumentsMixin.__dataclass_fields__.get(option.name)
    text = STOCK.get(option.name) or option.metadata.get("help") or stock.metadata["help"]
    choices = option.metadata.get("choices")
    if choices:
        text += f" One of {', '.join(map(str, choices))}."
    default = shown_default(option)
    if "efault" not in text or default != "none":
        text += f" Default: {default}."
    yield f"  --{option.name}"
    yield from textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def shown_default(option: dataclasses.Field[Any]) -> str:
    """Return the default of an option for people; that of the preset where it decides."""
    made = option.default_factory
    value = option.default if made is dataclasses.MISSING else made()
    if value is None:
        value = PRESETS["flops"].get(option.name)
    value = value.value if isinstance(value, Enum) else value
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(repr, value)) if isinstance(value, list) else str(value)
