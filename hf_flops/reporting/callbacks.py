"""What a trainer says of itself while it runs: numbers for the log, a progress bar, costs, pictures
at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..base.memory import peak_memory
from .figures import draw_pictures
from .ledger import Ledger

logger = logging.getLogger(__name__)


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


class RowProgress(ProgressCallback):
    """The stock progress bar, counting rows, with rows per second and the time that is left.

    The rows of the whole run are those used so far, and for each step that is left the average of a
    step; or the budget, where that is less.

    Args:
        ledger: returns the ledger of the run.
        most: the budget of rows, None for no limit.
    """

    def __init__(self, ledger: Callable[[], Ledger], most: int | None = None) -> None:
        super().__init__()
        self.ledger, self.most = ledger, most

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, where a resumed run goes on."""
        self.most = args.max_queries
        if state.is_world_process_zero:
            done = self.ledger().all_rows
            self.training_bar = tqdm(
                initial=done, total=self.most, unit=" rows", unit_scale=True, dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar by the rows of the step."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.total = self.expected(state.global_step, state.max_steps)
            self.training_bar.set_postfix_str(
                f"step {state.global_step}/{state.max_steps}", refresh=False
            )
            self.training_bar.update(self.ledger().all_rows - self.training_bar.n)

    def expected(self, step: int, steps: int) -> int:
        """Return the rows that the whole run will have taken, as far as `step` of `steps` tell."""
        ledger = self.ledger()
        rows = ledger.all_rows + round(ledger.rows / max(step, 1) * max(steps - step, 0))
        return rows if self.most is None else min(rows, self.most)


class Pictures(TrainerCallback):
    """Draws the run into its output folder when it ends, unless `pictures=False`.

    Args:
        ledger: returns the ledger of the run.
    """

    def __init__(self, ledger: Callable[[], Ledger]) -> None:
        self.ledger = ledger

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw what there is to draw; a picture that fails must not cost a trained adapter."""
        if not (args.pictures and state.is_world_process_zero):
            return
        try:
            draw_pictures(args.output_dir, state.log_history, self.ledger())
        except ImportError as error:
            logger.info("No pictures of the run: %s", error)
        except Exception as error:
            logger.warning(
                "The pictures of the run could not be drawn (%s: %s).", type(error).__name__, error
            )


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
