"""The clean forward of a step: the batch as it is, each process running its part of the samples."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import ChunkPlanner, in_chunks
from .control_variates import MOST_LOGITS
from .method import Method
from .objectives import Forward, Objective, RowLosses
from .padding import Feed
from .rows import take


@dataclass(frozen=True)
class Clean:
    """What the clean forward found.

    Attributes:
        losses: of all samples.
        objective: what queries are judged by; it may depend on what was found.
        own: of the samples that this process ran, with slopes where they were asked for.
        head_inputs: (b, ...) what the closed-form head was given for these; empty without a head.
    """

    losses: RowLosses
    own: RowLosses
    head_inputs: Tensor
    objective: Objective


def clean_forward(forward: Forward, method: Method, samples: int, feed: Feed, planner: ChunkPlanner) -> Clean:
    """Run the batch, this process's samples all at once unless they do not fit in memory.

    Where processes share scalars only, the gradient of a closed-form head must not travel: then each runs all samples.

    Args:
        forward: runs the model.
        method: how the gradient is estimated.
        samples: B.
        feed: gives inputs of samples.
        planner: how much fits.
    """
    objective, reuse, head, exchange = method.objective, method.reuse, method.head, method.exchange
    features = method.needs_features
    whole = feed.whole
    if not objective.per_row:
        losses = objective(reuse.through(forward, whole), whole, features=features)
        return Clean(losses, losses, torch.zeros(0), objective)
    pieces, found, seen = [slice(0, samples)], list[RowLosses](), list[Tensor]()
    if not exchange.alone:
        if reuse.remembers:
            reuse.record(forward, whole)
        if samples >= 4 and not (exchange.scalars and head is not None):
            pieces = exchange.share.cut(samples, 2)
    piece = pieces[exchange.share.rank % len(pieces)]
    idle = piece.start == piece.stop  # then some samples are run to see what is found, but not told
    mine = torch.arange(samples)[slice(0, 2) if idle else piece]

    def work(chunk: slice) -> int:
        owner = mine[chunk]
        inputs, columns, cut = whole, feed.columns, None
        if len(owner) == len(mine) < samples and not reuse.complete:
            inputs = take(whole, owner)
            reuse.of_samples(owner, samples)
        elif len(owner) < samples and head is not None:  # what it is given has to have one width
            inputs = take(whole, owner)
        elif len(owner) < samples:
            inputs, columns, cut = feed.of(owner)
        recording = len(owner) == len(mine) and not reuse.complete
        run = reuse.through(forward, inputs, None if inputs is whole or recording else owner, cut)
        watched: AbstractContextManager[list[Tensor]] = nullcontext([]) if head is None else head.watched()
        with watched as heard:
            losses = objective(run, inputs, features=features)
        found.append(losses)
        seen.extend(x.reshape(len(owner), -1) for x in heard)
        return columns

    in_chunks([len(mine)], work, planner, whole=True)
    own = RowLosses.joined(found)
    given = torch.cat(seen) if seen else torch.zeros(0)
    if idle:
        own, given = own.without_rows(), given[:0]
    sizes = [piece.stop - piece.start for piece in pieces]
    # Beyond so many logits there is no control variate, and what it would look at need not travel.
    few = method.control is not None and own.logits is not None and own.logits.shape[1] <= MOST_LOGITS
    losses = own if len(pieces) == 1 else exchange.losses(own, sizes, logits=few or objective.needs_clean)
    if len(pieces) == 1 and exchange.share.rank > 0 and not exchange.scalars:
        own, given = own.without_rows(), given[:0]  # what is summed must be told by one process only
    objective, losses = objective.settled(losses, whole)
    return Clean(losses, own, given, objective)
