"""Variance and signal of a step's estimate, computed from its deltas at no extra cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..allocators import Allocator, PredictingAllocator, SampleFeatures, predicted_gain
from ..base.rows import Rows


def mean_squares(rows: Rows, deltas: Tensor, units: int) -> Tensor:
    """Return (B,) mean of each sample's finite squared deltas (R,), an estimate of
    `||grad s_i||^2`; NaN for samples without a finite delta, such as those without queries.
    """
    finite = deltas.isfinite()
    squares = torch.zeros(units).index_add_(0, rows.owner[finite], deltas[finite].square())
    return squares / torch.bincount(rows.owner[finite], minlength=units)


def gain_metrics(allocator: Allocator, features: SampleFeatures) -> dict[str, float]:
    """Return `predicted_gain`, the gain over equal counts that the allocator's predicted sigmas
    promise before they are calibrated; nothing if it predicts none or there is one sample.
    """
    if not isinstance(allocator, PredictingAllocator) or len(features.losses) < 2:
        return {}
    return {"predicted_gain": predicted_gain(allocator.predict(features))}


def summarise(
    signals: tuple[float, float] | None,
    squares: Tensor,
    counts: Tensor,
    rows: Rows,
    deltas: Tensor,
    shares_noise: bool,
    dimension: int,
) -> dict[str, float]:
    """Return the metrics of a step for the log.

    `E delta^2 = ||grad s_i||^2`, so row-wise noise gives `tr Cov = (d + 1) sum_i ||grad s_i||^2 /
    n_i / N^2`; where a group shares its noise, its summed coefficient takes the place of delta.
    `||estimate||^2 - tr Cov` is an unbiased estimate of the squared gradient norm.
    `effective_queries` per sample, all alike, would have the variance of the counts used.

    Args:
        signals: squared norms of the estimate, and of the closed-form head's gradient; None if
            only a sum over batches is known.
        squares: (B,) result of `mean_squares`, divided by N squared.
        counts: (B,) queries per sample.
        rows: the step's R rows, laid out with N = 1.
        deltas: (R,) divided by N.
        shares_noise: whether rows of a group share their noise.
        dimension: d above, the number of random numbers in a row's noise.
    """
    squares, finite = squares.nan_to_num(0.0).double(), deltas.isfinite()
    # sum_i ||grad s_i||^2 / n_i, if all rows of a sample have the same weight
    inverse = float((squares[rows.owner] * rows.weight.double().square()).sum())
    spread = inverse
    if shares_noise:
        groups = torch.zeros(int(rows.group.max()) + 1)
        spread = float(
            groups.index_add_(0, rows.group[finite], (deltas * rows.weight)[finite]).square().sum()
        )
    variance = (dimension + 1) * spread
    share = counts.double() / counts.sum()
    entropy = (
        float(torch.special.entr(share).sum()) / math.log(len(counts)) if len(counts) > 1 else 1.0
    )
    standing = represented(rows, counts)
    equal = float((standing * squares).sum() * len(counts) / counts.sum())
    gain = equal / inverse if inverse > 0 else 1.0
    metrics = {
        "gradient_variance": variance,
        "sample_signal": float((standing * squares.sqrt()).mean()) ** 2 * len(counts),
        "allocation_entropy": entropy,
        "allocation_gain": gain,
        "effective_queries": gain * float(counts.sum()) / len(counts),
        "dropped_rows": float((~finite).sum()),
    }
    if signals is not None:
        metrics["gradient_signal"] = signals[0] - variance
        metrics["head_signal"] = signals[1]
    return metrics


def represented(rows: Rows, counts: Tensor) -> Tensor:
    """Return (B,) float64, how many samples each sample stands for in a sum over all: 1, or the
    total weight of its rows where others have no queries.
    """
    samples = len(counts)
    if bool((counts > 0).all()):
        return torch.ones(samples, dtype=torch.float64)
    totals = torch.zeros(samples, dtype=torch.float64)
    return totals.index_add_(0, rows.owner, rows.weight.double())
