"""Records optimizers that can be replayed, and builds them again.

A log may come from a stranger, so that what it names is looked up among these and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ..base.state import State
from ..errors import ConfigurationError, TrajectoryError

_NAMES = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam"]
_NAMES += ["RAdam", "RMSprop", "Rprop", "SGD"]


@cache
def kinds() -> dict[str, type[Optimizer]]:
    """Return the optimizers that can be replayed, by module and name."""
    from transformers.optimization import Adafactor

    known = [getattr(torch.optim, name) for name in _NAMES if hasattr(torch.optim, name)]
    return {_home(kind): kind for kind in (*known, Adafactor)}


def _home(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def bare(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside Accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def describe(optimizer: Optimizer, names: Mapping[int, str]) -> State:
    """Return the class of an optimizer, its defaults, and the names of each group's tensors.

    Args:
        optimizer: of the trainer.
        names: of the trainable parameters, by id.

    Raises:
        ConfigurationError: its steps cannot be replayed, because they need other code or a closure.
    """
    optimizer = bare(optimizer)
    home = _home(type(optimizer))
    if home not in kinds():
        raise ConfigurationError(
            f"trajectory_log cannot replay the optimizer {home}: use one of torch.optim "
            f"({', '.join(_NAMES)}) or transformers' Adafactor, such as optim='adamw_torch'."
        )
    groups = [
        [names[id(p)] for p in group["params"] if id(p) in names]
        for group in optimizer.param_groups
    ]
    return {"class": home, "defaults": _plain(optimizer.defaults), "groups": groups}


def arguments(optimizer: Optimizer) -> list[State]:
    """Return the arguments of each group, such as the learning rate, as plain values."""
    return [
        _plain({k: v for k, v in group.items() if k != "params"})
        for group in bare(optimizer).param_groups
    ]


def build(
    description: State,
    groups: Sequence[State],
    parameters: Mapping[str, nn.Parameter],
) -> Optimizer:
    """Return an optimizer from `describe`, the groups' arguments, and parameters by name.

    Raises:
        TrajectoryError: it is none of those that can be replayed.
    """
    kind = kinds().get(description["class"])
    if kind is None:
        raise TrajectoryError(
            f"The log's optimizer {description['class']!r:.80} is none that can be replayed."
        )
    known = inspect.signature(kind).parameters
    options = {
        key: value for key, value in restored(description["defaults"]).items() if key in known
    }
    filled = [
        {**restored(group), "params": [parameters[key] for key in keys]}
        for group, keys in zip(groups, description["groups"], strict=True)
    ]
    return kind(filled, **options)


def restored(values: State) -> State:
    """Return arguments with lists as tuples again, which JSON does not have."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def _plain(values: State) -> State:
    """Return arguments with plain numbers in place of tensors."""
    return tree_map(lambda value: value.item() if hasattr(value, "item") else value, values)
