"""Which optimizers can be replayed, what is recorded of them, and how they are built again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..base.state import State
from ..errors import ConfigurationError

_HOMES = ("torch.optim.", "transformers.optimization.")


def bare(optimizer: Optimizer) -> Optimizer:
    """Return what Accelerate wrapped."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def describe(optimizer: Optimizer, names: Mapping[int, str]) -> State:
    """Return what builds an optimizer again: its class, its defaults, and the names of each group's
    tensors.

    Args:
        optimizer: as the trainer has it.
        names: of the trainable parameters, by id.

    Raises:
        ConfigurationError: its steps cannot be replayed, because other code or a closure belongs to
            them.
    """
    own = bare(optimizer)
    home = f"{type(own).__module__}.{type(own).__qualname__}"
    if not home.startswith(_HOMES) or isinstance(own, torch.optim.LBFGS):
        raise ConfigurationError(
            f"trajectory_log cannot replay the optimizer {home}: use one of torch.optim (not "
            "LBFGS) or transformers' Adafactor, such as optim='adamw_torch'."
        )
    groups = [
        [names[id(p)] for p in group["params"] if id(p) in names] for group in own.param_groups
    ]
    return {"class": home, "defaults": _plain(own.defaults), "groups": groups}


def arguments(optimizer: Optimizer) -> list[State]:
    """Return the arguments of each group as numbers and words, the learning rate among them."""
    return [
        _plain({k: v for k, v in group.items() if k != "params"})
        for group in bare(optimizer).param_groups
    ]


def build(
    said: State,
    groups: Sequence[State],
    parameters: Mapping[str, nn.Parameter],
) -> Optimizer:
    """Return an optimizer as `describe` found it, with the arguments of each group, for the
    parameters by name.
    """
    home, _, name = said["class"].rpartition(".")
    if not said["class"].startswith(_HOMES):
        raise ConfigurationError(
            f"The log's optimizer {said['class']} is not one that can be replayed."
        )
    kind = getattr(import_module(home), name)
    known = inspect.signature(kind).parameters
    options = {key: value for key, value in restored(said["defaults"]).items() if key in known}
    own = [
        {**restored(group), "params": [parameters[key] for key in keys]}
        for group, keys in zip(groups, said["groups"], strict=True)
    ]
    return kind(own, **options)


def restored(values: State) -> State:
    """Return arguments as the optimizer had them: JSON knows no tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def _plain(values: State) -> State:
    """Return arguments as JSON keeps them."""

    def one(value: Any) -> Any:
        if torch.is_tensor(value) or hasattr(value, "item"):
            return value.item()
        return [one(part) for part in value] if isinstance(value, (list, tuple)) else value

    return {name: one(value) for name, value in values.items()}
