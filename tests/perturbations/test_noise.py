import random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flops.base.prng import seeds, uniforms, words
from hf_flops.perturbations import DISTRIBUTIONS, NoiseKeys
from hf_flops.perturbations.noise import draw

COUNTER = st.integers(0, 2**40)


@given(st.integers(-(2**70), 2**70), COUNTER, COUNTER)
def test_seeds_depend_on_every_counter_and_its_place(seed, first, second):
    one = int(seeds(seed, first, second)[0])
    assert one == int(seeds(seed, np.array([first]), second)[0])
    others = [
        seeds(seed + 1, first, second),
        seeds(seed, first + 1, second),
        seeds(seed, first, second + 1),
    ]
    if first != second:
        others.append(seeds(seed, second, first))
    assert all(int(other[0]) != one for other in others)


def test_uniforms_lie_in_the_unit_interval_and_look_uniform():
    values = uniforms(seeds(3, np.arange(20_000)))
    assert values.min() >= 0
    assert values.max() < 1
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(2000, abs=200)


def flat(noise):
    """Return the noise of all rows as (R, d)."""
    return torch.stack(list(noise))


def shapes(*sizes):
    return [torch.Size(size) for size in sizes]


# most are whole words of bits
WORDS = st.lists(st.sampled_from([(64,), (8, 16), (3, 5), (2,)]), min_size=1, max_size=5)
SHAPES = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(torch.Size), min_size=1, max_size=4
)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_noise_is_standardised_and_uncorrelated(distribution):
    noise = flat(draw(distribution, seeds(0, np.arange(4000)), shapes((8, 7), (11,)))).double()
    assert noise.shape == (4000, 67)
    torch.testing.assert_close(noise.mean(0), torch.zeros(67).double(), atol=0.08, rtol=0)
    torch.testing.assert_close(noise.T @ noise / 4000, torch.eye(67).double(), atol=0.1, rtol=0)
    rows = (noise[:400] @ noise[:400].T / 67).tril(-1)
    assert float(rows.square().sum() / (400 * 399 / 2)) == pytest.approx(1 / 67, rel=0.1)


@pytest.mark.parametrize("distribution", ["rademacher", "rank_one"])
def test_signs_are_signs_and_take_a_bit_each(distribution):
    noise = draw(distribution, seeds(1, np.arange(5)), shapes((26, 100), (70,)))
    assert flat(noise).abs().eq(1).all()
    kept = draw(
        distribution, seeds(1, np.arange(5)), shapes((26, 100), (70,)), "meta"
    ).numbers.packed
    assert noise.numbers.packed.numel() == kept.numel() <= 5 * ((26 * 100 + 70) / 8 + 3 * 8)


def test_many_bits_are_drawn_when_they_are_used_and_are_the_same(monkeypatch):
    kept = draw("rademacher", seeds(1, np.arange(5)), shapes((26, 100), (70,)))
    monkeypatch.setattr("hf_flops.perturbations.streams._PACKED", kept.numbers.packed.numel() - 1)
    drawn = draw("rademacher", seeds(1, np.arange(5)), shapes((26, 100), (70,)))
    assert drawn.numbers.packed is None
    assert torch.equal(flat(drawn), flat(kept))
    assert torch.equal(drawn.weighted_sum(torch.arange(5.0)), kept.weighted_sum(torch.arange(5.0)))


def test_the_bits_of_signs_look_random_within_and_between_rows():
    size, rows = 2**16, 24
    signs = flat(
        draw("rademacher", seeds(0, 5, np.arange(rows) // 4, np.arange(rows) % 4), shapes((size,)))
    )
    limit = 5 / size**0.5  # five standard errors
    assert signs.mean(1).abs().max() < limit
    assert (signs @ signs.T / size).tril(-1).abs().max() < limit
    for lag in (1, 2, 7, 8, 31, 32, 63, 64, 1024, 2048):
        assert (signs[:, lag:] * signs[:, :-lag]).mean(1).abs().max() < limit * 1.05
    bits = words(seeds(0, 5, np.arange(rows)), 1024).view(np.uint8)
    expected = bits.size / 256
    assert (
        (np.bincount(bits.ravel(), minlength=256) - expected) ** 2 / expected
    ).sum() < 255 + 5 * (2 * 255) ** 0.5


@given(SHAPES, st.sampled_from(list(DISTRIBUTIONS)))
def test_a_row_does_not_depend_on_the_rows_drawn_with_it(sizes, distribution):
    keys = seeds(0, np.arange(6))
    together = draw(distribution, keys, sizes)
    assert not together[0].equal(together[1]) or together[0].numel() < 20
    for row in range(6):
        assert draw(distribution, keys[row : row + 1], sizes)[0].equal(together[row])


@given(SHAPES, st.sampled_from(list(DISTRIBUTIONS)), st.sampled_from([1, 20, 2**18]))
def test_the_weighted_sum_is_that_of_the_rows_however_they_are_cut(sizes, distribution, block):
    noise = draw(distribution, seeds(0, np.arange(7)), sizes)
    coefficients = torch.randn(7, generator=torch.Generator().manual_seed(0))
    with patch.multiple("hf_flops.perturbations.noise", BLOCK=block, _WIDE=block):
        found = noise.weighted_sum(coefficients)
    torch.testing.assert_close(found, coefficients @ flat(noise))


@given(WORDS, st.sampled_from(list(DISTRIBUTIONS)), st.sampled_from([1, 200, 2**13]))
def test_parameters_whose_noise_adjoins_are_taken_together(sizes, distribution, most):
    noise, rng = (
        draw(distribution, seeds(0, np.arange(7)), shapes(*sizes)),
        torch.Generator().manual_seed(0),
    )
    coefficients, vectors = (
        torch.randn(7, 2, generator=rng),
        torch.randn(3, flat(noise).shape[1], generator=rng),
    )
    with patch.multiple("hf_flops.perturbations.noise", _WIDE=most, _RUN=most):
        torch.testing.assert_close(noise.weighted_sum(coefficients), coefficients.T @ flat(noise))
        torch.testing.assert_close(
            noise.dot(vectors).double(),
            flat(noise).double() @ vectors.double().T,
            rtol=1e-5,
            atol=1e-4,
        )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sums_after_products_have_the_same_bits(distribution):
    rng, own = torch.Generator().manual_seed(0), shapes((8, 24), (64,), (5,))
    coefficients = torch.randn(20, 2, generator=rng)
    fresh, used = (draw(distribution, seeds(0, np.arange(20)), own) for _ in range(2))
    used.dot(torch.randn(3, 261, generator=rng))
    assert used.exact_sum(coefficients).equal(fresh.exact_sum(coefficients))


def test_rank_one_noise_has_the_variance_of_independent_signs_and_heavier_tails():
    gradient, draws = (
        torch.tensor([[1.0], [2.0], [2.0]]).double() * torch.tensor([3.0, 1.0, 2.0, 2.0]),
        40_000,
    )
    square, found = float(gradient.square().sum()), {}
    for distribution in ("rademacher", "rank_one"):
        z = (
            draw(distribution, seeds(0, np.arange(draws)), shapes((3, 4)))
            .tensor(0)
            .flatten(1)
            .double()
        )
        assert z.square().sum(1).eq(12).all()
        deltas = z @ gradient.flatten()
        estimates = deltas[:, None] * z
        assert float(estimates.var(0).sum()) == pytest.approx(11 * square, rel=0.05)
        assert (estimates.mean(0) - gradient.flatten()).abs().max() < 5 * (square / draws) ** 0.5
        found[distribution] = float(deltas.pow(4).mean()) / square**2
    # For a gradient u v^T, (a^T u)^4 and (b^T v)^4 are independent: of kurtosis 3 - 2 sum u^4 /
    # (sum u^2)^2 each.
    factors = [
        3 - 2 * sum(x**4 for x in u) / sum(x**2 for x in u) ** 2 for u in ([1, 2, 2], [3, 1, 2, 2])
    ]
    assert found["rank_one"] == pytest.approx(factors[0] * factors[1], rel=0.1)
    fourth = float(gradient.pow(4).sum()) / square**2
    assert found["rademacher"] == pytest.approx(3 - 2 * fourth, rel=0.05)
    ranks = [int(torch.linalg.matrix_rank(matrix)) for matrix in z[:20].view(-1, 3, 4)]
    assert ranks == [1] * 20


def test_shared_noise_has_a_stream_of_its_own():
    keys = NoiseKeys.of(0, 3, torch.arange(50), torch.zeros(50, dtype=torch.int64), group=0)
    assert keys.group not in keys.rows.tolist()
    assert keys.group == NoiseKeys.of(0, 3, torch.tensor([7]), torch.tensor([9]), group=0).group


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_global_generators_are_left_alone(distribution):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    draw(distribution, seeds(0, np.arange(3)), shapes((100,)))
    assert torch.get_rng_state().equal(before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
