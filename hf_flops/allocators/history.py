"""Each sample's deviation from the regression in past visits, by sample id."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.state import State, number, whole

_KEPT = 0.8  # decay of a sample's history at each visit, because training changes sigma
_MOST = 2**17  # samples in memory; the least recently visited are removed first
_PAIRS = 20.0  # prior pairs of visits, with zero agreement


class History:
    """Each sample's deviation from the regression, shrunk by how much visits of the same sample
    agree.

    A deviation is `effect_i + transient`; the effect, of variance V, is the same in all visits. The
    transient parts and the observation noise of two visits are independent, so the product of their
    deviations estimates V. After visits of total precision P and precision-weighted sum S, the
    effect has the posterior mean `S V / (1 + P V)` and the variance `V / (1 + P V)`: a new sample
    has mean 0 and all of V.
    """

    def __init__(self) -> None:
        # id: (P, S); ordered, as a plain dict looks for its oldest key behind all removed ones
        self._past: OrderedDict[int, tuple[float, float]] = OrderedDict()
        self._agreement, self._pairs = 0.0, _PAIRS

    @property
    def shared(self) -> float:
        """V, the variance of the samples' persistent effects."""
        return max(self._agreement / self._pairs, 0.0)

    def effects(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return posterior means and variances (B,) float64 of the samples' effects."""
        precision, weighted = torch.tensor(
            [self._past.get(i, (0.0, 0.0)) for i in ids], dtype=torch.float64
        ).T
        shrinkage = self.shared / (1 + precision * self.shared)
        return weighted * shrinkage, shrinkage

    def update(
        self, ids: Sequence[int], errors: Tensor, variance: Tensor, spread: float, decay: float
    ) -> None:
        """Learn from a step.

        Args:
            ids: (B,) of the samples.
            errors: (B,) float64, deviations from the regression.
            variance: (B,) float64, of the noise in the observations.
            spread: variance of log sigma around the regression, both parts together.
            decay: of the past agreement, per step.
        """
        transient = max(spread - self.shared, 0.01)
        self._agreement, self._pairs = decay * self._agreement, decay * self._pairs
        weights = (1 / (transient + variance)).tolist()
        for sample, error, weight in zip(ids, errors.tolist(), weights, strict=True):
            precision, weighted = self._past.pop(sample, (0.0, 0.0))
            if precision > 0:
                self._agreement += error * weighted / precision
                self._pairs += 1
            self._past[sample] = (_KEPT * precision + weight, _KEPT * weighted + weight * error)
        while len(self._past) > _MOST:
            self._past.popitem(last=False)

    def state_dict(self) -> State:
        """Return the history, oldest first, as JSON-serialisable values."""
        past = [[sample, *entry] for sample, entry in self._past.items()]
        return {"past": past, "agreement": self._agreement, "pairs": self._pairs}

    def load_state_dict(self, state: State) -> None:
        """Load a state from `state_dict`."""
        self._past = OrderedDict(
            (whole(sample, -(2**63)), (number(precision, 0), number(weighted)))
            for sample, precision, weighted in state["past"]
        )
        self._agreement, self._pairs = number(state["agreement"]), number(state["pairs"], 1e-300)
