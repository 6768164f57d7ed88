"""Allocators: how many queries each sample of a batch deserves."""

from .authors import AuthorsBernoulli
from .base import Allocator, check_budget, equal_counts
from .bernoulli import Bernoulli
from .gaussian import Gaussian
from .loss import LossProportional, LossRank
from .optimal import Optimal
from .rounding import optimal_counts, proxy
from .uniform import Uniform

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "AuthorsBernoulli",
    "Bernoulli",
    "Gaussian",
    "LossProportional",
    "LossRank",
    "Optimal",
    "Uniform",
    "check_budget",
    "equal_counts",
    "optimal_counts",
    "proxy",
]

ALLOCATORS: dict[str, type[Allocator]] = {
    "optimal": Optimal,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "loss_proportional": LossProportional,
    "loss_rank": LossRank,
    "uniform": Uniform,
    "authors_bernoulli": AuthorsBernoulli,
}
