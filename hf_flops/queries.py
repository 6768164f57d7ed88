"""The queries of a step, a chunk at a time: the noise of rows, what they lose under it, and what that says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chunks import ChunkPlanner, Work, in_chunks
from .control_variates import Prediction
from .method import Method
from .objectives import Forward, RowLosses
from .padding import Feed
from .perturbations import NoiseKeys
from .rows import Place, Rows


class Queries:
    """Runs query rows through the model.

    Args:
        forward: runs the model.
        method: how the gradient is estimated.
        place: where the batch lies in the run.
        feed: the batch.
        samples: B.
        clean: what the clean forward of the batch found, if it was run.

    Attributes:
        prediction: of the rows' deltas, if there is one.
    """

    prediction: Prediction | None = None

    def __init__(
        self, forward: Forward, method: Method, place: Place, feed: Feed, samples: int, clean: RowLosses | None
    ) -> None:
        self.forward, self.method, self.place, self.feed = forward, method, place, feed
        self.samples, self.clean = samples, clean

    def in_chunks(self, rows: Rows, work: Work, planner: ChunkPlanner) -> None:
        """Do the work of rows, a chunk at a time."""
        per_row, grouped = self.method.objective.per_row, self.method.perturbation.grouped
        in_chunks(rows.stretches(within_groups=grouped) if per_row else [1] * len(rows), work, planner)

    def noise(self, chunk: Rows) -> Any:
        """Draw the noise of a chunk."""
        seed, step, positions = self.place.seed, self.place.step, chunk.owner + self.place.position
        keys = NoiseKeys.of(seed, step, positions, chunk.query, int(chunk.group[0]))
        return self.method.perturbation.draw(keys)

    def evaluate(self, chunk: Rows, noise: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
        """Run a chunk at every sign.

        Returns:
            Deltas (R,), losses (S, R), loss elements (R,), changes of logits (R, K), and the columns of a row.
        """
        method = self.method
        owner = chunk.owner if method.objective.per_row else torch.arange(self.samples)
        unread = method.reuse.unread if method.reuse.complete else ()
        inputs, columns, cut = self.feed.of(owner, unread) if method.objective.per_row else (self.feed.whole, 1, None)
        forward = method.reuse.through(self.forward, inputs, owner, cut)
        found: list[RowLosses] = []
        for sign in method.estimator.signs:
            with method.perturbation.applied(noise, sign * method.scale):
                found.append(method.objective(forward, inputs))
        losses, clean = torch.stack([part.sums.cpu() for part in found]), self.clean
        deltas = method.estimator.deltas(losses, None if clean is None else clean.sums.cpu()[chunk.owner], method.scale)
        changes = None
        if self.prediction is not None and all(part.logits is not None for part in found):
            logits = torch.stack([part.logits.cpu().float() for part in found])  # type: ignore[union-attr]
            changes = method.estimator.deltas(logits, self.prediction.logits[chunk.owner], method.scale)
        return deltas.float(), losses, found[0].counts.cpu().float(), changes, columns

    def pull_back(self, noise: Any, coefficients: Tensor, errors: Tensor | None) -> tuple[Tensor, Any]:
        """Return `sum_r c_r z_r` (d,) for coefficients (R,), and (M, d) for errors (R, M); the noise is unpacked once."""
        perturbation = self.method.perturbation
        own: Any = None if errors is None else perturbation.row_noise(noise)
        if errors is None or perturbation.rowwise_size < perturbation.vector.size:
            return perturbation.pull_back(noise, coefficients), None if own is None else own.exact_sum(errors)
        both = own.exact_sum(torch.cat([coefficients[:, None].to(errors), errors], 1))
        return both[0], both[1:]
