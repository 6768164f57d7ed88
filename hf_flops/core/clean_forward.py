"""The clean forward of a step, which runs the batch unperturbed ("clean"). Each process runs its
part of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..allocators import SampleFeatures
from ..base.batch import Inputs, batch_size, take
from ..base.padding import TrimmedBatch
from ..base.rows import BatchPosition
from ..base.transfer import to_host
from ..estimators.control_variate import MOST_LOGITS
from ..objectives import Objective, RowLosses
from ..reuse import Recording
from .chunking import ChunkPlanner, in_chunks
from .method import Method


@dataclass(frozen=True)
class Clean:
    """Results of the clean forward.

    Attributes:
        losses: of all samples.
        own: losses of the samples that this process ran, with slopes if they were requested.
        head_inputs: (b, ...) inputs of the closed-form head for these; empty without a head.
        objective: the objective of the queries, which may depend on the clean losses.
        features: (B, ...) inputs of the head for all samples; None without a head.
    """

    losses: RowLosses
    own: RowLosses
    head_inputs: Tensor
    objective: Objective
    features: Tensor | None = None


@dataclass(frozen=True)
class CleanPass:
    """A batch after its clean forward, if the method needs one.

    Attributes:
        recording: runs the model, by the method's reuse plan.
        method: how the gradient is estimated, with the objective of the batch's queries.
        place: position of the batch in the run.
        feed: the inputs of samples.
        planner: chooses the chunk size.
        samples: B.
        units: number of things that get counts: B samples, or 1 for the batch as a whole.
        budget: queries of all units.
        found: results of the clean forward; None without one.
    """

    recording: Recording
    method: Method
    place: BatchPosition
    feed: TrimmedBatch
    planner: ChunkPlanner
    samples: int
    units: int
    budget: int
    found: Clean | None

    @property
    def losses(self) -> RowLosses | None:
        """Unperturbed losses of all samples."""
        return None if self.found is None else self.found.losses

    def judged_by(self, objective: Objective, losses: RowLosses) -> CleanPass:
        """Return this pass with another objective and the clean losses under that objective."""
        assert self.found is not None
        found = replace(self.found, losses=losses, own=losses, objective=objective)
        return replace(self, method=replace(self.method, objective=objective), found=found)

    @property
    def head_features(self) -> Tensor | None:
        """(B, H) of the head, if its loss has one element per sample and all are known here."""
        features = None if self.found is None else self.found.features
        head = self.method.head
        if features is None or head is None or len(features) != self.samples:
            return None
        return features if features[0].numel() == head.module.in_features else None

    def features(self) -> SampleFeatures:
        """Return the features that the allocator may use, on the CPU."""
        place, losses = self.place, self.losses
        ids = place.ids if place.ids is not None and len(place.ids) == self.units else None
        when = place.step, place.position, place.epoch, place.seed
        if losses is None:
            return SampleFeatures(torch.zeros(self.units), None, *when, None, ids)
        known = [losses.sums, losses.counts.float()]
        known += [] if losses.residuals is None else [losses.residuals]
        sums, counts, *residuals = to_host(*known)
        return SampleFeatures(sums, next(iter(residuals), None), *when, counts, ids)


def clean_pass(
    recording: Recording, inputs: Inputs, method: Method, place: BatchPosition
) -> CleanPass:
    """Run the clean forward if the method needs it; `recording` belongs to `method.reuse`."""
    samples, per_row = batch_size(inputs), method.objective.per_row
    units = samples if per_row else 1
    budget = method.budget(samples) // (samples // units)
    planner = ChunkPlanner.of(method.rows_per_forward)
    feed = TrimmedBatch(inputs, method.trimmed if per_row else frozenset())
    recording.recall(feed.whole, place.ids)
    found = None
    if method.needs_clean:
        found = clean_forward(recording, method, samples, feed, planner)
        method = replace(method, objective=found.objective)
    elif method.exchange.group.world == 1:
        recording.record(feed.whole)
    return CleanPass(recording, method, place, feed, planner, samples, units, budget, found)


def clean_forward(
    recording: Recording, method: Method, samples: int, feed: TrimmedBatch, planner: ChunkPlanner
) -> Clean:
    """Run this process's samples of the batch, all at once if they fit in memory.

    With `reduce="scalars"` the gradient of a closed-form head must not be sent, so every process
    runs all samples.

    Args:
        recording: runs the model, by the method's reuse plan.
        method: how the gradient is estimated.
        samples: B.
        feed: the inputs of samples.
        planner: knows how many rows fit.
    """
    objective, head, exchange = method.objective, method.head, method.exchange
    features = method.needs_features
    whole = feed.whole
    if not objective.per_row:
        losses = objective(recording.batch(whole), whole, features=features)
        return Clean(losses, losses, torch.zeros(0), objective)
    found, seen = list[RowLosses](), list[Tensor]()
    if exchange.group.world > 1 and method.reuse.spans_steps:
        recording.record(whole)
    pieces = exchange.clean_pieces(samples, head=head is not None)
    piece = pieces[exchange.group.rank % len(pieces)]
    idle = (
        piece.start == piece.stop
    )  # two samples are run for the shapes, and their results dropped
    mine = torch.arange(samples)[slice(0, 2) if idle else piece]

    def work(chunk: slice) -> int:
        owner = mine[chunk]
        inputs, columns, cut = whole, feed.columns, None
        part = len(owner) == len(mine) < samples and not recording.complete
        # the inputs of a head must all have the same width
        if part or (len(owner) < samples and head is not None):
            inputs = take(whole, owner)
        elif len(owner) < samples:
            inputs, columns, cut = feed.of(owner)
        if part:
            run = recording.batch(inputs, owner, samples)
        else:
            run = recording.batch(whole) if inputs is whole else recording.rows(inputs, owner, cut)
        watched: AbstractContextManager[list[Tensor]] = (
            nullcontext([]) if head is None else head.watched()
        )
        with watched as heard:
            losses = objective(run, inputs, features=features)
        found.append(losses)
        seen.extend(x.reshape(len(owner), -1) for x in heard)
        return columns

    with objective.deferred():
        in_chunks([len(mine)], work, planner, whole=True)
    own = RowLosses.joined(found)
    given = torch.cat(seen) if seen else torch.zeros(0)
    if idle:
        own, given = own.without_rows(), given[:0]
    losses, all_inputs = own, given
    if len(pieces) > 1:
        losses, all_inputs = gathered(method, own, given, pieces)
    if not exchange.counts_exact(pieces):
        own, given = own.without_rows(), given[:0]
    objective, losses = objective.bind_batch(losses, whole)
    return Clean(losses, own, given, objective, all_inputs if head is not None else None)


def gathered(
    method: Method, own: RowLosses, head_inputs: Tensor, pieces: Sequence[slice]
) -> tuple[RowLosses, Tensor]:
    """Gather the clean losses and the head's inputs of all processes, each of which ran a piece of
    the batch.
    """
    # With more logits there is no control variate, so they need not be sent.
    few = (
        method.control is not None and own.logits is not None and own.logits.shape[1] <= MOST_LOGITS
    )
    sizes = [piece.stop - piece.start for piece in pieces]
    losses = method.exchange.losses(own, sizes, logits=few or method.objective.needs_clean)
    if method.head is None or (method.solver is None and not few):
        return losses, head_inputs
    return losses, method.exchange.group.all_gather(head_inputs, sizes)
