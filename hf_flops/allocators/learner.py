"""Learning between optimizer steps, never inside one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from torch import Tensor

from ..base.state import State
from .base import SampleFeatures


class Learner(ABC):
    """The part of an allocator that learns from finished optimizer steps.

    Micro-batches of one optimizer step may share their noise, so what one of them showed must not
    decide the counts of the next: updates wait until another step begins.
    """

    needs_clean = True
    weighted = True
    shuffled = False

    def __init__(self) -> None:
        self._waiting: list[tuple[SampleFeatures, Tensor, Tensor]] = []

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        self._learn_up_to(features.step)
        return self._counts(features, budget)

    def update(self, features: SampleFeatures, counts: Tensor, mean_squares: Tensor) -> None:
        """See `Allocator.update`; it takes effect when the next optimizer step begins."""
        self._learn_up_to(features.step)
        self._waiting.append((features, counts, mean_squares))

    def state_dict(self) -> State:
        """See `Allocator.state_dict`; to be called between optimizer steps."""
        self._learn_up_to(None)
        return self._state()

    def load_state_dict(self, state: State) -> None:
        """See `Allocator.load_state_dict`."""
        self._waiting = []
        self._load(state)

    def _learn_up_to(self, step: int | None) -> None:
        """Learn from what waits, unless it belongs to `step`."""
        if self._waiting and self._waiting[0][0].step != step:
            waiting, self._waiting = self._waiting, []
            for features, counts, mean_squares in waiting:
                squares = mean_squares.detach().cpu().double()
                known = squares.isfinite()  # a sample without a finite row says nothing
                if int(known.sum()) > 1 and float(squares[known].sum()) > 0:
                    self._learn(_chosen(features, known), counts[known].long(), squares[known])

    @abstractmethod
    def _counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """Return (B,) int64 from the clean forward and what has been learned."""

    @abstractmethod
    def _learn(self, features: SampleFeatures, counts: Tensor, squares: Tensor) -> None:
        """Learn from a step of B > 1 samples; squares: (B,) float64 mean squared deltas, finite,
        not all 0.
        """

    @abstractmethod
    def _state(self) -> State:
        """Return what `_load` needs, JSON-serialisable."""

    @abstractmethod
    def _load(self, state: State) -> None:
        """Take up a state."""


def _chosen(features: SampleFeatures, mask: Tensor) -> SampleFeatures:
    """Return the features of some samples; mask: (B,) bool."""
    if bool(mask.all()):
        return features
    ids = (
        None
        if features.ids is None
        else tuple(i for i, kept in zip(features.ids, mask.tolist(), strict=True) if kept)
    )
    losses, residuals, lengths = (
        None if values is None else values.cpu()[mask]
        for values in (features.losses, features.residuals, features.lengths)
    )
    assert losses is not None
    return replace(features, losses=losses, residuals=residuals, lengths=lengths, ids=ids)
