"""Precision and compilation that come from accelerate or the model; losses that cannot move."""

import pytest
import torch
from datasets import Dataset
from helpers.tiny import tiny_batch, tiny_model
from peft import LoraConfig, get_peft_model

from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.errors import ConfigurationError, ObjectiveError


def adapted():
    return get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=2))


def data():
    batch = tiny_batch("llama", 4)
    return [{name: value[i] for name, value in batch.items()} for i in range(4)]


def trainer(folder, model=None, dataset=None, cls=FlopsTrainer, **options):
    args = FlopsTrainingArguments(
        str(folder),
        max_steps=1,
        queries_per_sample=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        pictures=False,
        **options,
    )
    return cls(
        adapted() if model is None else model,
        args,
        train_dataset=data() if dataset is None else dataset,
    )


def test_mixed_precision_from_the_environment_is_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert trainer(tmp_path).args.bf16


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision='fp16'"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "dynamo_backend='EAGER'"),
    ],
)
def test_what_forward_only_training_cannot_follow_is_refused(
    name, value, why, tmp_path, monkeypatch
):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=why):
        trainer(tmp_path)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_trains_without_being_compiled(in_place, tmp_path, caplog):
    model = adapted()
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    candidate = trainer(tmp_path, model, learning_rate=0.1)
    before = [p.detach().clone() for p in candidate.model.parameters() if p.requires_grad]
    candidate.train()
    after = [p for p in candidate.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert "without torch.compile" in caplog.text


@pytest.mark.parametrize("removed", [True, False])
def test_a_text_column_called_sample_id_is_left_out(removed, tmp_path):
    dataset = Dataset.from_dict(
        {
            **{name: value.tolist() for name, value in tiny_batch("llama", 4).items()},
            "sample_id": list("abcd"),
        }
    )
    candidate = trainer(tmp_path, dataset=dataset, remove_unused_columns=removed)
    candidate.train()
    assert candidate.ledger.sample_queries == {}


class OnPolicy(FlopsTrainer):
    """Compares the model with a detached copy of itself, as GRPO does on policy."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        logits = model(input_ids=inputs["input_ids"]).logits
        logs = logits.log_softmax(-1)[..., 0].mean(1)
        return -torch.exp(logs - logs.detach()).mean()


@pytest.mark.parametrize("late_expansion", [True, False])
def test_a_loss_that_cannot_move_is_refused(late_expansion, tmp_path):
    candidate = trainer(tmp_path, cls=OnPolicy, late_expansion=late_expansion)
    with pytest.raises(ObjectiveError, match=r"stays -1 .* detached copy .* objective=.*reward"):
        candidate.train()
