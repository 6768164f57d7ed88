"""Metrics that a trainer gathers while it computes a loss: those of one forward per batch count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch


class GatheredMetrics:
    """Keeps the numbers among a trainer's attributes as the first forward of a batch left them.

    A step computes the loss many times, with perturbed parameters and for single rows.

    Args:
        trainer: whose `compute_loss` may write into its attributes.
    """

    def __init__(self, trainer: object) -> None:
        self.trainer, self._waits = trainer, False
        self._start: dict[str, Any] = {}
        self._first: dict[str, Any] | None = None

    @contextmanager
    def of_one_forward(self) -> Iterator[None]:
        """Leave behind the numbers of the first forward after `begin`."""
        self._start, self._first, self._waits = self._numbers(), None, False
        try:
            yield
        finally:
            self._waits = False
            self._restore(self._start if self._first is None else self._first)

    def begin(self) -> None:
        """Forget the forwards so far, which were checks."""
        self._restore(self._start)
        self._waits = True

    def forward_ended(self) -> None:
        """Keep the numbers, if this was the first forward."""
        if self._waits:
            self._first, self._waits = self._numbers(), False

    def _numbers(self) -> dict[str, Any]:
        found = {}
        for name, value in vars(self.trainer).items():
            if isinstance(value, (int, float, dict)) and "dataset" not in name:
                try:
                    found[name] = _copied(value)
                except TypeError:
                    continue  # it holds other things than numbers
        return found

    def _restore(self, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            setattr(self.trainer, name, _copied(value))


def _copied(value: object) -> Any:
    """Return a copy of nested containers of numbers.

    Raises:
        TypeError: they hold something else.
    """
    if isinstance(value, (int, float, str, type(None))):
        return value
    if isinstance(value, list):
        return [_copied(each) for each in value]
    if isinstance(value, dict):
        found = copy(value)
        found.update({name: _copied(each) for name, each in value.items()})
        return found
    if torch.is_tensor(value) and value.numel() == 1:
        return value.clone()
    raise TypeError(type(value).__name__)
