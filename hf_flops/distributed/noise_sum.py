"""The sum of noise times coefficients, accumulated chunk by chunk and in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.rows import BatchPosition, Rows
from ..perturbations import Perturbation, accumulator
from ..perturbations.base import DrawnNoise
from ..perturbations.replay import in_turn, regenerate
from .collectives import ProcessGroup

_NOISE = 2**26  # bytes of noise in memory at a time when an update is computed again
Again = Callable[[Rows, Tensor], None]
"""Adds the noise of rows to a sum again, with additional coefficients (R,)."""


class NoiseSum:
    """`sum_r c_r z_r` over the rows that this process runs.

    Args:
        perturbation: where noise enters.

    Attributes:
        update: (d,) the sum.
        parts: the chunks in it, with their coefficients, in order.
        dimension: random numbers of unit variance in a row's noise, from the last chunk.
    """

    def __init__(self, perturbation: Perturbation) -> None:
        self.perturbation, vector = perturbation, perturbation.vector
        self.update = torch.zeros(
            vector.size, dtype=accumulator(vector.device), device=vector.device
        )
        self.parts: list[tuple[Rows, Tensor]] = []
        self.dimension = 0

    def weighted(
        self, noise: DrawnNoise, coefficients: Tensor, errors: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return a chunk's `sum_r c_r z_r` (d,), and the same for errors (R, M): (M, d).

        Nothing is added yet, so that a chunk can be repeated if memory runs out. Errors are
        multiples of 2^-15.
        """
        perturbation = self.perturbation
        if errors is None:
            return perturbation.weighted_noise(noise, coefficients), None
        row_noise: Any = perturbation.row_noise(noise)
        if perturbation.rowwise_size < perturbation.vector.size:
            weighted = perturbation.weighted_noise(noise, coefficients)
            return weighted, row_noise.exact_sum(errors, coarse=errors.shape[1])
        columns = torch.cat([coefficients[:, None].to(errors), errors], 1)
        both = row_noise.exact_sum(columns, coarse=errors.shape[1])
        return both[0], both[1:]

    def add(
        self, rows: Rows, coefficients: Tensor, weighted: Tensor | None, dimension: int = 0
    ) -> None:
        """Add a chunk.

        Args:
            rows: of the chunk.
            coefficients: (R,) of their noise.
            weighted: (d,) result of `weighted`.
            dimension: random numbers of unit variance in a row's noise; 0 if the rows are in the
                sum already.
        """
        self.dimension = dimension or self.dimension
        if weighted is not None:
            self.update.add_(weighted)
            self.parts.append((rows, coefficients))

    def add_back(self, mean: Tensor) -> None:
        """Add (k,) to the first k numbers."""
        self.update[: len(mean)] += mean

    def complete(self, rows: Rows, coefficients: Tensor, corrections: Tensor, again: Again) -> None:
        """Change the coefficients of all rows to their final values.

        Args:
            rows: R rows of all processes.
            coefficients: (R,) final coefficients.
            corrections: (R,) final coefficients minus those in the sum; 0 for rows of other
                processes.
            again: adds the noise of rows with a correction.
        """
        del coefficients
        index = torch.nonzero(corrections).flatten()
        if self.perturbation.shares_noise:
            index = index[rows.group[index].argsort(stable=True)]
        again(rows[index], corrections[index])

    def shared_facts(self, group: ProcessGroup, replayed: int) -> tuple[int, int]:
        """Return the dimension of a row's noise, and how many rows all processes replayed."""
        if not self.perturbation.replays:
            return self.perturbation.vector.size, replayed
        facts = group.all_gather(torch.tensor([[self.dimension, replayed]]), [1] * group.world)
        return int(facts[:, 0].max()), int(facts[:, 1].sum())


class RegeneratedSum(NoiseSum):
    """`sum_r c_r z_r` over the rows of all processes, computed at the end from noise drawn again.

    Args:
        perturbation: where noise enters.
        place: position of the batch in the run.
    """

    def __init__(self, perturbation: Perturbation, place: BatchPosition) -> None:
        super().__init__(perturbation)
        self.place = place

    def weighted(
        self, noise: DrawnNoise, coefficients: Tensor, errors: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return nothing yet."""
        del noise, coefficients, errors
        return None, None

    def complete(self, rows: Rows, coefficients: Tensor, corrections: Tensor, again: Again) -> None:
        """See `NoiseSum`."""
        del corrections, again
        perturbation, place = self.perturbation, self.place
        size = max(1, min(4096, int(_NOISE // max(1.0, perturbation.row_bytes))))
        self.update = regenerate(
            perturbation,
            place.seed,
            place.step,
            rows.owner + place.position,
            rows.query,
            coefficients,
            rows.group,
            size,
        )
        self.parts = [
            (rows[chunk], coefficients[chunk])
            for chunk in in_turn(rows.group, size, shares_noise=perturbation.shares_noise)
        ]
