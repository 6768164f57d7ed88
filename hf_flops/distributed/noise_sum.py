"""The sum of noise by coefficients that a step builds up chunk by chunk: the one thing that it
changes in place.
"""

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

_NOISE = 2**26  # bytes of noise that are held at a time when an update is made again
Again = Callable[[Rows, Tensor], None]
"""Adds the noise of rows to a sum once more, with further coefficients (R,)."""


class NoiseSum:
    """`sum_r c_r z_r` over the rows that this process runs.

    Args:
        perturbation: where noise enters.

    Attributes:
        update: (d,) the sum.
        parts: the chunks that it is the sum of, with their coefficients, in order.
        dimension: random numbers of unit variance in the noise of a row as of the last chunk.
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
        """Return a chunk's `sum_r c_r z_r` (d,), and (M, d) that for errors (R, M); the noise is
        unpacked once.

        Nothing is added yet, so that a chunk for which memory does not suffice can be done again.
        """
        perturbation = self.perturbation
        own: Any = None if errors is None else perturbation.row_noise(noise)
        if errors is None or perturbation.rowwise_size < perturbation.vector.size:
            innovation = None if own is None else own.exact_sum(errors)
            return perturbation.weighted_noise(noise, coefficients), innovation
        both = own.exact_sum(torch.cat([coefficients[:, None].to(errors), errors], 1))
        return both[0], both[1:]

    def add(
        self, rows: Rows, coefficients: Tensor, weighted: Tensor | None, dimension: int = 0
    ) -> None:
        """Add a chunk.

        Args:
            rows: of the chunk.
            coefficients: (R,) of their noise.
            weighted: (d,) what `weighted` returned for it.
            dimension: random numbers of unit variance in a row's noise; 0 where the rows are in the
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
        """Bring the coefficients of all rows to their final values, now that all deltas are known.

        Args:
            rows: R rows of all processes.
            coefficients: (R,) the final ones.
            corrections: (R,) what the sum lacks of them, 0 for rows of other processes.
            again: adds the noise of rows that lack something.
        """
        del coefficients
        index = torch.nonzero(corrections).flatten()
        if self.perturbation.shares_noise:
            index = index[rows.group[index].argsort(stable=True)]
        again(rows[index], corrections[index])

    def shared_facts(self, group: ProcessGroup, replayed: int) -> tuple[int, int]:
        """Return of how many numbers a row's noise is made, and how many rows were run again, in
        all processes.
        """
        if not self.perturbation.replays:
            return self.perturbation.vector.size, replayed
        facts = group.all_gather(torch.tensor([[self.dimension, replayed]]), [1] * group.world)
        return int(facts[:, 0].max()), int(facts[:, 1].sum())


class RegeneratedSum(NoiseSum):
    """`sum_r c_r z_r` over the rows of all processes: made at the end, from noise that is drawn
    again.

    Args:
        perturbation: where noise enters.
        place: where the batch lies in the run.
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
        where = rows.owner + place.position, rows.query
        self.update = regenerate(
            perturbation, place.seed, place.step, *where, coefficients, rows.group, size
        )
        chunks = in_turn(rows.group, size, shares_noise=perturbation.shares_noise)
        self.parts = [(rows[chunk], coefficients[chunk]) for chunk in chunks]
