"""Control variates: unbiased whatever they predict, worth it where they predict well, and nothing
lost in a checkpoint.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import ALLOCATORS
from hf_flops.base.prng import seeds
from hf_flops.estimators import ESTIMATORS, Antithetic, LogitJacobian, OneSided, Prediction
from hf_flops.estimators.loadings import contrasts
from hf_flops.objectives import RowLosses, TappedLoss
from hf_flops.perturbations import DISTRIBUTIONS, ParameterVector, perturb
from hf_flops.perturbations.noise import draw
from tests.helpers.quadratic import Fixed, repeated
from tests.helpers.tiny import generator, model_forward

SAMPLES, WIDTH, CLASSES = 5, 3, 4


class Softmax(nn.Module):
    """Logits `W x` with a bias, in float64."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES).double()
        for parameter in self.linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator(1)).double()

    def forward(self, x, labels):
        logits = self.linear(x)
        return type("Output", (), {"loss": F.cross_entropy(logits, labels), "logits": logits})


def batch(alike=0.0, copies=1):
    """Draw samples; `alike` of each is what all have in common."""
    x = torch.randn(SAMPLES, WIDTH, generator=generator(2)).double()
    return repeated(
        {"x": alike * x[:1] + (1 - alike) * x, "labels": torch.arange(SAMPLES) % CLASSES}, copies
    )


class Wrong(LogitJacobian):
    """A control variate whose Jacobian is fixed and far off."""

    def start(self, clean, size, device, step, features=None, reference=None):
        slopes, logits = clean.slopes.float(), clean.logits.float()
        wrong = 0.3 * torch.randn(2 * CLASSES, size, generator=generator(3))
        loadings = torch.randn(len(slopes), 2, generator=generator(4))
        return Prediction(wrong, slopes, logits, 1.3, torch.eye(CLASSES), loadings=loadings)

    def finish(self, innovation, sums):
        """Learn nothing."""


def estimate(model, inputs, control, step=0, **options):
    vector = ParameterVector.of(model)
    defaults = {
        "objective": TappedLoss(logits=True),
        "perturbation": perturb(
            model, rowwise=vector.names, distribution=options.pop("distribution", "rademacher")
        ),
        "estimator": OneSided(),
        "allocator": Fixed([1, 2, 1, 5, 6] * (len(inputs["labels"]) // SAMPLES)),
        "queries_per_sample": 4,
        "scale": 1e-3,
        "rows_per_forward": 999,
    }
    model.zero_grad()
    forward = options.pop("forward", model_forward(model))
    result = estimate_gradient(
        forward,
        inputs,
        Method(**{**defaults, **options}, control=control),
        BatchPosition(step=step),
    )
    return torch.cat([p.grad.flatten() for p in vector.parameters]), result


def true_gradient(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("make", [Wrong, LogitJacobian])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("distribution", ["rademacher", "rank_one"])
def test_unbiased_with_uneven_counts_and_a_wrong_jacobian(make, name, distribution):
    model, inputs, control = Softmax(), batch(copies=10), make()
    options = {
        "estimator": ESTIMATORS[name](),
        "queries_per_sample": {"one_sided": 4, "antithetic": 7}[name],
        "distribution": distribution,
    }
    found = torch.stack(
        [estimate(model, inputs, control, step, **options)[0] for step in range(50)]
    )
    wanted = true_gradient(model, inputs)
    deviation = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - wanted).abs() < 4.5 * deviation).all()
    assert deviation.norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize("allocator", ["two_stage", "optimal"])
def test_unbiased_with_the_counts_of_an_allocator_that_learns_from_remainders(allocator):
    model, inputs, control, chosen = Softmax(), batch(copies=5), Wrong(), ALLOCATORS[allocator]()
    found = torch.stack(
        [estimate(model, inputs, control, step, allocator=chosen)[0] for step in range(100)]
    )
    deviation = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - true_gradient(model, inputs)).abs() < 4.5 * deviation).all()


def test_the_variance_falls_by_what_a_common_jacobian_explains():
    def variance(control, alike):
        model, inputs = Softmax(), batch(alike, copies=5)
        found = torch.stack([estimate(model, inputs, control, step)[0] for step in range(100)])[50:]
        return float(found.var(0).sum())

    assert variance(LogitJacobian(), 1.0) < 0.02 * variance(None, 1.0)
    assert variance(LogitJacobian(), 0.8) < 0.3 * variance(None, 0.8)
    assert variance(LogitJacobian(), 0.0) < 1.1 * variance(None, 0.0)


@pytest.mark.parametrize("estimator", [OneSided(), Antithetic()])
def test_rows_per_forward_change_nothing(estimator):
    inputs, queries = batch(), 4 if estimator.baseline else 7
    controls, found = [LogitJacobian(), LogitJacobian()], []
    for control, rows in zip(controls, (2, 99), strict=True):
        model = Softmax()
        options = {"estimator": estimator, "queries_per_sample": queries, "rows_per_forward": rows}
        found.append(
            [estimate(model, inputs, control, step, **options)[0] for step in range(3)][-1]
        )
    assert torch.allclose(*found, atol=1e-5)
    for control in controls:
        control.state_dict()
    assert torch.allclose(*(control.jacobian for control in controls), atol=1e-5)


def test_rows_without_a_finite_loss_teach_nothing():
    model, inputs, control = Softmax(), batch(), LogitJacobian()
    calls = 0

    def forward(given):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            inputs = {**given, "x": given["x"].clone()}
            inputs["x"][0] = float("nan")
            return model_forward(model)(inputs)
        return model_forward(model)(given)

    for step in range(5):
        estimate(model, inputs, control, step, forward=forward, rows_per_forward=5)
    assert control.state_dict()["jacobian"].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_restored_state_goes_on_alike_and_another_size_starts_anew():
    model, inputs, control = Softmax(), batch(), LogitJacobian()
    for step in range(4):
        estimate(model, inputs, control, step)
    other = LogitJacobian()
    other.load_state_dict({name: value.clone() for name, value in control.state_dict().items()})
    assert torch.equal(estimate(model, inputs, control, 4)[0], estimate(model, inputs, other, 4)[0])
    assert torch.equal(control.state_dict()["jacobian"], other.state_dict()["jacobian"])
    model.linear.bias.requires_grad_(False)
    estimate(model, inputs, control, 5)
    assert control.jacobian.shape == (9 * (CLASSES - 1), WIDTH * CLASSES)
    empty = LogitJacobian()
    empty.load_state_dict(LogitJacobian().state_dict())
    assert empty.jacobian is None


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_contrasts_are_orthonormal_and_sum_to_zero(classes):
    basis = contrasts(classes)
    assert basis.shape == (classes, classes - 1)
    assert torch.allclose(basis.T @ basis, torch.eye(classes - 1), atol=1e-6)
    assert (basis.sum(0).abs() < 1e-6).all()


SHAPES = st.lists(
    st.one_of(st.tuples(st.integers(1, 5)), st.tuples(st.integers(1, 4), st.integers(1, 70))),
    min_size=1,
    max_size=3,
)


@given(st.sampled_from(sorted(DISTRIBUTIONS)), SHAPES, st.integers(1, 5), st.integers(1, 3))
def test_products_and_sums_of_noise_are_those_of_its_rows(distribution, shapes, rows, columns):
    noise = draw(
        distribution,
        seeds(1, 2, torch.arange(rows).numpy()),
        [torch.Size(shape) for shape in shapes],
    )
    dense = torch.stack([noise[row] for row in range(rows)])
    vectors = torch.randn(columns, dense.shape[1], generator=generator(4))
    coefficients = torch.randn(rows, columns, generator=generator(5))
    assert torch.allclose(noise.dot(vectors), dense @ vectors.T, atol=1e-4)
    assert torch.allclose(noise.weighted_sum(coefficients), coefficients.T @ dense, atol=1e-4)
    assert torch.allclose(
        noise.weighted_sum(coefficients[:, 0]), coefficients[:, 0] @ dense, atol=1e-4
    )


@pytest.mark.parametrize("size", [1.0, 3e4])
def test_what_rows_taught_adds_up_exactly(size):
    parts = [
        (size * torch.randn(2, 50, generator=generator(i)).double() * 2**15).round() / 2**15
        for i in range(6)
    ]
    prediction = Prediction(
        torch.zeros(2, 50), torch.ones(3, 2), torch.ones(3, 2), 1.0, torch.eye(2)
    )
    for part in parts:
        prediction.add(part, part.T, torch.ones(4).double())
    assert prediction.innovation.is_floating_point() == (size > 1)
    found, sums = prediction.statistics()
    assert found.equal(sum(parts))
    assert sums.equal(torch.full((4,), 6.0).double())


def test_the_unit_of_errors_changes_what_is_taught_by_its_rounding_only():
    noise = draw("rademacher", seeds(0, 0, torch.arange(30).numpy(), 0), [torch.Size([40])])
    deltas, changes = (
        torch.randn(30, generator=generator(1)),
        torch.randn(30, 2, generator=generator(2)),
    )

    def taught(unit):
        prediction = Prediction(
            torch.zeros(2, 40), torch.ones(3, 2), torch.ones(3, 2), 1.0, torch.eye(2), unit
        )
        left, errors, sums = prediction.remainder(noise, torch.arange(30) % 3, deltas, changes)
        prediction.add(noise.exact_sum(errors), errors, sums)
        return left, *prediction.statistics()

    (left, innovation, sums), (other_left, other, other_sums) = taught(1.0), taught(16.0)
    assert left.equal(other_left)
    assert torch.allclose(innovation, other, atol=30 * 16 * 2**-16, rtol=0)
    assert not innovation.equal(other)
    assert torch.allclose(sums, other_sums, rtol=1e-3)


def test_errors_are_told_in_a_unit_that_holds_them_in_one_digit():
    control, slopes = LogitJacobian(0), torch.randn(3, 2, generator=generator())
    clean = RowLosses(torch.ones(3), torch.ones(3), slopes=slopes, logits=torch.zeros(3, 2))
    assert control.start(clean, 40, torch.device("cpu"), 0).unit == 1.0
    # each error 0.03
    control.finish(torch.zeros(2, 40), torch.tensor([10.0, 10 * 2 * 0.03**2, 0.0, 0.0]).double())
    unit = control.start(clean, 40, torch.device("cpu"), 1).unit
    assert 16 * 0.03 <= unit < 32 * 0.03
    again = LogitJacobian(0)
    again.load_state_dict(control.state_dict())
    assert again.start(clean, 40, torch.device("cpu"), 1).unit == unit
