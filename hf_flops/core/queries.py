"""Runs query rows through the model: draws their noise and evaluates their losses under it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.padding import TrimmedBatch
from ..base.rows import BatchPosition, Rows
from ..base.transfer import onto
from ..distributed.noise_sum import NoiseSum
from ..estimators.delta_chain import Evaluation
from ..objectives import RowLosses
from ..perturbations import NoiseKeys
from ..perturbations.base import DrawnNoise
from ..reuse import Recording
from .chunking import ChunkPlanner, Work, in_chunks
from .method import Method


@dataclass(frozen=True)
class QueryResults:
    """Results of the R query rows of all processes.

    Attributes:
        rows: the rows.
        measured: (R,) the deltas with which their noise has been summed.
        deltas: (R,) the final deltas, now that those of all rows are known.
        told: (R, 2) losses and loss elements, or (R, 0) if the clean forward has them.
        mine: (R,) whether this process ran them.
    """

    rows: Rows
    measured: Tensor
    deltas: Tensor
    told: Tensor
    mine: Tensor

    def then(self, other: QueryResults) -> QueryResults:
        """Return these results followed by those of another round."""
        names = ("measured", "deltas", "told", "mine")
        joined = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names}
        return QueryResults(rows=self.rows.then(other.rows), **joined)

    def counts(self, samples: int) -> Tensor:
        """Return (B,) int64, queries per sample."""
        return torch.bincount(self.rows.owner, minlength=samples)

    def losses(self, samples: int) -> Tensor:
        """Return (B,) float64, the summed losses of each sample's rows."""
        return torch.zeros(samples, dtype=torch.float64).index_add_(
            0, self.rows.owner, self.told[:, 0].double()
        )

    def elements(self, samples: int) -> Tensor:
        """Return (B,) float32, the loss elements of each sample."""
        return torch.zeros(samples).index_put_((self.rows.owner,), self.told[:, 1])


@dataclass(frozen=True)
class Queries:
    """Runs query rows through the model.

    Attributes:
        recording: runs the model, by the method's reuse plan.
        method: how the gradient is estimated.
        place: position of the batch in the run.
        feed: the batch.
        samples: B.
    """

    recording: Recording
    method: Method
    place: BatchPosition
    feed: TrimmedBatch
    samples: int

    def in_chunks(self, rows: Rows, work: Work, planner: ChunkPlanner) -> None:
        """Process rows chunk by chunk."""
        per_row, shares_noise = self.method.objective.per_row, self.method.perturbation.shares_noise
        in_chunks(
            rows.stretches(within_groups=shares_noise) if per_row else [1] * len(rows),
            work,
            planner,
        )

    def noise(self, chunk: Rows) -> DrawnNoise:
        """Draw the noise of a chunk."""
        seed, step, positions = self.place.seed, self.place.step, chunk.owner + self.place.position
        keys = NoiseKeys.of(seed, step, positions, chunk.query, int(chunk.group[0]))
        return self.method.perturbation.draw(keys)

    def evaluate(self, chunk: Rows, noise: DrawnNoise) -> Evaluation:
        """Run a chunk at every sign of the estimator."""
        method = self.method
        owner = chunk.owner if method.objective.per_row else torch.arange(self.samples)
        unread = self.recording.unread_inputs
        inputs, columns, cut = (
            self.feed.of(owner, unread) if method.objective.per_row else (self.feed.whole, 1, None)
        )
        forward = self.recording.rows(inputs, owner, cut)
        found: list[RowLosses] = []
        for sign in method.estimator.signs:
            with method.perturbation.applied(noise, sign * method.scale):
                found.append(method.objective(forward, inputs))
        losses = torch.stack([part.sums for part in found])
        logits = tuple(part.logits for part in found)
        return Evaluation(chunk, noise, losses, found[0].counts.float(), logits, columns)

    def sum_again(
        self, rows: Rows, coefficients: Tensor, sums: NoiseSum, planner: ChunkPlanner
    ) -> int:
        """Add the noise of rows to a sum again, with coefficients (R,); return the number of rows
        that were run again.
        """
        perturbation, replayed = self.method.perturbation, []
        coefficients = onto(coefficients, perturbation.vector.device)

        def work(part: slice) -> int:
            chunk = rows[part]
            noise = self.noise(chunk)
            if perturbation.replays:
                self.evaluate(chunk, noise)
                replayed.append(len(chunk))
            sums.add(
                chunk, coefficients[part], perturbation.weighted_noise(noise, coefficients[part])
            )
            return 1

        self.in_chunks(rows, work, planner)
        return sum(replayed)
