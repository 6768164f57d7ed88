"""Metrics and rewards as objectives: what they measure, what their steps need, and that training
improves them.
"""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from hf_flops import (
    ConfigurationError,
    FlopsTrainer,
    GeneratedMetric,
    Metric,
    ObjectiveError,
    SuffixPromptModel,
)
from hf_flops.autotune.epsilon import STEP_GRID, choose_step_scale
from hf_flops.base.batch import take
from hf_flops.objectives.generation import exact_match
from hf_flops.objectives.metrics import SmoothSurrogate, last_logits
from hf_flops.perturbations import NoiseKeys, ParameterVector, RowwiseNoise
from tests.helpers.tiny import as_dataset, generator, tiny_batch, tiny_model, training_arguments
from tests.prompts.test_suffix_prompt import batch, draw_rows

WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join)


class Letters:
    """A tokenizer whose tokens are words."""

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(f"w{int(token)}" for token in row if int(token) > 2) for row in rows]


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 8,
        "queries_per_sample": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "rows_per_forward": 64,
    }
    return training_arguments(folder, **{**defaults, **options})


def built(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def adapted(kind, base=None):
    configs = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    if kind == "suffix":
        return built(lambda: SuffixPromptModel(tiny_model("llama"), 3))
    return built(lambda: get_peft_model(tiny_model("llama"), configs[kind]))


# --- scores ---


@given(text=WORDS, wanted=WORDS)
def test_an_exact_match_is_of_words(text, wanted):
    assert exact_match(text, wanted) == (text.split() == wanted.split())
    assert exact_match(f" {text.upper()}!", text) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "side"),
    [("lora", "left"), ("lora", "right"), ("prompt", "right"), ("prefix", "right")],
)
def test_the_last_logits_are_those_after_the_text(kind, side):
    model, texts = adapted(kind), draw_rows([(5, 1), (3, 1)])
    inputs = batch(texts, side)
    # the answer is not there yet
    inputs["attention_mask"] = inputs["attention_mask"] * (inputs["labels"] == -100)
    found = last_logits(
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]), inputs
    )
    for row, (text, _) in zip(found, texts, strict=True):
        torch.testing.assert_close(
            row, model(input_ids=text[None]).logits[0, -1], rtol=1e-4, atol=1e-5
        )


def test_accuracy_by_classes_and_by_words():
    logits, labels = torch.tensor([[1.0, 2, 0], [3, 1, 0]]), torch.tensor([1, 2])
    outputs = SimpleNamespace(logits=logits)
    assert Metric("accuracy").function(outputs, {"labels": labels}).tolist() == [1, 0]
    words = Metric("accuracy", label_words=[2, 1])
    outputs = SimpleNamespace(logits=torch.stack([logits * 0, logits], 1))
    assert words.function(outputs, {"labels": torch.tensor([1, 1])}).tolist() == [1, 1]
    with pytest.raises(ObjectiveError, match="label_words="):
        Metric("accuracy").function(outputs, {"labels": labels})


@pytest.mark.parametrize("better", [True, False])
def test_which_way_is_better_is_said_once(better):
    metric = Metric(lambda outputs, inputs: outputs, greater_is_better=better)
    found = metric(lambda inputs: (None, torch.tensor([1.0, 3])), {"labels": torch.zeros(2)})
    assert found.sums.tolist() == ([-1, -3] if better else [1, 3])
    assert found.counts.tolist() == [1, 1]
    text = GeneratedMetric(
        lambda texts, inputs: [len(text) for text in texts], Letters(), greater_is_better=better
    )
    assert text(lambda inputs: (None, ["ab", ""]), {"labels": torch.zeros(2)}).sums.tolist() == (
        [-2, 0] if better else [2, 0]
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Metric("acuracy"), r"Metric\('acuracy'\) is unknown"),
        (lambda: GeneratedMetric("bleu", Letters()), "'bleu'.* is unknown: use exact_match"),
        (lambda: Metric("accuracy", label_words=[5, 5]), "two or more different tokens"),
        (lambda: Metric("accuracy", label_words=[5]), "two or more different tokens"),
    ],
)
def test_unknown_metrics_are_refused(make, match):
    with pytest.raises(ConfigurationError, match=match):
        make()


def test_a_function_compares_texts_with_the_references():
    """As docs/objectives.md shows it for the scorers of a library."""

    def overlap(texts, inputs):
        pairs = zip(texts, metric.references(inputs), strict=True)
        return [len({*text.split()} & {*wanted.split()}) for text, wanted in pairs]

    metric = GeneratedMetric(overlap, Letters())
    labels = torch.tensor([[-100, 5, 6], [7, 8, 9]])
    found = metric(lambda inputs: (None, ["w6 w5 w4", "w3"]), {"labels": labels})
    assert found.sums.tolist() == [-2, 0]


def test_wrong_numbers_are_refused():
    with pytest.raises(ObjectiveError, match=r"\(3,\) for 2 rows"):
        Metric(lambda outputs, inputs: torch.zeros(3))(
            lambda inputs: (None, None), {"labels": torch.zeros(2)}
        )
    with pytest.raises(ObjectiveError, match="there are none"):
        GeneratedMetric("exact_match", Letters())(
            lambda inputs: (None, ["", ""]), {"input_ids": torch.zeros(2, 3)}
        )


# --- generation ---


# PEFT's, of prompts before padded texts
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix", "suffix"])
def test_every_row_generates_with_its_own_noise(kind):
    model, inputs = adapted(kind).eval(), batch(draw_rows([(5, 2), (3, 1)]))
    metric = GeneratedMetric(
        "exact_match", Letters(), max_new_tokens=4, min_new_tokens=4, pad_token_id=0
    )
    vector = ParameterVector.of(model)
    noise = RowwiseNoise(model, vector, "gaussian")
    rows = take(inputs, torch.tensor([0, 1, 1]))
    drawn = noise.draw(NoiseKeys(np.arange(3, dtype=np.uint64), 0))
    with noise.applied(drawn, 1.0):
        together = metric.run(model, rows)[1]
    for row in range(3):
        single = noise.draw(NoiseKeys(np.array([row], dtype=np.uint64), 0))
        with noise.applied(single, 1.0):
            alone = metric.run(model, take(rows, torch.tensor([row])))[1]
        assert alone == [together[row]]
    assert len(set(together)) > 1
    assert metric.references(inputs) == Letters().batch_decode(
        [answer for _, answer in draw_rows([(5, 2), (3, 1)])]
    )


@torch.no_grad()
def test_encoder_decoders_generate_too():
    model, inputs = tiny_model("t5"), tiny_batch("t5", 2)
    texts = GeneratedMetric("exact_match", Letters(), max_new_tokens=3, min_new_tokens=3).run(
        model, inputs
    )[1]
    tokens = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=3,
        min_new_tokens=3,
    )
    assert texts == Letters().batch_decode(tokens)


# --- steps and their scale ---


@given(data=st.data(), seed=st.integers(0, 99))
def test_a_scale_is_chosen_at_which_queries_see_steps(data, seed):
    shares = sorted(
        data.draw(st.lists(st.floats(0, 1), min_size=len(STEP_GRID), max_size=len(STEP_GRID)))
    )
    chosen = torch.rand(200, generator=generator(seed))
    deltas = torch.stack([(chosen < share).double() for share in shares])
    scale, share = choose_step_scale(deltas)
    seen = [float(row.mean()) for row in deltas]
    if max(seen) == 0:
        assert (scale, share) == (None, 0)
    else:
        index = STEP_GRID.index(scale)
        assert share == pytest.approx(seen[index])
        assert share >= min(0.25, max(seen))
        assert index == 0 or seen[index - 1] < 0.25


@torch.no_grad()
def test_a_surrogate_sees_what_metrics_do_not():
    model, inputs = tiny_model("llama"), batch(draw_rows([(5, 2), (3, 1)]))

    def sums(objective):
        return objective(lambda given: (None, model(**given)), inputs).sums

    flat = Metric(lambda outputs, given: outputs.logits[:, -1, 3] > 0)
    before = sums(flat), sums(flat.surrogate)
    model.lm_head.weight[3] += 1e-3
    assert sums(flat).equal(before[0])
    assert (sums(flat.surrogate) != before[1]).all()
    inputs["input_ids"][1, -2:] = 0  # padding
    assert sums(SmoothSurrogate())[1] == pytest.approx(float(sums(flat.surrogate)[1]))


def test_the_scale_of_a_metric_is_measured_unless_given(tmp_path, caplog):
    def found(**options):
        model = built(
            lambda: get_peft_model(tiny_model("vit"), LoraConfig(target_modules=["q_proj"]))
        )
        model.classifier.requires_grad_(True)
        data = as_dataset(tiny_batch("vit", 8))
        objective = options.pop("objective", Metric("accuracy"))
        trainer = FlopsTrainer(
            model,
            arguments(tmp_path, max_steps=1, **options),
            train_dataset=data,
            objective=objective,
        )
        trainer.train()
        return trainer, next(entry for entry in trainer.state.log_history if "loss" in entry)

    trainer, entry = found()
    assert entry["perturbation_scale"] in STEP_GRID
    assert entry["changed_queries"] >= 0.25
    assert trainer.ledger.rows == 32 * len(STEP_GRID) + 8 + 64
    given = found(perturbation_scale=0.1)[1]
    assert given["perturbation_scale"] == 0.1
    assert "changed_queries" not in given
    with caplog.at_level(logging.WARNING):
        found(objective=Metric(lambda outputs, inputs: torch.zeros(len(inputs["labels"]))))
    assert "No query of the first batch changes the objective" in caplog.text


# --- training ---


@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
def test_training_improves_accuracy_itself(estimator, tmp_path):
    model = built(lambda: tiny_model("vit"))
    model.requires_grad_(False).classifier.requires_grad_(True)
    options = {
        "max_steps": 30,
        "learning_rate": 0.1,
        "queries_per_sample": 16,
        "lr_scheduler_type": "constant",
    }
    data = as_dataset(tiny_batch("vit", 16))
    args = arguments(tmp_path, per_device_train_batch_size=16, **options, estimator=estimator)
    trainer = FlopsTrainer(model, args, train_dataset=data, objective=Metric("accuracy"))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > -0.7
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2


# PEFT's, of prompts before padded texts
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["suffix", "lora", "prompt"])
def test_training_improves_a_reward_of_generated_text(kind, tmp_path):
    model = adapted(kind)
    reward = GeneratedMetric(
        lambda texts, inputs: [sum(int(word[1:]) % 2 for word in text.split()) for text in texts],
        Letters(),
        max_new_tokens=3,
        min_new_tokens=3,
        pad_token_id=0,
    )
    rows = batch(draw_rows([(5, 1), (4, 1), (3, 1), (5, 1)]))
    args = arguments(
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=0.3,
        queries_per_sample=16,
        lr_scheduler_type="constant",
    )
    trainer = FlopsTrainer(model, args, train_dataset=as_dataset(rows), objective=reward)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[-4:]) < losses[0] - 0.3
