"""Rounds of queries: one, or two where the allocator wants a pilot. This file lays out the rows of
a round, runs them chunk by chunk, and adds their noise to the sum.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..allocators import (
    Allocator,
    RandomisedAllocator,
    SampleFeatures,
    TwoRoundAllocator,
    equal_counts,
)
from ..base.prng import seeds
from ..base.rows import Rows, expand
from ..base.transfer import onto, to_host
from ..distributed.noise_sum import NoiseSum
from ..estimators import Chain
from ..estimators.delta_chain import ChunkDeltas
from ..perturbations.base import DrawnNoise
from .clean_forward import CleanPass
from .diagnostics import mean_squares
from .queries import Queries, QueryResults


def all_queries(
    clean: CleanPass, chain: Chain, sums: NoiseSum, features: SampleFeatures
) -> QueryResults:
    """Run all queries, in two rounds where the allocator wants a pilot."""
    allocator, budget = clean.method.allocator, clean.budget
    if not clean.method.objective.per_row:
        return run_round(clean, chain, sums, equal_counts(clean.units, budget))
    plan = allocator.pilot(features, budget) if isinstance(allocator, TwoRoundAllocator) else None
    if plan is None:
        return run_round(clean, chain, sums, *counts_and_shares(allocator, features, budget))
    assert isinstance(allocator, TwoRoundAllocator)
    pilot, weights = plan
    first = run_round(clean, chain, sums, pilot, share=weights)
    squares = mean_squares(first.rows, first.deltas, clean.units)
    left = budget - len(first.rows)
    counts = allocator.second_counts(features, squares, pilot, weights, left)
    return first.then(run_round(clean, chain, sums, counts, share=1 - weights, after=pilot))


def counts_and_shares(
    allocator: Allocator, features: SampleFeatures, budget: int
) -> tuple[Tensor, Tensor | float]:
    """Return the counts (B,) of a single round and the total weight of each sample's rows, which is
    1 in expectation if counts are random.
    """
    counts = allocator.counts(features, budget)
    if not isinstance(allocator, RandomisedAllocator):
        return counts, 1.0
    return counts, counts / allocator.expected_counts(features, budget)


def lay_out(
    clean: CleanPass, counts: Tensor, share: Tensor | float = 1.0, after: Tensor | None = None
) -> Rows:
    """Return the rows of `counts[i]` queries for each sample; for `share` and `after` see
    `expand`.
    """
    allocator, place = clean.method.allocator, clean.place
    # N is known only after a forward has counted the loss elements: rows are laid out with N = 1.
    # Counts may round differently on another machine, so all processes use those of process 0.
    group = clean.method.exchange.group
    counts = group.broadcast(counts.int()).long()
    share = group.broadcast(share) if isinstance(share, Tensor) else share
    rows = expand(counts, 1.0, weighted=allocator.weighted, share=share, after=after)
    if not (allocator.shuffled and clean.method.objective.per_row):
        return rows
    order = seeds(place.seed, place.step, rows.owner.numpy(), rows.query.numpy()).argsort()
    return replace(rows[torch.from_numpy(order)], group=torch.arange(len(rows)) // clean.units)


def run_round(
    clean: CleanPass,
    chain: Chain,
    sums: NoiseSum,
    counts: Tensor,
    share: Tensor | float = 1.0,
    after: Tensor | None = None,
) -> QueryResults:
    """Run `counts[i]` queries of each sample and add their noise to the sum; each process runs its
    part of them.
    """
    method, queries, exchange = clean.method, queries_of(clean), clean.method.exchange
    shares_noise, rows = method.perturbation.shares_noise, lay_out(clean, counts, share, after)
    parts = exchange.parts(rows, clean.feed, shares_noise=shares_noise, chunk=clean.planner.given)
    own = parts[exchange.group.rank]
    if exchange.group.world > 1 and (clean.losses is None or clean.recording.complete):
        clean.recording.extend(clean.feed.whole, own.owner)
    results: list[Tensor] = []  # of each chunk: deltas, losses, elements

    def work(index: slice) -> int:
        chunk = own[index]
        noise = queries.noise(chunk)
        deltas, losses, elements, columns = measure(queries, chain, chunk, noise)
        weight = onto(chunk.weight, deltas.values.device)
        coefficients = torch.where(deltas.values.isfinite(), deltas.values * weight, 0.0)
        weighted, innovation = sums.weighted(noise, coefficients, deltas.errors)
        # Memory may run out above; nothing large is allocated below.
        results.append(torch.stack([deltas.values, losses, elements], 1))
        sums.add(chunk, coefficients, weighted, method.perturbation.dimension(noise))
        chain.update(deltas, innovation)
        return columns

    with method.objective.deferred():
        queries.in_chunks(own, work, clean.planner)
    (told,) = to_host(torch.cat(results) if results else torch.zeros(0, 3))
    # Without a clean forward, losses and elements of the rows replace it.
    rows, told, mine = exchange.gathered(parts, told[:, :1] if clean.losses is not None else told)
    measured = told[:, 0]
    return QueryResults(rows, measured, chain.of_round(measured, rows), told[:, 1:], mine)


def queries_of(clean: CleanPass) -> Queries:
    """Return the object that runs rows of a batch under noise."""
    return Queries(clean.recording, clean.method, clean.place, clean.feed, clean.samples)


def measure(
    queries: Queries, chain: Chain, chunk: Rows, noise: DrawnNoise
) -> tuple[ChunkDeltas, Tensor, Tensor, int]:
    """Return a chunk's deltas, losses (R,), loss elements (R,), and the number of columns of a row;
    its logits are freed.
    """
    evaluation = queries.evaluate(chunk, noise)
    deltas = chain.of_chunk(ChunkDeltas(evaluation.losses), evaluation)
    device = deltas.values.device
    losses = onto(evaluation.losses.mean(0).float(), device)
    return deltas, losses, onto(evaluation.elements, device), evaluation.columns
