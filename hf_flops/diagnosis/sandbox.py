"""A copy of a model for a trial, and a process that the trial does not change."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..trainer.preparation import wrap_with_adapter

if TYPE_CHECKING:
    from peft import PeftConfig


def copied(model: nn.Module, peft_config: PeftConfig | None = None) -> nn.Module:
    """Return a copy of a model that shares the frozen tensors and has trained ones of its own."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = (
            nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
        )
    copied_model = copy.deepcopy(model, memo)
    if peft_config is not None:
        copied_model = wrap_with_adapter(copied_model, copy.deepcopy(peft_config))
    for parameter in copied_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    return copied_model


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators after the context: the stock trainer seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def listening() -> Iterator[list[str]]:
    """Yield a list that collects the library's warnings, which other handlers do not see."""
    warnings: list[str] = []
    logger = logging.getLogger("hf_flops")
    handler, propagate = logging.Handler(logging.WARNING), logger.propagate
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield warnings
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
