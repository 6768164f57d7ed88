"""Noise of rows for all parameters, drawn from counter-based streams.

No noise is stored and no global generator is used, so noise can be drawn again for the update, on
another rank, or after a resume, and does not depend on how rows are cut into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .exact_sums import DIGIT, ROWS, accumulator, cut
from .streams import ALL, Normals, Numbers, Signs

BLOCK = 2**18  # numbers of noise that are unpacked at a time; they fit in a processor's cache
_RUN = 2**13  # largest number of noise entries of a run of parameters
_WIDE = 2**20  # numbers that are unpacked at a time for sums
# the same two of devices that need large products, 64 MiB of float32 at a time
_DEVICE_RUN, _DEVICE_WIDE = 2**16, 2**24


def blocks(rows: int, numbers: int, most: int = BLOCK) -> Iterator[slice]:
    """Split rows of `numbers` numbers into blocks of at most `most` numbers, or of one row."""
    step = max(1, most // max(1, numbers))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class RowNoise:
    """The noise of R rows: mean 0, identity covariance.

    A matrix can be the outer product of two independent vectors of signs, `Z = a b^T`: rank-one
    noise. Its entries are signs that are uncorrelated, though not independent, so estimates stay
    unbiased, and `||Z||^2` is the number of entries whatever the draw. Therefore `tr Cov = E
    delta^2 ||z||^2 - ||g||^2 = (d - 1) ||g||^2`, the same as with independent signs. But the error
    lies in fewer directions, because entries of one row or column of Z err together, and deltas
    have heavier tails: `E (a^T G b)^4 <= 9 ||G||^4`, against `3 ||G||^4`. With normal factors the
    trace would be `(out + 2) (in + 2) - 1` times `||G||^2`.

    Args:
        numbers: of the noise, in pieces by parameter.
        shapes: the shapes of the parameters.
        rank_one: whether matrices are outer products.

    References:
        Sarkar et al. (2025), Evolution Strategies at the Hyperscale (EGGROLL), arXiv 2511.16652.
    """

    def __init__(self, numbers: Numbers, shapes: Sequence[torch.Size], rank_one: bool) -> None:
        self.numbers, self.shapes = numbers, shapes
        most = _RUN if numbers.host else _DEVICE_RUN
        self.layouts, self.first, self._runs = _plan(tuple(shapes), rank_one, numbers.adjoins, most)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def _wide(self) -> int:
        return _WIDE if self.numbers.host else _DEVICE_WIDE

    @property
    def _narrow(self) -> int:
        return BLOCK if self.numbers.host else _DEVICE_WIDE

    def __getitem__(self, row: int) -> Tensor:
        """Return the noise of one row as a flat vector (d,)."""
        if not 0 <= row < len(self):
            raise IndexError(f"there is no row {row} among {len(self)} rows of noise")
        return torch.cat(
            [self.tensor(index, slice(row, row + 1)).flatten() for index in range(len(self.shapes))]
        )

    def is_rank_one(self, index: int) -> bool:
        """Return whether a parameter's noise is an outer product."""
        return len(self.layouts[index]) == 2

    def factors(self, index: int, rows: slice = ALL) -> tuple[Tensor, ...]:
        """Return a parameter's noise (R, numel), or its factors (R, out) and (R, in)."""
        return tuple(
            self.numbers.piece(self.first[index] + i, rows) for i in range(len(self.layouts[index]))
        )

    def tensor(self, index: int, rows: slice = ALL) -> Tensor:
        """Return the noise (R, *shape) of a parameter."""
        factors = self.factors(index, rows)
        if len(factors) == 2:
            return factors[0].unsqueeze(2) * factors[1].unsqueeze(1)
        return factors[0].view(-1, *self.shapes[index])

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        """Return `sum_r coefficients[r] * noise[r]`.

        Args:
            coefficients: (R,) or, for M sums at once, (R, M) float32 on the noise's device.

        Returns:
            (d,) or (M, d).
        """
        return self._summed(coefficients.view(len(self), -1)).view(*coefficients.shape[1:], -1)

    def _summed(self, columns: Tensor, among: slice = ALL) -> Tensor:
        """Return (M, d) for (R, M) coefficients of some rows."""
        total = columns.new_zeros(columns.shape[1], sum(shape.numel() for shape in self.shapes))
        start = among.start or 0
        for run, where in self._runs:
            part, first = total[:, where], run[0]
            if not self.is_rank_one(first):
                for rows in blocks(len(columns), part.shape[1], self._wide):
                    numbers = self._flat(run, slice(rows.start + start, rows.stop + start))
                    part.addmm_(columns[rows].T, numbers)
                continue
            for rows in blocks(len(columns), sum(self.layouts[first]), self._narrow):
                left, right = self.factors(first, slice(rows.start + start, rows.stop + start))
                for matrix, column in zip(
                    part.view(-1, *self.shapes[first]), columns[rows].T, strict=True
                ):
                    matrix.addmm_((left * column[:, None]).T, right)
        return total

    def exact_sum(self, coefficients: Tensor, coarse: int = 0) -> Tensor:
        """Return `weighted_sum` in float64; for independent signs it is equal in any order of rows.

        Coefficients are rounded to multiples of 2^-30 and cut into three digits of 15 bits, whose
        sums are exact in float32.

        Args:
            coefficients: (R,) or (R, M).
            coarse: how many of the last of M columns are multiples of 2^-15.
        """
        wide, columns = accumulator(coefficients.device), coefficients.view(len(self), -1)
        if not isinstance(self.numbers, Signs) or any(len(pieces) == 2 for pieces in self.layouts):
            return self.weighted_sum(coefficients).to(wide)
        digits, sums = cut(columns).float(), columns.shape[1]
        digits, used = self._used(digits, 3 * sums - coarse)
        total = columns.new_zeros(sums, sum(shape.numel() for shape in self.shapes), dtype=wide)
        for start in range(0, len(self), ROWS):
            rows = slice(start, start + ROWS)
            parts = self._summed(digits[rows], rows).split([len(stretch) for stretch in used])
            for stretch, summed in zip(used, parts, strict=True):
                level, first = divmod(stretch.start, sums)
                total[first : first + len(stretch)].add_(summed, alpha=DIGIT**level)
        return total.view(*coefficients.shape[1:], -1)

    def _used(self, digits: Tensor, columns: int) -> tuple[Tensor, list[range]]:
        """Return the digits (R, ..) to sum, and which of the 3 M columns they are, in stretches.

        Digits of small coefficients are all zero and left out on the CPU. Elsewhere the host would
        have to wait for the device to know them.
        """
        if self.numbers.host:
            used = digits.any(0).nonzero().flatten()
            return digits[:, used], [range(column, column + 1) for column in used.tolist()]
        sums = digits.shape[1] // 3
        cuts = [range(start, min(start + sums, columns)) for start in range(0, columns, sums)]
        return digits[:, :columns], cuts

    def dot(self, vectors: Tensor) -> Tensor:
        """Return the products (R, M) of every row's noise with vectors (M, d)."""
        # twice as fast as its transpose
        products = vectors.new_zeros(len(vectors), len(self))
        for run, where in self._runs:
            part, first = vectors[:, where], run[0]
            if not self.is_rank_one(first):
                for rows in blocks(len(self), part.shape[1], self._wide):
                    products[:, rows].addmm_(part, self._flat(run, rows).T)
                continue
            for rows in blocks(len(self), sum(self.layouts[first]), self._narrow):
                left, right = self.factors(first, rows)
                matrices = part.view(-1, *self.shapes[first])
                products[:, rows] += torch.stack(
                    [((left @ matrix) * right).sum(1) for matrix in matrices]
                )
        return products.T

    def _flat(self, run: range, rows: slice) -> Tensor:
        """Return the noise (R, numbers) of a run of parameters."""
        return self.numbers.piece(self.first[run[0]], rows, self.first[run[-1]])


@cache
def _plan(
    shapes: tuple[torch.Size, ...], rank_one: bool, adjoins: Callable[[int], bool], most: int
) -> tuple[list[tuple[int, ...]], list[int], list[tuple[range, slice]]]:
    """Return the layouts of parameters' noise, the first piece of each, and runs to sum together.

    The noise of a run is contiguous, and has at most `most` numbers unless it is that of one
    parameter; a run comes with its slice of the flat vector.
    """
    layouts = [layout(shape, rank_one) for shape in shapes]
    runs, first, start, stop = list[tuple[range, slice]](), 0, 0, 0
    for index, shape in enumerate(shapes):
        stop += shape.numel()
        joins_next = (
            index + 1 < len(shapes)
            and len(layouts[index]) == len(layouts[index + 1]) == 1
            and adjoins(shape.numel())
            and stop + shapes[index + 1].numel() - start <= most
        )
        if not joins_next:
            runs.append((range(first, index + 1), slice(start, stop)))
            first, start = index + 1, stop
    return layouts, list(accumulate(map(len, layouts), initial=0)), runs


def layout(shape: torch.Size, rank_one: bool) -> tuple[int, ...]:
    """Return the sizes of the pieces of a parameter's noise."""
    return tuple(shape) if rank_one and len(shape) == 2 else (shape.numel(),)


DISTRIBUTIONS: dict[str, tuple[type[Numbers], bool]] = {
    "gaussian": (Normals, False),
    "rademacher": (Signs, False),
    "rank_one": (Signs, True),
}


def draw(
    distribution: str,
    row_seeds: np.ndarray,
    shapes: Sequence[torch.Size],
    device: torch.device | str = "cpu",
) -> RowNoise:
    """Draw noise for each seed, mean 0 and identity covariance.

    Args:
        distribution: a name in `DISTRIBUTIONS`.
        row_seeds: (R,) uint64.
        shapes: of the parameters.
        device: of the noise.
    """
    kind, rank_one = DISTRIBUTIONS[distribution]
    sizes = [size for shape in shapes for size in layout(shape, rank_one)]
    return RowNoise(kind(row_seeds, sizes, device), shapes, rank_one)


def bytes_per_row(distribution: str, shapes: Sequence[torch.Size]) -> float:
    """Return how many bytes the noise of a row takes in `draw`."""
    kind, rank_one = DISTRIBUTIONS[distribution]
    return kind.bytes_each * sum(size for shape in shapes for size in layout(shape, rank_one))
