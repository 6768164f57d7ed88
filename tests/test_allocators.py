import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flops import ConfigurationError
from hf_flops.allocators import ALLOCATORS, AuthorsBernoulli, Optimal, equal_counts, optimal_counts
from hf_flops.rows import Features

SIGMA = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1.0, 1.0, float("inf"), float("nan")]))
SIGMAS = st.lists(SIGMA, min_size=1, max_size=12).map(torch.tensor)


def proxy(sigma, counts):
    """J(n) of FLOPS section 4."""
    return float((sigma.double() ** 2 / counts).sum())


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
    assert proxy(sigma, optimal_counts(sigma, budget)) <= proxy(sigma, equal_counts(len(sigma), budget)) * (1 + 1e-9)


def test_the_largest_sigmas_get_neyman_shares_of_a_large_budget():
    sigma = torch.tensor([1.0, 2.0, 7.0])
    assert optimal_counts(sigma, 10**6).tolist() == [100_000, 200_000, 700_000]


@pytest.mark.parametrize("counts", [equal_counts, lambda n, b: optimal_counts(torch.ones(n), b)])
def test_a_budget_below_one_query_per_sample_is_refused(counts):
    with pytest.raises(ConfigurationError, match="budget of 3 queries cannot give each of 4 samples"):
        counts(4, 3)


@settings(max_examples=50)
@given(st.sampled_from(sorted(ALLOCATORS)), st.integers(1, 9), st.integers(0, 60), st.integers(0, 10**6))
def test_every_allocator_spends_its_budget_whatever_it_sees(name, samples, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    allocator = ALLOCATORS[name]()
    for step in range(4):
        losses = torch.randn(samples, generator=generator).abs()
        features = Features(losses, losses.sqrt() if step % 2 else None, step=step, seed=seed, epoch=step / 2)
        counts = allocator.counts(features, samples + extra)
        assert counts.shape == (samples,)
        assert counts.min() >= 1
        assert counts.sum() == samples + extra
        allocator.update(features, counts, torch.rand(samples, generator=generator))


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_a_resumed_allocator_decides_as_the_old_one(name):
    generator = torch.Generator().manual_seed(0)
    old, new = ALLOCATORS[name](), ALLOCATORS[name]()
    for step in range(6):
        losses = torch.rand(8, generator=generator)
        old.update(Features(losses, step=step), torch.full((8,), 4), losses**1.5 * 3)
    new.load_state_dict(old.state_dict())
    features = Features(torch.rand(8, generator=generator))
    assert old.counts(features, 80).equal(new.counts(features, 80))


def test_optimal_follows_residuals_where_they_are_known():
    features = Features(torch.ones(3), residuals=torch.tensor([1.0, 1.0, 3.0]))
    assert Optimal().counts(features, 50).tolist() == [10, 10, 30]


def test_optimal_learns_the_power_of_the_loss_from_deltas():
    allocator, generator = Optimal(), torch.Generator().manual_seed(0)
    losses = torch.tensor([0.5, 1.0, 4.0])
    assert allocator.counts(Features(losses), 30).tolist() == [10, 10, 10]  # nothing is known yet
    for step in range(20):
        seen = torch.rand(16, generator=generator) + 0.1
        # mean squared delta = loss, so sigma = sqrt(loss)
        allocator.update(Features(seen, step=step), torch.full((16,), 16), seen)
    expected = optimal_counts(losses.sqrt(), 300)
    assert (allocator.counts(Features(losses, step=20), 300) - expected).abs().max() <= 6


def test_the_authors_heuristic_halves_easy_samples_and_favours_no_other():
    losses = torch.cat([torch.zeros(500), torch.ones(500)])
    counts = AuthorsBernoulli().counts(Features(losses, seed=1), 8000)
    halved = counts[:500] == 4
    assert 0.2 < halved.float().mean() < 0.4
    assert counts[500:].min() >= 8
    assert counts[500:].max() - counts[:500][~halved].min() <= 1
    later = AuthorsBernoulli().counts(Features(losses, seed=1, epoch=1.0), 8000)
    assert (later == 4).float().mean() < 0.03
