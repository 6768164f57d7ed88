"""Activation noise: unbiased by enumeration, the published formula, the Rao-Blackwell form, and
where it is used.
"""

import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import Uniform
from hf_flops.autotune.rule_check import choose_perturbation
from hf_flops.estimators import Antithetic, OneSided
from hf_flops.objectives import CallableObjective, TappedLoss
from hf_flops.perturbations import (
    ActivationNoise,
    NoiseKeys,
    ParameterVector,
    PinCheck,
    RowMismatch,
    RowwiseNoise,
    displaced,
    perturb,
)
from hf_flops.perturbations.activation import Drawn, correlated, independent
from tests.helpers.tiny import TASKS, model_forward, tiny_batch, tiny_model
from tests.perturbations.test_perturbations import keys, randn

MIXINGS = pytest.mark.parametrize("mixing", [correlated, independent])


def linear_layer(kind, inside, outside, trainable):
    module = (Conv1D(outside, inside) if kind == "conv1d" else nn.Linear(inside, outside)).double()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    return module


def row_estimates(module, perturbation, noise, x, scale, loss):
    """Return (R, d): each row's one-sided difference times what its noise pulls back to."""
    with torch.no_grad():
        clean = loss(module(x))
        with perturbation.applied(noise, scale):
            deltas = (loss(module(x)) - clean) / scale
        rows = torch.eye(len(x), dtype=x.dtype)
        return torch.stack(
            [
                delta * perturbation.weighted_noise(noise, row)
                for delta, row in zip(deltas, rows, strict=True)
            ]
        )


@MIXINGS
@pytest.mark.parametrize("trainable", [("weight",), ("bias",), ("weight", "bias")], ids=" ".join)
@settings(max_examples=6)
@given(
    kind=st.sampled_from(["linear", "conv1d"]),
    inside=st.integers(1, 4),
    shape=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3), (3, 2), (6, 1)]),
)
def test_the_mean_over_all_signs_is_the_gradient(mixing, trainable, kind, inside, shape):
    tokens, outside = shape
    module = linear_layer(kind, inside, outside, trainable)
    signs = torch.tensor(
        list(product([1.0, -1.0], repeat=tokens * outside)), dtype=torch.float64
    ).view(-1, tokens, outside)
    x, slope = randn(tokens, inside).double(), randn(tokens, outside).double()
    vector = ParameterVector.of(module)
    perturbation = ActivationNoise(module, vector, "rademacher", mixing)
    noise = Drawn(keys(len(signs)), {(0, 0): signs})
    found = row_estimates(
        module,
        perturbation,
        noise,
        x.repeat(len(signs), 1, 1),
        0.1,
        lambda y: (y * slope).sum((1, 2)),
    )
    wanted = torch.autograd.grad((module(x) * slope).sum(), vector.parameters)
    torch.testing.assert_close(
        found.mean(0).double(), torch.cat([g.flatten() for g in wanted]), rtol=1e-5, atol=1e-6
    )
    assert perturbation.dimension(noise) == tokens * outside


def test_independent_noise_is_the_published_likelihood_ratio():
    module, x = linear_layer("linear", 4, 3, ("weight",)), randn(5, 2, 4).double()
    perturbation = ActivationNoise(module, ParameterVector.of(module), "gaussian", independent)
    noise, scale = perturbation.draw(keys(5)), 0.3

    def loss(y):
        return y.tanh().sum((1, 2))

    found = row_estimates(module, perturbation, noise, x, scale, loss)
    sigma = scale * x.norm(dim=-1, keepdim=True)  # of the noise on each token's output
    xi = noise.noise[0, 0]
    with torch.no_grad():
        above = loss(module(x) + sigma * xi) - loss(module(x))  # the clean loss as the baseline
    wanted = torch.einsum("r,rto,rti->roi", above, xi / sigma, x)
    torch.testing.assert_close(found.view(5, 3, 4).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3])
def test_it_is_weight_noise_less_what_the_forward_cannot_see(tokens):
    module, x = linear_layer("linear", 6, 3, ("weight", "bias")), randn(4, tokens, 6).double()
    vector = ParameterVector.of(module)
    weights = RowwiseNoise(module, vector, "gaussian")
    drawn = weights.draw(keys(4))
    z = torch.stack([drawn[row] for row in range(4)]).double()
    seen = torch.cat([x, torch.ones(4, tokens, 1)], -1)
    full = torch.cat([z[:, :18].view(4, 3, 6), z[:, 18:].view(4, 3, 1)], -1)  # (R, out, in + 1)
    outputs = seen @ full.transpose(1, 2)
    mix = correlated(seen @ seen.transpose(1, 2))
    noise = Drawn(keys(4), {(0, 0): torch.linalg.solve_triangular(mix, outputs, upper=False)})
    perturbation = ActivationNoise(module, vector, "gaussian")
    with torch.no_grad():
        with perturbation.applied(noise, 0.1):
            found = module(x)
        for row in range(4):
            with displaced(vector, 0.1 * z[row]):
                torch.testing.assert_close(found[row], module(x)[row], rtol=1e-6, atol=1e-6)
    projected = full @ torch.linalg.pinv(seen) @ seen  # E[z | what was seen]
    for row in range(4):
        weight, bias = vector.views(perturbation.weighted_noise(noise, torch.eye(4)[row]).double())
        torch.testing.assert_close(
            torch.cat([weight, bias[:, None]], -1), projected[row], rtol=0.01, atol=0.01
        )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)

    def forward(self, features, labels=None):
        return self.second(self.first(features).tanh()).mean(1)


def surprise(outputs, inputs):
    return nn.functional.cross_entropy(outputs, inputs["labels"], reduction="none")


class Given(Uniform):
    """Hands out the counts it is told to."""

    def __init__(self, counts):
        self.wanted = counts

    def counts(self, features, budget):
        return self.wanted


def net_and_inputs():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double(), {
            "features": randn(4, 3, 5).double(),
            "labels": torch.tensor([0, 1, 2, 0]),
        }


def estimate(model, inputs, counts, objective=surprise, estimator=OneSided, rows_per_forward=10**6):
    model.zero_grad()
    perturbation = ActivationNoise(model, ParameterVector.of(model), "rademacher")
    method = Method(
        CallableObjective(objective),
        perturbation,
        estimator(),
        Given(torch.tensor(counts)),
        100,
        1e-4,
        rows_per_forward,
    )
    result = estimate_gradient(
        lambda inputs: (None, model(**inputs)), inputs, method, BatchPosition(seed=5)
    )
    return torch.cat([p.grad.flatten() for p in model.parameters()]), result


@pytest.mark.parametrize("estimator", [OneSided, Antithetic])
def test_a_step_with_uneven_counts_is_unbiased(estimator):
    model, inputs = net_and_inputs()
    found, result = estimate(model, inputs, [3000, 700, 5000, 1500], estimator=estimator)
    model.zero_grad()
    surprise(model(**inputs), inputs).mean().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    spread = result.metrics["gradient_variance"] ** 0.5
    assert spread < 0.2 * float(wanted.norm())
    assert float((found - wanted).norm()) < 1.6 * spread
    assert float((found - wanted).norm()) > 0.5 * spread  # the log's variance is that of this noise


@pytest.mark.parametrize("estimator", [OneSided, Antithetic])
def test_chunks_do_not_matter(estimator):
    model, inputs = net_and_inputs()
    whole, _ = estimate(model, inputs, [3, 1, 5, 2], estimator=estimator)
    for size in (1, 4):
        pieces, _ = estimate(
            model, inputs, [3, 1, 5, 2], estimator=estimator, rows_per_forward=size
        )
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6)


def test_rows_with_a_non_finite_loss_run_again_for_their_neighbours():
    model, inputs = net_and_inputs()
    clean = surprise(model(**inputs), inputs).detach()

    def broken(outputs, inputs):  # half of the noise leads to NaN, all of it for the last sample
        losses = surprise(outputs, inputs)
        bad = (losses > clean[2] + 1e-9) & (inputs["labels"] == 2)
        return torch.where(bad, torch.nan, losses)

    found, result = estimate(model, inputs, [2, 2, 9, 2], objective=broken)
    lost = int(result.metrics["dropped_rows"])
    assert 0 < lost < 9
    assert result.rows == 4 + 15 + 9 - lost
    perturbation = ActivationNoise(model, ParameterVector.of(model), "rademacher")
    wanted = torch.zeros_like(found)
    for sample, count in enumerate([2, 2, 9, 2]):
        for query in range(count):
            one = {name: value[sample : sample + 1] for name, value in inputs.items()}
            noise = perturbation.draw(
                NoiseKeys.of(5, 0, torch.tensor([sample]), torch.tensor([query]), 0)
            )
            with torch.no_grad(), perturbation.applied(noise, 1e-4):
                delta = (broken(model(**one), one) - clean[sample]) / 1e-4
            if bool(delta.isfinite()):
                wanted += (
                    perturbation.weighted_noise(noise, delta)
                    / (9 - lost if sample == 2 else count)
                    / 4
                )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def adapted(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(
            tiny_model(kind), LoraConfig(r=2, target_modules="all-linear", task_type=TASKS[kind])
        ).eval()


@torch.no_grad()
def test_nothing_is_left_behind():
    model = adapted("llama")
    names = [name for name in ParameterVector.of(model).names if "lora_A" in name]
    perturbation = perturb(
        model,
        activation=names,
        rowwise=[n for n in ParameterVector.of(model).names if n not in names],
    )
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.named_parameters()}
    for rows in (4, 3):
        noise = perturbation.draw(keys(rows))
        if rows == 4:
            with perturbation.applied(noise, 0.1):
                model(**tiny_batch("llama"))
        else:
            applied = perturbation.applied(noise, 0.1)
            with pytest.raises(RowMismatch), applied:
                model(**tiny_batch("llama"))
        assert all(
            value.equal(before[n][0]) and value.data_ptr() == before[n][1]
            for n, value in model.named_parameters()
        )
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("vit", "auto"), ("bert", "auto"), ("gpt2", "activation"), ("llama", "activation")],
)
def test_queries_see_the_slope_along_their_pull_back(kind, mode):
    model, inputs, objective = adapted(kind), tiny_batch(kind), TappedLoss()
    with torch.no_grad():
        perturbation, notes = choose_perturbation(
            model, objective, model_forward(model), inputs, mode=mode
        )
    activation = next(p for p in perturbation.parts if isinstance(p, ActivationNoise))
    # The pooler and the classifier see one token, all other layers several.
    if mode == "auto":
        assert activation.vector.names
        assert all(re.search("pooler|classifier", name) for name in activation.vector.names)
    else:
        assert set(activation.vector.names) >= {
            name for name in perturbation.vector.names if "lora_" in name
        }
    assert notes == []
    assert perturbation.replays
    vector = perturbation.vector
    with displaced(vector, 0.1 * randn(vector.size)):
        deltas = torch.zeros(4)
        noise = perturbation.draw(keys(4))
        with torch.no_grad():
            for sign in (1, -1):
                with perturbation.applied(noise, sign * 1e-3):
                    deltas += sign * objective(model_forward(model), inputs).sums / 2e-3
        losses = objective(model_forward(model), inputs).sums
        gradients = [
            torch.autograd.grad(loss, vector.parameters, retain_graph=True) for loss in losses
        ]
        flat = [torch.cat([piece.flatten() for piece in gradient]) for gradient in gradients]
    if mode == "auto":  # as few outputs as inputs, so that the weights can do what the noise did
        pulled = [perturbation.weighted_noise(noise, row) for row in torch.eye(4)]
        slopes = torch.stack([g @ own.to(g) for g, own in zip(flat, pulled, strict=True)])
        torch.testing.assert_close(deltas, slopes, rtol=0.05, atol=0.05 * float(slopes.abs().max()))


class Odd(nn.Module):
    """Uses its layer in a way for which noise on outputs would be wrong, or in the plain one."""

    def __init__(self, way):
        super().__init__()
        self.way, self.layer, self.head = way, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, features, labels):
        hidden = self.layer(features).tanh()
        if self.way == "twice":
            hidden = self.layer(hidden).tanh()
        elif self.way == "elsewhere":
            hidden = hidden + self.layer.weight.sum()
        elif self.way == "tokens first":
            hidden = self.layer(features.transpose(0, 1)).tanh().transpose(0, 1)
        logits = self.head(hidden.mean(1))
        return nn.functional.cross_entropy(logits, labels), logits


@pytest.mark.parametrize("way", ["plainly", "twice", "elsewhere", "tokens first"])
@torch.no_grad()
def test_the_check_pins_what_the_noise_must_act_through(way):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Odd(way).eval()
    inputs = {"features": randn(4, 2, 8), "labels": torch.tensor([0, 1, 2, 0])}
    pair = {name: value[:2] for name, value in inputs.items()}
    objective, names = TappedLoss(), ParameterVector.of(model).names
    check = PinCheck(model, lambda: objective(lambda inputs: model(**inputs), pair).sums, 1e-4)
    found = check.run([name for name in names if "layer" in name], smaller=False)
    assert found == (["layer.weight", "layer.bias"] if way == "plainly" else [])
    perturbation, _ = choose_perturbation(
        model, objective, lambda inputs: model(**inputs), inputs, mode="activation"
    )
    parts = perturbation.parts
    activation = {
        name for part in parts if isinstance(part, ActivationNoise) for name in part.vector.names
    }
    fine = {"plainly": ["layer.weight", "layer.bias"], "elsewhere": ["layer.bias"]}.get(way, [])
    assert activation == {"head.weight", "head.bias", *fine}


def test_only_linear_layers_are_taken():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(
        RowMismatch, match=r"\['1.weight', '1.bias'\] do not belong to linear layers"
    ):
        ActivationNoise(module, ParameterVector.of(module), "gaussian")
