"""What a run cost: rows, tokens, seconds and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from .base.memory import peak_memory
from .ledger import Ledger


class RunCosts(TrainerCallback):
    """Keeps what the last run cost, as it stood when the run ended.

    Args:
        ledger: returns the ledger of the run.
    """

    def __init__(self, ledger: Callable[[], Ledger]) -> None:
        self.ledger = ledger
        self._finished: dict[str, float] = {}

    def so_far(self) -> dict[str, float]:
        """Return rows, check rows, tokens, seconds and peak bytes of the process, of the last run
        or of this one so far.

        The peak is that of the GPU where there is one; it is absent where the system does not tell.
        """
        return self._finished or self._measure()

    def _measure(self) -> dict[str, float]:
        ledger, peak = self.ledger(), peak_memory()
        found = {
            "rows": ledger.all_rows,
            "check_rows": ledger.all_rows - ledger.rows,
            "tokens": ledger.tokens,
        }
        return {
            **found,
            "seconds": ledger.seconds,
            **({} if peak is None else {"peak_memory": peak}),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the run before."""
        self._finished = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the run cost."""
        self._finished = self._measure()
