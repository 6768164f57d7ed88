"""A chain of small transforms from the losses of query rows to deltas, the coefficients of noise.

    losses (S, R) -> finite difference -> residual of the control variate -> leave-one-out
                  -> deltas (R,)

The first is one-sided or antithetic (`estimators/differences.py`); the others are used if they
reduce the variance. None of them changes the mean of an estimate: what is subtracted from a delta
is independent of its row's noise, or its exact mean is added back (`DeltaTransform.mean`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.rows import Rows
from ..base.transfer import onto
from ..perturbations import Perturbation
from ..perturbations.base import DrawnNoise
from .control_variate import ControlVariate
from .differences import Estimator, against_others
from .prediction import Prediction


@dataclass(frozen=True)
class Evaluation:
    """Results of a chunk of R rows under its noise.

    Attributes:
        rows: the rows.
        noise: as the perturbation drew it.
        losses: (S, R) at each of the estimator's S signs.
        elements: (R,) float32, loss elements.
        logits: S times (R, K), or None if the objective returns none.
        columns: tokens per row; 1 if unknown.
    """

    rows: Rows
    noise: DrawnNoise
    losses: Tensor
    elements: Tensor
    logits: tuple[Tensor | None, ...]
    columns: int


@dataclass(frozen=True)
class ChunkDeltas:
    """Deltas of a chunk of R rows between two transforms.

    Attributes:
        values: (R,) deltas; before the finite difference (S, R) losses.
        errors: (R, M) further coefficients of the same noise; `update` gets the resulting sums.
        sums: further statistics for `update`.
    """

    values: Tensor
    errors: Tensor | None = None
    sums: Tensor | None = None


class DeltaTransform:
    """An element of the chain; by default every method leaves its argument unchanged."""

    def of_chunk(self, deltas: ChunkDeltas, evaluation: Evaluation) -> ChunkDeltas:
        """Transform the deltas of a chunk, before they are multiplied by its noise."""
        del evaluation
        return deltas

    def of_round(self, deltas: Tensor, rows: Rows) -> Tensor:
        """Transform the deltas (R,) of all rows of a round; all processes get the same."""
        del rows
        return deltas

    def update(self, deltas: ChunkDeltas, innovation: Tensor | None) -> None:
        """Update statistics with a finished chunk; innovation: (M, d), its noise summed with the
        coefficients `errors`.
        """

    def mean(self, weights: Tensor) -> Tensor | None:
        """Return the mean (k,) of what was subtracted, for the first k numbers of the gradient;
        None for 0.

        Args:
            weights: (B,) total weight of each sample's rows in the estimate.
        """
        del weights
        return None

    def statistics(self) -> list[Tensor]:
        """Return statistics, which are summed over processes and batches."""
        return []

    def finish(self, statistics: Iterator[Tensor]) -> None:
        """Take as many sums from the iterator as `statistics` returns; they are used from the next
        step on.
        """


class FiniteDifference(DeltaTransform):
    """From losses at each sign to directional derivatives: the first of a chain.

    Args:
        estimator: one-sided or antithetic.
        clean: (B,) clean losses; None if the estimator needs none.
        scale: the step of the difference, epsilon.
    """

    def __init__(self, estimator: Estimator, clean: Tensor | None, scale: float) -> None:
        self.estimator, self.clean, self.scale = estimator, clean, scale

    def of_chunk(self, deltas: ChunkDeltas, evaluation: Evaluation) -> ChunkDeltas:
        """See `DeltaTransform`."""
        clean, device = self.clean, deltas.values.device
        if clean is not None:
            clean = onto(clean, device)[onto(evaluation.rows.owner, device)]
        return replace(
            deltas, values=self.estimator.deltas(deltas.values, clean, self.scale).float()
        )


class Residual(DeltaTransform):
    """Subtracts a control variate, fitted on past steps, from the deltas; its exact mean is added
    back.

    Args:
        control: is updated with the step's statistics.
        prediction: of the rows' deltas.
        perturbation: unpacks the noise.
        estimator: the finite difference.
        scale: its step, epsilon.
    """

    def __init__(
        self,
        control: ControlVariate,
        prediction: Prediction,
        perturbation: Perturbation,
        estimator: Estimator,
        scale: float,
    ) -> None:
        self.control, self.prediction, self.perturbation = control, prediction, perturbation
        self.estimator, self.scale = estimator, scale

    def of_chunk(self, deltas: ChunkDeltas, evaluation: Evaluation) -> ChunkDeltas:
        """See `DeltaTransform`."""
        device = self.perturbation.vector.device
        known = [onto(part, device).float() for part in evaluation.logits if part is not None]
        if len(known) < len(evaluation.logits):
            return deltas
        owner = onto(evaluation.rows.owner, device)
        noise = self.perturbation.row_noise(evaluation.noise)
        logits = torch.stack(known)
        changes = self.estimator.deltas(logits, self.prediction.logits[owner], self.scale)
        rows = noise, owner, onto(deltas.values, device), changes
        values, errors, sums = self.prediction.remainder(*rows)  # type: ignore[arg-type]
        return ChunkDeltas(values, errors, sums)

    def update(self, deltas: ChunkDeltas, innovation: Tensor | None) -> None:
        """See `DeltaTransform`."""
        if innovation is not None and deltas.errors is not None and deltas.sums is not None:
            self.prediction.add(innovation, deltas.errors, deltas.sums)

    def mean(self, weights: Tensor) -> Tensor:
        """See `DeltaTransform`."""
        return self.prediction.baseline(weights)

    def statistics(self) -> list[Tensor]:
        """See `DeltaTransform`."""
        return list(self.prediction.statistics())

    def finish(self, statistics: Iterator[Tensor]) -> None:
        """See `DeltaTransform`."""
        self.control.finish(next(statistics), next(statistics))


class LeaveOneOut(DeltaTransform):
    """Subtracts the mean of the sample's other deltas: see `against_others`.

    Args:
        samples: B.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def of_round(self, deltas: Tensor, rows: Rows) -> Tensor:
        """See `DeltaTransform`."""
        return against_others(deltas, rows, self.samples)


class Chain(DeltaTransform):
    """Several transforms in sequence."""

    def __init__(self, transforms: Sequence[DeltaTransform]) -> None:
        self.transforms = list(transforms)

    def of_chunk(self, deltas: ChunkDeltas, evaluation: Evaluation) -> ChunkDeltas:
        """See `DeltaTransform`."""
        for transform in self.transforms:
            deltas = transform.of_chunk(deltas, evaluation)
        return deltas

    def of_round(self, deltas: Tensor, rows: Rows) -> Tensor:
        """See `DeltaTransform`."""
        for transform in self.transforms:
            deltas = transform.of_round(deltas, rows)
        return deltas

    def update(self, deltas: ChunkDeltas, innovation: Tensor | None) -> None:
        """See `DeltaTransform`."""
        for transform in self.transforms:
            transform.update(deltas, innovation)

    def means(self, weights: Tensor) -> list[Tensor]:
        """Return the transforms' means without those that are 0."""
        means = (transform.mean(weights) for transform in self.transforms)
        return [mean for mean in means if mean is not None]

    def statistics(self) -> list[Tensor]:
        """See `DeltaTransform`."""
        return [sums for transform in self.transforms for sums in transform.statistics()]

    def finish(self, statistics: Iterator[Tensor]) -> None:
        """See `DeltaTransform`."""
        for transform in self.transforms:
            transform.finish(statistics)
