"""The same bits on every device: NumPy, torch on the CPU, and a pretend accelerator."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_flops.base.prng import seeds, words, words_on
from hf_flops.perturbations import DISTRIBUTIONS, NoiseKeys, perturb
from hf_flops.perturbations.noise import draw
from tests.helpers import pretend
from tests.helpers.tiny import generator

DEVICE = pretend.install()
SHAPES = [torch.Size(size) for size in ((8, 24), (64,), (5,), (3, 5))]
SEED = st.integers(0, 2**64 - 1)


@given(st.lists(SEED, min_size=1, max_size=5), st.integers(1, 40))
def test_words_of_torch_are_those_of_numpy(row_seeds, count):
    row_seeds = np.array(row_seeds, dtype=np.uint64)
    wanted = torch.from_numpy(words(row_seeds, count).view(np.int64))
    for device in (torch.device("cpu"), DEVICE):
        found = words_on(device, row_seeds, count)
        assert found.device.type == device.type
        assert found.cpu().equal(wanted)


def test_words_are_those_that_were_published():
    # the first three of SplitMix64 from seed 1234567, as in Vigna's splitmix64.c
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = words_on(DEVICE, np.array([1234567], dtype=np.uint64), 3).cpu().numpy()
    assert found.view(np.uint64).tolist() == [known]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_noise_and_its_sums_are_the_same_on_a_device(distribution):
    row_seeds = seeds(0, np.arange(700))
    here, there = (draw(distribution, row_seeds, SHAPES, device) for device in ("cpu", DEVICE))
    assert all(there[row].cpu().equal(here[row]) for row in range(0, 700, 100))
    errors = (torch.randn(700, 2, generator=generator()) * 2**15).round() / 2**15
    columns = torch.cat([torch.randn(700, 1, generator=generator(1)), errors], 1)
    found = there.exact_sum(columns.to(DEVICE), coarse=2).cpu()
    if distribution == "rademacher":
        assert found.equal(here.exact_sum(columns))
        assert found.equal(here.exact_sum(columns, coarse=2))
    torch.testing.assert_close(found, here.exact_sum(columns), rtol=1e-4, atol=1e-3)
    vectors = torch.randn(3, here[0].numel(), generator=generator(2))
    products = there.dot(vectors.to(DEVICE)).cpu()
    torch.testing.assert_close(products, here.dot(vectors), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("distribution", ["rademacher", "rank_one"])
def test_the_host_neither_waits_nor_draws_bits_for_a_device(distribution):
    row_seeds, shapes = seeds(0, np.arange(16)), [torch.Size((8, 576))] * 10
    coefficients = torch.ones(16, 3).to(DEVICE)
    with pretend.waits() as waits:
        noise = draw(distribution, row_seeds, shapes, DEVICE)
        drawing = waits.kernels
        for index in range(10):
            noise.tensor(index)
        noise.exact_sum(coefficients)
    assert waits.number == 0, waits.lines
    assert drawing <= 16, waits.launches  # whatever the numbers


def test_a_perturbed_layer_launches_a_few_kernels_and_unpacks_no_more_than_its_activations():
    layer, rows, tokens = nn.Linear(64, 8).to(DEVICE), 1024, 16
    perturbation = perturb(layer, rowwise=["weight", "bias"])
    position = torch.arange(rows)
    noise = perturbation.draw(NoiseKeys.of(0, 0, position, 0 * position, 0))
    x = torch.ones(rows, tokens, 64).to(DEVICE)
    with pretend.waits() as waits, perturbation.applied(noise, 1e-3), pretend.limited(x.numel()):
        layer(x)
    assert waits.number == 0, waits.lines
    assert waits.kernels <= 12, waits.launches
