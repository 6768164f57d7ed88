"""Estimators: from the losses of perturbed rows to directional derivatives."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..base.rows import Rows


class Estimator(Protocol):
    """A finite difference along the noise of each query.

    Attributes:
        signs: the multiples of the noise at which each query is evaluated; one forward row each.
        baseline: whether the clean forward is part of the difference.
    """

    signs: tuple[int, ...]
    baseline: bool

    def deltas(self, losses: Tensor, clean: Tensor | None, scale: float) -> Tensor:
        """Return the directional derivative of each query.

        Args:
            losses: (S, R) float32, loss sums of the rows at each of the S signs.
            clean: (R,) float32, the clean loss sums of the rows' samples, or None.
            scale: the step of the difference, epsilon.

        Returns:
            (R,) float32.
        """
        ...


class OneSided:
    """Forward differences: `(s(theta + eps z) - s(theta)) / eps`, one row per query and one clean
    row per sample.

    The clean row is shared by all queries of its sample, so at equal rows there are almost twice as
    many directions as with antithetic pairs, and the variance halves. The bias is O(eps^2) for
    symmetric noise, like the pair's.

    Examples:
        >>> import torch
        >>> from hf_flops.estimators import OneSided
        >>> losses, clean = torch.tensor([[1.2, 0.9]]), torch.tensor([1.0, 1.0])
        >>> OneSided().deltas(losses, clean, scale=0.1)
        tensor([ 2.0000, -1.0000])
    """

    signs: tuple[int, ...] = (1,)
    baseline: bool = True

    def deltas(self, losses: Tensor, clean: Tensor | None, scale: float) -> Tensor:
        """See `Estimator.deltas`."""
        assert clean is not None
        return (losses[0] - clean) / scale


class Antithetic:
    """Central differences: `(s(theta + eps z) - s(theta - eps z)) / (2 eps)`, two rows per query.

    Examples:
        >>> import torch
        >>> from hf_flops.estimators import Antithetic
        >>> losses = torch.tensor([[1.2, 0.9], [0.8, 1.1]])  # at theta + eps z and theta - eps z
        >>> Antithetic().deltas(losses, None, scale=0.1)
        tensor([ 2.0000, -1.0000])

    References:
        Spall (1992), SPSA; Malladi et al. (2023), MeZO, arXiv 2305.17333, definition 1.
    """

    signs: tuple[int, ...] = (1, -1)
    baseline: bool = False

    def deltas(self, losses: Tensor, clean: Tensor | None, scale: float) -> Tensor:
        """See `Estimator.deltas`."""
        del clean
        return (losses[0] - losses[1]) / (2 * scale)


def against_others(deltas: Tensor, rows: Rows, units: int) -> Tensor:
    """Subtract from each delta (R,) the mean of the sample's other deltas and a zero, which stands
    for the clean row.

    A delta is `(s_k - c) / epsilon` with the clean loss c as its baseline. As `E z_k = 0`, any
    number that does not depend on z_k may take its place without a bias. Where s_k has mean m and
    variance v under the noise, a delta's expected square is `v + (m - c)^2` over epsilon squared;
    against the mean of c and the n - 1 other losses of the sample it is
    `v (1 + (n - 1) / n^2) + (m - c)^2 / n^2`. For a piecewise constant loss `m - c` can be as large
    as the root of v; for a smooth one it is small. Non-finite deltas are unchanged, and ignored in
    the means.

    Args:
        deltas: (R,) differences to the clean loss.
        rows: the R rows, of one round of queries.
        units: B, how many samples there are.

    References:
        Kool, van Hoof and Welling (2019), Buy 4 REINFORCE Samples, Get a Baseline for Free!,
        section 3 (without the zero).
    """
    finite = deltas.isfinite()
    known = torch.where(finite, deltas, 0.0)
    totals = torch.zeros(units).index_add_(0, rows.owner, known)
    counts = torch.bincount(rows.owner[finite], minlength=units).clamp(min=1)
    return deltas - (totals[rows.owner] - known) / counts[rows.owner]
