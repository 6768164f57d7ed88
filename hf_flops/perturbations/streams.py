"""Streams of random numbers, functions of (seed, optimizer step, sample position, query)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..base.prng import seeds, words, words_on

SHARED_POSITION = 2**62  # stream of shared noise; no sample has this position
ALL = slice(None)
_PACKED = 2**20  # bytes of bits that are drawn at once and kept


@cache
def _signs(device: torch.device) -> Tensor:
    """Return the signs (256, 8) float32 of each byte's bits."""
    signs = [[1.0 - 2.0 * (byte >> bit & 1) for bit in range(8)] for byte in range(256)]
    return torch.tensor(signs).to(device, non_blocking=True)


@dataclass(frozen=True)
class NoiseKeys:
    """Seeds of the noise of a chunk's rows.

    Attributes:
        rows: (R,) uint64, one seed for each row.
        group: the seed of noise that the rows of a group share.
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
        return cls(
            seeds(seed, step, positions.numpy(), queries.numpy()),
            int(seeds(seed, step, SHARED_POSITION, group)[0]),
        )


class Signs:
    """R rows of independent signs +1 and -1, of one random bit each, cut into pieces.

    On the CPU, up to a megabyte of bits is drawn at once and kept packed; more are drawn whenever a
    piece is used. On other devices all bits are drawn at once, there, and the host does not wait.

    Args:
        row_seeds: (R,) uint64.
        sizes: number of entries of each piece; every piece starts at a new word.
        device: where bits are drawn and unpacked.

    Attributes:
        bytes_each: memory of a number before it is unpacked.
        host: whether the device is the CPU.
    """

    bytes_each: float = 1 / 8

    def __init__(
        self, row_seeds: np.ndarray, sizes: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        device = torch.device(device)
        self.row_seeds, self.sizes, self.signs = row_seeds, sizes, _signs(device)
        self.starts = list(accumulate((-(-size // 64) for size in sizes), initial=0))  # words
        self.host = device.type == "cpu"
        self.packed: Tensor | None = None
        if not self.host:
            self.packed = words_on(device, row_seeds, self.starts[-1]).view(torch.uint8)
        elif 8 * self.starts[-1] * len(row_seeds) <= _PACKED:
            self.packed = self._bytes(0, self.starts[-1], ALL)

    def __len__(self) -> int:
        return len(self.row_seeds)

    def _bytes(self, start: int, stop: int, rows: slice) -> Tensor:
        """Draw the words `start` to `stop` on the CPU; return (R, 8 words) uint8."""
        return torch.from_numpy(words(self.row_seeds[rows], stop - start, start).view(np.uint8))

    def piece(self, index: int, rows: slice = ALL, last: int | None = None) -> Tensor:
        """Return a piece (R, size) float32 of some rows, or the adjacent ones from it to `last`."""
        last = index if last is None else last
        start, stop = self.starts[index], self.starts[last + 1]
        packed = (
            self._bytes(start, stop, rows)
            if self.packed is None
            else self.packed[rows, 8 * start : 8 * stop]
        )
        signs = self.signs.index_select(0, packed.int().flatten())
        return signs.view(len(packed), -1)[:, : sum(self.sizes[index : last + 1])]

    @staticmethod
    def adjoins(size: int) -> bool:
        """Return whether the next piece directly follows a piece of that size."""
        return size % 64 == 0


class Normals:
    """Rows of standard normal numbers, four bytes each; for the arguments see `Signs`.

    They come from torch's CPU generator, re-seeded for each row; it uses 32 bits of its seed. Other
    devices get a copy, because their generators draw other numbers.
    """

    bytes_each: float = 4.0

    def __init__(
        self, row_seeds: np.ndarray, sizes: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        values, generator = torch.empty(len(row_seeds), sum(sizes)), torch.Generator()
        for row, seed in zip(values, row_seeds.tolist(), strict=True):
            torch.randn(len(row), generator=generator.manual_seed(seed), out=row)
        self.host = torch.device(device).type == "cpu"
        self.values = values.to(device, non_blocking=True)
        self.starts, self.rows = list(accumulate(sizes, initial=0)), len(row_seeds)

    def __len__(self) -> int:
        return self.rows

    def piece(self, index: int, rows: slice = ALL, last: int | None = None) -> Tensor:
        """See `Signs.piece`."""
        return self.values[
            rows, self.starts[index] : self.starts[(index if last is None else last) + 1]
        ]

    @staticmethod
    def adjoins(size: int) -> bool:
        """See `Signs.adjoins`."""
        return True


Numbers = Signs | Normals
"""Rows of independent numbers with mean 0 and variance 1, cut into pieces."""
