"""A step's update again, from the few numbers that made it: no data, no forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .perturbations import NoiseKeys, Perturbation
from .rows import Rows


@dataclass(frozen=True)
class Trace:
    """What the update of a batch was made of, in the order in which it was summed.

    Attributes:
        rows: R query rows, those first that were pulled back first.
        coefficients: (R,) float32, what each row's noise was multiplied by.
        chunks: rows of each chunk.
        position: index of the batch's first sample in the global batch of the step.
        factor: what the sum was multiplied by, because samples were dropped.
        normalizer: N, what it was divided by then.
    """

    rows: Rows
    coefficients: Tensor
    chunks: list[int]
    position: int
    factor: float
    normalizer: float

    @classmethod
    def of(cls, parts: Sequence[tuple[Rows, Tensor]], position: int, factor: float, normalizer: float) -> Trace:
        """Join the rows and coefficients of chunks."""
        (rows, coefficients), *others = parts
        for more, _ in others:
            rows = rows.then(more)
        coefficients = torch.cat([coefficients, *(more for _, more in others)])
        return cls(rows, coefficients, [len(part) for part, _ in parts], position, factor, normalizer)


def regenerate(
    perturbation: Perturbation,
    seed: int,
    step: int,
    positions: Tensor,
    queries: Tensor,
    coefficients: Tensor,
    groups: Tensor,
    rows_per_chunk: int | Sequence[int],
) -> Tensor:
    """Return `sum_r c_r z_r` (d,) float32; with the same chunks it is the same bit for bit.

    Args:
        perturbation: where noise enters; its pull-back must not need a forward.
        seed: the run's seed.
        step: optimizer steps done before this one.
        positions: (R,) int64, index of each row's sample in the global batch of the step.
        queries: (R,) int64, which query of its sample each row is.
        coefficients: (R,) float32.
        groups: (R,) int64, see `Rows`.
        rows_per_chunk: rows whose noise is there at a time (no chunk leaves its group where noise is shared), or those of
            each chunk.
    """
    vector = perturbation.vector
    update = torch.zeros(vector.size, device=vector.device)
    for start, end in _bounds(groups, rows_per_chunk, grouped=perturbation.grouped):
        keys = NoiseKeys.of(seed, step, positions[start:end], queries[start:end], int(groups[start]))
        update.add_(perturbation.pull_back(perturbation.draw(keys), coefficients[start:end]))
    return update


def _bounds(groups: Tensor, rows_per_chunk: int | Sequence[int], *, grouped: bool) -> Iterator[tuple[int, int]]:
    """Yield the first row of each chunk and the one after its last."""
    if not isinstance(rows_per_chunk, int):
        yield from pairwise(accumulate(rows_per_chunk, initial=0))
        return
    lengths = torch.unique_consecutive(groups, return_counts=True)[1].tolist() if grouped else [len(groups)]
    for start, end in pairwise(accumulate(lengths, initial=0)):
        for first in range(start, end, rows_per_chunk):
            yield first, min(first + rows_per_chunk, end)
