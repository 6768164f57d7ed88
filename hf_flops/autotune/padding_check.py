"""A check with the first batches of whether padding may be cut off."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from ..base.batch import Inputs, batch_size, take
from ..base.padding import SIDES, TrimmedBatch, real_tokens, trim, window
from ..base.probe import Attempt, Probe, agree
from ..objectives import Forward, Objective
from ..reuse import Recording, ReusePlan


def padding_is_idle(
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    precision: float = 1e-4,
    *,
    known: Collection[str] = (),
) -> dict[str, bool]:
    """Return for each padded side whether a sample's loss is the same without that padding.

    With padding at the left it is not where a model counts positions from the first column, as
    GPT-2 does.

    Args:
        objective: what is minimised, per row.
        forward: runs the model.
        inputs: a batch.
        precision: see `precision_of`.
        known: sides that need no check.
    """
    real, idle = real_tokens(inputs), dict[str, bool]()
    for side in SIDES:
        if real is None or side in known:
            continue
        cut = [window(row[None], frozenset([side])) for row in real]
        row = min(range(len(cut)), key=lambda i: cut[i].stop - cut[i].start)
        probe = Probe(objective, forward, take(inputs, torch.tensor([row])), precision / 20)
        padded = cut[row].stop - cut[row].start < real.shape[1]
        if padded and bool(probe.losses.sums.isfinite()):
            short = trim(probe.inputs, cut[row])
            idle[side] = probe.difference(f"Padding at the {side} is kept", inputs=short) is None
    return idle


def with_cropping(
    plan: ReusePlan,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    sides: frozenset[str],
    precision: float = 1e-4,
) -> ReusePlan:
    """Check whether losses of rows stay the same with recorded outputs cut to their own columns.

    The outputs to cut, `token_axes`, have as many columns as the inputs both for the batch and for
    a shorter sample alone.

    Args:
        plan: what runs once per sample.
        objective: what is minimised, per row.
        forward: runs the model.
        inputs: a batch.
        sides: where padding may be cut off.
        precision: see `precision_of`.

    Returns:
        The plan with the answer; unchanged if no sample is shorter.
    """
    feed = TrimmedBatch(inputs, sides)
    rows = [feed.of(torch.tensor([i, i])) for i in range(batch_size(inputs))]
    short = min(range(len(rows)), key=lambda i: rows[i][1])
    pair, _, cut = rows[short]
    if cut is None:
        return plan
    with Attempt("Chunks with less padding run through the whole model"):
        with Recording(plan, forward) as recording:
            wanted, axes = objective(recording.batch(pair), pair).sums, recording.token_axes()
        with Recording(plan, forward) as recording:
            objective(recording.batch(feed.whole), feed.whole)
            cropping = replace(plan, crop_padding=True, token_axes=axes & recording.token_axes())
            recording.adopt(cropping)
            sums = objective(recording.rows(pair, torch.tensor([short, short]), cut), pair).sums
        if agree(sums, wanted, precision / 20, 1.0):
            return cropping
    return replace(plan, crop_padding=False)
