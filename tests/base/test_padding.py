"""Padding that no row of a forward needs is cut off, where that changes no loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, TrainerCallback

from hf_flops import CallableObjective, FlopsTrainer
from hf_flops.allocators import Uniform
from hf_flops.autotune.padding_check import padding_is_idle
from hf_flops.base.batch import take
from hf_flops.base.padding import TrimmedBatch, real_tokens, trim, window
from hf_flops.base.rows import expand
from hf_flops.estimators import Antithetic
from hf_flops.objectives import BatchLoss, TappedLoss
from tests.helpers.padded import Cramped, adapted, estimate, padded
from tests.helpers.tiny import (
    SIZES,
    VOCABULARY,
    as_dataset,
    generator,
    model_forward,
    tiny_batch,
    tiny_model,
    training_arguments,
)

SIDES = frozenset(["left", "right"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "opt", "t5"])
@torch.no_grad()
def test_the_check_tells_whether_padding_may_be_cut(kind, side):
    model, inputs = tiny_model(kind), padded(kind, side=side)
    found = padding_is_idle(TappedLoss(), model_forward(model), inputs)
    # BERT and GPT-2 number positions by column; OPT from its mask; Llama's and T5's are relative.
    assert found == {side: side == "right" or kind in ("llama", "opt", "t5")}
    assert padding_is_idle(TappedLoss(), model_forward(model), inputs, known={side}) == {}
    assert padding_is_idle(TappedLoss(), model_forward(model), trim(inputs, slice(0, 0))) == {}


@torch.no_grad()
def test_the_check_sees_an_objective_that_reads_a_certain_column():
    model, inputs = tiny_model("llama"), padded("llama")
    last = CallableObjective(lambda outputs, inputs: outputs.logits[:, -1].logsumexp(-1))
    assert padding_is_idle(last, model_forward(model), inputs) == {"right": False}
    fixed = CallableObjective(
        lambda outputs, _: (outputs.logits * inputs["attention_mask"][:1, :, None]).sum((1, 2))
    )
    assert padding_is_idle(fixed, model_forward(model), inputs) == {"right": False}


@pytest.mark.parametrize("kind", ["rowwise", "shared"])
@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left"), ("gpt2", "right")]
)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_estimate_does_not_depend_on_padding_that_is_cut(kind, name, side, size):
    model, inputs = Cramped(adapted(name)), padded(name, samples=6, side=side)
    options = {
        "forward": model_forward(model),
        "estimator": Antithetic(),
        "allocator": Uniform(),
        "scale": 1e-2,
    }
    expected, whole = estimate(model.model, inputs, kind, **options)
    model.seen.clear()
    found, result = estimate(
        model.model, inputs, kind, trimmed=SIDES, rows_per_forward=size, **options
    )
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    assert result.loss == pytest.approx(float(whole.loss), rel=1e-5)
    assert result.rows == whole.rows
    widths = {inputs["input_ids"].shape[1] for inputs in model.seen}
    assert max(widths) <= inputs["input_ids"].shape[1] - 3
    assert len(widths) > 1 or size > 1


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 2**20),
    st.sampled_from([{"left"}, {"right"}, SIDES]),
)
def test_cutting_keeps_every_column_that_a_row_needs(rows, columns, bits, sides):
    mask = torch.tensor([bits >> i & 1 for i in range(36)])[: rows * columns].view(rows, columns)
    inputs = {
        "input_ids": torch.arange(rows * columns).view(rows, columns),
        "attention_mask": mask,
        "labels": torch.ones(rows),
    }
    kept = window(real_tokens(inputs), frozenset(sides))
    short = trim(inputs, kept)
    assert short["attention_mask"].sum() == mask.sum()
    assert short["input_ids"].equal(inputs["input_ids"][:, kept])
    assert short["labels"].equal(inputs["labels"])
    ends = [
        short["attention_mask"][:, column].any()
        for side, column in (("left", 0), ("right", -1))
        if side in sides
    ]
    assert all(ends) or not mask.any()


def test_labels_and_inputs_that_are_not_understood_keep_their_columns():
    inputs = padded("llama")
    wide = inputs["input_ids"].shape[1]
    assert window(real_tokens({**inputs, "labels": torch.zeros(4, wide)}), SIDES) == slice(0, wide)
    counted = torch.where(torch.arange(wide) == 5, 1, -100).expand(4, -1)  # predicted from padding
    late = {"attention_mask": (torch.arange(wide) > 4).long().expand(4, -1), "labels": counted}
    assert window(real_tokens(late), SIDES) == slice(0, wide)
    assert real_tokens({**inputs, "bbox": torch.zeros(4, wide, 4)}) is None
    assert real_tokens({**inputs, "attention_mask": torch.ones(4, 1, wide, wide)}) is None
    assert real_tokens(tiny_batch("vit")) is None


@pytest.mark.parametrize("within_groups", [True, False])
def test_rows_of_like_width_go_together(within_groups):
    inputs = tiny_batch("bert", samples=6)
    rows = expand(torch.tensor([3, 1, 2, 5, 1, 2]), 1.0)
    ordered = TrimmedBatch(inputs, SIDES).ordered(rows, within_groups=within_groups)
    width = inputs["attention_mask"].sum(1)[ordered.owner]
    assert sorted(zip(ordered.owner.tolist(), ordered.query.tolist(), strict=True)) == sorted(
        zip(rows.owner.tolist(), rows.query.tolist(), strict=True)
    )
    pieces = width.split(ordered.stretches(within_groups=within_groups))
    assert all(piece.diff().le(0).all() for piece in pieces)
    assert len(pieces) == (5 if within_groups else 1)


def test_take_and_trim_agree():
    inputs = padded("llama", samples=3)
    owner = torch.randint(3, (5,), generator=generator())
    feed = TrimmedBatch(inputs, SIDES)
    fed, columns, cut = feed.of(owner)
    assert columns == fed["input_ids"].shape[1]
    assert fed["input_ids"].equal(take(feed.whole, owner)["input_ids"][:, cut or slice(None)])
    assert fed["input_ids"].equal(take(inputs, owner)["input_ids"][:, :columns])
    assert (
        TrimmedBatch(inputs, frozenset())
        .of(owner)[0]["labels"]
        .equal(take(inputs, owner)["labels"])
    )


def test_the_loss_of_a_whole_batch_is_never_cut():
    model, inputs = Cramped(adapted("bert")), padded("bert")
    options = {
        "objective": BatchLoss(),
        "forward": model_forward(model),
        "trimmed": SIDES,
        "rows_per_forward": 3,
    }
    estimate(model.model, inputs, "shared", **options)
    assert {seen["input_ids"].shape for seen in model.seen} == {inputs["input_ids"].shape}


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }


# so little that the clean forward, too, is cut into chunks
@pytest.mark.parametrize("memory", [None, 3e-6])
# few enough for the control variate, if texts were short, and too many
@pytest.mark.parametrize("labels", [2, 9])
def test_tokens_of_uneven_texts_have_labels(tmp_path, labels, memory):
    batch = tiny_batch("bert", 6)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % labels, -100)
    with torch.random.fork_rng(devices=[]):
        model = BertForTokenClassification(
            BertConfig(vocab_size=VOCABULARY, num_labels=labels, **SIZES)
        ).eval()
    loss = model(**batch).loss
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if "classifier" in name}
    model.requires_grad_(False).zero_grad()
    model.classifier.requires_grad_(True)
    model.bert.encoder.layer[-1].requires_grad_(True)
    options = {
        "per_device_train_batch_size": 6,
        "queries_per_sample": 4,
        "memory_limit_gb": memory,
        "max_grad_norm": 0.0,
        "closed_form_head": "gradient",
    }
    args, kept = (
        training_arguments(tmp_path, max_steps=2, learning_rate=0.0, **options),
        Gradients(),
    )
    trainer = FlopsTrainer(model, args, train_dataset=as_dataset(batch), callbacks=[kept])
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(kept.found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_masked_language_model_learns_from_uneven_texts(tmp_path):
    batch = tiny_batch("bert", 6)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    with torch.random.fork_rng(devices=[]):
        model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SIZES)).eval()
    loss = model(**batch).loss
    model.bert.embeddings.requires_grad_(False)
    args = training_arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=6,
        queries_per_sample=4,
        rows_per_forward=2,
    )
    trainer = FlopsTrainer(model, args, train_dataset=as_dataset(batch))
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=1e-5)
