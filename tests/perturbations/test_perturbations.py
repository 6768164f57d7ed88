"""Row-wise noise against the oracle: a loop that changes the parameters for one row at a time."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from hf_flops.autotune.rule_check import choose_perturbation
from hf_flops.base.prng import seeds
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import (
    DISTRIBUTIONS,
    NoiseKeys,
    ParameterVector,
    RowMismatch,
    RowwiseNoise,
    SharedNoise,
    displaced,
    perturb,
)
from hf_flops.perturbations.noise import draw
from tests.helpers.tiny import TASKS, generator, model_forward, tiny_batch, tiny_model

SIZE = st.integers(1, 4)
NOISE = st.sampled_from(sorted(DISTRIBUTIONS))
BLOCK = st.sampled_from([1, 20, 2**18])  # a row at a time, a few, all


def keys(rows, step=0):
    positions = torch.arange(rows)
    return NoiseKeys.of(0, step, positions, torch.zeros(rows, dtype=torch.int64), group=0)


@torch.no_grad()
def assert_equals_oracle(module, x, rows, distribution="gaussian", block=2**18):
    """Compare outputs under row-wise noise with a loop over rows, in float64; x: (R * m, ...)."""
    module = module.double()
    x = x.double() if x.is_floating_point() else x
    vector = ParameterVector.of(module)
    perturbation = RowwiseNoise(module, vector, distribution)
    noise = perturbation.draw(keys(rows))
    with patch("hf_flops.perturbations.noise.BLOCK", block), perturbation.applied(noise, 0.25):
        found = module(x)
    expected = []
    for row, own in enumerate(x.reshape(rows, -1, *x.shape[1:])):
        with displaced(vector, 0.25 * noise[row]):
            expected.append(module(own))
    tolerance = (
        1e-5 if "RMSNorm" in type(module).__name__ or isinstance(module, T5LayerNorm) else 1e-9
    )
    # some norms compute in float32
    torch.testing.assert_close(found, torch.cat(expected), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(found, module(x))


def randn(*shape):
    return torch.randn(*shape, generator=generator())


@settings(max_examples=60)
@given(
    rows=SIZE,
    tokens=st.lists(SIZE, max_size=2),
    repeats=SIZE,
    inside=SIZE,
    outside=SIZE,
    bias=st.booleans(),
    noise=NOISE,
    block=BLOCK,
)
def test_linear(rows, tokens, repeats, inside, outside, bias, noise, block):
    module, x = nn.Linear(inside, outside, bias), randn(rows * repeats, *tokens, inside)
    assert_equals_oracle(module, x, rows, noise, block)


@settings(max_examples=40)
@given(rows=SIZE, tokens=SIZE, inside=SIZE, outside=SIZE, noise=NOISE, block=BLOCK)
def test_conv1d_of_gpt2(rows, tokens, inside, outside, noise, block):
    assert_equals_oracle(Conv1D(outside, inside), randn(rows, tokens, inside), rows, noise, block)


@settings(max_examples=30)
@given(
    rows=SIZE,
    repeats=st.integers(1, 2),
    dimensions=st.integers(1, 3),
    groups=st.integers(1, 2),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    bias=st.booleans(),
    block=BLOCK,
)
def test_convolution(rows, repeats, dimensions, groups, stride, padding, mode, bias, block):
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    stride = 1 if padding == "same" else stride
    module = kind(
        2 * groups, 4 * groups, 3, stride, padding, groups=groups, bias=bias, padding_mode=mode
    )
    x = randn(rows * repeats, 2 * groups, *[5] * dimensions)
    assert_equals_oracle(module, x, rows, block=block)


@settings(max_examples=15)
@given(rows=SIZE, tokens=SIZE, entries=SIZE, width=SIZE, noise=NOISE, block=BLOCK)
def test_embedding(rows, tokens, entries, width, noise, block):
    x = torch.randint(entries, (rows, tokens), generator=generator())
    assert_equals_oracle(nn.Embedding(entries, width), x, rows, noise, block)


@settings(max_examples=20)
@given(
    rows=SIZE,
    tokens=SIZE,
    shape=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    bias=st.booleans(),
)
def test_layer_norm(rows, tokens, shape, bias):
    assert_equals_oracle(nn.LayerNorm(shape, bias=bias), randn(rows, tokens, *shape), rows)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm, nn.RMSNorm])
def test_rms_norm(kind):
    assert_equals_oracle(kind(6), randn(3, 4, 6), 3)


def test_only_the_trainable_part_of_a_module_moves():
    for frozen in ("weight", "bias"):
        module = nn.Linear(3, 2)
        getattr(module, frozen).requires_grad_(False)
        assert_equals_oracle(module, randn(4, 3), 4)


def test_a_layer_may_be_called_by_the_name_of_its_input():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(input=x)

    assert_equals_oracle(Named(), randn(4, 2, 3), 4)


def test_tied_weights_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    assert_equals_oracle(Tied(), randn(4, 2, 3), 4)


ADAPTERS = {
    "lora": lambda task: LoraConfig(
        r=2, target_modules="all-linear", task_type=task, lora_dropout=0.1
    ),
    "prompt": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "projected_prefix": lambda task: PrefixTuningConfig(
        task_type=task, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
}
PAIRS = [
    (kind, adapter)
    for kind in TASKS
    for adapter in ADAPTERS
    if adapter == "lora" or (kind not in ("vit", "t5")) or (kind == "t5" and adapter == "prompt")
]


def adapted(kind, adapter):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_model(kind), ADAPTERS[adapter](TASKS[kind])).eval()


@pytest.mark.parametrize(
    ("kind", "adapter", "distribution"),
    [(*pair, "gaussian") for pair in PAIRS]
    + [
        ("vit", "lora", "rademacher"),
        ("gpt2", "lora", "rank_one"),
        ("llama", "prompt", "rank_one"),
    ],
)
@torch.no_grad()
def test_adapters_in_real_models(kind, adapter, distribution):
    model, inputs, objective = adapted(kind, adapter), tiny_batch(kind), TappedLoss()
    vector = ParameterVector.of(model)
    perturbation = RowwiseNoise(model, vector, distribution)
    noise = perturbation.draw(keys(4))
    # off lora_B = 0, where lora_A does nothing
    offset = 0.2 * draw("gaussian", seeds(9, 9), vector.shapes)[0]
    with displaced(vector, offset):
        with perturbation.applied(noise, 0.05):
            found = objective(model_forward(model), inputs).sums
        for row in range(4):
            with displaced(vector, 0.05 * noise[row]):
                expected = objective(model_forward(model), inputs).sums[row]
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("kind", "adapter"), PAIRS)
@torch.no_grad()
def test_the_self_check_trusts_the_rules_of_supported_adapters(kind, adapter):
    model, inputs = adapted(kind, adapter), tiny_batch(kind)
    perturbation, notes = choose_perturbation(
        model, TappedLoss(), model_forward(model), inputs, mode="rowwise"
    )
    assert isinstance(perturbation, RowwiseNoise)
    assert set(perturbation.vector.names) == set(ParameterVector.of(model).names)
    assert notes == []


@torch.no_grad()
def test_the_self_check_finds_modules_that_are_called_in_unexpected_ways():
    class Weights(nn.Module):
        """Reads a weight off by sending the identity matrix through its layer, as some adapters
        do.
        """

        def __init__(self):
            super().__init__()
            self.odd, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

        def forward(self, features, labels):
            weight = self.odd(torch.eye(4)).T
            logits = self.head(torch.tanh(features @ (weight / weight.norm())))
            return nn.functional.cross_entropy(logits, labels), logits

    model, inputs = (
        Weights().eval(),
        {"features": randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])},
    )
    perturbation, notes = choose_perturbation(
        model, TappedLoss(), lambda inputs: model(**inputs), inputs
    )
    rowwise, shared = perturbation.parts
    assert (rowwise.vector.names, shared.vector.names) == (
        ["head.weight", "head.bias"],
        ["odd.weight"],
    )
    assert "noise that is shared by the batch" in notes[0]


@torch.no_grad()
def test_the_self_check_finds_attention_that_reads_its_weights_directly():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = (
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.Linear(8, 3),
            )
            self.unused = nn.Linear(8, 3)

        def forward(self, features, labels):
            hidden, _ = self.attention(features, features, features)
            return nn.functional.cross_entropy(self.head(hidden.mean(1)), labels), hidden

    model = Attends().eval()
    inputs = {"features": randn(4, 5, 8), "labels": torch.tensor([0, 1, 2, 0])}
    perturbation, notes = choose_perturbation(
        model, TappedLoss(), lambda inputs: model(**inputs), inputs
    )
    rowwise, shared = perturbation.parts
    assert set(rowwise.vector.names) == {"head.weight", "head.bias"}
    assert set(shared.vector.names) == {
        f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias")
    } | {
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    }
    assert "unused" in notes[1]


def test_a_flattened_input_that_does_not_hold_whole_rows_is_refused():
    module = nn.Linear(3, 2)
    perturbation = RowwiseNoise(module, ParameterVector.of(module), "gaussian")
    applied = perturbation.applied(perturbation.draw(keys(4)), 1.0)
    with pytest.raises(RowMismatch, match=r"\(5, [23]\) does not contain 4 rows"), applied:
        module(randn(5, 3))


@pytest.mark.parametrize("mode", ["rowwise", "shared", "mixed"])
@torch.no_grad()
def test_nothing_is_left_behind(mode):
    model = adapted("llama", "lora")
    names = ParameterVector.of(model).names
    half = len(names) // 2
    rowwise = {"rowwise": names, "shared": [], "mixed": names[:half]}[mode]
    perturbation = perturb(
        model, rowwise=rowwise, shared=[name for name in names if name not in rowwise]
    )
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.named_parameters()}
    for failing in (False, True):
        try:
            with perturbation.applied(perturbation.draw(keys(4)), 0.1):
                model(**tiny_batch("llama"))
                assert not failing or not "raise here"
        except AssertionError:
            pass
        for name, value in model.named_parameters():
            assert value.equal(before[name][0])
            assert value.data_ptr() == before[name][1]
        assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_the_prompt_is_unpatched_after_an_exception():
    model = adapted("llama", "prompt")
    perturbation = RowwiseNoise(model, ParameterVector.of(model), "gaussian")
    patched = []

    def fail():
        patched.append("get_prompt" in vars(model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), perturbation.applied(perturbation.draw(keys(4)), 0.1):
        fail()
    assert patched == [True]
    assert "get_prompt" not in vars(model)


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize(
    "module", [nn.Linear(8, 3), nn.Linear(3, 8), Conv1D(3, 8)], ids=["narrow", "wide", "conv1d"]
)
@torch.no_grad()
def test_noise_enters_under_autocast(module, distribution):
    vector, x = (
        ParameterVector.of(module),
        randn(3, 5, module.weight.shape[isinstance(module, nn.Linear)]),
    )
    perturbation = RowwiseNoise(module, vector, distribution)
    noise = perturbation.draw(keys(3))
    with torch.autocast("cpu", torch.bfloat16):  # which keeps what it has cast
        clean = module(x)
        with perturbation.applied(noise, 0.25):
            found = module(x)
        for row in range(3):
            with displaced(vector, 0.25 * noise[row]):
                torch.testing.assert_close(found[row], module(x[row]), rtol=0.05, atol=0.05)
        assert module(x).equal(clean)
    assert found.dtype == torch.bfloat16
    assert not torch.allclose(found, clean, rtol=0.1, atol=0.1)
    with perturbation.applied(noise, 0.25):
        assert module(x).is_contiguous()  # as without noise: models take views of outputs


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("kind", [RowwiseNoise, SharedNoise])
def test_the_pull_back_is_the_weighted_sum_of_the_noise(kind, distribution):
    module = nn.Linear(13, 2)
    vector = ParameterVector.of(module)
    perturbation = (
        kind(module, vector, distribution) if kind is RowwiseNoise else kind(vector, distribution)
    )

    def flat(step=0):
        noise = perturbation.draw(keys(5, step))
        return (
            noise.expand(5, -1)
            if torch.is_tensor(noise)
            else torch.stack([noise[row] for row in range(5)])
        )

    coefficients = randn(5)
    found = perturbation.weighted_noise(perturbation.draw(keys(5)), coefficients)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), (flat() * coefficients[:, None]).sum(0))
    assert flat().equal(flat())
    assert not flat(step=1).equal(flat())


def test_gradients_are_added_in_the_parameters_dtype():
    model = nn.Sequential(
        nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False).to(torch.bfloat16)
    )
    vector = ParameterVector.of(model)
    vector.add_to_gradients(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    vector.add_to_gradients(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    assert model[0].weight.grad.tolist() == [[2.0, 3.0]]
    assert model[1].weight.grad.dtype == torch.bfloat16
    assert model[1].weight.grad.tolist() == [[4.0], [5.0]]
