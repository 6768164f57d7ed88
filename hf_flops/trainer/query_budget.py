"""A budget of queries: training stops cleanly before the step that would exceed it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sized

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..errors import ConfigurationError
from ..reporting.ledger import Ledger

logger = logging.getLogger(__name__)


class QueryBudget(TrainerCallback):
    """Stops training before its rows, those of the checks included, exceed `max_queries`.

    It plans `queries_per_sample` rows for each sample of a batch. It does not foresee rows that run
    again because a loss was not finite, which only noise on outputs needs.

    Args:
        most: returns the limit on the rows of the run, None for no limit.
        queries: returns the rows per sample of an optimizer step.
        ledger: returns the ledger of the run.
        samples: returns the samples of an optimizer step.

    Attributes:
        stopped: says when the run was stopped, if it was.
    """

    def __init__(
        self,
        most: Callable[[], int | None],
        queries: Callable[[int], int],
        ledger: Callable[[], Ledger],
        samples: Callable[[], int],
    ) -> None:
        self.most, self.queries, self.ledger, self.samples = most, queries, ledger, samples
        self._refused = False
        self.stopped = ""

    @property
    def left(self) -> float:
        """Rows left."""
        most = self.most()
        return math.inf if most is None else most - self.ledger().all_rows

    def allows(self, samples: int, step: int) -> bool:
        """Return whether a batch fits; if not, the rest of its step is refused, and training stops.

        Args:
            samples: B.
            step: optimizer steps done.

        Raises:
            ConfigurationError: the checks of the first batch left too few rows for a step.
        """
        need = samples * self.queries(step)
        self._refused = self._refused or need > self.left
        if self._refused and step == 0:
            raise ConfigurationError(
                f"max_queries={self.most()} leaves {self.left} rows after the checks of the first "
                f"batch, but a batch takes {need}: raise max_queries, or lower queries_per_sample "
                "or the batch size."
            )
        return not self._refused

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: object = None,
        **kwargs: object,
    ) -> None:
        """Refuse a run that could not take one step."""
        need = self._step(state.global_step, train_dataloader)
        used = self.ledger().all_rows
        self._refused = False
        self.stopped = ""
        if need > self.left:
            spent = f", of which the checkpoint's run has used {used}," if used else ""
            raise ConfigurationError(
                f"max_queries={self.most()}{spent} is less than one step of {need} rows needs: "
                "raise max_queries, or lower queries_per_sample or the batch size."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: object = None,
        **kwargs: object,
    ) -> None:
        """Stop, and save as at the end of training, if the next step would not fit."""
        if not self._refused and self._step(state.global_step, train_dataloader) <= self.left:
            return
        if state.global_step < state.max_steps:
            self.stopped = f"stopped by max_queries={self.most():,} after {_done(args, state)}"
            logger.warning("Training is %s.", self.stopped)
        control.should_training_stop = control.should_log = True
        if args.save_strategy == SaveStrategy.STEPS:
            control.should_save = True

    def _step(self, step: int, loader: object) -> int:
        """Return the rows of a whole optimizer step; 0 without a limit."""
        if self.most() is None:
            return 0
        samples = self.samples()
        data = getattr(loader, "dataset", None)
        if isinstance(data, Sized):
            samples = min(samples, len(data))
        return samples * self.queries(step)


def _done(args: TrainingArguments, state: TrainerState) -> str:
    """Return how much of a run is done, in the unit that its length was given in."""
    if args.max_steps > 0:
        return f"{state.global_step:,} of {args.max_steps:,} steps"
    return f"{state.epoch or 0:.1f} of {args.num_train_epochs:g} epochs"
