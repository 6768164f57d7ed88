"""Per-row rules of PEFT's own layers against the oracle, and the rule that runs a layer row by
row.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    C3AConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PromptEncoderConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_flops.autotune.rule_check import choose_perturbation
from hf_flops.base.prng import seeds
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import (
    ParameterVector,
    RowMismatch,
    RowwiseNoise,
    SharedNoise,
    displaced,
)
from hf_flops.perturbations.noise import draw
from tests.helpers.tiny import TASKS, model_forward, tiny_batch, tiny_model
from tests.perturbations.test_perturbations import keys, randn

WIDTHS = st.integers(1, 3).map(lambda n: 2 * n)


class Net(nn.Module):
    """Linear layers, GPT-2's, a convolution and an embedding, each used as transformers do."""

    def __init__(self, inside, outside):
        super().__init__()
        self.tokens = nn.Embedding(7, inside)
        self.first, self.second = nn.Linear(inside, outside), nn.Linear(outside, inside, bias=False)
        self.third, self.patch = Conv1D(outside, inside), nn.Conv2d(outside, 3, (2, 1), bias=False)

    def forward(self, ids):
        hidden = self.tokens(ids)
        hidden = self.third(hidden + self.second(self.first(hidden).tanh()))
        return self.patch(hidden.transpose(-1, -2).unsqueeze(-1))


ADAPTERS = {
    "dora": lambda: LoraConfig(r=2, target_modules=["first", "second", "third"], use_dora=True),
    "ia3": lambda: IA3Config(
        target_modules=["first", "second", "third", "patch"],
        feedforward_modules=["second", "patch"],
    ),
    "ia3_outputs": lambda: IA3Config(
        target_modules=["first", "third", "patch"], feedforward_modules=[]
    ),
    "vera": lambda: VeraConfig(r=3, target_modules=["first"], vera_dropout=0.1),
    "embedding": lambda: LoraConfig(r=2, target_modules=["tokens"]),
    "tokens": lambda: TrainableTokensConfig(target_modules=["tokens"], token_indices=[0, 3, 5]),
    "lora_and_tokens": lambda: LoraConfig(
        r=2, target_modules=["first"], trainable_token_indices={"tokens": [0, 3, 5]}
    ),
}
LOOPED = {
    "loha": lambda: LoHaConfig(r=2, target_modules=["first", "second", "patch"]),
    "oft": lambda: OFTConfig(
        oft_block_size=2, target_modules=["first", "second"], use_cayley_neumann=False
    ),
    "c3a": lambda: C3AConfig(block_size=2, target_modules=["first", "second"]),
    "dora_bias": lambda: LoraConfig(r=2, target_modules=["first"], use_dora=True, bias="lora_only"),
    "dora_embedding": lambda: LoraConfig(r=2, target_modules=["tokens"], use_dora=True),
}


@torch.no_grad()
def assert_equals_oracle(config, inside, outside, rows, tokens, repeats=1, row_by_row=False):
    """Compare outputs under row-wise noise with a loop over rows that changes the parameters, in
    float64.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(Net(inside, outside), config).double().eval()
    vector = ParameterVector.of(model)
    # off values at which tensors hide each other
    offset = 0.3 * draw("gaussian", seeds(3, 3), vector.shapes)[0]
    ids = torch.arange(rows * repeats * tokens).reshape(rows * repeats, tokens) * 5 % 7
    perturbation = RowwiseNoise(model, vector, "gaussian", vector.names if row_by_row else ())
    noise = perturbation.draw(keys(rows))
    with displaced(vector, offset):
        with perturbation.applied(noise, 0.25):
            found = model(ids)
        expected = []
        for row in range(rows):
            with displaced(vector, 0.25 * noise[row]):
                expected.append(model(ids[row * repeats : (row + 1) * repeats]))
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-6, atol=1e-7)
        assert not torch.allclose(found, model(ids))


# PEFT on models without a configuration, and on GPT-2's layer
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("adapter", ADAPTERS)
@settings(max_examples=6)
@given(
    inside=WIDTHS,
    outside=WIDTHS,
    rows=st.integers(1, 4),
    tokens=st.integers(2, 4),
    repeats=st.integers(1, 2),
)
def test_rules_of_adapter_layers(adapter, inside, outside, rows, tokens, repeats):
    assert_equals_oracle(ADAPTERS[adapter](), inside, outside, rows, tokens, repeats)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("adapter", [*LOOPED, *ADAPTERS])
def test_layers_run_row_by_row(adapter):
    assert_equals_oracle(
        {**LOOPED, **ADAPTERS}[adapter](), 4, 6, rows=3, tokens=4, repeats=2, row_by_row=True
    )


def adapted(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_model(kind), config).eval()


CHECKED = [
    (
        "llama",
        LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
        False,
    ),
    (
        "gpt2",
        LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
        False,
    ),
    (
        "bert",
        IA3Config(
            target_modules=["key", "value", "dense"],
            feedforward_modules=["dense"],
            task_type="SEQ_CLS",
        ),
        False,
    ),
    ("vit", VeraConfig(r=4, target_modules=["q_proj", "v_proj"]), False),
    ("bert", LoraConfig(r=2, target_modules=["word_embeddings"], task_type="SEQ_CLS"), False),
    (
        "llama",
        TrainableTokensConfig(
            token_indices=[5, 6, 9], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
        ),
        False,
    ),
    (
        "gpt2",
        TrainableTokensConfig(
            token_indices=list(range(9)), target_modules=["wte"], task_type="CAUSAL_LM"
        ),
        False,
    ),
    ("llama", LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"), True),
    (
        "bert",
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="SEQ_CLS"),
        True,
    ),
]


@pytest.mark.parametrize(
    ("kind", "config", "row_by_row"), CHECKED, ids=lambda value: getattr(value, "peft_type", value)
)
@torch.no_grad()
def test_the_self_check_agrees_with_the_oracle(kind, config, row_by_row):
    model, inputs, objective = adapted(kind, config), tiny_batch(kind), TappedLoss()
    perturbation, notes = choose_perturbation(
        model, objective, model_forward(model), inputs, mode="rowwise", distribution="gaussian"
    )
    assert [note for note in notes if "run once for each row" in note] == (
        notes if row_by_row else []
    )
    noise = perturbation.draw(keys(4))
    with perturbation.applied(noise, 0.05):
        found = objective(model_forward(model), inputs).sums
    for row in range(4):
        with displaced(perturbation.vector, 0.05 * noise[row]):
            expected = objective(model_forward(model), inputs).sums[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_nothing_is_left_behind_in_adapter_layers():
    model = adapted(
        "bert",
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="SEQ_CLS"),
    )
    vector = ParameterVector.of(
        model, {n for n, _ in model.named_parameters() if "prompt_encoder" in n}
    )
    perturbation = RowwiseNoise(model, vector, "gaussian", vector.names)
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.named_parameters()}
    applied = perturbation.applied(perturbation.draw(keys(3)), 0.1)
    with pytest.raises(RowMismatch, match="does not get 3 rows"), applied:
        model(**tiny_batch("bert"))
    assert "get_prompt" not in vars(model)
    assert all(
        value.equal(before[n][0]) and value.data_ptr() == before[n][1]
        for n, value in model.named_parameters()
    )


@torch.no_grad()
def test_layers_that_mix_rows_are_not_run_row_by_row():
    class Centring(nn.Linear):
        """Takes the mean over all rows away, as batch norm does."""

        def forward(self, x):
            return super().forward(x - x.mean(0))

    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = Centring(4, 4), nn.Linear(4, 3)

        def forward(self, features, labels):
            logits = self.head(self.first(features).tanh())
            return nn.functional.cross_entropy(logits, labels), logits

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = OFTConfig(oft_block_size=2, target_modules=["first"], use_cayley_neumann=False)
        model = get_peft_model(Mixes(), config).eval()
    inputs = {"features": randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}
    perturbation, notes = choose_perturbation(
        model, TappedLoss(), lambda inputs: model(**inputs), inputs
    )
    assert isinstance(perturbation, SharedNoise)
    assert "noise that is shared by the batch" in notes[0]


def test_every_method_of_the_tests_is_a_known_kind():
    assert {kind for kind, _, _ in CHECKED} <= set(TASKS)
