"""A progress bar that counts rows through the model, since steps may differ in what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from .ledger import Ledger


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
