"""Measures epsilon, the step of the difference: too small rounds, too large curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..base.batch import Inputs, batch_size, take
from ..base.rows import Rows, expand
from ..core.chunking import ChunkPlanner, in_chunks
from ..core.method import Method
from ..objectives import Forward
from ..perturbations import NoiseKeys, RowwiseNoise

# Powers of the square root of ten. Epsilon is always one of these: the error that rounding causes
# depends on the processor's kernels, and a finer choice would follow it from machine to machine.
GRID = tuple(10 ** (exponent / 2) for exponent in range(-8, -1))  # 1e-4 ... 1e-1
# 1e-3 ... 3, for objectives that move in steps
STEP_GRID = tuple(10 ** (exponent / 2) for exponent in range(-6, 2))
_SHARE = 0.25  # of queries that should see a step
_ROWS = 32  # queries at each scale, or 8 where each needs a whole batch
# no optimizer step has this number, so nothing else uses a calibration's noise
_STEP = 2**61
_LOOKS = 8  # queries that are compared at two scales, or 2 where each needs a whole batch
_BEND = 0.1  # relative error of the differences above which smaller scales are looked at


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        scale: the step of the difference, epsilon, one of the grid's; None where no two steps agree
            on any signal.
        signal_to_noise: RMS of the deltas there over the RMS of their error; for an objective that
            moves in steps, the share of the queries that see one there.
        rows: rows that went through the model.
    """

    scale: float | None
    signal_to_noise: float
    rows: int


def choose_scale(
    deltas: Tensor, scales: tuple[float, ...] = GRID, order: int = 1
) -> tuple[float | None, float]:
    """Return the scale at which deltas have the least error, and their signal-to-noise ratio there.

    Deltas of the same queries at neighbouring scales have independent errors from rounding,
    `rounding / epsilon`, and from curvature errors that grow as `epsilon ** order`. So their mean
    squared difference is `a (1 / low^2 + 1 / high^2) + b (high^order - low^order)^2`; a and b are
    fitted to all pairs by least squares of relative errors, and the error
    `a / epsilon^2 + b epsilon^(2 order)` is compared at all scales. The mean product of neighbours
    is the squared signal. Where only one of the errors is visible, the scale is one of the two
    neighbours that agree best: the smaller where only curvature is visible, the larger where only
    rounding is. Pairs in which rounding swallows most perturbations are left out. Of scales with
    equal errors the larger is taken, at which rounding matters less.

    Args:
        deltas: (K, R) the same R queries at K scales.
        scales: the K scales, growing: powers of the square root of ten, so that the choice is the
            same whatever kernels the processor runs, unless two of them are nearly equally good.
        order: by which power of epsilon the error of curvature grows: 1 for one-sided differences,
            2 for antithetic ones.
    """
    low, high = deltas[:-1].double(), deltas[1:].double()
    steps = torch.tensor(scales, dtype=torch.float64)
    difference, signal = (high - low).square().mean(1), (high * low).mean(1)
    visible = difference.isfinite() & (difference > 0) & ((low != 0).double().mean(1) >= 0.5)
    if not bool(visible.any()):
        return None, 0.0
    rounding = steps[:-1] ** -2 + steps[1:] ** -2
    curvature = (steps[1:] ** order - steps[:-1] ** order) ** 2
    shares = torch.stack([rounding / difference, curvature / difference], 1)[visible]
    sizes = shares.norm(dim=0)
    a, b = (
        torch.linalg.lstsq(shares / sizes, torch.ones(len(shares), 1).double()).solution.flatten()
        / sizes
    ).tolist()
    if a > 0 and b > 0:
        pairs = torch.nonzero(visible).flatten().tolist()
        errors = {
            k: a / scales[k] ** 2 + b * scales[k] ** (2 * order)
            for pair in pairs
            for k in (pair, pair + 1)
        }
        best = min(errors, key=lambda k: (errors[k], -k))
        pair, error = min(pairs, key=lambda k: abs(2 * (k - best) + 1)), errors[best]
    else:
        pair = int((signal / difference).masked_fill(~visible, -math.inf).argmax())
        best, error = (pair if b > 0 else pair + 1), float(difference[pair] / 2)
    squared = float(signal[pair])
    return (scales[best], (squared / error) ** 0.5) if squared > 1e-2 * error else (None, 0.0)


def calibrate(forward: Forward, inputs: Inputs, method: Method, seed: int = 0) -> Calibration:
    """Evaluate the same few queries of a batch at every scale of the grid, and choose one.

    Args:
        forward: runs the model, in evaluation mode, without gradients.
        inputs: a batch of B samples.
        method: how gradients are estimated; its own scale is not looked at.
        seed: the run's seed.
    """
    if method.objective.piecewise_constant:
        deltas, rows = evaluated(forward, inputs, method, seed, STEP_GRID)
        return Calibration(*choose_step_scale(deltas), rows)
    deltas, rows = evaluated(forward, inputs, method, seed, GRID)
    return Calibration(*choose_scale(deltas, order=len(method.estimator.signs)), rows)


def look(
    forward: Forward, inputs: Inputs, method: Method, seed: int = 0
) -> tuple[float, float, float]:
    """Compare a few queries at a method's scale and the next smaller one; where they differ, look
    at others, and choose one.

    Noise of one scale has another effect on every model: on embeddings in a LoRA it is large. Where
    the difference grows towards smaller scales, it is the rounding of the loss, as with bases that
    compute in fewer bits than their parameters tell, and the scale may have to be larger.

    Returns:
        The scale; the root mean square of the differences between the first two over the signal;
        and, where the loss rounds, the signal-to-noise ratio at the scale, infinite elsewhere.
    """
    top = min(range(len(GRID)), key=lambda i: abs(math.log(GRID[i] / method.scale)))
    scales = GRID[max(top - 1, 0) : top + 1]
    deltas, _ = evaluated(forward, inputs, method, seed, scales, _LOOKS)
    low, high = deltas[0], deltas[-1]
    error, signal = float((high - low).square().mean()), float((high * low).mean())
    bend = (error / signal) ** 0.5 if signal > 0 else math.inf
    if math.isnan(error) or bend <= _BEND:
        return method.scale, bend, math.inf
    less, more = GRID[max(top - 3, 0) : max(top - 1, 0)], GRID[top + 1 : top + 4]
    if less:
        deltas = torch.cat([evaluated(forward, inputs, method, seed, less, _LOOKS)[0], deltas])
    rounds = len(deltas) > 2 and float((deltas[-2] - deltas[-3]).square().mean()) > error
    if rounds:
        deltas = torch.cat([deltas, evaluated(forward, inputs, method, seed, more, _LOOKS)[0]])
    looked = (*less, *scales, *(more if rounds else ()))
    best, ratio = choose_scale(deltas, looked, len(method.estimator.signs))
    if best is None:
        best = looked[-1] if rounds else method.scale
    return (best, bend, ratio) if rounds else (min(best, method.scale), bend, math.inf)


def choose_step_scale(
    deltas: Tensor, scales: tuple[float, ...] = STEP_GRID
) -> tuple[float | None, float]:
    """Return the least scale at which enough queries see a step, and their share.

    Differences estimate the gradient of the objective averaged over the noise. Below this scale
    most queries see no difference and are wasted; far above it the noise destroys the model.

    Args:
        deltas: (K, R) the same R queries at K scales, zero where there is no difference.
        scales: the K scales, growing.
    """
    shares = ((deltas != 0) & deltas.isfinite()).double().mean(1)
    enough = torch.nonzero(shares >= _SHARE).flatten()
    best = int(enough[0]) if len(enough) else int(shares.argmax())
    return (scales[best], float(shares[best])) if shares[best] > 0 else (None, 0.0)


def evaluated(
    forward: Forward,
    inputs: Inputs,
    method: Method,
    seed: int,
    grid: tuple[float, ...],
    queries: int = _ROWS,
) -> tuple[Tensor, int]:
    """Return (K, R) deltas of the same queries at every scale of the grid, and the rows used.

    A quarter of the queries is enough where each needs a whole batch.
    """
    samples = batch_size(inputs)
    units, wanted = (samples, queries) if method.objective.per_row else (1, queries // 4)
    rows = expand(torch.full((units,), -(-wanted // units)), 1.0)[slice(wanted)]
    clean = None
    used = len(rows) * len(grid) * len(method.estimator.signs) * (samples // units)
    if _at_once(method, wanted):
        used += len(rows.owner.unique()) * method.estimator.baseline
    elif method.estimator.baseline:
        if method.objective.per_row:
            inputs = take(inputs, torch.arange(int(rows.owner.max()) + 1))
        clean = method.objective(forward, inputs).sums.double().cpu()
        used += batch_size(inputs)
    return _deltas(forward, inputs, method, rows, clean, seed, grid), used


def _deltas(
    forward: Forward,
    inputs: Inputs,
    method: Method,
    rows: Rows,
    clean: Tensor | None,
    seed: int,
    grid: tuple[float, ...],
) -> Tensor:
    """Return (K, R) deltas of the rows at every scale; clean: (B,) losses or None."""
    deltas = torch.empty(len(grid), len(rows), dtype=torch.float64)
    at_once = _at_once(method, len(rows))
    perturbation, per_row = method.perturbation, method.objective.per_row

    def work(index: slice) -> int:
        chunk = rows[index]
        chunk_inputs = take(inputs, chunk.owner) if per_row else inputs
        keys = NoiseKeys.of(seed, _STEP, chunk.owner, chunk.query, int(chunk.group[0]))
        if at_once:
            deltas[:, index] = _every_scale(forward, inputs, method, chunk, keys, grid)
            return 1
        noise, start = perturbation.draw(keys), None if clean is None else clean[chunk.owner]
        for scale, results in zip(grid, deltas, strict=True):
            losses = []
            for sign in method.estimator.signs:
                with perturbation.applied(noise, sign * scale):
                    losses.append(method.objective(forward, chunk_inputs).sums.double().cpu())
            results[index] = method.estimator.deltas(torch.stack(losses), start, scale)
        return 1

    lengths = (
        rows.stretches(within_groups=perturbation.shares_noise) if per_row else [1] * len(rows)
    )
    in_chunks(lengths, work, ChunkPlanner.of(method.rows_per_forward), whole=True)
    return deltas


def _at_once(method: Method, queries: int) -> bool:
    """Return whether all scales go into one forward: where every forward fetches weights, or there
    are few queries.
    """
    few = queries <= _LOOKS or ChunkPlanner.of(method.rows_per_forward).fetches
    return few and method.objective.per_row and isinstance(method.perturbation, RowwiseNoise)


def _every_scale(
    forward: Forward,
    inputs: Inputs,
    method: Method,
    rows: Rows,
    keys: NoiseKeys,
    grid: tuple[float, ...],
) -> Tensor:
    """Return (K, R) deltas of rows at every scale from one forward, the clean rows included."""
    signs = method.estimator.signs
    steps = torch.tensor([sign * scale for scale in grid for sign in signs], dtype=torch.float32)
    clean = rows.owner.unique() if method.estimator.baseline else rows.owner[:0]
    owner = torch.cat([clean, rows.owner.repeat(len(steps))])
    row_seeds = np.concatenate([np.zeros(len(clean), np.uint64), np.tile(keys.rows, len(steps))])
    multiples = torch.cat([torch.zeros(len(clean)), steps.repeat_interleave(len(rows))])
    noise = method.perturbation.draw(NoiseKeys(row_seeds, keys.group)).times(multiples)
    with method.perturbation.applied(noise, 1.0):
        sums = method.objective(forward, take(inputs, owner)).sums.double().cpu()
    start = sums[torch.searchsorted(clean, rows.owner)] if len(clean) else None
    found = sums[len(clean) :].view(len(grid), len(signs), len(rows))
    pairs = zip(found, grid, strict=True)
    return torch.stack([method.estimator.deltas(losses, start, scale) for losses, scale in pairs])
