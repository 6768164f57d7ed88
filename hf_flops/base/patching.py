"""Contexts that replace a method of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

from torch import nn

Call = Callable[..., Any]


@contextmanager
def replaced_method(module: nn.Module, name: str, method: Call) -> Iterator[None]:
    """Replace a method of this instance inside the context."""
    before = module.__dict__.get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


def replaced_forward(
    module: nn.Module, make: Callable[[Call], Call]
) -> AbstractContextManager[None]:
    """Return a context in which `module.forward` is `make(module.forward)`, with its signature."""
    return replaced_method(module, "forward", wraps(module.forward)(make(module.forward)))
