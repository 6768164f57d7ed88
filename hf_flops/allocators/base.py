"""The interface of allocators, and the simplest budget rules.

Counts are fixed before the noise is drawn: an allocator uses the clean forward and past steps only.
Together with the weight `1 / n_i` of every row this keeps the gradient estimate unbiased for every
allocator.
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
    """What an allocator may use: results of the clean forward, never this step's noise.

    Attributes:
        losses: (B,) float32, loss sums of the clean forward.
        residuals: (B,) float32 norm of the loss's gradient by the model's outputs, or None if it
            is unknown.
        step: optimizer steps done before this one.
        position: index of the first sample in the global batch of this optimizer step.
        epoch: epochs done, with fraction.
        seed: the run's seed.
        lengths: (B,) number of loss elements (tokens, labels, ...), or None if unknown.
        ids: (B,) the samples' indices in the data set, or None if unknown.

    Examples:
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
        shuffled: whether rows are divided at random into groups that share noise, instead of one
            group per query.
    """

    needs_clean: bool
    weighted: bool
    shuffled: bool

    def counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """Return (B,) int64, summing to `budget`; each at least 1, but 0 for a
        `RandomisedAllocator`.
        """
        ...

    def update(self, features: SampleFeatures, counts: Tensor, mean_squares: Tensor) -> None:
        """Update with a finished step; mean_squares: (B,) mean of each sample's squared deltas, NaN
        if there is no finite one.
        """
        ...

    def state_dict(self) -> State:
        """Return the state that a resumed run needs, as JSON-serialisable values."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Load a state from `state_dict`."""
        ...


@runtime_checkable
class TwoRoundAllocator(Protocol):
    """Additional methods of an allocator with a pilot round that determines the second round."""

    def pilot(self, features: SampleFeatures, budget: int) -> tuple[Tensor, Tensor] | None:
        """Return the pilot's counts (B,) int64 and its weights (B,) in each sample's estimate, or
        None for no pilot.
        """
        ...

    def second_counts(
        self, features: SampleFeatures, squares: Tensor, pilot: Tensor, shares: Tensor, budget: int
    ) -> Tensor:
        """Return (B,) int64, the counts of the second round, each at least 1, summing to `budget`.

        Args:
            features: of the clean forward.
            squares: (B,) mean squared deltas of the pilot, NaN if none is finite.
            pilot: (B,) the pilot's counts.
            shares: (B,) the pilot's weights.
            budget: remaining queries.
        """
        ...


@runtime_checkable
class RandomisedAllocator(Protocol):
    """Additional method of an allocator with random counts, which may be 0.

    Counts are a function of features and past steps, the seed among them. `needs_clean` is
    True: the loss of a sample without queries is known from the clean forward alone.
    """

    def expected_counts(self, features: SampleFeatures, budget: int) -> Tensor:
        """Return (B,) float64, all positive, the mean of `counts` over seeds; each row of sample i
        has the weight `1 / expected_counts[i]`.
        """
        ...


@runtime_checkable
class PredictingAllocator(Protocol):
    """Additional method of an allocator that predicts sigmas; their gain is logged."""

    def predict(self, features: SampleFeatures) -> Tensor:
        """Return (B,) float64, predicted sigmas up to a common factor."""
        ...


def check_budget(samples: int, budget: int) -> None:
    """Raise an error if the budget is less than one query per sample."""
    if samples < 1 or budget < samples:
        raise ConfigurationError(
            f"A budget of {budget} queries cannot give each of {samples} samples at least one."
        )


def equal_counts(samples: int, budget: int) -> Tensor:
    """Split a budget evenly; the first samples take the remainder. Returns (B,) int64."""
    check_budget(samples, budget)
    return torch.tensor([budget // samples + (i < budget % samples) for i in range(samples)])


def finite(values: Tensor) -> Tensor:
    """Return values (B,) as float64 on the CPU; non-finite ones are replaced by the largest finite
    one, or 0.
    """
    values = values.detach().cpu().double()
    known = values.isfinite()
    return torch.where(known, values, values[known].max() if bool(known.any()) else 0.0)


class Memoryless:
    """The part of an allocator without state."""

    needs_clean = True
    weighted = True
    shuffled = False

    def update(self, features: SampleFeatures, counts: Tensor, mean_squares: Tensor) -> None:
        """Do nothing: the allocator has no state."""
        del features, counts, mean_squares

    def state_dict(self) -> State:
        """See `Allocator.state_dict`."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """See `Allocator.load_state_dict`."""
        del state
