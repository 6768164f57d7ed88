"""Allocators: how many queries each sample of a batch deserves."""

from .base import (
    Allocator,
    Memoryless,
    PredictingAllocator,
    RandomisedAllocator,
    SampleFeatures,
    TwoRoundAllocator,
    check_budget,
    equal_counts,
)
from .bernoulli import Bernoulli
from .gain import predicted_gain
from .gaussian import Gaussian
from .loss import LossProportional, LossRank
from .optimal import Optimal
from .published import AuthorsBernoulli
from .rounding import optimal_counts, proxy
from .two_stage import TwoStage
from .uniform import Uniform
from .with_zeros import OptimalWithZeros

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "AuthorsBernoulli",
    "Bernoulli",
    "Gaussian",
    "LossProportional",
    "LossRank",
    "Memoryless",
    "Optimal",
    "OptimalWithZeros",
    "PredictingAllocator",
    "RandomisedAllocator",
    "SampleFeatures",
    "TwoRoundAllocator",
    "TwoStage",
    "Uniform",
    "check_budget",
    "equal_counts",
    "optimal_counts",
    "predicted_gain",
    "proxy",
]

ALLOCATORS: dict[str, type[Allocator]] = {
    "optimal": Optimal,
    "optimal_with_zeros": OptimalWithZeros,
    "two_stage": TwoStage,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "loss_proportional": LossProportional,
    "loss_rank": LossRank,
    "uniform": Uniform,
    "authors_bernoulli": AuthorsBernoulli,
}
