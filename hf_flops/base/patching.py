"""A context that replaces a module's `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

Call = Callable[..., Any]


@contextmanager
def replaced_forward(module: nn.Module, make: Callable[[Call], Call]) -> Iterator[None]:
    """Replace `module.forward` of this instance by `make(module.forward)` inside the context."""
    before, original = module.__dict__.get("forward"), module.forward
    # callers that inspect the signature get the original one
    module.forward = wraps(original)(make(original))
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
