"""What a run finds out about itself with its first batches, and keeps: rows per forward and padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .chunks import ChunkPlanner
from .objectives import Forward
from .selfcheck import padding_is_idle
from .step import Method


class Tuning:
    """Completes the method of each step with what was found out so far.

    Args:
        rows: rows per forward pass, or None to find out.
        memory: bytes that a forward pass may take on top of the model, or None for most of what is free.
    """

    def __init__(self, rows: int | None = None, memory: float | None = None) -> None:
        self.planner = ChunkPlanner(rows, memory)
        self.idle: dict[str, bool] = {}  # side → whether the loss is the same without its padding, once that is known

    @classmethod
    def of(cls, args: Any) -> Tuning:
        """Start from a run's arguments."""
        memory = None if args.memory_limit_gb is None else args.memory_limit_gb * 1e9
        return cls(None if args.rows_per_forward == "auto" else args.rows_per_forward, memory)

    def complete(self, method: Method, forward: Forward, inputs: Mapping[str, Any], precision: float) -> Method:
        """Return the method with all that is known; runs the model on a single sample where that tells something new."""
        vector, grouped = method.perturbation.vector, method.perturbation.grouped
        self.planner.prepare(vector.device, 0 if grouped else 4 * vector.size)
        if method.objective.per_row:
            self.idle.update(padding_is_idle(method.objective, forward, inputs, precision, known=set(self.idle)))
        sides = frozenset(side for side, idle in self.idle.items() if idle)
        return replace(method, rows_per_forward=self.planner, trimmed=sides)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as JSON-serialisable values."""
        return {"chunks": self.planner.state_dict(), "padding": self.idle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        self.planner.load_state_dict(state["chunks"])
        self.idle = dict(state["padding"])
