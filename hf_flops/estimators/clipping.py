"""Robust clipping of deltas: less variance from a few large ones, at the price of a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.rows import Rows
from .delta_chain import DeltaTransform

_NORMAL = 1.4826  # standard deviation over median absolute deviation of a normal distribution


class Clipping(DeltaTransform):
    """Limits the absolute deltas of a round to a multiple of their robust standard deviation.

    That is 1.4826 times the median absolute delta; the mean of deltas is 0, as that of the noise.

    The estimate is biased: samples with large gradients count for less, as with gradient clipping
    per sample. If half of the deltas are 0, as those of a metric may be, nothing is clipped.

    Args:
        most: the multiple; 1.5 clips 13 % of normal deltas.

    Examples:
        >>> import torch
        >>> from hf_flops.base.rows import expand
        >>> from hf_flops.estimators.clipping import Clipping
        >>> rows = expand(torch.tensor([3, 2]), 1.0)
        >>> Clipping(2.0).of_round(torch.tensor([1.0, -1.0, 0.5, 1.0, -9.0]), rows)
        tensor([ 1.0000, -1.0000,  0.5000,  1.0000, -2.9652])
    """

    def __init__(self, most: float) -> None:
        self.most = most

    def of_round(self, deltas: Tensor, rows: Rows) -> Tensor:
        """See `DeltaTransform`."""
        del rows
        finite = deltas.isfinite()
        if not bool(finite.any()):
            return deltas
        bound = self.most * _NORMAL * float(deltas[finite].abs().median())
        return torch.where(finite & (bound > 0), deltas.clamp(-bound, bound), deltas)
