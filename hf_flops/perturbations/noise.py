"""Counter-based noise: a pure function of (seed, optimizer step, global sample position, query).

Nothing is stored and no global generator is touched, so noise can be drawn again for the pull-back, on another rank, or
after a resume, and does not depend on how rows are cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..counters import seeds

SHARED_POSITION = 2**62  # no sample has this position: the stream of noise that all samples share
# The eight signs that a byte of random bits stands for: (256, 8).
_SIGNS = torch.tensor([[1.0 - 2.0 * (byte >> bit & 1) for bit in range(8)] for byte in range(256)])


@dataclass(frozen=True)
class NoiseKeys:
    """Where in the noise stream a chunk's rows lie.

    Attributes:
        rows: (R,) uint64, one seed for each row.
        group: the seed that the rows of one group share, for parts with shared noise.
    """

    rows: np.ndarray
    group: int

    @classmethod
    def of(cls, seed: int, step: int, positions: Tensor, queries: Tensor, group: int) -> NoiseKeys:
        """Derive the keys of a chunk.

        Args:
            seed: the run's seed.
            step: the optimizer step.
            positions: (R,) int64, index of each row's sample in the global batch of the step.
            queries: (R,) int64, which query of its sample each row is.
            group: the rows' common group.
        """
        rows = seeds(seed, step, positions.numpy(), queries.numpy())
        return cls(rows, int(seeds(seed, step, SHARED_POSITION, group)[0]))


def _generators(row_seeds: np.ndarray) -> Iterator[torch.Generator]:
    """Yield a private generator, seeded for each row in turn."""
    generator = torch.Generator()
    return (generator.manual_seed(seed) for seed in row_seeds.tolist())


def gaussian(row_seeds: np.ndarray, size: int) -> Tensor:
    """Draw (R, d) standard normal numbers."""
    out = torch.empty(len(row_seeds), size)
    for row, generator in zip(out, _generators(row_seeds), strict=True):
        torch.randn(size, generator=generator, out=row)
    return out


def rademacher(row_seeds: np.ndarray, size: int) -> Tensor:
    """Draw (R, d) independent signs +1 and -1, at one random bit each."""
    words = torch.empty(len(row_seeds), (size + 63) // 64, dtype=torch.int64)
    for row, generator in zip(words, _generators(row_seeds), strict=True):
        row.random_(-(2**63), 2**63 - 1, generator=generator)
    signs = F.embedding(words.view(torch.uint8).int(), _SIGNS)  # (R, bytes, 8)
    return signs.view(len(row_seeds), -1)[:, :size]


DISTRIBUTIONS: dict[str, Callable[[np.ndarray, int], Tensor]] = {"gaussian": gaussian, "rademacher": rademacher}


def draw(distribution: str, row_seeds: np.ndarray, size: int) -> Tensor:
    """Draw one flat noise vector for each seed, mean 0 and identity covariance.

    Args:
        distribution: a name in `DISTRIBUTIONS`.
        row_seeds: (R,) uint64.
        size: d, numbers per row.

    Returns:
        (R, d) float32 on the CPU.
    """
    return DISTRIBUTIONS[distribution](row_seeds, size)
