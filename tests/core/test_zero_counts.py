"""Samples without queries: the estimate is unbiased over the draw of the counts, and nothing
downstream takes such a sample for one whose rows failed.
"""

import pytest
import torch

from hf_flops.allocators import OptimalWithZeros
from hf_flops.estimators import ESTIMATORS, Antithetic, LogitJacobian
from tests.core.test_estimate import Poisoned
from tests.estimators.test_control_variate import Softmax, Wrong, batch, estimate, true_gradient
from tests.helpers.quadratic import Quadratic, one_estimate, quadratic_batch, repeated
from tests.helpers.quadratic import true_gradient as quadratic_gradient


def assert_unbiased(estimates, wanted, *, most=0.2):
    error = estimates.mean(0) - wanted
    deviation = estimates.std(0) / len(estimates) ** 0.5
    assert (error.abs() < 4.5 * deviation).all()
    assert deviation.norm() < most * wanted.norm()


@pytest.mark.parametrize("kind", ["rowwise", pytest.param("shared", marks=pytest.mark.slow)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_of_many_estimates_is_autograds_gradient(kind, estimator):
    model, inputs, allocator = Quadratic(), quadratic_batch(), OptimalWithZeros()
    steps, copies = (100, 10) if kind == "rowwise" else (1500, 1)
    inputs, zeros, estimates = repeated(inputs, copies), 0, []
    for step in range(steps):
        gradient, result = one_estimate(
            model,
            inputs,
            step=step,
            kind=kind,
            estimator=ESTIMATORS[estimator](),
            allocator=allocator,
            queries_per_sample=2,  # antithetic: a pair for every second sample
            rows_per_forward=999,
        )
        estimates.append(gradient)
        zeros += int((result.counts == 0).sum())
        assert result.counts.sum() == len(inputs["labels"]) // len(ESTIMATORS[estimator].signs)
    assert zeros > 0.2 * steps * len(inputs["labels"])
    assert_unbiased(torch.stack(estimates), quadratic_gradient(model, inputs))


@pytest.mark.parametrize("control", [Wrong, LogitJacobian])
def test_unbiased_with_a_control_variate_that_is_wrong(control):
    """The mean that it subtracted from rows is added back for all samples, those without rows too:
    added back for the others alone, the estimate is far off.
    """
    model, inputs, allocator = Softmax(), batch(copies=20), OptimalWithZeros(least_gain=1.0)
    options = {"allocator": allocator, "queries_per_sample": 2, "estimator": Antithetic()}
    control, zeros, estimates = control(), 0, []
    for step in range(150):
        gradient, result = estimate(model, inputs, control, step, **options)
        estimates.append(gradient)
        zeros += int((result.counts == 0).sum())
    assert zeros > 0.4 * 150 * len(inputs["labels"])
    assert_unbiased(torch.stack(estimates), true_gradient(model, inputs), most=0.3)


def test_predicted_variance_and_gain_count_samples_without_queries():
    model, inputs, allocator = Quadratic(), repeated(quadratic_batch(), 4), OptimalWithZeros()
    options = {"queries_per_sample": 2, "rows_per_forward": 999}
    found = [
        one_estimate(model, inputs, step=step, allocator=allocator, **options)
        for step in range(650)
    ]
    found = found[50:]
    metrics = {
        name: sum(result.metrics[name] for _, result in found) / len(found)
        for name in found[0][1].metrics
    }
    variance = float(torch.stack([gradient for gradient, _ in found]).var(0).sum())
    assert variance == pytest.approx(metrics["gradient_variance"], rel=0.3)
    equal = [one_estimate(model, inputs, step=step, **options)[0] for step in range(600)]
    gain = float(torch.stack(equal).var(0).sum()) / variance
    assert metrics["allocation_gain"] == pytest.approx(gain, rel=0.3)
    assert gain > 1.3
    assert metrics["predicted_gain"] == pytest.approx(gain, rel=0.5)
    assert 0 < metrics["allocation_entropy"] < 1
    assert metrics["dropped_rows"] == 0


class Chosen(OptimalWithZeros):
    """Gives the first samples these counts."""

    def expected_counts(self, features, budget):
        return torch.tensor([0.5, 0.5, 1.0, 2.0, 1.0])[: len(features.losses)].double()

    def counts(self, features, budget):
        return torch.tensor([0, 1, 1, 2, 1])[: len(features.losses)]


def test_a_sample_whose_rows_failed_is_dropped_and_one_without_rows_is_not():
    """The mean is over the four samples that are left, the one without rows among them."""
    inputs, options = quadratic_batch(), {"allocator": Chosen(), "queries_per_sample": 2}
    gradient, result = one_estimate(Poisoned([4], always=True), inputs, **options)
    assert result.metrics["dropped_rows"] == 1
    assert result.mean_squares.isnan().tolist() == [True, False, False, False, True]
    good = {name: value[:4] for name, value in inputs.items()}
    expected, _ = one_estimate(Quadratic(), good, **options)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
