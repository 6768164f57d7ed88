"""A budget of queries: training stops, as if it had been told to, before the step that would not
fit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..errors import ConfigurationError
from ..reporting.ledger import Ledger

logger = logging.getLogger(__name__)


class QueryBudget(TrainerCallback):
    """Stops training before the ledger would hold more rows than `max_queries`, checks included.

    A batch is planned with `queries_per_sample` rows for each sample. Rows that run again because a
    loss was not finite, which only noise on outputs needs, are not foreseen.

    Args:
        most: returns the rows that may go through the model in all, None for no limit.
        queries: returns the rows per sample of an optimizer step.
        ledger: returns the ledger of the run.
    """

    def __init__(
        self,
        most: Callable[[], int | None],
        queries: Callable[[int], int],
        ledger: Callable[[], Ledger],
    ) -> None:
        self.most, self.queries, self.ledger = most, queries, ledger
        self._refused = False

    @property
    def left(self) -> float:
        """Rows that may still go through the model."""
        most = self.most()
        return math.inf if most is None else most - self.ledger().all_rows

    def allows(self, samples: int, step: int) -> bool:
        """Return whether a batch fits; if not, training stops at the end of its step, and nothing
        more of that fits.

        Args:
            samples: B.
            step: optimizer steps done.

        Raises:
            ConfigurationError: nothing was learned yet, because what checks the first batch left
                too little.
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a run that could not take one step."""
        need, used = (
            self._step(args, state.global_step, kwargs.get("train_dataloader")),
            self.ledger().all_rows,
        )
        self._refused = False
        if need > self.left:
            spent = f", of which the checkpoint's run has used {used}," if used else ""
            raise ConfigurationError(
                f"max_queries={self.most()}{spent} is less than one step of {need} rows needs: "
                "raise max_queries, or lower queries_per_sample or the batch size."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, and save as at the end of training, where the next step would not fit."""
        if (
            not self._refused
            and self._step(args, state.global_step, kwargs.get("train_dataloader")) <= self.left
        ):
            return
        logger.info(
            "Training stops at step %d: %d rows are left of max_queries=%d.",
            state.global_step,
            self.left,
            self.most(),
        )
        control.should_training_stop = control.should_log = True
        if args.save_strategy == SaveStrategy.STEPS:
            control.should_save = True

    def _step(self, args: Any, step: int, loader: Any) -> int:
        """Return the rows that a whole optimizer step takes; 0 where there is no limit."""
        if self.most() is None:
            return 0
        samples = args.train_batch_size * args.gradient_accumulation_steps
        data = getattr(loader, "dataset", None)
        if data is not None and hasattr(data, "__len__"):
            samples = min(samples, len(data))
        return samples * self.queries(step)
