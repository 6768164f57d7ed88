"""What a checkpoint holds of a run's method, beside the stock trainer's files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from .control_variates import ControlVariate
from .errors import ConfigurationError

logger = logging.getLogger("hf_flops.trainer")
STATE_FILE, CONTROL_FILE = "flops_state.json", "flops_control.safetensors"
_CONTROL = "control variate"


def save_state(folder: str, parts: Mapping[str, Any], control: ControlVariate | None) -> None:
    """Write the state of the parts (JSON) and of the control variate (safetensors) into a folder."""
    if control is not None:
        _replace(Path(folder, CONTROL_FILE), save(control.state_dict()))
    kinds = {name: _kind(part) for name, part in {**parts, _CONTROL: control}.items()}
    states = {name: part.state_dict() for name, part in parts.items()}
    _replace(Path(folder, STATE_FILE), json.dumps({**states, "kinds": kinds}).encode())


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
    """Give the parts and the control variate the state that `save_state` wrote, if it did; others than then start afresh.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    path = Path(folder or "", STATE_FILE)
    if folder is None or not path.is_file():
        return
    state = read_json(path)
    for name, part in parts.items():
        if name in state and _same(name, part, state):
            part.load_state_dict(state[name])
    if control is not None and (tensors := path.with_name(CONTROL_FILE)).is_file() and _same(_CONTROL, control, state):
        control.load_state_dict(load(tensors.read_bytes()))


def _kind(part: Any) -> str:
    """Return the class of a part, and those of its allocators if it has some."""
    return " of ".join(type(one).__name__ for one in (part, *getattr(part, "allocators", {}).values()))


def _same(name: str, part: Any, state: Mapping[str, Any]) -> bool:
    """Say whether a part is of the class that a state is of, as far as the state tells, and warn if it is not."""
    now = _kind(part)
    saved = state.get("kinds", {}).get(name, now)
    if saved != now:
        logger.warning("The %s of the checkpoint's run was %s, this one's is %s and starts afresh.", name, saved, now)
    return bool(saved == now)


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)
