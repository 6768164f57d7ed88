"""What a checkpoint holds beside the stock trainer's files: the state of every part, by one
function each way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import ConfigurationError

logger = logging.getLogger("hf_flops.trainer")
STATE_FILE, TENSOR_FILE = "flops_state.json", "flops_state.safetensors"
_TENSOR = "__tensor__"  # {"__tensor__": key} stands for a tensor of the other file


class Stateful(Protocol):
    """A part of a run that a checkpoint holds: its state is a nested dict or list of tensors and
    plain values.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a resume needs."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Take up a state from `state_dict`."""
        ...


def save_state(folder: str, parts: Mapping[str, Any]) -> None:
    """Write the state of the parts into a folder: plain values as JSON, tensors in a file beside
    it.

    Args:
        folder: of the checkpoint.
        parts: what is `Stateful`, by name.
    """
    tensors: dict[str, Tensor] = {}
    states = {
        name: _without_tensors(part.state_dict(), name, tensors) for name, part in parts.items()
    }
    kinds = {name: type(part).__name__ for name, part in parts.items()}
    if tensors:
        _replace(Path(folder, TENSOR_FILE), save(tensors))
    _replace(Path(folder, STATE_FILE), json.dumps({**states, "kinds": kinds}).encode())


def load_state(folder: str | None, parts: Mapping[str, Any]) -> None:
    """Give the parts the state that `save_state` wrote, if it did; a part of another class than the
    saved one starts afresh.

    Raises:
        ConfigurationError: a file cannot be read.
    """
    path = Path(folder or "", STATE_FILE)
    if folder is None or not path.is_file():
        return
    state, tensors = read_json(path), _read_tensors(path.with_name(TENSOR_FILE))
    for name, part in parts.items():
        if name in state and _same_kind(name, part, state):
            part.load_state_dict(_with_tensors(state[name], tensors))


def read_json(path: Path, *keys: str) -> Any:
    """Return what a file of a run says, or what it says under a key, under a key in that, and so
    on.

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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path} is damaged: {type(error).__name__}: {error}.") from error


def _without_tensors(state: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested state with a reference in the place of each tensor, which goes to
    `tensors`.
    """
    if torch.is_tensor(state):
        tensors[key] = state.detach().clone().contiguous()
        return {_TENSOR: key}
    if isinstance(state, Mapping):
        return {
            name: _without_tensors(value, f"{key}.{name}", tensors) for name, value in state.items()
        }
    if isinstance(state, (list, tuple)):
        return [_without_tensors(value, f"{key}.{i}", tensors) for i, value in enumerate(state)]
    return state


def _with_tensors(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the nested state that `_without_tensors` took apart."""
    if isinstance(state, dict) and state.keys() == {_TENSOR}:
        if state[_TENSOR] not in tensors:
            raise ConfigurationError(f"The checkpoint's {TENSOR_FILE} lacks {state[_TENSOR]}.")
        return tensors[state[_TENSOR]]
    if isinstance(state, dict):
        return {name: _with_tensors(value, tensors) for name, value in state.items()}
    if isinstance(state, list):
        return [_with_tensors(value, tensors) for value in state]
    return state


def _same_kind(name: str, part: Any, state: Mapping[str, Any]) -> bool:
    """Say whether a part is of the class that a state is of, as far as the state tells, and warn if
    it is not.
    """
    now = type(part).__name__
    saved = state.get("kinds", {}).get(name, now)
    if saved != now:
        logger.warning(
            "The %s of the checkpoint's run was %s, this one's is %s and starts afresh.",
            name,
            saved,
            now,
        )
    return bool(saved == now)


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)
