"""What every allocator is, and the simplest budget rules.

Counts are fixed before the noise is drawn: an allocator sees the clean forward and the past only.
That, and the weight `1 / n_i` of every row, keeps the gradient estimate unbiased whatever an
allocator does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..base.state import State
from ..errors import ConfigurationError


@dataclass(frozen=True)
class SampleFeatures:
    """What an allocator may look at: the clean forward and the past, never this step's noise.

    Attributes:
        losses: (B,) float32, loss sums of the clean forward.
        residuals: (B,) float32 norm of the loss's gradient by the model's outputs, or None where it
            is unknown.
        step: optimizer steps done before this one.
        position: index of the first sample in the global batch of this optimizer step.
        epoch: epochs done, with fraction.
        seed: the run's seed.
        lengths: (B,) number of loss elements (tokens, labels, ...), or None where it is unknown.
        ids: (B,) the samples' places in the data set, or None where they are unknown.

    Example:
        >>> import torch
        >>> from hf_flops.allocators import SampleFeatures
        >>> SampleFeatures(losses=torch.tensor([0.5, 2.0]), step=3).step
        3
    """

    losses: Tensor
    residuals: Tensor | None = None
    step: int = 0
    position: int = 0
    epoch: float = 0.0
    seed: int = 0
    lengths: Tensor | None = None
    ids: tuple[int, ...] | None = None


class Allocator(Protocol):
    """Gives each sample its number of queries.

    Attributes:
        needs_clean: whether the clean forward must run before counts can be given.
        weighted: whether rows carry the unbiased weight `1 / n_i`.
        shuffled: whether rows are cut at random into groups that share noise, instead of one group
            per query.
    """

    needs_clean: bool
    weighted: bool
    shuffled: bool

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """Return (B,) int64, each at least 1, summing to `budget`."""
        ...

    def update(self, features: SampleFeatures, counts: Tensor, mean_squares: Tensor) -> None:
        """Learn from a finished step; mean_squares: (B,) mean of each sample's squared deltas
        (NaN where none).
        """
        ...

    def state_dict(self) -> State:
        """Return what a resume needs, as JSON-serialisable values."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        ...


@runtime_checkable
class TwoRoundAllocator(Protocol):
    """What an allocator has beside the rest if a pilot round is to fix the counts of a second
    round.
    """

    def pilot(self, features: SampleFeatures, budget: int) -> tuple[Tensor, Tensor] | None:
        """Return the pilot's counts (B,) int64, and its weight (B,) in each sample's estimate; None
        for no pilot.
        """
        ...

    def second_counts(
        self, features: SampleFeatures, squares: Tensor, pilot: Tensor, shares: Tensor, budget: int
    ) -> Tensor:
        """Return (B,) int64, the counts of the second round, each at least 1, summing to `budget`.

        Args:
            features: of the clean forward.
            squares: (B,) mean squared deltas of the pilot, NaN where none is finite.
            pilot: (B,) the pilot's counts.
            shares: (B,) the pilot's weights.
            budget: queries that the pilot left.
        """
        ...


def check_budget(samples: int, budget: int) -> None:
    """Refuse a budget that leaves a sample without a query."""
    if samples < 1 or budget < samples:
        raise ConfigurationError(
            f"A budget of {budget} queries cannot give each of {samples} samples at least one."
        )


def equal_counts(samples: int, budget: int) -> Tensor:
    """Split a budget evenly; the first samples take the remainder. Returns (B,) int64."""
    check_budget(samples, budget)
    return torch.tensor([budget // samples + (i < budget % samples) for i in range(samples)])


def finite(values: Tensor) -> Tensor:
    """Return values (B,) as float64 on the CPU, those that are not finite replaced by the largest
    finite one, or 0.
    """
    values = values.detach().cpu().double()
    known = values.isfinite()
    return torch.where(known, values, values[known].max() if bool(known.any()) else 0.0)


class Memoryless:
    """The part of an allocator that learns nothing."""

    needs_clean = True
    weighted = True
    shuffled = False

    def update(self, features: SampleFeatures, counts: Tensor, mean_squares: Tensor) -> None:
        """Nothing is learned."""
        del features, counts, mean_squares

    def state_dict(self) -> State:
        """See `Allocator.state_dict`."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """See `Allocator.load_state_dict`."""
        del state
