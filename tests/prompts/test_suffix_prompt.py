"""A prompt after the text: the same as full sequences built by hand, but every text is run once."""

import json
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_flops import ConfigurationError, FlopsTrainer, FlopsTrainingArguments, SuffixPromptModel
from hf_flops.autotune.rule_check import choose_perturbation
from hf_flops.base.batch import take
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, RowwiseNoise, displaced
from tests.helpers.tiny import SIZES, VOCABULARY, generator, model_forward, tiny_model
from tests.perturbations.test_perturbations import keys

KINDS = ["llama", "gpt2", "opt", "windows"]


def base_model(kind, **options):
    if kind != "windows":
        return tiny_model(kind, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MistralForCausalLM(
            MistralConfig(
                vocab_size=VOCABULARY, sliding_window=4, num_key_value_heads=1, **SIZES, **options
            )
        ).eval()


def suffix(kind, tokens=3, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return SuffixPromptModel(base_model(kind), tokens, **options)


def draw_rows(lengths, seed=0):
    """Draw the tokens of a text and an answer of the given lengths for each row."""
    rng = generator(seed)
    return [
        tuple(torch.randint(3, VOCABULARY, (n,), generator=rng) for n in pair) for pair in lengths
    ]


def batch(rows, side="right"):
    """Pad rows of (text, answer) to one length."""
    length = max(len(text) + len(answer) for text, answer in rows)
    columns = {"input_ids": [], "attention_mask": [], "labels": []}
    for text, answer in rows:
        extra = length - len(text) - len(answer)
        pad = (0, extra) if side == "right" else (extra, 0)
        columns["input_ids"].append(F.pad(torch.cat([text, answer]), pad, value=1))
        columns["attention_mask"].append(
            F.pad(torch.ones(len(text) + len(answer), dtype=torch.long), pad)
        )
        columns["labels"].append(
            F.pad(torch.cat([torch.full_like(text, -100), answer]), pad, value=-100)
        )
    return {name: torch.stack(values) for name, values in columns.items()}


def plain_losses(model, rows):
    """Return each row's loss sum, from a forward of its own full sequence."""
    embed, sums = model.base.get_input_embeddings(), []
    for text, answer in rows:
        tokens = torch.cat([embed(text), model.prompt.weight, embed(answer)])
        logits = model.base(inputs_embeds=tokens[None], use_cache=False).logits[0]
        sums.append(F.cross_entropy(logits[-len(answer) - 1 : -1], answer, reduction="sum"))
    return torch.stack(sums)


def text_runs(model):
    """Count the texts that go through the base model's first layer, in a list that grows."""
    counts = []
    model.base.get_input_embeddings().register_forward_hook(
        lambda module, args, out: counts.append(args[0].shape)
    )
    return counts


LENGTHS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    lengths=LENGTHS,
    tokens=st.integers(1, 4),
    side=st.sampled_from(["left", "right"]),
)
def test_loss_and_gradient_equal_those_of_full_sequences(kind, lengths, tokens, side):
    model, rows = suffix(kind, tokens).double(), draw_rows(lengths)
    answers = sum(len(answer) for _, answer in rows)
    (expected,) = torch.autograd.grad(
        plain_losses(model, rows).sum() / answers, model.prompt.weight
    )
    for items in (None, 2 * answers):
        model.zero_grad()
        loss = model(**batch(rows, side), num_items_in_batch=items).loss
        loss.backward()
        factor = answers / (items or answers)
        torch.testing.assert_close(
            loss, factor * plain_losses(model, rows).sum() / answers, rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(
            model.prompt.weight.grad, factor * expected, rtol=1e-6, atol=1e-7
        )
    assert [name for name, value in model.named_parameters() if value.grad is not None] == [
        "prompt.weight"
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_rows_with_the_same_text_share_one_run_of_it(kind, cached):
    model, rows = suffix(kind), draw_rows([(5, 1), (2, 2), (6, 1)])
    inputs = batch(rows)
    owner = torch.tensor([2, 0, 0, 1, 2, 2, 2])
    runs = text_runs(model)
    for chosen in (owner, owner[:2]):
        runs.clear()
        if cached:
            with model.cached_texts(inputs):
                found = TappedLoss()(model_forward(model), take(inputs, chosen)).sums
        else:
            found = TappedLoss()(model_forward(model), take(inputs, chosen)).sums
        texts, answer = (
            3 if cached else len(set(chosen.tolist())),
            max(len(rows[i][1]) for i in chosen),
        )
        assert runs == [(texts, 6), (len(chosen), answer - 1)]
        torch.testing.assert_close(found, plain_losses(model, rows)[chosen], rtol=1e-5, atol=1e-5)
    assert model.texts is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_clean_rows_run_in_the_same_forward_as_their_texts(kind):
    model, rows = suffix(kind), draw_rows([(5, 1), (2, 2), (6, 1)])
    rows.append((rows[0][0], rows[1][1]))  # a text again, with another answer
    inputs, runs, objective = batch(rows[:3]), [], TappedLoss()
    perturbation = RowwiseNoise(model, ParameterVector.of(model), "gaussian")
    noise = perturbation.draw(keys(3))
    model.base.register_forward_hook(lambda *args: runs.append(1))

    def sums(chosen=inputs, scale=0.0):
        runs.clear()
        with perturbation.applied(noise, scale) if scale else nullcontext():
            return objective(model_forward(model), chosen).sums

    with model.cached_texts(inputs):
        plain, moved = sums(), sums(scale=0.3)
    order, forgets = torch.tensor([2, 1]), kind == "windows"
    with model.cached_texts(inputs, clean=True):
        for chosen, expected in ((inputs, plain), (take(inputs, order), plain[order])):
            torch.testing.assert_close(sums(chosen), expected, rtol=1e-5, atol=1e-5)
            assert len(runs) == forgets
        torch.testing.assert_close(sums(scale=0.3), moved, rtol=1e-5, atol=1e-5)
        assert len(runs) == 1
    with model.cached_texts(batch(rows), clean=True):  # a text with two answers: these rows are run
        found = sums(batch(rows))
        assert len(runs) == 1
        torch.testing.assert_close(found, plain_losses(model, rows), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_cache_of_texts_is_dropped_after_an_exception():
    model, inputs, seen = suffix("llama"), batch(draw_rows([(5, 1), (2, 1)])), []

    def fail():
        seen.append(model.texts)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), model.cached_texts(inputs):
        fail()
    assert len(seen[0].mask) == 2  # texts
    assert model.texts is None


@torch.no_grad()
def test_texts_that_are_not_cached_are_run_all_the_same():
    model, rows = suffix("gpt2"), draw_rows([(5, 1), (2, 1)])
    with model.cached_texts(batch(rows[:1])):
        found = model(**batch(rows)).loss
    torch.testing.assert_close(found, plain_losses(model, rows).mean())


def test_a_base_that_is_trained_runs_the_text_of_every_row():
    model, rows = suffix("llama").double(), draw_rows([(5, 1), (5, 2)])
    rows.append(rows[0])
    model.base.requires_grad_(True)
    (expected,) = torch.autograd.grad(
        plain_losses(model, rows).sum() / 4, model.base.lm_head.weight
    )
    runs = text_runs(model)
    with model.cached_texts(batch(rows)):
        model(**batch(rows)).loss.backward()
    assert runs[0] == (3, 5)
    torch.testing.assert_close(model.base.lm_head.weight.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_noise_per_row_equals_an_explicit_change_of_the_prompt(kind):
    model, rows = suffix(kind), draw_rows([(5, 1), (2, 2)])
    inputs, owner, objective = batch(rows), torch.tensor([0, 1, 0, 0]), TappedLoss()
    vector = ParameterVector.of(model)
    perturbation = RowwiseNoise(model, vector, "gaussian")
    noise = perturbation.draw(keys(4))
    with model.cached_texts(inputs), perturbation.applied(noise, 0.3):
        found = objective(model_forward(model), take(inputs, owner)).sums
    for row, sample in enumerate(owner.tolist()):
        with displaced(vector, 0.3 * noise[row]):
            torch.testing.assert_close(
                found[row], plain_losses(model, rows)[sample], rtol=1e-5, atol=2e-5
            )
    chosen, notes = choose_perturbation(
        model, objective, model_forward(model), inputs, mode="rowwise"
    )
    assert isinstance(chosen, RowwiseNoise)
    assert notes == []


@torch.no_grad()
def test_a_bf16_base_has_a_prompt_in_fp32_and_noise_that_bf16_would_lose():
    model = SuffixPromptModel(base_model("llama").to(torch.bfloat16), 3)
    inputs, perturbation = (
        batch(draw_rows([(5, 1), (2, 1)])),
        RowwiseNoise(model, ParameterVector.of(model), "gaussian"),
    )
    noise, seen = perturbation.draw(keys(2)), []
    with perturbation.applied(noise, 1e-5):
        model.prompt.register_forward_hook(lambda module, args, out: seen.append(out))
        assert model(**inputs).logits.dtype == torch.bfloat16
    assert model.prompt.weight.dtype == torch.float32
    for row in range(2):
        expected = model.prompt.weight + 1e-5 * noise[row].view(3, -1)
        torch.testing.assert_close(seen[0][row], expected, rtol=0, atol=1e-8)


@torch.no_grad()
def test_classes_are_scored_by_their_words_after_the_prompt():
    model = suffix("llama", label_words=[4, 9, 7])
    rows = draw_rows([(5, 1), (2, 1)])
    words = [(text, torch.tensor([word])) for (text, _), word in zip(rows, (7, 4), strict=True)]
    texts = {
        name: value[:, :-1] for name, value in batch(words, "left").items() if name != "labels"
    }
    outputs = model(**texts, labels=torch.tensor([2, 0]))
    spelled = model(**batch(words)).logits[:, 0, [4, 9, 7]]
    torch.testing.assert_close(outputs.logits, spelled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(spelled, torch.tensor([2, 0])))
    torch.testing.assert_close(model(**texts).logits, outputs.logits)
    found = TappedLoss()(model_forward(model), {**texts, "labels": torch.tensor([2, 0])})
    assert found.sums.shape == (2,)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_generated_is_what_the_logits_prefer(kind):
    model, rows = suffix(kind), draw_rows([(5, 1), (2, 1)])
    texts = {
        name: value
        for name, value in batch([(text, text[:0]) for text, _ in rows]).items()
        if name != "labels"
    }
    new = model.generate(
        **texts, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    assert new.shape == (2, 3)
    logits = model(
        **batch([(text, answer) for (text, _), answer in zip(rows, new, strict=True)])
    ).logits
    assert logits.argmax(-1).equal(new)


class Tokenizer:
    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def test_the_prompt_starts_as_the_given_text_and_all_else_is_frozen():
    model = suffix("opt", 5, init_text="4 9", tokenizer=Tokenizer())
    words = model.base.get_input_embeddings().weight
    assert model.prompt.weight.equal(words[[4, 9, 4, 9, 4]])
    assert [name for name, value in model.named_parameters() if value.requires_grad] == [
        "prompt.weight"
    ]
    assert model.config is model.base.config


def test_save_and_load(tmp_path):
    model = suffix("llama", label_words=[4, 9])
    model.save_pretrained(tmp_path)
    assert set(model.state_dict()) == {"prompt.weight", "label_words"}
    assert json.loads((tmp_path / "suffix_prompt.json").read_text())["num_virtual_tokens"] == 3
    loaded = SuffixPromptModel.from_pretrained(base_model("llama"), tmp_path)
    inputs = batch(draw_rows([(5, 1)]))
    assert loaded(**inputs).loss.equal(model(**inputs).loss)
    assert loaded.label_words.tolist() == [4, 9]


def training_data(samples=16):
    """One answer to every text, so that a prompt alone can learn it."""
    rows = [(text, torch.tensor([5])) for text, _ in draw_rows([(4, 1)] * samples)]
    columns = batch(rows)
    return [{name: value[i] for name, value in columns.items()} for i in range(samples)]


def options(folder, **others):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **others,
    }


def test_forward_only_training_runs_each_text_once_per_step_and_resumes(tmp_path):
    model, data = suffix("llama", 4), training_data()
    own = {"rows_per_forward": 16, "save_steps": 6, "perturbation": "rowwise", "pictures": False}
    args = FlopsTrainingArguments(**options(tmp_path, **own, queries_per_sample=16))
    trainer = FlopsTrainer(model=model, args=args, train_dataset=data)
    runs = text_runs(model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert sum(shape[0] for shape in runs if shape[1] > 0) == 12 * 8
    assert model.texts is None
    assert model.model_tags

    resumed = suffix("llama", 4)
    FlopsTrainer(model=resumed, args=args, train_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-6")
    )
    torch.testing.assert_close(resumed.prompt.weight, model.prompt.weight)
    loaded = SuffixPromptModel.from_pretrained(base_model("llama"), tmp_path / "checkpoint-12")
    assert loaded.prompt.weight.equal(model.prompt.weight)


def test_late_expansion_leaves_it_alone(tmp_path):
    columns = batch(draw_rows([(4, 2), (5, 2), (2, 2), (4, 2)]))
    data = [{name: value[i] for name, value in columns.items()} for i in range(4)]
    args = FlopsTrainingArguments(
        **options(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4,
            rows_per_forward=1,
            save_strategy="no",
        )
    )
    trainer = FlopsTrainer(model=suffix("gpt2"), args=args, train_dataset=data)
    trainer.train()
    # in later batches answers may be longer than what was recorded
    assert not trainer.session.chosen.reuse.modules


def test_backprop_trains_the_same_module(tmp_path):
    model = suffix("llama", 4)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options(tmp_path, max_steps=6)),
        train_dataset=training_data(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def changed(**columns):
    return {
        **batch(draw_rows([(4, 2), (2, 1)])),
        **{name: torch.tensor(value) for name, value in columns.items()},
    }


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (changed(labels=[[-100] * 4 + [5, 5], [-100] * 6]), "Row 1 of the batch has no answer"),
        (
            changed(labels=[[-100] * 4 + [5, 5], [5] * 3 + [-100] * 3]),
            "Row 1 of the batch has no text",
        ),
        (
            changed(labels=[[-100, 5, -100, -100, 5, 5], [-100] * 2 + [5] + [-100] * 3]),
            "Row 0 .* in the middle of its text",
        ),
        (changed(labels=[0, 1]), r"Labels of shape \(2,\) are classes: give label_words="),
        (
            batch(draw_rows([(9, 2)])),
            "A text of 9 tokens, 3 virtual tokens and an answer of 2 are more than the 12 ",
        ),
    ],
)
def test_bad_batches(inputs, message):
    model = SuffixPromptModel(base_model("llama", max_position_embeddings=12), 3)
    with pytest.raises(ConfigurationError, match=message):
        model(**inputs)


def test_bad_arguments():
    with pytest.raises(
        ConfigurationError, match="num_virtual_tokens=0 must be a whole number, 1 or more"
    ):
        SuffixPromptModel(base_model("llama"), 0)
    with pytest.raises(ConfigurationError, match="init_text='x' needs tokenizer="):
        SuffixPromptModel(base_model("llama"), init_text="x")
    adapted = get_peft_model(
        base_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(
        ConfigurationError,
        match=r"A PeftModelForCausalLM cannot .* what merge_and_unload\(\) returns",
    ):
        SuffixPromptModel(adapted)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=8, state_size=2, num_hidden_layers=1)
    )
    with pytest.raises(
        ConfigurationError, match="MambaForCausalLM keeps more than keys and values of its text"
    ):
        SuffixPromptModel(mamba)(**batch(draw_rows([(4, 2)])))
