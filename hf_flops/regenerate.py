"""The update of a step, made again from what its rows are called and what they count: no noise is stored or sent."""

from __future__ import annotations

import torch
from torch import Tensor

from .perturbations import NoiseKeys, Perturbation, accumulator


def regenerate(
    perturbation: Perturbation,
    seed: int,
    step: int,
    positions: Tensor,
    queries: Tensor,
    coefficients: Tensor,
    groups: Tensor,
    rows_per_chunk: int,
) -> Tensor:
    """Return `sum_r coefficients[r] * noise[r]` (d,) float64 for rows in any order.

    Args:
        perturbation: draws the noise; one that `replays` forwards cannot be drawn again without them.
        seed: the run's seed.
        step: the optimizer step.
        positions: (R,) int64, index of each row's sample in the global batch of the step.
        queries: (R,) int64, which query of its sample each row is.
        coefficients: (R,) float32.
        groups: (R,) int64; rows of a group have the same noise where noise is shared.
        rows_per_chunk: rows whose noise is held at a time.
    """
    device = perturbation.vector.device
    update = torch.zeros(perturbation.vector.size, dtype=accumulator(device), device=device)
    order, lengths = torch.arange(len(positions)), [len(positions)]
    if perturbation.grouped:
        order = groups.argsort(stable=True)
        lengths = torch.unique_consecutive(groups[order], return_counts=True)[1].tolist()
    for stretch in order.split(lengths):
        for chunk in stretch.split(rows_per_chunk):
            keys = NoiseKeys.of(seed, step, positions[chunk], queries[chunk], int(groups[chunk[0]]))
            update += perturbation.pull_back(perturbation.draw(keys), coefficients[chunk])
    return update
