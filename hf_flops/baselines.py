"""What deltas of an objective that moves in steps are measured against: the other queries of their
sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base.rows import Rows


def against_others(deltas: Tensor, rows: Rows, units: int) -> Tensor:
    """Return deltas (R,) less the mean of the others of their sample and of a zero, which stands
    for the clean row.

    A delta is `(s_k - c) / epsilon` with the clean loss c as its baseline. As `E z_k = 0`, any
    number that does not depend on z_k may take its place without a bias. Where s_k has mean m and
    variance v under the noise, a delta's expected square is `v + (m - c)^2` over epsilon squared;
    against the mean of c and the n - 1 other losses of the sample it is
    `v (1 + (n - 1) / n^2) + (m - c)^2 / n^2`. A loss that moves in steps has `m - c` as large as
    the root of v; a smooth one has none. Deltas that are not finite stay so, and count for no
    other.

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
