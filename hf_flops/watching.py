"""What a trainer says of itself while it runs: numbers for the log, a progress bar, its costs, pictures at the end."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ProgressCallback

from .costs import RunCosts
from .ledger import Ledger
from .pictures import Pictures
from .progress import RowProgress


class Watched:
    """Callbacks and log entries of forward-only training; put in front of a trainer class.

    Attributes:
        costs: what the last run cost, or this one so far.
    """

    costs: RunCosts

    def _watch(self: Any) -> None:
        """Add the callbacks; the stock progress bar, if there is one, gives way to one of rows."""

        def ledger() -> Ledger:
            return self.ledger

        self.costs = RunCosts(ledger)
        self.add_callback(self.costs)
        self.add_callback(Pictures(ledger))
        stock = [callback for callback in self.callback_handler.callbacks if type(callback) is ProgressCallback]
        if stock:
            self.remove_callback(stock[0])
            self.add_callback(RowProgress(ledger, self.args.max_queries))

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the stock trainer does, with epsilon beside the loss."""
        scale = self._tuning.scale
        if "loss" in logs and scale is not None:
            logs = {**logs, "perturbation_scale": scale}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
