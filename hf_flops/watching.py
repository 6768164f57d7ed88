"""The callbacks that say what a run does while it trains: costs, a progress bar of rows, pictures
at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import ProgressCallback

from .costs import RunCosts
from .ledger import Ledger
from .pictures import Pictures
from .progress import RowProgress


def add_reports(trainer: Any, ledger: Callable[[], Ledger]) -> RunCosts:
    """Add the callbacks to a trainer; its stock progress bar, if there is one, gives way to one of
    rows.

    Args:
        trainer: the trainer.
        ledger: returns the ledger of the run.

    Returns:
        What tells what the last run cost, or this one so far.
    """
    costs = RunCosts(ledger)
    trainer.add_callback(costs)
    trainer.add_callback(Pictures(ledger))
    stock = [
        callback
        for callback in trainer.callback_handler.callbacks
        if type(callback) is ProgressCallback
    ]
    if stock:
        trainer.remove_callback(stock[0])
        trainer.add_callback(RowProgress(ledger, trainer.args.max_queries))
    return costs
