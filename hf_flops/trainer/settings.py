"""The arguments that repeat a run: those that differ from their defaults."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum

from .args import FlopsTrainingArguments
from .presets import PRESETS

# Arguments that change where a run writes and what it shows, but not what it computes, and those
# that follow from others.
_ASIDE = {
    "output_dir",
    "run_name",
    "report_to",
    "disable_tqdm",
    "push_to_hub",
    "debug",
    "accelerator_config",
    "pictures",
}
_ASIDE_PREFIXES = (
    "hub_",
    "logging_",
    "log_",
    "dataloader_pin_memory",
    "use_cpu",
    "project",
    "trackio_",
    "save_",
)


def changed_settings(args: FlopsTrainingArguments) -> dict[str, object]:
    """Return the arguments of a run that differ from the defaults and from the preset.

    Leaves out tokens, folders, display options, and values that cannot be written as a literal.
    """
    preset, changed = PRESETS[args.preset], dict[str, object]()
    for field in dataclasses.fields(args):
        if not field.init or field.name in _ASIDE or field.name.startswith(_ASIDE_PREFIXES):
            continue
        made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = preset.get(
            field.name, made if field.default is dataclasses.MISSING else field.default
        )
        value = _plain(getattr(args, field.name))
        if (
            value != _plain(default)
            and (value or default)
            and isinstance(value, (bool, int, float, str, list, dict))
        ):
            changed[field.name] = value
    return changed


def as_code(args: FlopsTrainingArguments) -> str:
    """Return a call of the arguments' class that sets what differs from the defaults."""
    lines = [
        f"    {name}={json.dumps(value) if isinstance(value, str) else repr(value)},"
        for name, value in changed_settings(args).items()
    ]
    return "\n".join([f"{type(args).__name__}(", '    output_dir="outputs",', *lines, ")"])


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value
