"""A copy of a model for a trial, and a process that the trial does not change."""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..trainer.preparation import wrap_with_adapter

if TYPE_CHECKING:
    from peft import PeftConfig


def copied(model: nn.Module, peft_config: PeftConfig | None = None) -> nn.Module:
    """Return a copy of a model that shares the frozen tensors and has trained ones of its own."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.data, p.requires_grad) if type(p) is nn.Parameter else p
        for p in model.parameters()
    }
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
def listening() -> Iterator[list[logging.LogRecord]]:
    """Yield a list that collects the library's warnings, which other handlers do not see."""
    logger, handler = logging.getLogger("hf_flops"), BufferingHandler(capacity=sys.maxsize)
    handler.setLevel(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
