"""Rows: which sample and which query each row of a forward pass belongs to."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchPosition:
    """Position of a batch in the run; it determines all noise.

    Attributes:
        seed: the run's seed.
        step: optimizer steps done before this one.
        position: index of the batch's first sample in the global batch of this optimizer step.
        epoch: epochs done, with fraction.
        ids: the samples' indices in the data set, if known; the noise does not depend on them.

    Examples:
        >>> BatchPosition(seed=1, step=3) == BatchPosition(1, 3, 0, 0.0, None)
        True
    """

    seed: int = 0
    step: int = 0
    position: int = 0
    epoch: float = 0.0
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Rows:
    """The query rows of a step, in the order in which they go through the model.

    Attributes:
        owner: (R,) int64, the sample of the batch that the row repeats.
        query: (R,) int64, which query of its sample the row is, from 0.
        group: (R,) int64, non-decreasing; rows of a group have the same noise if noise is shared.
        weight: (R,) float32, weight of the row's delta in the gradient: `1 / (N n_owner)`.
    """

    owner: Tensor
    query: Tensor
    group: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: slice | Tensor) -> Rows:
        return Rows(*(getattr(self, field.name)[index] for field in fields(self)))

    def then(self, other: Rows) -> Rows:
        """Return these rows followed by others."""
        return Rows(
            *(
                torch.cat([getattr(self, field.name), getattr(other, field.name)])
                for field in fields(self)
            )
        )

    def order(self) -> Tensor:
        """Return the permutation (R,) that sorts the rows by sample and query."""
        return torch.argsort(
            self.owner * (int(self.query.max()) + 1 if len(self) else 1) + self.query
        )

    def sorted(self) -> Rows:
        """Return the rows sorted by sample and query."""
        return self[self.order()]

    def stretches(self, *, within_groups: bool) -> list[int]:
        """Return the lengths of stretches that a chunk must not cross: all rows, or those of each
        group if `within_groups`.
        """
        return (
            torch.unique_consecutive(self.group, return_counts=True)[1].tolist()
            if within_groups
            else [len(self)]
        )

    def lacking(self, deltas: Tensor, samples: int) -> Tensor:
        """Return the correction (R,) that redistributes the weight of a sample's non-finite rows
        over its other rows.

        Args:
            deltas: (R,) float32.
            samples: B.
        """
        total, kept = torch.zeros(2, samples)
        total.index_add_(0, self.owner, self.weight)
        kept.index_add_(0, self.owner, self.weight * deltas.isfinite())
        share = torch.where(kept > 0, total / kept.clamp(min=1e-30) - 1, 0.0)[self.owner]
        return torch.where(deltas.isfinite() & (share > 1e-6), deltas * self.weight * share, 0.0)


def expand(
    counts: Tensor,
    normalizer: float,
    *,
    weighted: bool = True,
    share: Tensor | float = 1.0,
    after: Tensor | None = None,
) -> Rows:
    """Lay out `counts[i]` query rows for each sample, query by query.

    Query k of every sample forms group k: with shared noise this is the simultaneous perturbation
    of the whole batch (SPSA). The weight `1 / n_i` keeps the estimate unbiased whatever the counts.
    Where counts are random and may be 0, the share `n_i / E n_i` makes it `1 / E n_i`, which keeps
    the estimate unbiased over the draw.

    Args:
        counts: (B,) int64, queries per sample.
        normalizer: N, the number of loss elements that the objective averages over.
        weighted: False gives every row the same weight, as the published code does, which is
            biased.
        share: (B,) total weight of these rows in their sample's estimate; with two rounds, the
            other has the rest.
        after: (B,) queries of each sample in earlier rounds.
    """
    samples = len(counts)
    owner = torch.repeat_interleave(torch.arange(samples), counts)
    query = torch.arange(len(owner)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    per_sample = (
        counts.clamp(min=1).float() if weighted else torch.full((samples,), len(owner) / samples)
    )
    weight = (share / (normalizer * per_sample)).float()[owner]
    if after is not None:
        query = query + after[owner]
    order = torch.argsort(query * samples + owner)
    return Rows(owner[order], query[order], query[order], weight[order])
