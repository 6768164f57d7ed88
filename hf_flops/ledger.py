"""The ledger of a run: every row that went through the model, who got queries, and what the log says of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .method import StepResult
from .objectives import Forward
from .rows import batch_size


def columns(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens each row of a batch has, padding included; 0 where it is not text."""
    for name in ("input_ids", "inputs_embeds"):
        value = inputs.get(name)
        if torch.is_tensor(value) and value.dim() > 1:
            return value.shape[1]
    return 0


class Ledger:
    """Counts rows and queries, and averages the metrics of steps between two logs.

    Attributes:
        rows: rows that went through the model for estimates so far, clean ones and the calibration of epsilon included.
        all_rows: rows that the model was asked for in training, those of the checks with the first batch included.
        tokens: tokens of all these rows, padding included, as if every row ran whole.
        sample_queries: sample id → [steps that the sample took part in, queries that it got], for samples that have an id.
        last_step: what the last batch found.
    """

    def __init__(self) -> None:
        self.rows = self.all_rows = self.tokens = 0
        self.sample_queries: dict[int, list[int]] = {}
        self.last_step: StepResult | None = None
        self._window: dict[str, list[float]] = {}
        self._began = time.monotonic()  # earlier by what a run took before it was resumed

    @property
    def seconds(self) -> float:
        """Seconds since the run began, evaluations included."""
        return round(time.monotonic() - self._began, 3)

    def metered(self, forward: Forward) -> Forward:
        """Return a function that runs the model and counts what it was asked for."""

        def run(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
            answer = forward(inputs)
            rows = batch_size(inputs)
            self.all_rows, self.tokens = self.all_rows + rows, self.tokens + rows * columns(inputs)
            return answer

        return run

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
        counts = {"rows": self.rows, "check_rows": self.all_rows - self.rows, "tokens": self.tokens}
        return {**{name: round(value, 6) for name, value in summary.items()}, **counts, "seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as JSON-serialisable values."""
        counts = {"rows": self.rows, "all_rows": self.all_rows, "tokens": self.tokens, "seconds": self.seconds}
        return {**counts, "samples": [[sample, *seen] for sample, seen in self.sample_queries.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        self.rows, self.all_rows, self.tokens = state["rows"], state["all_rows"], state["tokens"]
        self._began = time.monotonic() - state.get("seconds", 0.0)
        self.sample_queries = {sample: [steps, queries] for sample, steps, queries in state["samples"]}
