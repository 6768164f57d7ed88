"""A copy of a model to try something on, and a process that is the same after it."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..trainer.preparation import wrap_with_adapter


def copied(model: nn.Module, peft_config: Any = None) -> nn.Module:
    """Return a model that shares storage with another where it is frozen, and has trained tensors
    of its own.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = (
            nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
        )
    own = copy.deepcopy(model, memo)
    if peft_config is not None:
        own = wrap_with_adapter(own, copy.deepcopy(peft_config))
    for parameter in own.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    return own


@contextmanager
def generators_kept() -> Iterator[None]:
    """Bring the global generators back, which the stock trainer seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def listening() -> Iterator[list[str]]:
    """Hear what the library says, in place of who listens otherwise."""
    said: list[str] = []
    own = logging.getLogger("hf_flops")
    handler, propagated = logging.Handler(logging.WARNING), own.propagate
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    own.addHandler(handler)
    own.propagate = False
    try:
        yield said
    finally:
        own.removeHandler(handler)
        own.propagate = propagated
