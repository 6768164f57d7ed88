"""What a notebook shows of a run: a bar of rows, and its pictures. Import it in a notebook only."""

from __future__ import annotations

from pathlib import Path

from IPython.display import Image, display
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback

from .callbacks import RowProgress


class NotebookRows(NotebookProgressCallback):
    """The stock bar of a notebook with its table of metrics, in rows.

    Args:
        rows: counts them.
    """

    def __init__(self, rows: RowProgress) -> None:
        super().__init__()
        self.rows = rows

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Open the bar."""
        self.rows.most = getattr(args, "max_queries", None)
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Move the bar by the rows of the step."""
        self._show(state, at_once=self._force_next_update)
        self._force_next_update = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Leave the bar where training ended."""
        self._show(state, at_once=True)
        self.training_tracker = None

    def _show(self, state: TrainerState, *, at_once: bool) -> None:
        step = f"rows, step {state.global_step}/{state.max_steps}"
        bar = self.training_tracker
        assert bar is not None
        bar.total = self.rows.expected(state.global_step, state.max_steps)
        bar.update(self.rows.ledger().all_rows, comment=step, force_update=at_once)


def show(path: Path) -> None:
    """Show a picture below the cell."""
    display(Image(filename=str(path)))
