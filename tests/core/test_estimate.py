"""The gradient estimate: unbiased whatever the counts, the same however it is cut, and harmless
where losses fail.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_flops import (
    BatchPosition,
    CallableObjective,
    ConfigurationError,
    Method,
    NonFiniteError,
    estimate_gradient,
)
from hf_flops.allocators import ALLOCATORS, Optimal, TwoStage, Uniform
from hf_flops.estimators import ESTIMATORS, Antithetic, OneSided
from hf_flops.objectives import BatchLoss, TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from tests.allocators.test_allocators import following
from tests.helpers.tiny import generator, model_forward, tiny_batch, tiny_model

SAMPLES, WIDTH = 5, 3


class Fixed(Uniform):
    """An allocator that gives the counts it was told to."""

    def __init__(self, counts):
        self.fixed = torch.tensor(counts)

    def counts(self, features, budget):
        assert budget == self.fixed.sum()
        return self.fixed


class Quadratic(nn.Module):
    """Row losses `(w . x_i - y_i)^2 / 2` of very different sizes, in float64."""

    def __init__(self, shared=False):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1).double()
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator(1)))

    def forward(self, features, labels):
        return 0.5 * (self.linear(features).squeeze(-1) - labels).square()


def quadratic_batch():
    scale = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0]).double()
    features = torch.randn(SAMPLES, WIDTH, generator=generator(2)).double() * scale[:, None]
    return {"features": features, "labels": torch.arange(SAMPLES).double()}


def run(model, inputs, *, step=0, elements=None, batches=1, place=None, **options):
    """One estimate; returns the flat gradient and the result."""
    vector = ParameterVector.of(model)
    kind = options.pop("kind", "rowwise")
    defaults = {
        "objective": CallableObjective(lambda outputs, inputs: outputs),
        "perturbation": perturb(
            model, **{kind: vector.names}, distribution=options.pop("distribution", "gaussian")
        ),
        "estimator": OneSided(),
        "allocator": Uniform(),
        "queries_per_sample": 4,
        "scale": 1e-3,
        "rows_per_forward": 7,
    }
    model.zero_grad()
    forward = options.pop("forward", lambda batch: (None, model(**batch)))
    result = estimate_gradient(
        forward,
        inputs,
        Method(**{**defaults, **options}),
        place or BatchPosition(step=step),
        elements,
        batches,
    )
    return torch.cat([p.grad.flatten().double() for p in vector.parameters]), result


def repeated(inputs, times):
    """Return so many copies of a batch as one: where rows have noise of their own, one estimate is
    as good as so many.
    """
    return {name: torch.cat([value] * times) for name, value in inputs.items()}


def true_gradient(model, inputs):
    model.zero_grad()
    model(**inputs).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


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
            run(
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


@pytest.mark.parametrize("kind", ["rowwise", "shared"])
@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"authors_bernoulli", "uniform"}))
def test_the_mean_of_many_estimates_is_autograds_gradient_while_an_allocator_learns(name, kind):
    model, inputs, allocator = Quadratic(), quadratic_batch(), ALLOCATORS[name]()
    steps, copies = (80, 5) if kind == "rowwise" else (250, 1)
    batch, estimates, uneven = repeated(inputs, copies), [], 0
    for step in range(steps):
        # In two micro-batches, which share their noise where it is shared.
        parts = [
            run(
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
        [run(model, repeated(inputs, 15), step=step, **options)[0] for step in range(40)]
    )
    error = estimates.mean(0) - true_gradient(model, inputs)
    assert (error.abs() > 10 * estimates.std(0) / len(estimates) ** 0.5).any()


def test_predicted_variance_and_signal_are_those_of_many_estimates():
    model, inputs = Quadratic(), quadratic_batch()
    for kind in ("rowwise", "shared"):
        options = {"kind": kind, "queries_per_sample": 5, "rows_per_forward": 99}
        found = [run(model, inputs, step=step, **options) for step in range(400)]
        estimates = torch.stack([gradient for gradient, _ in found])
        predicted = sum(result.metrics["gradient_variance"] for _, result in found) / len(found)
        signal = sum(result.metrics["gradient_signal"] for _, result in found) / len(found)
        # (d + 1) in the prediction is exact up to the squared mean, one part in d + 1 at most
        assert estimates.var(0).sum() == pytest.approx(predicted, rel=0.3)
        assert signal == pytest.approx(float(true_gradient(model, inputs).square().sum()), rel=0.6)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 60),
    estimator=st.sampled_from(sorted(ESTIMATORS)),
    allocator=st.sampled_from(sorted(ALLOCATORS)),
    kind=st.sampled_from(["rowwise", "shared"]),
)
def test_the_estimate_does_not_depend_on_how_rows_are_cut(rows, estimator, allocator, kind):
    model, inputs = Quadratic(), quadratic_batch()

    def at(rows_per_forward):
        options = {
            "estimator": ESTIMATORS[estimator](),
            "allocator": ALLOCATORS[allocator](),
            "queries_per_sample": 8,
        }
        return run(model, inputs, kind=kind, rows_per_forward=rows_per_forward, **options)[0]

    torch.testing.assert_close(at(rows), at(1000), rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_to_the_whole_batch():
    model, inputs = Quadratic(), quadratic_batch()
    for kind in ("rowwise", "shared"):
        whole, result = run(model, inputs, kind=kind)
        parts = [
            run(
                model,
                {name: value[i : i + 1] for name, value in inputs.items()},
                kind=kind,
                elements=SAMPLES,
                place=BatchPosition(position=i),
            )
            for i in range(SAMPLES)
        ]
        torch.testing.assert_close(
            torch.stack([gradient for gradient, _ in parts]).sum(0), whole, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(sum(part.loss for _, part in parts), result.loss)
        averaged = [run(model, inputs, kind=kind, batches=2)[0] for _ in range(2)]
        torch.testing.assert_close(sum(averaged), whole)


def test_every_row_is_charged():
    model, inputs = Quadratic(), quadratic_batch()
    seen = []

    def forward(batch):
        seen.append(len(batch["labels"]))
        return None, model(**batch)

    for kind in ("rowwise", "shared"):
        for estimator in ESTIMATORS.values():
            for allocator in ALLOCATORS.values():
                seen.clear()
                options = {
                    "kind": kind,
                    "estimator": estimator(),
                    "allocator": allocator(),
                    "queries_per_sample": 7,
                }
                _, result = run(model, inputs, forward=forward, **options)
                assert result.rows == sum(seen) <= 7 * SAMPLES
                assert result.rows > 7 * SAMPLES - SAMPLES


def test_a_batch_loss_charges_whole_batches():
    model, inputs = tiny_model("bert"), tiny_batch("bert")
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["labels"])), with_kwargs=True
    )
    for estimator in ESTIMATORS.values():
        seen.clear()
        _, result = run(
            model,
            inputs,
            kind="shared",
            objective=BatchLoss(),
            forward=model_forward(model),
            estimator=estimator(),
        )
        assert result.rows == sum(seen) == 16
        assert result.counts.tolist() == [3 if estimator is OneSided else 2]


def test_a_batch_loss_gives_the_gradient_of_the_models_loss():
    model, inputs = tiny_model("vit"), tiny_batch("vit")
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    model(**inputs).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.classifier.parameters()]).double()
    for objective, kind in (
        (BatchLoss(), "shared"),
        (TappedLoss(), "rowwise"),
        (TappedLoss(), "shared"),
    ):
        options = {
            "objective": objective,
            "forward": model_forward(model),
            "scale": 1e-2,
            "rows_per_forward": 999,
        }
        estimates = [
            run(model, inputs, step=s, kind=kind, queries_per_sample=26, **options)[0]
            for s in range(20)
        ]
        mean = torch.stack(estimates).mean(0)
        assert torch.cosine_similarity(mean, expected, dim=0) > 0.93
        assert mean.norm() == pytest.approx(float(expected.norm()), rel=0.3)


class Poisoned(Quadratic):
    """Non-finite losses for some samples wherever the parameters are not the clean ones."""

    def __init__(self, bad, always=False, share=1.0):
        super().__init__()
        self.bad, self.always, self.share = bad, always, share
        self.clean = self.linear.weight.data_ptr()

    def forward(self, features, labels):
        losses = super().forward(features, labels)
        poisoned = torch.isin(labels, torch.tensor(self.bad).double())
        if not self.always:
            signs = (
                features @ torch.ones(WIDTH).double() - self.linear(features).squeeze(-1)
            ) * 1e12
            poisoned &= (signs.long() % 8 == 0) if self.share < 1 else True
        return torch.where(poisoned, float("nan"), losses)


def test_samples_with_non_finite_losses_are_dropped_and_the_rest_is_averaged():
    inputs = quadratic_batch()
    model = Poisoned([4], always=True)
    good = {name: value[:4] for name, value in inputs.items()}
    gradient, result = run(model, inputs)
    assert result.metrics["dropped_rows"] == 3
    expected, _ = run(Quadratic(), good)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert result.loss.isfinite()
    assert result.mean_squares.isnan().tolist() == [False] * 4 + [True]


def test_the_weight_of_dropped_rows_goes_to_the_samples_other_rows():
    inputs = quadratic_batch()
    model = Poisoned([3, 4], share=0.5)
    allocator = Fixed([2, 2, 2, 12, 12])
    estimates, dropped = [], 0
    for step in range(400):
        try:
            options = {
                "estimator": Antithetic(),
                "allocator": allocator,
                "queries_per_sample": 12,
                "rows_per_forward": 99,
            }
            gradient, result = run(model, inputs, step=step, **options)
        except NonFiniteError:
            continue
        dropped += result.metrics["dropped_rows"]
        estimates.append(gradient)
    assert dropped > 1000
    mean, spread = (
        torch.stack(estimates).mean(0),
        torch.stack(estimates).std(0) / len(estimates) ** 0.5,
    )
    truth = true_gradient(Quadratic(), inputs)
    assert ((mean - truth).abs() < 5 * spread).all()
    assert spread.norm() < 0.1 * truth.norm()


def test_a_step_without_any_finite_row_raises_and_changes_nothing():
    model = Poisoned(list(range(SAMPLES)), always=True)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(NonFiniteError, match="All 15 perturbed rows of optimizer step 8"):
        run(model, quadratic_batch(), step=8)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(
        parameter.equal(old) for parameter, old in zip(model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize(
    ("estimator", "allocator", "least"),
    [
        (OneSided, Uniform, 2),
        (OneSided, Optimal, 2),
        (Antithetic, Uniform, 2),
        (Antithetic, Optimal, 3),
    ],
)
def test_too_few_queries_are_refused_with_the_least_number(estimator, allocator, least):
    model, inputs = Quadratic(), quadratic_batch()
    options = {"estimator": estimator(), "allocator": allocator()}
    run(model, inputs, queries_per_sample=least, **options)
    with pytest.raises(
        ConfigurationError, match=f"queries_per_sample={least - 1} .* needs at least {least} rows"
    ):
        run(model, inputs, queries_per_sample=least - 1, **options)


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"two_stage"}))
def test_counts_do_not_depend_on_the_steps_own_noise(name):
    """Same past, same clean forward, other noise: the counts must be the same, or the estimate
    could be biased.
    """
    model, inputs = tiny_model("vit"), tiny_batch("vit", samples=8)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    options = {
        "objective": TappedLoss(),
        "forward": model_forward(model),
        "queries_per_sample": 8,
        "kind": "shared",
    }
    options["rows_per_forward"] = 99
    found = []
    for distribution in ("gaussian", "rademacher"):
        allocator = following(name)
        for step in range(12):
            run(model, inputs, step=step, allocator=allocator, **options)
        # Three micro-batches of one step: the noise of the first must not reach the counts of the
        # third either.
        results = [
            run(
                model,
                inputs,
                place=BatchPosition(step=12, position=p),
                allocator=allocator,
                distribution=distribution,
                **options,
            )
            for p in (0, 8, 16)
        ]
        found.append([result.counts.tolist() for _, result in results])
        estimates = results[0][1].mean_squares
    assert found[0] == found[1]
    assert estimates.isfinite().all()
    assert name == "uniform" or len({count for counts in found[0] for count in counts}) > 1


class Recorded(TwoStage):
    """Notes what it decided, and on what."""

    def __init__(self):
        super().__init__(pilot=3)
        self.seen = []

    def pilot(self, features, budget):
        plan = super().pilot(features, budget)
        self.seen.append([part.tolist() for part in plan])
        return plan

    def second_counts(self, features, squares, pilot, shares, budget):
        counts = super().second_counts(features, squares, pilot, shares, budget)
        self.seen.append([squares.tolist(), counts.tolist()])
        return counts


def test_a_pilot_decides_the_second_round_and_nothing_else_of_the_steps_noise_does():
    found = []
    for distribution in ("gaussian", "rademacher"):
        allocator = Recorded()
        _, result = run(
            Quadratic(),
            quadratic_batch(),
            allocator=allocator,
            queries_per_sample=13,
            distribution=distribution,
        )
        (pilot, shares), (squares, second) = allocator.seen
        assert pilot == [3] * SAMPLES
        assert sum(second) == 9 * SAMPLES
        assert result.counts.tolist() == [3 + n for n in second]
        # The pilot outvotes a prediction that knows nothing: the larger deltas got more of the
        # second round.
        order = torch.tensor(squares).argsort()
        assert second[order[-1]] > 2 * second[order[0]]
        found.append((shares, second))
    assert found[0][0] == found[1][0]  # weights are fixed before any noise
    assert found[0][1] != found[1][1]


def test_allocators_learn_lengths_and_ids():
    class Nosy(Uniform):
        needs_clean = True

        def update(self, features, counts, mean_squares):
            self.seen = features

    model, inputs, allocator = tiny_model("llama"), tiny_batch("llama"), Nosy()
    options = {
        "objective": TappedLoss(),
        "forward": model_forward(model),
        "allocator": allocator,
        "kind": "shared",
    }
    run(model, inputs, place=BatchPosition(ids=(7, 3, 5, 1)), **options)
    assert allocator.seen.ids == (7, 3, 5, 1)
    assert allocator.seen.lengths.equal((inputs["labels"][:, 1:] != -100).sum(1).float())
    run(model, inputs, place=BatchPosition(ids=(7,)), **options)  # not this batch's
    assert allocator.seen.ids is None


def test_the_gradient_is_added_to_what_is_there():
    model, inputs = Quadratic(), quadratic_batch()
    first, _ = run(model, inputs)
    method = Method(
        CallableObjective(lambda outputs, inputs: outputs),
        perturb(model, rowwise=ParameterVector.of(model).names, distribution="gaussian"),
        OneSided(),
        Uniform(),
        4,
        1e-3,
        7,
    )
    estimate_gradient(lambda batch: (None, model(**batch)), inputs, method, BatchPosition())
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), 2 * first)
    assert replace(method, allocator=Optimal()).needs_clean
