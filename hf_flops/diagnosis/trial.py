"""A short run on a copy of a model, and the learning rate that suits it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Subset

from ..autotune.epsilon import Calibration, calibrate
from ..autotune.line_search import MOST, MOST_LOOKS, Found, thorough_search
from ..autotune.protocol import Batch, GradientSession, seed_of
from ..autotune.queries_per_sample import AutoQueries
from ..base.memory import PeakMemory
from ..perturbations import ParameterVector
from ..trainer import FlopsTrainer
from ..trainer.learning_rate_search import Agree, RateSearch
from ..trainer.step import batch_of
from .clock import Clock

COST = 2_500  # rows that the measurement of epsilon takes
JUDGES, PER_STEP = 256, 8  # most samples of a search, in all and for each step of the trial
LONGEST = 4  # how many times as long as planned a trial may be


class Trial(FlopsTrainer):
    """Measures its steps.

    Attributes:
        auto: chooses queries per sample from the steps.
        speeds: rows per second of each step.
        signals: squared norm and variance of each step's gradient.
        megabytes: peak memory of the last step.
    """

    def __init__(self, *args: Any, clock: Clock | None = None, **kwargs: Any) -> None:
        self.clock = clock or Clock()
        self.auto = AutoQueries()
        self.speeds: list[float] = []
        self.signals: list[tuple[float, float]] = []
        self.megabytes = math.nan
        super().__init__(*args, **kwargs)

    def _new_search(self) -> PlannedSearch:
        search = PlannedSearch(self.args.max_steps // LONGEST, seed_of(self.args))
        samples = some_of(self.train_dataset, min(JUDGES, PER_STEP * search.steps))
        search.judges = [
            batch_of(self, self.model, self._prepare_inputs(inputs))
            for inputs in self.get_test_dataloader(samples)
        ]
        return search

    @property
    def search(self) -> PlannedSearch:
        """The search for a learning rate."""
        assert isinstance(self.rate_search, PlannedSearch)
        return self.rate_search

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step and time it; measure the memory of the step after the searches, the last."""
        rows, start = self.ledger.all_rows, time.perf_counter()
        search, step = self.search, self.state.global_step
        searched = search.searched
        self.clock.show(step, f"{search.searches} searches")
        if searched is not None and self.state.global_step > searched:
            self.control.should_training_stop = True
            with PeakMemory(self.args.device) as memory:
                loss = super().training_step(*args, **kwargs)
            self.megabytes = memory.megabytes
        else:
            loss = super().training_step(*args, **kwargs)
            seconds = time.perf_counter() - start
            self.speeds.append((self.ledger.all_rows - rows) / seconds)
            self._keep_time(seconds)
        result, method = self.ledger.last_step, self.session.method
        if result is not None and method is not None and "gradient_signal" in result.metrics:
            self.auto.at(self.state.global_step)
            self.auto.update(result, method)
            metrics = result.metrics
            self.signals.append((metrics["gradient_signal"], metrics["gradient_variance"]))
        return loss

    def _keep_time(self, seconds: float) -> None:
        """Plan the rest of the trial for the time that is left, and end it when there is none.

        Args:
            seconds: that the last step took.
        """
        left, search = self.clock.left, self.search
        if left <= 0:
            self.control.should_training_stop = True
        elif left < math.inf and len(self.speeds) == 2 and search.searches == 0:
            # half of the time for steps, half for searches; the first step had the checks
            search.plan(min(search.steps, max(2, int(left / 2 / seconds))))
            looks = 3 * MOST_LOOKS * sum(judge.samples for judge in search.judges)
            share = left / 2 * self.speeds[-1] / max(looks, 1)
            search.judges = search.judges[: max(1, int(share * len(search.judges)))]
        search.affordable = left * self.speeds[-1]


class PlannedSearch(RateSearch):
    """Thorough searches after two quarters and the rest of a trial, and then epsilon.

    If the last of them is not clear, the trial continues until one is, up to four times as long.

    Args:
        steps: of the trial.
        seed: of the noise that measures epsilon.

    Attributes:
        steps: of the trial.
        searches: done so far.
        settled: whether the trial may end.
        affordable: rows that there is time for; epsilon is not measured where that is too few.
        searched: optimizer steps before the measurement of epsilon, once it is done.
        calibration: epsilon.
    """

    _line = staticmethod(thorough_search)

    def __init__(self, steps: int, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.plan(steps)
        self.searches, self.settled = 0, False
        self.affordable = math.inf
        self.searched: int | None = None
        self.calibration = Calibration(None, 0.0, 0)

    def plan(self, steps: int) -> None:
        """Plan the windows of a trial of so many steps, before its first search."""
        self.steps = steps
        quarter = steps // 4
        windows = (quarter, quarter, steps - 2 * quarter, steps, 2 * steps)
        self._windows = list(filter(None, windows))
        self.window = self._windows[0]

    def step(self, session: GradientSession, batch: Batch, *args: Any, **kwargs: Any) -> int:
        """Search as `RateSearch` does, and measure epsilon after the last search."""
        rows = super().step(session, batch, *args, **kwargs)
        if self.searched is None and self.settled and session.method is not None:
            if self.affordable > COST:
                self.calibration = calibrate(batch.forward, batch.inputs, session.method, self.seed)
            self.searched = batch.step
        return rows

    def search(
        self,
        losses: Callable[[], Tensor],
        vector: ParameterVector,
        optimizer: Optimizer,
        agree: Agree,
    ) -> Found:
        """Search as `RateSearch` does, and decide whether the trial may end."""
        self.searches += 1
        result = super().search(losses, vector, optimizer, agree)
        left = len(self._windows) - self.searches
        self.settled = left <= 0 or (left <= 2 and result.clear)
        return result

    def _bounds(self) -> tuple[float, float]:
        return 1 / 8, MOST

    def begin(self, vector: ParameterVector, optimizer: Optimizer) -> None:
        """Begin a window of the plan."""
        super().begin(vector, optimizer)
        self.window = self._windows[min(self.searches, len(self._windows) - 1)]


def some_of(dataset: Any, most: int) -> Any:
    """Return at most so many samples, drawn at random without the global generators."""
    if not isinstance(dataset, Sized):
        return list(islice(dataset, most))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, order[:most].tolist())  # type: ignore[arg-type]
