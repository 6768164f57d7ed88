"""The average number of queries per sample: the one with the most progress per row."""

from __future__ import annotations

import math

from ..base.state import State, number, whole
from ..core.method import Method, StepResult

MOST = 64  # rows per sample
_KEPT = 0.95  # weight of past steps, from one step to the next


class AutoQueries:
    """Chooses `queries_per_sample` from the signal and the noise of past steps.

    With S the squared norm of the gradient and V / q the variance of an estimate from q queries per
    sample, the best step along it improves the loss by `S^2 / (2 L (S + V / q))`. It costs c clean
    rows and s rows for each query. Improvement per row is largest at `q = sqrt(c V / (s S))`: few
    queries while the signal is clear, more as it fades.

    S is that of all trained parameters, a closed-form head included: while the head learns most,
    queries are few.

    Args:
        rows: rows per sample of the first step.
    """

    def __init__(self, rows: int = 4) -> None:
        self.rows = self._next = rows
        self._signal = self._variance = 0.0
        self._step = -1

    def at(self, step: int) -> int:
        """Return rows per sample for an optimizer step: the same for all of its batches."""
        if step != self._step:
            self.rows, self._step = self._next, step
        return self.rows

    def update(self, result: StepResult, method: Method) -> None:
        """Learn from a finished batch."""
        clean, signs = int(method.needs_clean), len(method.estimator.signs)
        queries = float(result.counts.double().mean())
        signal = result.metrics["gradient_signal"] + result.metrics["head_signal"]
        self._signal = _KEPT * self._signal + signal
        self._variance = _KEPT * self._variance + result.metrics["gradient_variance"] * queries
        wanted = 1.0
        if clean:
            wanted = (
                math.sqrt(self._variance / (signs * self._signal)) if self._signal > 0 else MOST
            )
        # At most twice as many as before, because single steps say little.
        wanted = min(max(round(wanted), 1), 2 * max(1, (self.rows - clean) // signs))
        self._next = max(clean + signs, min(clean + signs * wanted, MOST))

    def state_dict(self) -> State:
        """Return what a resume needs, as JSON-serialisable values."""
        return {"rows": self._next, "signal": self._signal, "variance": self._variance}

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self._next, self._variance = whole(state["rows"], 1, MOST), number(state["variance"])
        self._signal = number(state["signal"])
        self._step = -1
