"""Allocators that learn between optimizer steps, never within one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from torch import Tensor

from ..base.state import State
from .base import SampleFeatures


class Learner(ABC):
    """The part of an allocator that learns from finished optimizer steps.

    Micro-batches of one optimizer step may share their noise, so the results of one must not
    influence the counts of the next: updates are pending until the next step begins.
    """

    needs_clean = True
    weighted = True
    shuffled = False

    def __init__(self) -> None:
        self._pending: list[tuple[SampleFeatures, Tensor, Tensor]] = []

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """See `Allocator.counts`."""
        self._learn_up_to(features.step)
        return self._counts(features, budget)

    def update(self, features: SampleFeatures, counts: Tensor, mean_squares: Tensor) -> None:
        """See `Allocator.update`; it takes effect when the next optimizer step begins."""
        self._learn_up_to(features.step)
        self._pending.append((features, counts, mean_squares))

    def state_dict(self) -> State:
        """See `Allocator.state_dict`; to be called between optimizer steps."""
        self._learn_up_to(None)
        return self._state()

    def load_state_dict(self, state: State) -> None:
        """See `Allocator.load_state_dict`."""
        self._pending = []
        self._load(state)

    def _learn_up_to(self, step: int | None) -> None:
        """Learn from the pending updates, unless they belong to `step`."""
        if self._pending and self._pending[0][0].step != step:
            pending, self._pending = self._pending, []
            for features, counts, mean_squares in pending:
                self._learn_features(features)
                squares = mean_squares.detach().cpu().double()
                known = squares.isfinite() & (counts > 0)
                if int(known.sum()) > 1 and float(squares[known].sum()) > 0:
                    self._learn(_chosen(features, known), counts[known].long(), squares[known])

    def _learn_features(self, features: SampleFeatures) -> None:  # noqa: B027
        """Learn from the clean forward of a finished batch, before `_learn`; by default nothing."""

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
        """Load a state."""


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
