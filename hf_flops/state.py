"""What a checkpoint holds of a run's method, beside the stock trainer's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from .control_variates import ControlVariate
from .errors import ConfigurationError

STATE_FILE, CONTROL_FILE = "flops_state.json", "flops_control.safetensors"


def save_state(folder: str, parts: Mapping[str, Any], control: ControlVariate | None) -> None:
    """Write the state of the parts (JSON) and of the control variate (safetensors) into a folder."""
    if control is not None:
        _replace(Path(folder, CONTROL_FILE), save(control.state_dict()))
    _replace(Path(folder, STATE_FILE), json.dumps({name: part.state_dict() for name, part in parts.items()}).encode())


def read_json(path: Path, *keys: str) -> Any:
    """Return what a file of a run says, or what it says under a key, under a key in that, and so on.

    Raises:
        ConfigurationError: it is no JSON, or there is no such key.
    """
    try:
        found = json.loads(path.read_text())
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    return found


def load_state(folder: str | None, parts: Mapping[str, Any], control: ControlVariate | None) -> None:
    """Give the parts and the control variate the state that `save_state` wrote, if it did.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    path = Path(folder or "", STATE_FILE)
    if folder is None or not path.is_file():
        return
    state = read_json(path)
    for name, part in parts.items():
        if name in state:
            part.load_state_dict(state[name])
    if control is not None and (tensors := path.with_name(CONTROL_FILE)).is_file():
        control.load_state_dict(load(tensors.read_bytes()))


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)
