"""The contrastive loss of kept batches as a function of the projections' weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimators import ClosedFormHead
from ..estimators.feature_solver import PRIOR
from .loss import ContrastiveBatch
from .similarity import Terms


@dataclass(frozen=True)
class Group:
    """Batches of the same shape.

    Attributes:
        terms: (n, C, B) the loss of their similarities.
        inputs: by side, (n, S, H) float64 of the projection; embeddings of a side without one.
    """

    terms: Terms
    inputs: Mapping[str, Tensor]


class ProjectionLoss:
    """Sum of a contrastive loss over groups of batches, with a Gaussian prior on the weights.

    A vector u (P,) stands for the weights `prior + u / sqrt(precision)` of all projections. The
    precision is `PRIOR` for a change of the similarities, to first order:
    `PRIOR * scale^2 * mean ||x||^2 / mean ||embedding||^2`, x the inputs, both before training.

    Args:
        heads: the projections, by side.
        prior: their weights (D, H) before training, by side.
        groups: the batches.
        scale: factor of the cosines.
        bias: added to the scaled cosines.
    """

    def __init__(
        self,
        heads: Mapping[str, ClosedFormHead],
        prior: Mapping[str, Tensor],
        groups: Sequence[Group],
        scale: float,
        bias: float,
    ) -> None:
        self.prior, self.groups, self.scale, self.bias = prior, groups, scale, bias
        self._designs = [
            {side: head.design(group.inputs[side]) for side, head in heads.items()}
            for group in groups
        ]
        self._lengths = {side: self._length(side) for side in heads}

    def _length(self, side: str) -> float:
        """Return the square root of the precision of a side's weights."""
        inputs = embeddings = 0.0
        for designs in self._designs:
            design, fixed = designs[side]
            inputs += float(design.square().sum())
            embeddings += float((design @ self.prior[side].T + fixed).square().sum())
        return float(self.scale * (PRIOR * inputs / embeddings) ** 0.5)

    def vector(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the vector u (P,) of weights (D, H) by side."""
        parts = [
            (weights[side] - self.prior[side]) * length for side, length in self._lengths.items()
        ]
        return torch.cat([part.flatten() for part in parts])

    def weights(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the weights (D, H) by side of a vector u (P,)."""
        parts = vector.split([self.prior[side].numel() for side in self._lengths])
        return {
            side: self.prior[side] + part.view_as(self.prior[side]) / length
            for part, (side, length) in zip(parts, self._lengths.items(), strict=True)
        }

    def batches(self, vector: Tensor) -> list[ContrastiveBatch]:
        """Return the losses of the groups under a vector u (P,)."""
        weights, found = self.weights(vector), []
        for group, designs in zip(self.groups, self._designs, strict=True):
            embeddings = dict(group.inputs)
            for side, (design, fixed) in designs.items():
                embeddings[side] = design @ weights[side].T + fixed
            both = embeddings["text"], embeddings["image"]
            found.append(ContrastiveBatch(*both, group.terms, self.scale, self.bias))
        return found

    def evaluate(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss with the prior's term, and its gradient (P,)."""
        objective = vector.square().sum() / 2
        parts = {side: torch.zeros_like(self.prior[side]) for side in self._lengths}
        for batch, designs in zip(self.batches(vector), self._designs, strict=True):
            objective = objective + batch.loss
            for side, (design, _) in designs.items():
                slopes = batch.by_embedding(side)
                parts[side] += slopes.flatten(0, 1).T @ design.flatten(0, 1)
        by_weights = [parts[side].flatten() / length for side, length in self._lengths.items()]
        return objective, vector + torch.cat(by_weights)
