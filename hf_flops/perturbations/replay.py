"""Computes a step's update again from its coefficients, without data or forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..base.rows import Rows
from .base import Perturbation
from .exact_sums import accumulator
from .streams import NoiseKeys


@dataclass(frozen=True)
class UpdateRecord:
    """Rows and coefficients of the update of a batch, in the order of the sum.

    Attributes:
        rows: R query rows.
        coefficients: (R,) float32, of the rows' noise.
        chunks: rows of each chunk.
        position: index of the batch's first sample in the global batch of the step.
        factor: of the sum, larger than 1 if samples were dropped.
        normalizer: N, by which the sum is divided.
    """

    rows: Rows
    coefficients: Tensor
    chunks: list[int]
    position: int
    factor: float
    normalizer: float

    @classmethod
    def of(
        cls, parts: Sequence[tuple[Rows, Tensor]], position: int, factor: float, normalizer: float
    ) -> UpdateRecord:
        """Join the rows and coefficients of chunks."""
        rows, coefficients = zip(*parts, strict=True)
        return cls(
            reduce(Rows.then, rows),
            torch.cat(coefficients),
            [len(chunk) for chunk in rows],
            position,
            factor,
            normalizer,
        )


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
    """Return `sum_r c_r z_r` (d,) float64 for rows in any order; equal for the same chunks.

    Args:
        perturbation: where noise enters; must not be one that `replays`.
        seed: the run's seed.
        step: optimizer steps done before this one.
        positions: (R,) int64, index of each row's sample in the global batch of the step.
        queries: (R,) int64, which query of its sample each row is.
        coefficients: (R,) float32.
        groups: (R,) int64; rows of a group have the same noise if noise is shared.
        rows_per_chunk: rows whose noise is drawn at a time, or the size of each chunk in order
            (then no chunk may span two groups if noise is shared).
    """
    device = perturbation.vector.device
    update = torch.zeros(perturbation.vector.size, dtype=accumulator(device), device=device)
    if isinstance(rows_per_chunk, int):
        chunks = in_turn(groups, rows_per_chunk, shares_noise=perturbation.shares_noise)
    else:
        chunks = list(torch.arange(len(positions)).split(list(rows_per_chunk)))
    for chunk in chunks:
        keys = NoiseKeys.of(seed, step, positions[chunk], queries[chunk], int(groups[chunk[0]]))
        update.add_(perturbation.weighted_noise(perturbation.draw(keys), coefficients[chunk]))
    return update


def in_turn(groups: Tensor, rows_per_chunk: int, *, shares_noise: bool) -> list[Tensor]:
    """Return the row indices of each chunk; no chunk spans two groups (R,) if noise is shared."""
    order, lengths = torch.arange(len(groups)), [len(groups)]
    if shares_noise:
        order = groups.argsort(stable=True)
        lengths = torch.unique_consecutive(groups[order], return_counts=True)[1].tolist()
    return [chunk for stretch in order.split(lengths) for chunk in stretch.split(rows_per_chunk)]
