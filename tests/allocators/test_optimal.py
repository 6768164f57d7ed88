"""The predicting allocator: it learns what pays, explores what is new, and falls back where it was
wrong.
"""

import pytest
import torch

from hf_flops.allocators import (
    Optimal,
    SampleFeatures,
    equal_counts,
    history,
    optimal_counts,
    predicted_gain,
    proxy,
)
from hf_flops.allocators.history import History
from hf_flops.allocators.observation import observe
from hf_flops.allocators.regression import Regression
from hf_flops.allocators.trust import LEVELS, Calibration


def mean_squares(sigma, counts, generator):
    """Means of n_i squared deltas of known sigmas."""
    normal = torch.randn(len(sigma), int(counts.max()), generator=generator, dtype=torch.float64)
    asked = torch.arange(int(counts.max())) < counts[:, None]
    return sigma**2 * (normal.square() * asked).sum(1) / counts


def play(world, *, steps=120, samples=16, queries=10, seed=0, best=True):
    """J over that of equal counts (steps,), and the same for the integer optimum of known sigmas,
    if `best` is asked for.

    world: (generator, step) -> (sigma (B,), options for the features).
    """
    generator, found = torch.Generator().manual_seed(seed), []
    allocator = Optimal(least_gain=1.0)  # follows its predictions however small their gain
    budget = samples * queries
    for step in range(steps):
        sigma, options = world(generator, step)
        features = SampleFeatures(**{"losses": torch.ones(samples), "step": step, **options})
        counts = allocator.counts(features, budget)
        given = [counts, optimal_counts(sigma, budget)] if best else [counts]
        equal = proxy(sigma**2, equal_counts(samples, budget))
        found.append([proxy(sigma**2, own) / equal for own in given])
        allocator.update(features, counts, mean_squares(sigma, counts, generator))
    return torch.tensor(found).T


def lognormal(generator, samples=16):
    return torch.randn(samples, generator=generator, dtype=torch.float64).exp()


def test_residuals_are_followed_where_they_are_known():
    features = SampleFeatures(torch.ones(3), residuals=torch.tensor([1.0, 1.0, 3.0]))
    assert Optimal(least_gain=1.0).counts(features, 50).tolist() == [10, 10, 30]


def test_the_power_of_the_loss_is_learned_from_deltas():
    allocator, generator = Optimal(least_gain=1.0), torch.Generator().manual_seed(0)
    losses = torch.tensor([0.5, 1.0, 4.0])
    assert allocator.counts(SampleFeatures(losses), 30).tolist() == [
        10,
        10,
        10,
    ]  # nothing is known yet
    for step in range(20):
        seen = torch.rand(16, generator=generator) + 0.1
        # mean squared delta = loss, so sigma = sqrt(loss)
        allocator.update(SampleFeatures(seen, step=step), torch.full((16,), 16), seen)
    expected = optimal_counts(losses.sqrt(), 300)
    assert (allocator.counts(SampleFeatures(losses, step=20), 300) - expected).abs().max() <= 6


@pytest.mark.parametrize("queries", [1, 2, 5, 40])
def test_observations_are_unbiased_and_as_uncertain_as_they_say(queries):
    generator, sigma = (
        torch.Generator().manual_seed(0),
        torch.full((40_000,), 3.0, dtype=torch.float64),
    )
    counts = torch.full((40_000,), queries)
    values, variance = observe(mean_squares(sigma, counts, generator), counts)
    # A few squares below a millionth of the largest one are lifted.
    assert float(values.mean()) == pytest.approx(float(sigma[0].log()), abs=0.03)
    assert float(values.var()) == pytest.approx(float(variance[0]), rel=0.1)


def test_a_delta_of_zero_is_an_observation_like_others():
    values, _ = observe(torch.tensor([0.0, 1.0]).double(), torch.tensor([4, 4]))
    assert values.isfinite().all()


def test_the_regression_learns_coefficients_and_what_they_leave_open():
    generator, regression = torch.Generator().manual_seed(0), Regression(0.98)
    for step in range(200):
        residuals, losses, lengths = (lognormal(generator, 32) for _ in range(3))
        spread = (0.3 * torch.randn(32, generator=generator, dtype=torch.float64)).exp()
        # any level
        sigma = residuals.pow(0.5) * losses.pow(0.3) * lengths.pow(-0.4) * spread * (1 + step)
        counts = torch.randint(1, 20, (32,), generator=generator)
        regression.update(
            SampleFeatures(losses, residuals, lengths=lengths),
            observe(mean_squares(sigma, counts, generator), counts),
        )
    logs = torch.eye(3, dtype=torch.float64).exp()
    predicted = regression.predict(SampleFeatures(logs[:, 1], logs[:, 0], lengths=logs[:, 2]))
    torch.testing.assert_close(
        predicted, torch.tensor([0.5, 0.3, -0.4]).double(), atol=0.07, rtol=0
    )
    assert regression.spread == pytest.approx(0.09, abs=0.04)


def test_samples_that_repeat_themselves_are_remembered_and_new_ones_explored():
    generator, memory = torch.Generator().manual_seed(0), History()
    effects = 0.8 * torch.randn(60, generator=generator, dtype=torch.float64)
    for _ in range(300):
        ids = torch.randperm(50, generator=generator)[:16]
        noise = 0.5 * torch.randn(16, generator=generator, dtype=torch.float64)
        memory.update(
            ids.tolist(), effects[ids] + noise, torch.full((16,), 0.25).double(), 0.64, 0.98
        )
    assert memory.shared == pytest.approx(float(effects[:50].var()), rel=0.35)
    mean, variance = memory.effects(list(range(60)))
    assert torch.corrcoef(torch.stack([mean[:50], effects[:50]]))[0, 1] > 0.9
    assert (mean[50:] == 0).all()
    assert (variance[50:] == memory.shared).all()
    assert variance[:50].max() < 0.5 * memory.shared


def test_visits_that_do_not_agree_are_no_history():
    generator, memory = torch.Generator().manual_seed(0), History()
    for _ in range(200):
        errors = torch.randn(16, generator=generator, dtype=torch.float64)
        memory.update(list(range(16)), errors, torch.full((16,), 0.1).double(), 1.0, 0.98)
    assert memory.effects([0, 99])[0].abs().max() < 0.2


def test_what_was_seen_longest_ago_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(history, "_MOST", 3)
    memory, one = History(), torch.ones(1).double()
    for sample in (1, 2, 3, 1, 4):
        memory.update([sample], one, one, 1.0, 0.9)
    assert [entry[0] for entry in memory.state_dict()["past"]] == [3, 1, 4]


def test_calibration_flattens_what_does_not_pay():
    squares, right = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    calibration = Calibration(0.9)
    assert calibration.power == 1
    for sigma, expected in ((1 / right, 0.0), (right, 1.0), (right**2, 0.5), (right**4, 0.25)):
        for _ in range(40):
            calibration.update(sigma, 300, squares)
        assert calibration.power == expected
    ratios = calibration.ratios()
    assert list(ratios) == list(LEVELS)
    assert ratios[0.0] == pytest.approx(1)


def opposite(generator, step):
    residuals = lognormal(generator)
    return 1 / residuals, {"residuals": residuals}


def unrelated(generator, step):
    return lognormal(generator), {"residuals": lognormal(generator)}


def nothing_to_gain(generator, step):
    return torch.ones(16, dtype=torch.float64), {"residuals": lognormal(generator)}


def alternating(generator, step):
    residuals = lognormal(generator)
    return residuals if step % 2 else 1 / residuals, {"residuals": residuals}


def changing_sides(generator, step):
    residuals = lognormal(generator)
    return residuals if step // 40 % 2 else 1 / residuals, {"residuals": residuals}


def meaningless_ids(generator, step):
    return lognormal(generator), {
        "ids": tuple(torch.randperm(40, generator=generator)[:16].tolist())
    }


def rare_giants(generator, step):
    giants = torch.rand(16, generator=generator, dtype=torch.float64) < 0.1
    return torch.where(giants, 30.0, 1.0).double(), {
        "losses": lognormal(generator),
        "residuals": lognormal(generator),
    }


WORLDS = [
    opposite,
    unrelated,
    nothing_to_gain,
    alternating,
    changing_sides,
    meaningless_ids,
    rare_giants,
]


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_misleading_features_do_not_make_it_worse_than_equal_counts(world):
    curves = torch.stack([play(world, seed=seed, best=False)[0] for seed in range(6)]).mean(0)
    # The first step has only the residuals to go by: what it learns there that they mislead, it
    # does not forget.
    assert curves[1:].mean() < 1.03
    assert curves.mean() < 1.08


def test_ids_alone_come_close_to_the_optimum():
    effects = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp()

    def world(generator, step):
        ids = torch.randperm(60, generator=generator)[:16]
        return effects[ids], {"ids": tuple(ids.tolist())}

    found, best = torch.stack([play(world, steps=80, seed=seed)[:, 30:] for seed in range(3)]).mean(
        (0, 2)
    )
    assert best < 0.7
    assert found < 1.1 * best


def test_helpful_residuals_come_close_to_the_optimum_at_once():
    def world(generator, step):
        residuals = lognormal(generator)
        return residuals * (
            0.2 * torch.randn(16, generator=generator, dtype=torch.float64)
        ).exp(), {"residuals": residuals}

    found, best = play(world).mean(1)
    assert found < 1.1 * best


def uneven(gain, samples=16):
    """Residuals with this predicted gain, 2 values, one of them taken once."""
    low, high = 1.0, 10.0**4
    for _ in range(100):
        middle = (low * high) ** 0.5
        residuals = torch.ones(samples, dtype=torch.float64)
        residuals[0] = middle
        low, high = (middle, high) if predicted_gain(residuals) < gain else (low, middle)
    return residuals


def test_counts_are_equal_while_the_predicted_gain_is_small():
    for gain, expected in ((1.45, [4] * 16), (1.55, None)):
        features = SampleFeatures(torch.ones(16), residuals=uneven(gain))
        counts = Optimal().counts(features, 64)
        wanted = optimal_counts(uneven(gain), 64).tolist() if expected is None else expected
        assert counts.tolist() == wanted
    assert predicted_gain(uneven(1.55)) == pytest.approx(1.55)


def test_a_single_batch_does_not_change_the_regime():
    """The gain is averaged over recent batches, all of them, also those without finite deltas."""
    allocator, decides = Optimal(), []
    unknown = torch.full((16,), float("nan"))
    for step, gain in enumerate([1.2] * 20 + [3.0] * 30):
        features = SampleFeatures(torch.ones(16), residuals=uneven(gain), step=step)
        counts = allocator.counts(features, 64)
        decides.append(len(set(counts.tolist())) > 1)
        allocator.update(features, counts, unknown)
    assert not any(decides[:22])
    assert all(decides[30:])
    assert decides == sorted(decides)
