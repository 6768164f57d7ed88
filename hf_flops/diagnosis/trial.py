"""A short run on a copy, its samples, and the learning rate that it finds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..autotune.epsilon import Calibration, calibrate
from ..autotune.line_search import MOST, Found, thorough_search
from ..autotune.protocol import Batch
from ..autotune.queries_per_sample import AutoQueries
from ..base.memory import PeakMemory
from ..perturbations import ParameterVector
from ..trainer import FlopsTrainer
from ..trainer.learning_rate_search import RateSearch


class Trial(FlopsTrainer):
    """Takes down what steps take and find."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.auto, self.speeds, self.found = (
            AutoQueries(),
            list[float](),
            list[tuple[float, float]](),
        )
        self.megabytes = math.nan
        # steps that searches looked at, once these are over; the next one ends the trial
        self.searched: int | None = None
        self.calibration = Calibration(None, 0.0, 0)
        super().__init__(*args, **kwargs)

    def _new_search(self) -> PlannedSearch:
        search = PlannedSearch(self.args.max_steps // LONGEST)
        loader = self.get_test_dataloader(
            some_of(self.train_dataset, min(JUDGES, PER_STEP * search.steps))
        )
        search.judges = [self._batch(self.model, self._prepare_inputs(inputs)) for inputs in loader]
        return search

    def _search_rate(self, batch: Batch) -> None:
        super()._search_rate(batch)
        assert isinstance(self._rate, PlannedSearch)
        if self.searched is None and self._rate.settled and self.session.method is not None:
            self.calibration = calibrate(
                batch.forward, batch.inputs, self.session.method, self._seed
            )
            self.searched = self.state.global_step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take a step with a clock beside it, the last one with an eye on memory."""
        before, start = self.ledger.all_rows, time.perf_counter()
        if self.searched is not None and self.state.global_step > self.searched:
            self.control.should_training_stop = True
            with PeakMemory(self.args.device) as memory:
                loss = super().training_step(*args, **kwargs)
            self.megabytes = memory.megabytes
        else:
            loss = super().training_step(*args, **kwargs)
            self.speeds.append((self.ledger.all_rows - before) / (time.perf_counter() - start))
        result, method = self.ledger.last_step, self.session.method
        if result is not None and method is not None and "gradient_signal" in result.metrics:
            self.auto.at(self.state.global_step)
            self.auto.update(result, method)
            self.found.append(
                (result.metrics["gradient_signal"], result.metrics["gradient_variance"])
            )
        return loss


JUDGES, PER_STEP = 256, 8  # samples that a search looks at at most, and for each step of the trial
LONGEST = 4  # how many times as long a trial may be


class PlannedSearch(RateSearch):
    """Thorough searches after a quarter, another quarter and the rest of a trial's steps.

    If the last of them is not clear, the trial is to go on until one is, up to four times as long.

    Args:
        steps: of the trial.

    Attributes:
        steps: of the trial.
        settled: whether the trial may end.
    """

    _line = staticmethod(thorough_search)

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, quarter = steps, steps // 4
        self._windows = [
            window for window in (quarter, quarter, steps - 2 * quarter, steps, 2 * steps) if window
        ]
        self._searches, self.settled = 0, False

    def search(
        self, losses: Callable[[], Tensor], vector: ParameterVector, optimizer: Any, agree: Any
    ) -> Found:
        """Search as `RateSearch` does, and know what is left to do."""
        self._searches += 1
        found, left = (
            super().search(losses, vector, optimizer, agree),
            len(self._windows) - self._searches,
        )
        self.settled = left <= 0 or (left <= 2 and found.clear)
        return found

    def _bounds(self) -> tuple[float, float]:
        return 1 / 8, MOST

    def _begin(self, vector: ParameterVector, optimizer: Any) -> None:
        super()._begin(vector, optimizer)
        self.window = self._windows[min(self._searches, len(self._windows) - 1)]


def some_of(dataset: Any, most: int) -> Any:
    """Return so many samples of a dataset at most, drawn at random where it has a length; global
    generators stay.
    """
    if not isinstance(dataset, Sized):
        return list(islice(dataset, most))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, order[:most].tolist())  # type: ignore[arg-type]
