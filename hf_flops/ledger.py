"""The ledger of a run: every row that went through the model, who got queries, and what the log says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .method import StepResult


class Ledger:
    """Counts rows and queries, and averages the metrics of steps between two logs.

    Attributes:
        rows: rows that went through the model in training so far, clean ones included.
        sample_queries: sample id → [steps that the sample took part in, queries that it got], for samples that have an id.
        last_step: what the last batch found.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.sample_queries: dict[int, list[int]] = {}
        self.last_step: StepResult | None = None
        self._window: dict[str, list[float]] = {}

    def record(self, result: StepResult, ids: Sequence[int] | None = None) -> None:
        """Enter a finished batch; ids: (B,) of its samples, if they have any."""
        self.last_step = result
        self.rows += result.rows
        if ids is not None and len(ids) == len(result.counts):
            for sample, count in zip(ids, result.counts.tolist(), strict=True):
                seen = self.sample_queries.setdefault(sample, [0, 0])
                seen[0], seen[1] = seen[0] + 1, seen[1] + count
        for name, value in result.metrics.items():
            self._window.setdefault(name, []).append(value)

    def summary(self) -> dict[str, float]:
        """Average what was recorded since the last call; a ratio is taken between averages, as single steps are noisy."""
        if not self._window:
            return {}
        mean = {name: sum(values) / len(values) for name, values in self._window.items()}
        signal, variance = mean.pop("gradient_signal"), mean.pop("gradient_variance")
        sample_signal, _ = mean.pop("sample_signal"), mean.pop("head_signal")
        summary = {
            **mean,
            "dropped_rows": sum(self._window["dropped_rows"]),
            "signal_to_noise": max(signal, 0.0) / variance if variance > 0 else 0.0,
        }
        if signal > 0:
            # mean(||g_i||)^2 / B over ||g||^2: below 1, noise per row with the best counts beats shared noise.
            summary["noise_ratio"] = sample_signal / signal
        self._window = {}
        return {**{name: round(value, 6) for name, value in summary.items()}, "rows": self.rows}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as JSON-serialisable values."""
        return {"rows": self.rows, "samples": [[sample, *seen] for sample, seen in self.sample_queries.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        self.rows = state["rows"]
        self.sample_queries = {sample: [steps, queries] for sample, steps, queries in state["samples"]}
