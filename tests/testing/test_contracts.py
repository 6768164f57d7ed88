"""The library's own classes pass the contracts that `hf_flops.testing` offers for classes of a
user's own.
"""

import contextlib
import doctest

import pytest
import torch
from torch import nn

import hf_flops.testing.allocators
import hf_flops.testing.engines
import hf_flops.testing.objectives
import hf_flops.testing.perturbations
from hf_flops import MacroF1, Metric
from hf_flops.allocators import ALLOCATORS, OptimalWithZeros, Uniform
from hf_flops.engines import TorchEngine
from hf_flops.objectives import BatchLoss, CallableObjective, Objective, RowLosses, TappedLoss
from hf_flops.perturbations import ActivationNoise, ParameterVector, RowwiseNoise, SharedNoise
from hf_flops.testing import (
    AllocatorContract,
    EngineContract,
    ObjectiveContract,
    PerturbationContract,
)
from tests.helpers.tiny import SIZES, VOCABULARY, generator, model_forward, tiny_batch, tiny_model


def double(inputs):
    return {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }


class TestAllocators(AllocatorContract):
    @pytest.fixture(autouse=True, params=sorted(ALLOCATORS))
    def _kind(self, request):
        self.kind = ALLOCATORS[request.param]

    def make(self):
        return self.kind()


OBJECTIVES = {
    "tapped": (TappedLoss(logits=True), "bert"),
    "tapped, tokens": (TappedLoss(), "llama"),
    "batch": (BatchLoss(), "bert"),
    "callable": (CallableObjective(lambda outputs, inputs: outputs.logits.square().sum(1)), "bert"),
    "accuracy": (Metric("accuracy"), "bert"),
    "macro f1": (MacroF1(), "bert"),
}


class TestObjectives(ObjectiveContract):
    @pytest.fixture(autouse=True, params=sorted(OBJECTIVES))
    def _objective(self, request):
        self.objective, self.kind = OBJECTIVES[request.param]

    def make(self):
        return (
            self.objective,
            model_forward(tiny_model(self.kind).double()),
            double(tiny_batch(self.kind)),
        )


def small_model():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(parameter.numel())))
    x = torch.randn(4, 3, generator=generator(1)).double()
    return model, lambda: model(x).square().sum(1)


PERTURBATIONS = {
    "rowwise": lambda model: RowwiseNoise(model, ParameterVector.of(model), "rademacher"),
    "shared": lambda model: SharedNoise(ParameterVector.of(model), "gaussian"),
    "activation": lambda model: ActivationNoise(model, ParameterVector.of(model), "gaussian"),
}


class TestPerturbations(PerturbationContract):
    @pytest.fixture(autouse=True, params=sorted(PERTURBATIONS))
    def _kind(self, request):
        self.kind = PERTURBATIONS[request.param]

    def make(self):
        model, losses = small_model()
        return self.kind(model), model, losses


class TestTorchEngine(EngineContract):
    def make(self):
        return TorchEngine(tiny_model("llama")), SIZES["hidden_size"], VOCABULARY


@pytest.mark.parametrize(
    "module",
    [
        hf_flops.testing.allocators,
        hf_flops.testing.engines,
        hf_flops.testing.objectives,
        hf_flops.testing.perturbations,
    ],
)
def test_the_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def broken(contract, test, make):
    """Run one test of a contract on a class that breaks it."""
    case = type("Case", (contract,), {"make": lambda self: make()})()
    with pytest.raises(AssertionError):
        getattr(case, test)()


class Forgetful(Uniform):
    """Gives other counts with every call."""

    calls = 0

    def counts(self, features, budget):
        self.calls += 1
        return super().counts(features, budget).roll(self.calls)


class Generous(Uniform):
    def counts(self, features, budget):
        return super().counts(features, max(budget, len(features.losses))) + 1


class Lucky(Uniform):
    """Draws who gets the remainder."""

    def counts(self, features, budget):
        counts = super().counts(features, budget)
        return counts[torch.randperm(len(counts))]


class Reversed(OptimalWithZeros):
    """Expects other counts than it draws."""

    def counts(self, features, budget):
        return super().counts(features, budget).flip(0)


def test_broken_allocators_are_found():
    broken(AllocatorContract, "test_the_mean_of_random_counts_is_the_expected_count", Reversed)
    broken(AllocatorContract, "test_counts_spend_the_budget", Generous)
    broken(AllocatorContract, "test_a_budget_below_one_query_per_sample_is_refused", Generous)
    broken(AllocatorContract, "test_counts_do_not_depend_on_global_state", Lucky)
    broken(AllocatorContract, "test_a_resumed_allocator_goes_on_as_the_old_one", Forgetful)


class Mean(Objective):
    """Losses that depend on the other rows."""

    def __call__(self, forward, inputs, *, features=False):
        sums = forward(inputs)[1].sum(1)
        return RowLosses(sums - sums.mean(), torch.ones_like(sums))


class Half(Objective):
    def __call__(self, forward, inputs, *, features=False):
        sums = forward(inputs)[1].sum(1).half()
        return RowLosses(sums, torch.ones_like(sums))


def test_broken_objectives_are_found():
    def case(objective):
        return lambda: (
            objective,
            lambda inputs: (None, inputs["x"]),
            {"x": torch.arange(6.0).reshape(3, 2)},
        )

    broken(ObjectiveContract, "test_rows_do_not_depend_on_each_other", case(Mean()))
    broken(ObjectiveContract, "test_losses_have_an_entry_per_row", case(Half()))


class Left(SharedNoise):
    """Forgets to take its noise away."""

    def applied(self, noise, scale):
        super().applied(noise, scale).__enter__()
        return contextlib.nullcontext()


class Doubled(SharedNoise):
    def weighted_noise(self, noise, coefficients):
        return 2 * super().weighted_noise(noise, coefficients)


def test_broken_perturbations_are_found():
    def case(kind):
        model, losses = small_model()
        return lambda: (kind(ParameterVector.of(model), "gaussian"), model, losses)

    broken(PerturbationContract, "test_the_model_is_bit_for_bit_what_it_was", case(Left))
    broken(PerturbationContract, "test_noise_is_a_change_of_the_parameters", case(Doubled))
    broken(PerturbationContract, "test_the_mean_of_the_estimate_is_the_gradient", case(Doubled))


def test_broken_engines_are_found():
    def blind(embeds, mask, tokens):
        return embeds.sum(1)[:, tokens]

    def first(embeds, mask, tokens):
        return embeds.sum(1)[:, : len(tokens)]

    broken(EngineContract, "test_padding_does_not_matter", lambda: (blind, 4, 4))
    broken(
        EngineContract,
        "test_rows_do_not_depend_on_each_other",
        lambda: (lambda e, m, t: e.sum(1)[:, t] * e.sum(), 4, 4),
    )
    broken(EngineContract, "test_scores_are_those_of_the_tokens", lambda: (first, 4, 4))
