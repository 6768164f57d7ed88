"""Shares become whole counts that spend the budget exactly, and the integer optimum is one."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flops import ConfigurationError
from hf_flops.allocators import equal_counts, optimal_counts
from hf_flops.allocators import proxy as proxies
from hf_flops.allocators.rounding import one_and_share, proportional, rounded

SIGMA = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1.0, 1.0, float("inf"), float("nan")]))
SIGMAS = st.lists(SIGMA, min_size=1, max_size=12).map(torch.tensor)
SHARES = st.lists(
    st.one_of(st.floats(-10, 1e6), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12
).map(lambda values: torch.tensor(values, dtype=torch.float64))
EXTRA = st.one_of(st.integers(0, 60), st.sampled_from([10**6, 10**6 + 7]))


def proxy(sigma, counts):
    return float(proxies(sigma.double() ** 2, counts))


@given(SIGMAS, st.integers(0, 200))
def test_counts_are_whole_and_spend_the_budget(sigma, extra):
    counts = optimal_counts(sigma, len(sigma) + extra)
    assert counts.dtype == torch.int64
    assert counts.min() >= 1
    assert counts.sum() == len(sigma) + extra


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4).map(torch.tensor), st.integers(0, 7))
def test_the_integer_optimum_is_found(sigma, extra):
    budget = len(sigma) + extra
    options = itertools.product(range(1, extra + 2), repeat=len(sigma))
    best = min(proxy(sigma, torch.tensor(option)) for option in options if sum(option) == budget)
    assert proxy(sigma, optimal_counts(sigma, budget)) == pytest.approx(best, rel=1e-9)


@given(SIGMAS, st.integers(0, 300))
def test_no_exchange_of_one_query_helps(sigma, extra):
    sigma = sigma.nan_to_num(0.0, posinf=0.0)
    counts = optimal_counts(sigma, len(sigma) + extra)
    squares = sigma.double() ** 2
    gain = (squares / (counts * (counts + 1))).max()
    loss = torch.where(counts > 1, squares / (counts * (counts - 1)).clamp(min=1), torch.inf).min()
    assert gain <= loss + 1e-9 * squares.max()


@given(st.floats(1e-3, 1e3), st.integers(1, 20), st.integers(0, 100))
def test_equal_sigmas_give_equal_counts(value, samples, extra):
    counts = optimal_counts(torch.full((samples,), value), samples + extra)
    assert counts.max() - counts.min() <= 1


@given(SIGMAS, st.integers(0, 200))
def test_predicted_variance_is_never_above_that_of_equal_counts(sigma, extra):
    sigma = sigma.nan_to_num(0.0, posinf=0.0)
    budget = len(sigma) + extra
    assert proxy(sigma, optimal_counts(sigma, budget)) <= proxy(
        sigma, equal_counts(len(sigma), budget)
    ) * (1 + 1e-9)


def test_the_largest_sigmas_get_neyman_shares_of_a_large_budget():
    sigma = torch.tensor([1.0, 2.0, 7.0])
    assert optimal_counts(sigma, 10**6).tolist() == [100_000, 200_000, 700_000]


@pytest.mark.parametrize("counts", [equal_counts, lambda n, b: optimal_counts(torch.ones(n), b)])
def test_a_budget_below_one_query_per_sample_is_refused(counts):
    with pytest.raises(
        ConfigurationError, match="budget of 3 queries cannot give each of 4 samples"
    ):
        counts(4, 3)


@given(SHARES, EXTRA)
def test_real_counts_are_rounded_to_their_neighbours(shares, extra):
    budget = len(shares) + extra
    real = one_and_share(shares, budget)
    assert real.min() >= 1
    assert float(real.sum()) == pytest.approx(budget)
    counts = rounded(real, budget)
    assert counts.min() >= 1
    assert counts.sum() == budget
    assert (counts - real).abs().max() < 1 + 1e-6


def test_the_largest_remainders_are_rounded_up():
    assert rounded(torch.tensor([1.2, 2.7, 3.6, 2.5]).double(), 10).tolist() == [1, 3, 4, 2]
    # however wrong the sum
    assert rounded(torch.tensor([1.0, 1.0, 1.0]).double(), 8).tolist() == [3, 3, 2]
    assert rounded(torch.tensor([1.0, 5.0, 5.0]).double(), 7).sum() == 7


@given(SHARES, EXTRA)
def test_proportional_counts_are_the_best_real_ones(shares, extra):
    shares, budget = shares.clamp(min=0), len(shares) + extra
    real = proportional(shares, budget)
    assert real.min() >= 1 - 1e-9
    if float(shares.max()) > 0:
        assert float(real.sum()) == pytest.approx(budget)
        assert proxy(shares, real) <= proxy(shares, optimal_counts(shares, budget)) * (1 + 1e-9)
