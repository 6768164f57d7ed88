import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flops.counters import seeds, uniforms
from hf_flops.perturbations.noise import DISTRIBUTIONS, NoiseKeys, draw

COUNTER = st.integers(0, 2**40)


@given(st.integers(-(2**70), 2**70), COUNTER, COUNTER)
def test_seeds_depend_on_every_counter_and_its_place(seed, first, second):
    one = int(seeds(seed, first, second)[0])
    assert one == int(seeds(seed, np.array([first]), second)[0])
    others = [seeds(seed + 1, first, second), seeds(seed, first + 1, second), seeds(seed, first, second + 1)]
    if first != second:
        others.append(seeds(seed, second, first))
    assert all(int(other[0]) != one for other in others)


def test_uniforms_lie_in_the_unit_interval_and_look_uniform():
    values = uniforms(seeds(3, np.arange(20_000)))
    assert values.min() >= 0
    assert values.max() < 1
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(2000, abs=200)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_noise_is_standardised_and_uncorrelated(distribution):
    noise = draw(distribution, seeds(0, np.arange(4000)), 67).double()
    assert noise.shape == (4000, 67)
    torch.testing.assert_close(noise.mean(0), torch.zeros(67).double(), atol=0.08, rtol=0)
    torch.testing.assert_close(noise.T @ noise / 4000, torch.eye(67).double(), atol=0.1, rtol=0)
    rows = noise[:200] @ noise[:200].T / 67
    assert (rows - rows.diag().diag()).abs().max() < 0.8


def test_rademacher_noise_is_signs():
    assert draw("rademacher", seeds(1, np.arange(5)), 130).abs().eq(1).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_row_does_not_depend_on_the_rows_drawn_with_it(distribution):
    keys = seeds(0, np.arange(6))
    together = draw(distribution, keys, 33)
    for row in range(6):
        assert draw(distribution, keys[row : row + 1], 33)[0].equal(together[row])


def test_shared_noise_has_a_stream_of_its_own():
    keys = NoiseKeys.of(0, 3, torch.arange(50), torch.zeros(50, dtype=torch.int64), group=0)
    assert keys.group not in keys.rows.tolist()
    assert keys.group == NoiseKeys.of(0, 3, torch.tensor([7]), torch.tensor([9]), group=0).group


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_global_generators_are_left_alone(distribution):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    draw(distribution, seeds(0, np.arange(3)), 100)
    assert torch.get_rng_state().equal(before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
