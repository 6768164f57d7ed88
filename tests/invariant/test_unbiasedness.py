"""The mean of many estimates is autograd's gradient, whatever the counts."""

import pytest
import torch

from hf_flops import BatchPosition
from hf_flops.allocators import ALLOCATORS
from hf_flops.estimators import ESTIMATORS
from tests.helpers.quadratic import (
    SAMPLES,
    Fixed,
    Quadratic,
    one_estimate,
    quadratic_batch,
    repeated,
    true_gradient,
)


@pytest.mark.parametrize("kind", ["rowwise", "shared"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "rank_one"])
def test_the_mean_of_many_estimates_is_autograds_gradient_with_uneven_counts(
    kind, estimator, distribution
):
    model, inputs = Quadratic(), quadratic_batch()
    # shared noise is drawn once, whatever the batch
    steps, copies = (40, 15) if kind == "rowwise" else (320, 1)
    allocator, queries = (
        Fixed([1, 2, 1, 5, 6] * copies),
        {"one_sided": 4, "antithetic": 6}[estimator],
    )
    estimates = torch.stack(
        [
            one_estimate(
                model,
                repeated(inputs, copies),
                step=step,
                kind=kind,
                distribution=distribution,
                estimator=ESTIMATORS[estimator](),
                allocator=allocator,
                queries_per_sample=queries,
                rows_per_forward=999,
            )[0]
            for step in range(steps)
        ]
    )
    error = estimates.mean(0) - true_gradient(model, inputs)
    standard_error = estimates.std(0) / len(estimates) ** 0.5
    assert (error.abs() < 4.5 * standard_error).all()
    # The check has teeth: without the weight 1 / n_i the same rows are far off.
    assert standard_error.norm() < 0.05 * true_gradient(model, inputs).norm()


@pytest.mark.parametrize("kind", ["rowwise", pytest.param("shared", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"authors_bernoulli", "uniform"}))
def test_the_mean_of_many_estimates_is_autograds_gradient_while_an_allocator_learns(name, kind):
    model, inputs, allocator = Quadratic(), quadratic_batch(), ALLOCATORS[name]()
    steps, copies = (80, 5) if kind == "rowwise" else (250, 1)
    batch, estimates, uneven = repeated(inputs, copies), [], 0
    for step in range(steps):
        # In two micro-batches, which share their noise where it is shared.
        parts = [
            one_estimate(
                model,
                {name: value[start:end] for name, value in batch.items()},
                kind=kind,
                elements=SAMPLES * copies,
                place=BatchPosition(step=step, position=start, ids=tuple(range(start, end))),
                allocator=allocator,
                queries_per_sample=5,
                rows_per_forward=999,
            )
            for start, end in ((0, 2 * copies), (2 * copies, SAMPLES * copies))
        ]
        estimates.append(parts[0][0] + parts[1][0])
        uneven += any(len(set(result.counts.tolist())) > 1 for _, result in parts)
    assert uneven > steps / 4
    estimates = torch.stack(estimates)
    error = estimates.mean(0) - true_gradient(model, inputs)
    assert (error.abs() < 4.5 * estimates.std(0) / len(estimates) ** 0.5).all()


def test_without_the_weight_the_estimate_is_biased():
    class Unweighted(Fixed):
        weighted = False

    model, inputs = Quadratic(), quadratic_batch()
    options = {"allocator": Unweighted([1, 2, 1, 5, 6] * 15), "rows_per_forward": 999}
    estimates = torch.stack(
        [one_estimate(model, repeated(inputs, 15), step=step, **options)[0] for step in range(40)]
    )
    error = estimates.mean(0) - true_gradient(model, inputs)
    assert (error.abs() > 10 * estimates.std(0) / len(estimates) ** 0.5).any()


def test_predicted_variance_and_signal_are_those_of_many_estimates():
    model, inputs = Quadratic(), quadratic_batch()
    for kind in ("rowwise", "shared"):
        options = {"kind": kind, "queries_per_sample": 5, "rows_per_forward": 99}
        found = [one_estimate(model, inputs, step=step, **options) for step in range(400)]
        estimates = torch.stack([gradient for gradient, _ in found])
        predicted = sum(result.metrics["gradient_variance"] for _, result in found) / len(found)
        signal = sum(result.metrics["gradient_signal"] for _, result in found) / len(found)
        # (d + 1) in the prediction is exact up to the squared mean, one part in d + 1 at most
        assert estimates.var(0).sum() == pytest.approx(predicted, rel=0.3)
        assert signal == pytest.approx(float(true_gradient(model, inputs).square().sum()), rel=0.6)
