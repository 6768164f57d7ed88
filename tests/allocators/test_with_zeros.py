"""Random counts that may be zero: each is its expected count rounded up or down, and right on
average.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flops.allocators import OptimalWithZeros, SampleFeatures
from hf_flops.allocators.with_zeros import systematic_counts

SIGMA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@given(SIGMA, st.integers(1, 40) | st.just(10**6 + 7), st.floats(0, 1, exclude_max=True))
def test_counts_are_expected_counts_rounded_up_or_down(sigma, budget, start):
    expected = budget * sigma / sigma.sum()
    counts = systematic_counts(expected, budget, start)
    assert counts.dtype == torch.int64
    assert counts.sum() == budget
    assert ((counts - expected).abs() < 1 + 1e-6 * budget / 10**6).all()


@given(SIGMA, st.integers(1, 40))
def test_the_mean_over_starts_is_the_expected_count(sigma, budget):
    expected, starts = budget * sigma / sigma.sum(), 500
    mean = sum(systematic_counts(expected, budget, (k + 0.5) / starts) for k in range(starts))
    torch.testing.assert_close(mean.double() / starts, expected, atol=2 / starts, rtol=1e-9)


@given(SIGMA, st.integers(1, 40))
def test_no_sample_is_left_out_for_good(sigma, budget):
    features = SampleFeatures(torch.ones(len(sigma)), residuals=sigma)
    expected = OptimalWithZeros(least_gain=1.0).expected_counts(features, budget)
    assert float(expected.sum()) == pytest.approx(budget)
    assert (expected >= 0.1 * budget / len(sigma)).all()


def test_counts_follow_seed_step_and_position_and_nothing_else():
    residuals = 2.0 ** torch.arange(8)

    def counts(**place):
        features = SampleFeatures(torch.ones(8), residuals=residuals, **place)
        return OptimalWithZeros().counts(features, 8).tolist()

    assert counts(seed=3, step=5, position=16) == counts(seed=3, step=5, position=16)
    for name in ("seed", "step", "position"):
        assert len({tuple(counts(**{name: value})) for value in range(20)}) > 1, name


def test_below_the_least_gain_all_samples_are_alike():
    features = SampleFeatures(torch.ones(4), residuals=torch.tensor([0.1, 0.2, 0.2, 0.3]))
    allocator = OptimalWithZeros()
    assert allocator.expected_counts(features, 2).tolist() == [0.5] * 4
    assert allocator.counts(features, 8).tolist() == [2] * 4
