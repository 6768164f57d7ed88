"""What people get wrong with arguments, data and models ends in one sentence that names it."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel

from hf_flops import (
    ConfigurationError,
    FlopsError,
    FlopsTrainer,
    Metric,
    SuffixPromptModel,
)
from hf_flops.reporting.callbacks import LossWatch
from tests.helpers.runs import adapted, short
from tests.helpers.tiny import as_dataset, tiny_batch, tiny_model, training_arguments


def sentence(error):
    """Return what an error says, which must be one sentence on one line."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def rows(samples=8, **changes):
    """Return images, with values of columns replaced in some rows: column=(row, value)."""
    data = as_dataset(tiny_batch("vit", samples))
    for name, (row, value) in changes.items():
        data[row] = {**data[row], name: value}
    return data


def without(name, row=None):
    """Return images without a column, in one row or in all."""
    return [
        {key: value for key, value in sample.items() if key != name or row not in (None, i)}
        for i, sample in enumerate(rows())
    ]


# --- arguments ---

ARGUMENTS = [
    ({"queries_per_sample": "many"}, "queries_per_sample='many' must be a whole number"),
    ({"queries_per_sample": "8 rows"}, "queries_per_sample='8 rows' must be a whole number"),
    ({"learning_rate": "fast"}, "learning_rate='fast' must be a number, or 'auto'"),
    ({"max_queries": 1.5}, "max_queries=1.5 must be a whole number"),
    ({"prefix_cache": "ram"}, "prefix_cache='ram' is unknown: choose one of memory, disk"),
    ({"prefix_cache_gb": 0.0}, "prefix_cache_gb=0.0 must be positive"),
    ({"memory_limit_gb": -1.0}, "memory_limit_gb=-1.0 must be positive"),
    ({"lora_parts": "A"}, "lora_parts='A' is unknown: choose one of auto, both, B, B_then_A"),
    ({"prefix_cache": "memory", "late_expansion": False}, "prefix_cache needs late_expansion"),
    ({"learning_rate": "auto", "trajectory_log": True}, "trajectory_log=True cannot replay"),
]


@pytest.mark.parametrize(("options", "said"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_a_mistake_in_the_arguments(options, said, tmp_path):
    with pytest.raises(ConfigurationError) as error:
        training_arguments(tmp_path, **options)
    assert said in sentence(error)


# --- data ---

DATA = [
    (lambda: rows(labels=(5, None)), "Row 5 of train_dataset has no 'labels'"),
    (lambda: rows(pixel_values=(6, None)), "Row 6 of train_dataset has no 'pixel_values'"),
    (lambda: without("labels", 3), "Row 3 of train_dataset has no 'labels'"),
    (lambda: without("pixel_values", 2), "Row 2 of train_dataset has no 'pixel_values'"),
    (lambda: [{**r, "labels": "cat"} for r in rows()], "'labels' of train_dataset is text ('cat'"),
    (lambda: [{**r, "label": "dog"} for r in without("labels")], "'label' of train_dataset is tex"),
    (lambda: without("labels"), "The batch has no labels: its keys are"),
    (lambda: [], "train_dataset is empty"),
    (
        lambda: rows(pixel_values=(4, torch.zeros(3, 4, 4))),
        "Row 4 of train_dataset: 'pixel_values'",
    ),
    (lambda: rows(labels=(7, torch.tensor(99))), "Row 7 of train_dataset: 'labels' is 99"),
]


@pytest.mark.parametrize(("data", "said"), DATA, ids=[str(i) for i in range(len(DATA))])
def test_a_mistake_in_the_data(data, said, tmp_path):
    with pytest.raises(FlopsError) as error:
        FlopsTrainer(adapted(), short(tmp_path), train_dataset=data()).train()
    assert said in sentence(error)


# --- models and objectives ---


def prompted():
    return SuffixPromptModel(tiny_model("llama"), num_virtual_tokens=2)


def for_inference(folder):
    adapted().save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_model("vit"), folder)


LORA = LoraConfig(target_modules=["q_proj"])
MODELS = [
    (
        lambda _: {"model": tiny_model("vit").requires_grad_(False)},
        "no trainable parameter: add an",
    ),
    (lambda path: {"model": for_inference(path)}, "loaded for inference. Load it"),
    (lambda _: {"model": adapted(), "peft_config": LORA}, "is a PeftModel already"),
    (lambda _: {"model": prompted(), "peft_config": LORA}, "SuffixPromptModel has a prompt"),
    (lambda _: {"objective": "acuracy"}, "objective='acuracy' is unknown: use 'accuracy', 'macro"),
    (lambda _: {"objective": 3}, "objective=3 is unknown"),
    (lambda _: {"objective": lambda outputs, inputs: outputs.loss}, "returned losses of shape ()"),
    (lambda _: {"objective": Metric(lambda o, i: o.logits)}, "returned numbers of shape (4, 3)"),
    (
        lambda _: {"model": tiny_model("bert"), "peft_config": LORA},
        "Its linear layers are classifier, dense, key, query, val",
    ),
    (lambda _: {"model": "google/vit"}, "model='google/vit' is a name: load it"),
]


@pytest.mark.parametrize(("options", "said"), MODELS, ids=[str(i) for i in range(len(MODELS))])
def test_a_mistake_with_the_model(options, said, tmp_path):
    given = {"model": adapted(), **options(tmp_path / "saved")}
    with pytest.raises(FlopsError) as error:
        FlopsTrainer(args=short(tmp_path), train_dataset=rows(), **given).train()
    assert said in sentence(error)


def test_an_error_of_other_origin_stays_itself(tmp_path):
    class Broken(FlopsTrainer):
        def compute_loss(self, *args, **options):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Broken(adapted(), short(tmp_path), train_dataset=rows()).train()


# --- what trains, but hardly as it was meant ---


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_flops")]


def test_a_whole_model_that_is_trained_is_said(tmp_path, caplog):
    model = tiny_model("bert", hidden_size=64, intermediate_size=512)
    FlopsTrainer(model, short(tmp_path), train_dataset=as_dataset(tiny_batch("bert", 4)))
    (said,) = warnings_of(caplog)
    assert re.match(r"All [\d,]+ parameters of the model are trained, .*peft_config= for", said)


def test_a_loss_that_explodes_is_said_once_with_its_rate(tmp_path, caplog):
    watch, args = LossWatch(), short(tmp_path, learning_rate=3.0)
    watch.on_train_begin(args, None, None)
    for loss in (0.7, 1.5, 0.6, 5.0, 80.0):
        watch.on_log(args, None, None, logs={"loss": loss})
    assert warnings_of(caplog) == [
        "The loss has risen from 0.7 to 5 with learning_rate=3: try a tenth of that rate."
    ]


def test_the_end_of_a_budget_is_said_with_what_was_done(tmp_path, caplog):
    args = short(tmp_path, max_steps=-1, num_train_epochs=4, max_queries=140)
    trainer = FlopsTrainer(adapted(), args, train_dataset=rows(16))
    trainer.train()
    done = f"{trainer.state.epoch:.1f} of 4 epochs"
    assert trainer.query_budget.stopped == f"stopped by max_queries=140 after {done}"
    assert f"Training is {trainer.query_budget.stopped}." in warnings_of(caplog)


def mistakes(outputs, inputs):
    return (outputs.logits.argmax(-1) != inputs["labels"]).float()


@pytest.mark.parametrize("objective", [mistakes, "accuracy"], ids=["function", "name"])
def test_an_objective_that_moves_in_steps_trains(objective, tmp_path):
    args = short(tmp_path, queries_per_sample=16, per_device_train_batch_size=8)
    trainer = FlopsTrainer(adapted(), args, train_dataset=rows(), objective=objective)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not a.equal(b) for a, b in zip(after, before, strict=True))
    assert trainer.session.log()["perturbation_scale"] > 1e-3
    assert trainer.session.log()["changed_queries"] > 0


def test_a_smooth_objective_keeps_its_scale(tmp_path):
    def loss(outputs, inputs):
        return torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    trainer = FlopsTrainer(adapted(), short(tmp_path), train_dataset=rows(), objective=loss)
    trainer.train()
    assert 0 < trainer.session.log()["perturbation_scale"] <= 1e-3
    assert not trainer.objective.piecewise_constant
