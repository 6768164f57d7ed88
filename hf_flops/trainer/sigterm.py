"""A run that saves and ends on SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("hf_flops.trainer")


class SaveOnSigterm(TrainerCallback):
    """Saves and ends the run on SIGTERM, after the current optimizer step, in all processes.

    Attributes:
        asked: whether this process got SIGTERM.
        agreed: whether all processes know that one of them did.
        left: whether the run has saved and ends.
    """

    asked = agreed = left = False
    alone = True

    @contextmanager
    def listening(self, *, alone: bool) -> Iterator[None]:
        """Handle SIGTERM inside the context.

        Args:
            alone: whether this is the only process.

        Raises:
            SystemExit: the run has saved; the status is that of a program that SIGTERM ended.
        """
        self.asked = self.agreed = self.left = False
        self.alone = alone
        if threading.current_thread() is not threading.main_thread():  # others get no signals
            yield
            return
        before = signal.signal(signal.SIGTERM, self._heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.left:
            raise SystemExit(128 + signal.SIGTERM)

    def _heard(self, *_: object) -> None:
        self.asked = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Save and stop, if all processes know of the signal."""
        if self.asked if self.alone else self.agreed:
            logger.warning("SIGTERM: the run saves at step %d and ends.", state.global_step)
            self.left = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Neither save nor evaluate again in a run that ends."""
        if self.left:
            control.should_save = control.should_evaluate = False
