"""The learned policies: their gradients are right, and they learn what their family can reach."""

import itertools
import json

import pytest
import torch

from hf_flops import ConfigurationError
from hf_flops.allocators import Bernoulli, Gaussian, SampleFeatures, equal_counts, proxy
from hf_flops.allocators.bernoulli import easy_samples
from hf_flops.allocators.gaussian import GaussianPolicy, standardised
from hf_flops.allocators.likelihood_ratio import Descent, gradient
from hf_flops.allocators.rounding import one_and_share

PARAMETERS = torch.tensor([0.9, 0.4, -1.5, 0.2], dtype=torch.float64)
LOSSES = torch.tensor([0.2, 0.5, 0.5, 1.0, 3.0], dtype=torch.float64)  # with a tie
SQUARES = torch.tensor([0.1, 0.3, 2.0, 1.0, 5.0], dtype=torch.float64)


def normals(draws, samples, seed=0):
    return torch.randn(
        draws, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def log_probability(parameters, x, draws):
    """The Gaussian of FLOPS section 4 in torch's own words."""
    kernel = (-0.5 * ((x[:, None] - x) / parameters[3].exp()).square()).exp() + 0.01 * torch.eye(
        len(x)
    )
    covariance = parameters[2].exp() * kernel
    return torch.distributions.MultivariateNormal(
        parameters[0] + parameters[1] * x, covariance
    ).log_prob(draws)


def test_draws_and_scores_are_those_of_the_gaussian():
    x = standardised(LOSSES)
    policy, noise = GaussianPolicy(PARAMETERS, x), normals(6, len(x))
    draws = policy.draw(noise)
    expected = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda p, u=u: log_probability(p, x, u), PARAMETERS)
            for u in draws
        ]
    )
    torch.testing.assert_close(policy.score(noise), expected)
    many = policy.draw(normals(100_000, len(x)))
    torch.testing.assert_close(many.mean(0), 0.9 + 0.4 * x, atol=0.01, rtol=0)
    torch.testing.assert_close(
        torch.cov(many.T), policy.factor @ policy.factor.T, atol=0.01, rtol=0
    )


def test_the_likelihood_ratio_gradient_is_that_of_the_expected_proxy():
    x, budget, noise = standardised(LOSSES), 30, normals(200_000, len(LOSSES))

    def expected_proxy(parameters):
        values = proxy(SQUARES, one_and_share(GaussianPolicy(parameters, x).draw(noise), budget))
        return float(values.mean()) * budget / len(x) / float(SQUARES.sum())

    allocator, differences = Gaussian(), []
    allocator.load_state_dict({**allocator.state_dict(), "values": PARAMETERS.tolist()})
    for unit in 1e-3 * torch.eye(4, dtype=torch.float64):
        differences.append(
            (expected_proxy(PARAMETERS + unit) - expected_proxy(PARAMETERS - unit)) / 2e-3
        )
    found = torch.stack(
        [
            allocator.slope(SampleFeatures(LOSSES, seed=seed), budget, SQUARES, 10_000)
            for seed in range(40)
        ]
    )
    error = found.mean(0) - torch.tensor(differences)
    assert (error.abs() < 4 * found.std(0) / 40**0.5).all()
    assert found.mean(0).norm() > 20 * found.std(0).norm() / 40**0.5


def test_the_bernoulli_gradient_is_that_of_the_expected_proxy():
    budget, easy = 30, easy_samples(LOSSES).nonzero().flatten().tolist()
    assert len(easy) == 4

    def expected_proxy(logit):
        probability, total = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)), 0.0
        for choice in itertools.product([0, 1], repeat=4):
            counts = torch.full((5,), 6.0)
            counts[[i for i, halved in zip(easy, choice, strict=True) if halved]] = 3.0
            counts[counts == 6] += 3.0 * sum(choice) / (5 - sum(choice))
            total += float(
                proxy(SQUARES, counts)
                * probability ** sum(choice)
                * (1 - probability) ** (4 - sum(choice))
            )
        return total * budget / 5 / float(SQUARES.sum())

    allocator = Bernoulli()
    allocator.load_state_dict({**allocator.state_dict(), "values": [0.4]})
    difference = (expected_proxy(0.4001) - expected_proxy(0.3999)) / 2e-4
    found = torch.stack(
        [
            allocator.slope(SampleFeatures(LOSSES, seed=seed), budget, SQUARES, 10_000)
            for seed in range(40)
        ]
    )
    error = abs(float(found.mean()) - difference)
    assert error < 4 * float(found.std()) / 40**0.5
    assert error < 0.02 * abs(difference)


def test_the_baseline_takes_constants_out():
    scores, values = normals(50, 4), normals(50, 1, seed=1).flatten()
    torch.testing.assert_close(gradient(scores, values + 1e3), gradient(scores, values))
    leave_one_out = torch.stack(
        [values[i] - values[torch.arange(50) != i].mean() for i in range(50)]
    )
    torch.testing.assert_close(gradient(scores, values), (leave_one_out[:, None] * scores).mean(0))


def test_descent_finds_a_minimum_within_its_bounds():
    descent = Descent([3.0, 3.0], 0.1, [(-5.0, 5.0), (2.0, 5.0)])
    for _ in range(300):
        descent.step(2 * (descent.values - 1))
    torch.testing.assert_close(descent.values, torch.tensor([1.0, 2.0]).double(), atol=0.02, rtol=0)


def test_descent_goes_on_from_a_state_as_if_it_had_not_stopped():
    whole, part = (Descent([3.0, 3.0], 0.1, [(-5.0, 5.0), (2.0, 5.0)]) for _ in range(2))
    # before the first step there are no moments
    part.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for step in range(20):
        slope = normals(1, 2, seed=step)[0]
        whole.step(slope)
        part.step(slope)
        if step == 9:
            state = json.loads(json.dumps(part.state_dict()))
            part = Descent([0.0, 0.0], 0.1, [(-5.0, 5.0), (2.0, 5.0)])
            part.load_state_dict(state)
    assert part.values.equal(whole.values)
    assert part.state_dict() == whole.state_dict()


def learning_curve(allocator, sigma_of, seed, steps=240, samples=16, queries=12):
    """J over that of equal counts at each step, with deltas of known sigmas, and the best of the
    Gaussian family.
    """
    generator, curve = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        losses = 3 * torch.rand(samples, generator=generator, dtype=torch.float64).square()
        sigma, features = sigma_of(losses), SampleFeatures(losses, step=step, seed=seed)
        counts = allocator.counts(features, samples * queries)
        curve.append(
            float(
                proxy(sigma**2, counts) / proxy(sigma**2, equal_counts(samples, samples * queries))
            )
        )
        normal = torch.randn(samples, int(counts.max()), generator=generator, dtype=torch.float64)
        asked = torch.arange(int(counts.max())) < counts[:, None]
        allocator.update(features, counts, sigma**2 * (normal.square() * asked).sum(1) / counts)
    return torch.tensor(curve)


def best_of_the_family(settings, sigma_of, samples=16, queries=12):
    """Least mean J over that of equal counts among policies of fixed mean, on batches of their
    own.
    """
    generator, means = torch.Generator().manual_seed(99), []
    batches = [
        3 * torch.rand(samples, generator=generator, dtype=torch.float64).square()
        for _ in range(200)
    ]
    for allocator in settings:
        ratios = []
        for step, losses in enumerate(batches):
            counts = allocator.counts(SampleFeatures(losses, step=step), samples * queries)
            square = sigma_of(losses) ** 2
            ratios.append(
                float(
                    proxy(square, counts) / proxy(square, equal_counts(samples, samples * queries))
                )
            )
        means.append(sum(ratios) / len(ratios))
    return min(means)


def fixed(kind, *values):
    allocator = kind()
    allocator.load_state_dict({**allocator.state_dict(), "values": list(values)})
    return allocator


def gaussian_family():
    angles = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    return [fixed(Gaussian, float(a.cos()), float(a.sin()), -2.0, 0.0) for a in angles]


def bernoulli_family():
    return [fixed(Bernoulli, float(logit)) for logit in torch.linspace(-5, 5, 11)]


@pytest.mark.parametrize(
    ("kind", "family"), [(Gaussian, gaussian_family), (Bernoulli, bernoulli_family)]
)
def test_learning_lowers_the_proxy_steadily_to_the_best_of_the_family(kind, family):
    def sigma_of(losses):
        return 0.2 + losses  # what a mean that is linear in the loss can match

    curves = torch.stack([learning_curve(kind(), sigma_of, seed) for seed in range(6)]).mean(0)
    phases = curves.reshape(6, -1).mean(1)
    assert (phases[1:] < phases[:-1] * 1.02).all()
    assert phases[-1] < phases[0] - 0.08
    best = best_of_the_family(family(), sigma_of)
    assert phases[-1] < 1.1 * best


@pytest.mark.parametrize("kind", [Gaussian, Bernoulli])
def test_learned_policies_cost_little_where_there_is_nothing_to_learn(kind):
    curve = learning_curve(kind(), torch.ones_like, seed=0)
    assert curve[:10].mean() < 1.15
    assert curve[-60:].mean() < 1.02


def test_the_mean_of_the_policy_beats_its_draws():
    x, noise = standardised(LOSSES), normals(5000, len(LOSSES))
    policy = GaussianPolicy(PARAMETERS, x)
    drawn = one_and_share(policy.draw(noise), 30)
    assert proxy(SQUARES, drawn.mean(0)) < proxy(SQUARES, drawn).mean()
    assert proxy(SQUARES, one_and_share(policy.mean, 30)) < proxy(SQUARES, drawn).mean()


def test_bernoulli_halves_easy_samples_only_and_follows_its_schedule():
    losses = torch.cat([torch.zeros(500), torch.ones(500)])
    counts = fixed(Bernoulli, 0.0).counts(SampleFeatures(losses, seed=1), 8000)
    assert 0.4 < (counts[:500] == 4).float().mean() < 0.6
    assert counts[500:].min() >= 8
    published = Bernoulli(schedule="published")
    assert [published.probability(epoch) for epoch in (0.0, 0.9, 1.0)] == [0.3, 0.3, 0.01]
    before = published.state_dict()
    published.update(SampleFeatures(losses), counts, losses + 1)
    assert published.state_dict() == before
    with pytest.raises(
        ConfigurationError, match="schedule='none' is unknown: choose one of learned, published"
    ):
        Bernoulli(schedule="none")
