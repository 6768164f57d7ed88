"""What a checkpoint holds beside the stock trainer's files: the states of our parts of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..autotune.protocol import Stateful
from ..base.state import State
from ..errors import ConfigurationError, FlopsError, in_one_line

logger = logging.getLogger("hf_flops.trainer")
STATE_FILE, TENSOR_FILE = "flops_state.json", "flops_state.safetensors"
_TENSOR = "__tensor__"  # {"__tensor__": key} stands for a tensor of the other file


def save_state(folder: str, parts: Mapping[str, Stateful]) -> None:
    """Write the state of the parts: plain values as JSON, tensors in a file beside it.

    Args:
        folder: of the checkpoint.
        parts: by name.
    """
    tensors: dict[str, Tensor] = {}
    states = {
        name: _without_tensors(part.state_dict(), name, tensors) for name, part in parts.items()
    }
    kinds = {name: type(part).__name__ for name, part in parts.items()}
    if tensors:
        _replace(Path(folder, TENSOR_FILE), save(tensors))
    _replace(Path(folder, STATE_FILE), json.dumps({**states, "kinds": kinds}).encode())


def load_state(folder: str | None, parts: Mapping[str, Stateful]) -> None:
    """Load the states that `save_state` wrote; a part of another class, or without a state, starts
    afresh with a warning.

    Raises:
        ConfigurationError: a file cannot be read, or the state of a part is no such state.
    """
    if folder is None:
        return
    path = Path(folder, STATE_FILE)
    if not path.is_file():
        message = "%s holds no %s: these start afresh: %s."
        logger.warning(message, folder, STATE_FILE, ", ".join(parts))
        return
    tensor_path = path.with_name(TENSOR_FILE)
    with damage_named(tensor_path):
        tensors = load(tensor_path.read_bytes()) if tensor_path.is_file() else {}

    def with_tensors(value: State) -> Any:
        if value.keys() != {_TENSOR}:
            return value
        if value[_TENSOR] not in tensors:
            raise KeyError(f"{TENSOR_FILE} lacks {value[_TENSOR]}")
        return tensors[value[_TENSOR]]

    with damage_named(path):
        state = json.loads(path.read_text(), object_hook=with_tensors)
        kinds = dict(state.get("kinds", {}))
    for name, part in parts.items():
        kind = type(part).__name__
        saved = kinds.get(name, kind)
        if saved != kind:
            message = "The %s of the checkpoint's run was %s, this one's is %s and starts afresh."
            logger.warning(message, name, saved, kind)
        elif name not in state:
            logger.warning("%s has no state of the %s, which starts afresh.", path, name)
        else:
            with damage_named(path, f" in the state of the {name}"):
                part.load_state_dict(state[name])


def read_json(path: Path, *keys: str) -> Any:
    """Return the JSON of a file of a run, or the value at nested keys of it.

    Raises:
        ConfigurationError: it is no JSON, or there is no such key.
    """
    with damage_named(path):
        return reduce(getitem, keys, json.loads(path.read_text()))


@contextmanager
def damage_named(path: Path, where: str = "") -> Iterator[None]:
    """Turn an error inside the context, which reads a file or a folder, into one that names it."""
    try:
        yield
    except (FlopsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a part makes of values that are not its own
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        wrong = "cannot be loaded" if path.is_dir() else "is damaged"
        raise ConfigurationError(f"{path} {wrong}{where}: {reason}.") from error


def _without_tensors(state: object, key: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested state to `tensors`; return it with references in their place."""
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


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)
