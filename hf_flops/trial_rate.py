"""The learning rate that a short trial suggests: searches along its way that look at many
samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from .autotune.line_search import MOST, Found, thorough_search
from .perturbations import ParameterVector
from .trainer.learning_rate_search import RateSearch

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
