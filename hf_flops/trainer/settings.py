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
# Fields of an adapter's configuration that PEFT fills in.
_OF_THE_BASE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
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
    folder = f"    output_dir={json.dumps(str(args.output_dir))},"
    return "\n".join([f"{type(args).__name__}(", folder, *lines, ")"])


def run_as_code(args: FlopsTrainingArguments, model: object) -> str:
    """Return what repeats a run: the adapter's configuration, if it has one, and the arguments."""
    adapter = adapter_as_code(model)
    return f"peft_config = {adapter}\nargs = {as_code(args)}" if adapter else as_code(args)


def adapter_as_code(model: object) -> str:
    """Return a call that makes the configuration of a PEFT model's adapter again; empty if it has
    none.
    """
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None:
        return ""
    lines = []
    for each in dataclasses.fields(config):
        made = None if each.default_factory is dataclasses.MISSING else each.default_factory()
        default = made if each.default is dataclasses.MISSING else each.default
        value = getattr(config, each.name)
        value = sorted(value) if isinstance(value, set) else _plain(value)
        literal = isinstance(value, (bool, int, float, str, list, dict))
        if value != default and literal and each.name not in _OF_THE_BASE:
            lines.append(f"    {each.name}={value!r},")
    return "\n".join([f"{type(config).__name__}(", *lines, ")"])


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value
