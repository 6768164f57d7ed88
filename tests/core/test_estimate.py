"""The gradient estimate: what it charges, and harmless where losses fail; see tests/invariant for
what does not change it.
"""

from dataclasses import replace

import pytest
import torch

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
from tests.helpers.quadratic import (
    SAMPLES,
    WIDTH,
    Fixed,
    Quadratic,
    one_estimate,
    quadratic_batch,
    true_gradient,
)
from tests.helpers.tiny import model_forward, tiny_batch, tiny_model


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
                _, result = one_estimate(model, inputs, forward=forward, **options)
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
        _, result = one_estimate(
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
            one_estimate(model, inputs, step=s, kind=kind, queries_per_sample=26, **options)[0]
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
    gradient, result = one_estimate(model, inputs)
    assert result.metrics["dropped_rows"] == 3
    expected, _ = one_estimate(Quadratic(), good)
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
            gradient, result = one_estimate(model, inputs, step=step, **options)
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
        one_estimate(model, quadratic_batch(), step=8)
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
    one_estimate(model, inputs, queries_per_sample=least, **options)
    with pytest.raises(
        ConfigurationError, match=f"queries_per_sample={least - 1} .* needs at least {least} rows"
    ):
        one_estimate(model, inputs, queries_per_sample=least - 1, **options)


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
            one_estimate(model, inputs, step=step, allocator=allocator, **options)
        # Three micro-batches of one step: the noise of the first must not reach the counts of the
        # third either.
        results = [
            one_estimate(
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
        _, result = one_estimate(
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
    one_estimate(model, inputs, place=BatchPosition(ids=(7, 3, 5, 1)), **options)
    assert allocator.seen.ids == (7, 3, 5, 1)
    assert allocator.seen.lengths.equal((inputs["labels"][:, 1:] != -100).sum(1).float())
    one_estimate(model, inputs, place=BatchPosition(ids=(7,)), **options)  # not this batch's
    assert allocator.seen.ids is None


def test_the_gradient_is_added_to_what_is_there():
    model, inputs = Quadratic(), quadratic_batch()
    first, _ = one_estimate(model, inputs)
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
