"""What happens to the losses of query rows until they are coefficients of noise: a chain of small
transforms.

    losses (S, R) -> finite difference -> residual of the control variate -> leave-one-out
                  -> deltas (R,)

The first is one-sided or antithetic (`estimators/differences.py`), the others are there where they
reduce the variance. None of them changes the mean of an estimate: whatever is subtracted from
deltas is independent of their rows' noise, or its exact mean is added back (`DeltaTransform.mean`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.rows import Rows
from ..perturbations import Perturbation
from ..perturbations.base import DrawnNoise
from .control_variate import ControlVariate, Prediction
from .differences import Estimator, against_others


@dataclass(frozen=True)
class Evaluation:
    """What a chunk of R rows shows under its noise.

    Attributes:
        rows: the rows.
        noise: as the perturbation drew it.
        losses: (S, R) at each of the estimator's S signs.
        elements: (R,) float32, loss elements.
        logits: S times (R, K), or None where the objective shows none.
        columns: tokens of a row; 1 if unknown.
    """

    rows: Rows
    noise: DrawnNoise
    losses: Tensor
    elements: Tensor
    logits: tuple[Tensor | None, ...]
    columns: int


@dataclass(frozen=True)
class ChunkDeltas:
    """What the chain has made of a chunk of R rows so far.

    Attributes:
        values: (R,) deltas; before the finite difference (S, R) losses.
        errors: (R, M) further coefficients of the same noise: `learn` gets the sum of the rows'
            noise by them.
        sums: what else `learn` gets.
    """

    values: Tensor
    errors: Tensor | None = None
    sums: Tensor | None = None


class DeltaTransform:
    """An element of the chain; a subclass overrides what it does, all else changes nothing."""

    def of_chunk(self, deltas: ChunkDeltas, seen: Evaluation) -> ChunkDeltas:
        """Transform the deltas of a chunk, before they are multiplied by its noise."""
        del seen
        return deltas

    def of_round(self, deltas: Tensor, rows: Rows) -> Tensor:
        """Transform the deltas (R,) of all rows of a round of queries, in all processes alike."""
        del rows
        return deltas

    def update(self, deltas: ChunkDeltas, innovation: Tensor | None) -> None:
        """Learn from a chunk whose deltas have been used; innovation: (M, d), its noise summed by
        `errors`.
        """

    def mean(self, weights: Tensor) -> Tensor | None:
        """Return (k,), the mean of what was subtracted, by the first k perturbed numbers; None for
        0.

        Args:
            weights: (B,) what the rows of each sample weigh in the estimate.
        """
        del weights
        return None

    def statistics(self) -> list[Tensor]:
        """Return what was learned, to be summed over processes and batches."""
        return []

    def finish(self, statistics: Iterator[Tensor]) -> None:
        """Take as many sums off the iterator as `statistics` returns, to be used from the next step
        on.
        """


class FiniteDifference(DeltaTransform):
    """From losses at each sign to directional derivatives: the first of a chain.

    Args:
        estimator: one-sided or antithetic.
        clean: (B,) unperturbed losses, on the CPU; None where the estimator needs none.
        scale: the step of the difference, epsilon.
    """

    def __init__(self, estimator: Estimator, clean: Tensor | None, scale: float) -> None:
        self.estimator, self.clean, self.scale = estimator, clean, scale

    def of_chunk(self, deltas: ChunkDeltas, seen: Evaluation) -> ChunkDeltas:
        """See `DeltaTransform`."""
        clean = None if self.clean is None else self.clean[seen.rows.owner]
        return replace(
            deltas, values=self.estimator.deltas(deltas.values, clean, self.scale).float()
        )


class Residual(DeltaTransform):
    """What a control variate, fitted on past steps, leaves of the deltas; its exact mean is added
    back.

    Args:
        control: takes in what the step's rows teach.
        prediction: of the rows' deltas.
        perturbation: unpacks noise.
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

    def of_chunk(self, deltas: ChunkDeltas, seen: Evaluation) -> ChunkDeltas:
        """See `DeltaTransform`."""
        if any(part is None for part in seen.logits):
            return deltas
        owner, noise = seen.rows.owner, self.perturbation.row_noise(seen.noise)
        logits = torch.stack([part.cpu().float() for part in seen.logits])  # type: ignore[union-attr]
        changes = self.estimator.deltas(logits, self.prediction.logits[owner], self.scale)
        return ChunkDeltas(*self.prediction.remainder(noise, owner, deltas.values, changes))  # type: ignore[arg-type]

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
    """Measures deltas against the other queries of their sample: see `against_others`.

    Args:
        samples: B.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def of_round(self, deltas: Tensor, rows: Rows) -> Tensor:
        """See `DeltaTransform`."""
        return against_others(deltas, rows, self.samples)


class Chain(DeltaTransform):
    """Several transforms, one after the other."""

    def __init__(self, transforms: Sequence[DeltaTransform]) -> None:
        self.transforms = list(transforms)

    def of_chunk(self, deltas: ChunkDeltas, seen: Evaluation) -> ChunkDeltas:
        """See `DeltaTransform`."""
        for transform in self.transforms:
            deltas = transform.of_chunk(deltas, seen)
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
        """Return what each transform's `mean` is, those of 0 left out."""
        means = (transform.mean(weights) for transform in self.transforms)
        return [mean for mean in means if mean is not None]

    def statistics(self) -> list[Tensor]:
        """See `DeltaTransform`."""
        return [found for transform in self.transforms for found in transform.statistics()]

    def finish(self, statistics: Iterator[Tensor]) -> None:
        """See `DeltaTransform`."""
        for transform in self.transforms:
            transform.finish(statistics)
