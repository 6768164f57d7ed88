"""Callbacks that report on a run: its costs, a progress bar of rows, and pictures at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_in_notebook

from ..base.memory import peak_memory
from .figures import draw_pictures
from .ledger import Ledger

logger = logging.getLogger(__name__)


class RunCosts(TrainerCallback):
    """Measures the cost of the current run, and keeps that of the last one.

    Args:
        ledger: returns the ledger of the run.

    Examples:
        >>> sorted(RunCosts(Ledger).so_far())
        ['check_rows', 'peak_memory', 'rows', 'seconds', 'tokens']
    """

    def __init__(self, ledger: Callable[[], Ledger]) -> None:
        self.ledger = ledger
        self._finished: dict[str, float] = {}

    def so_far(self) -> dict[str, float]:
        """Return rows, check rows, tokens, seconds and peak bytes of the last or the current run.

        The peak is that of the GPU if there is one, else of the process; it is absent if the system
        does not report it.
        """
        return self._finished or self._measure()

    def _measure(self) -> dict[str, float]:
        ledger, peak = self.ledger(), peak_memory()
        costs = {
            "rows": ledger.all_rows,
            "check_rows": ledger.all_rows - ledger.rows,
            "tokens": ledger.tokens,
            "seconds": ledger.seconds,
        }
        return costs if peak is None else {**costs, "peak_memory": peak}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Forget the last run."""
        self._finished = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Keep the costs of the run."""
        self._finished = self._measure()


class RowProgress(ProgressCallback):
    """The stock progress bar, in rows: with rows per second and the time left.

    The total is the rows used so far plus the average of a step for each step left, or the budget
    if that is less.

    Args:
        ledger: returns the ledger of the run.
        most: the budget of rows, None for no limit.
    """

    def __init__(self, ledger: Callable[[], Ledger], most: int | None = None) -> None:
        super().__init__()
        self.ledger, self.most = ledger, most

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Open the bar, at the rows that a resumed run has used."""
        self.most = getattr(args, "max_queries", None)
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                initial=self.ledger().all_rows,
                total=self.most,
                unit=" rows",
                unit_scale=True,
                dynamic_ncols=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Move the bar by the rows of the step."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.total = self.expected(state.global_step, state.max_steps)
            self.training_bar.set_postfix_str(
                f"step {state.global_step}/{state.max_steps}", refresh=False
            )
            self.training_bar.update(self.ledger().all_rows - self.training_bar.n)

    def expected(self, step: int, steps: int) -> int:
        """Return the rows of the whole run, as expected after `step` of `steps`."""
        ledger = self.ledger()
        rows = ledger.all_rows + round(ledger.rows / max(step, 1) * max(steps - step, 0))
        return rows if self.most is None else min(rows, self.most)


class LossWatch(TrainerCallback):
    """Says once that the loss explodes, with the learning rate that it does so at."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Forget the last run."""
        self._first, self._said = None, False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Compare the loss with the first one."""
        loss = (logs or {}).get("loss")
        if loss is None or self._said:
            return
        if self._first is None:
            self._first = loss
        # a metric is negative, and one batch differs from another
        elif self._first > 0 and loss > 3 * self._first and loss > self._first + 1:
            self._said = True
            logger.warning(
                "The loss has risen from %.3g to %.3g with learning_rate=%g: try a tenth of that "
                "rate.",
                self._first,
                loss,
                args.learning_rate,
            )


class Pictures(TrainerCallback):
    """Draws the run into its output folder when it ends, and shows the pictures in a notebook,
    unless `pictures=False`.

    Args:
        ledger: returns the ledger of the run.
    """

    def __init__(self, ledger: Callable[[], Ledger]) -> None:
        self.ledger = ledger

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Draw the pictures; an error in one must not cost the trained adapter."""
        if not (getattr(args, "pictures", True) and state.is_world_process_zero):
            return
        try:
            names = draw_pictures(str(args.output_dir), state.log_history, self.ledger())
            if names and is_in_notebook():
                from .notebook import show

                for name in names:
                    show(Path(str(args.output_dir), name))
        except ImportError as error:
            logger.info("No pictures of the run: %s", error)
        except Exception as error:
            logger.warning(
                "The pictures of the run could not be drawn (%s: %s).", type(error).__name__, error
            )


def add_reports(trainer: Trainer, ledger: Callable[[], Ledger]) -> RunCosts:
    """Add the callbacks to a trainer, a progress bar of rows among them; return the costs.

    Args:
        trainer: the trainer.
        ledger: returns the ledger of the run.
    """
    costs = RunCosts(ledger)
    trainer.add_callback(costs)
    trainer.add_callback(Pictures(ledger))
    trainer.add_callback(LossWatch())
    for callback in list(trainer.callback_handler.callbacks):
        name = type(callback).__name__  # that of notebooks is there in notebooks only
        if type(callback) is ProgressCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(RowProgress(ledger))
        elif name == "NotebookProgressCallback":
            from .notebook import NotebookRows

            trainer.remove_callback(callback)
            trainer.add_callback(NotebookRows(RowProgress(ledger)))
    return costs
