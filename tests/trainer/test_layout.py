"""Pairs, packed texts, and metrics of one forward per batch."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening

from hf_flops import FlopsTrainer
from hf_flops.errors import ObjectiveError
from hf_flops.trainer.gathered import GatheredMetrics
from hf_flops.trainer.layout import Pairs, is_packed, rows_together, unpacked
from tests.helpers.tiny import tiny_batch, tiny_model, training_arguments


def packed():
    texts = [
        {"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (4, 2, 6)
    ]
    return dict(DataCollatorWithFlattening(return_tensors="pt")(texts))


@torch.no_grad()
def test_packed_texts_become_rows_with_the_same_loss():
    inputs, model = packed(), tiny_model("llama")
    assert is_packed(inputs)
    rows = unpacked(inputs)
    assert rows["input_ids"].shape == rows["labels"].shape == (3, 6)
    assert rows["attention_mask"].sum(1).tolist() == [4, 2, 6]
    assert (rows["labels"] != -100).sum(1).tolist() == [3, 1, 5]
    torch.testing.assert_close(model(**rows).loss, model(**inputs, use_cache=False).loss)
    assert not is_packed(rows)
    assert not is_packed(tiny_batch("llama"))


def test_packed_texts_have_queries_of_their_own(tmp_path):
    texts = [list(range(3, 3 + length)) for length in (4, 2, 6, 5)]
    args = training_arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4,
        queries_per_sample=3,
    )
    trainer = FlopsTrainer(
        tiny_model("llama"),
        args,
        train_dataset=[{"input_ids": text, "labels": text} for text in texts],
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    assert trainer.ledger.rows == 4 * 3
    assert trainer.session.chosen.objective.per_row
    assert trainer.session.chosen.perturbation.rowwise_size > 0


def test_pairs_are_put_beside_each_other_and_back():
    inputs = {"x": torch.arange(12).view(6, 2), "margin": torch.arange(3), "use_cache": False}
    assert Pairs.of(inputs, 6) is None
    pairs = Pairs.of(inputs, 3)
    rows = pairs.by_sample(inputs)
    assert rows["x"].shape == (3, 2, 2)
    assert rows["x"][1].tolist() == [[2, 3], [8, 9]]  # the second chosen and rejected
    assert rows["margin"] is inputs["margin"]
    assert pairs.restored(rows)["x"].equal(inputs["x"])


def test_modules_see_all_texts_of_a_row_together():
    seen, module = [], nn.Identity()
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    with rows_together({module}, 2):
        assert module(torch.arange(6)).tolist() == list(range(6))
        module(torch.arange(2))
        module(torch.arange(5))
    assert seen == [[0, 2, 4, 1, 3, 5], [0, 1], [0, 1, 2, 3, 4]]
    assert "_call_impl" not in vars(module)


def test_metrics_are_those_of_the_first_forward_after_the_checks():
    trainer = SimpleNamespace(tokens=3, metrics=defaultdict(list), model=nn.Linear(1, 1))
    gathered = GatheredMetrics(trainer)

    def forward(value):
        trainer.tokens += 1
        trainer.metrics["loss"].append(value)
        gathered.forward_ended()

    with gathered.of_one_forward():
        forward("check")
        gathered.begin()
        forward("clean")
        forward("query")
    assert trainer.tokens == 4
    assert trainer.metrics == {"loss": ["clean"]}
    trainer.metrics["other"].append(1)  # it stays a defaultdict
    with gathered.of_one_forward():
        forward("check")
    assert trainer.tokens == 4


def test_batches_with_other_numbers_of_elements_cannot_be_logged(tmp_path):
    batch = tiny_batch("llama", 4)
    data = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    args = training_arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        trajectory_log=True,
    )
    counts = iter(range(1, 10**6))

    def counted(outputs, inputs):
        losses = outputs.logits.square().mean((1, 2))
        return losses, torch.full_like(losses, next(counts))

    trainer = FlopsTrainer(tiny_model("llama"), args, train_dataset=data, objective=counted)
    with pytest.raises(ObjectiveError, match="gradient_accumulation_steps=1"):
        trainer.train()
