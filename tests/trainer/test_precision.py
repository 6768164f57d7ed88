"""Bases in 16 bits train with forward passes; small updates and small differences survive."""

import logging

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.nn import functional as F

from hf_flops import FlopsTrainer
from hf_flops.base.prng import seeds
from hf_flops.objectives import BatchLoss, TappedLoss
from hf_flops.perturbations import NoiseKeys, ParameterVector, RowwiseNoise, SharedNoise
from hf_flops.trainer.master_weights import keep_masters
from tests.helpers.tiny import (
    TASKS,
    as_dataset,
    model_forward,
    tiny_batch,
    tiny_model,
    training_arguments,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # PEFT, of norms
]
HALF = [torch.bfloat16, torch.float16]
CONFIGS = {
    "lora": lambda kind: LoraConfig(
        r=2, target_modules=TARGETS[kind], task_type=TASKS[kind], modules_to_save=HEADS[kind]
    ),
    "ln_tuning": lambda kind: LNTuningConfig(
        task_type=TASKS[kind], modules_to_save=HEADS[kind], target_modules=NORMS.get(kind)
    ),
    "prompt": lambda kind: PromptTuningConfig(task_type=TASKS[kind], num_virtual_tokens=3),
}
NORMS = {"vit": ["layernorm_before", "layernorm_after"], "bert": ["LayerNorm"]}
TARGETS = {"vit": ["q_proj", "v_proj"], "bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
HEADS = {"vit": ["classifier"], "bert": ["pooler", "classifier"], "llama": None}
CASES = [
    (kind, adapter)
    for kind in TARGETS
    for adapter in CONFIGS
    if (kind, adapter) not in {("vit", "prompt"), ("bert", "prompt")}
]


def adapted(kind, adapter, dtype=torch.float32, model=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(
            (tiny_model(kind) if model is None else model).to(dtype), CONFIGS[adapter](kind)
        ).eval()


def batch(kind, dtype, samples=4):
    inputs = tiny_batch(kind, samples)
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


# --- parameters in float32 ---


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("kind", "adapter"), CASES)
@torch.no_grad()
def test_trainable_parameters_are_kept_in_float32_and_the_model_still_runs(kind, adapter, dtype):
    model, inputs = adapted(kind, adapter, dtype), batch(kind, dtype)
    before = model(**inputs)
    names = keep_masters(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert all(p.dtype == dtype for p in model.parameters() if not p.requires_grad)
    after = model(**inputs)
    torch.testing.assert_close(after.logits.float(), before.logits.float(), rtol=0.1, atol=0.1)
    assert after.logits.dtype == (torch.float32 if "classifier" in str(names) else dtype)
    assert keep_masters(model) == []  # nothing is done twice


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("kind", "bias"), [("vit", "lora_only"), ("vit", "all"), ("bert", "all")])
@torch.no_grad()
def test_a_frozen_weight_beside_a_trained_bias_goes_with_it(kind, bias, dtype):
    names = ["q_proj"] if kind == "vit" else ["query"]
    model = get_peft_model(
        tiny_model(kind).to(dtype), LoraConfig(r=2, target_modules=names, bias=bias)
    ).eval()
    inputs = batch(kind, dtype)
    before = model(**inputs)
    keep_masters(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    for module in model.modules():  # what computes together has one precision
        assert len({p.dtype for p in module.parameters(recurse=False)}) <= 1
    if bias == "lora_only":
        assert any(p.dtype == dtype for p in model.parameters())
    torch.testing.assert_close(
        model(**inputs).logits.float(), before.logits.float(), rtol=0.1, atol=0.1
    )


def test_a_model_that_is_trained_as_a_whole_keeps_its_precision():
    assert keep_masters(tiny_model("vit").bfloat16()) == []
    assert keep_masters(adapted("vit", "lora")) == []


@torch.no_grad()
def test_the_noise_of_a_head_is_not_rounded():
    model, inputs = adapted("vit", "lora", torch.bfloat16), batch("vit", torch.bfloat16)
    keep_masters(model)
    head = {
        name for name, p in model.named_parameters() if p.requires_grad and "classifier" in name
    }
    rowwise = RowwiseNoise(model, ParameterVector.of(model, head), "gaussian")
    noise = rowwise.draw(NoiseKeys(seeds(0, torch.arange(4).numpy()), 0))
    clean = model(**inputs).logits
    moved = []
    for scale in (1e-4, 1e-3):
        with rowwise.applied(noise, scale):
            moved.append((model(**inputs).logits - clean) / scale)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-2, atol=1e-2)
    assert moved[0].abs().max() > 0.1


@pytest.mark.parametrize("kind", ["vit", "bert", "llama", "gpt2"])
@torch.no_grad()
def test_losses_of_sixteen_bit_models_are_float32(kind):
    model, inputs = tiny_model(kind).bfloat16(), batch(kind, torch.bfloat16)
    logits = model(**inputs).logits.float()
    found, whole = (
        TappedLoss()(model_forward(model), inputs),
        BatchLoss()(model_forward(model), inputs),
    )
    labels = inputs["labels"]
    if kind in ("llama", "gpt2"):
        logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
    expected = F.cross_entropy(logits, labels, reduction="none").reshape(4, -1).sum(1)
    torch.testing.assert_close(found.sums, expected)
    torch.testing.assert_close(whole.sums[0], expected.sum() / found.counts.sum())


# --- training ---


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 8,
        "queries_per_sample": 8,
        "max_steps": 12,
        "learning_rate": 0.03,
        "logging_steps": 12,
        "lr_scheduler_type": "constant",
    }
    return training_arguments(folder, **{**defaults, **options})


def dataset(kind, dtype, samples=8):
    return as_dataset(batch(kind, dtype, samples))


@pytest.mark.parametrize(
    ("kind", "adapter", "dtype"),
    [
        ("vit", "lora", torch.bfloat16),
        ("vit", "lora", torch.float16),
        ("llama", "ln_tuning", torch.bfloat16),
        ("llama", "prompt", torch.float16),
    ],
)
def test_sixteen_bit_bases_train(kind, adapter, dtype, tmp_path, caplog):
    data = dataset(kind, dtype)
    with caplog.at_level(logging.WARNING):
        trainer = FlopsTrainer(
            adapted(kind, adapter, dtype),
            arguments(tmp_path),
            train_dataset=data,
            eval_dataset=data,
        )
    assert ("kept in float32" in caplog.text) == (adapter != "prompt")
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start - 0.05
    parts = trainer.session.chosen.perturbation.parts
    assert not any(isinstance(part, SharedNoise) for part in parts)
    expected = trainer.predict(data).predictions
    trainer.save_model(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny_model(kind).to(dtype), tmp_path / "saved").eval()
    with torch.no_grad():
        found = again(**batch(kind, dtype, 8)).logits.float()
    # rounded to 16 bits
    torch.testing.assert_close(found, torch.as_tensor(expected).float(), rtol=0.1, atol=0.15)


def test_autocast_trains(tmp_path):
    data = dataset("vit", torch.float32)
    trainer = FlopsTrainer(
        adapted("vit", "lora"),
        arguments(tmp_path, bf16=True),
        train_dataset=data,
        eval_dataset=data,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start - 0.05


def test_a_head_is_found_under_autocast_which_ends_with_its_run(tmp_path):
    model = tiny_model("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name or "self.query" in name)
    data = as_dataset(tiny_batch("bert", 4))
    inputs = {name: value for name, value in tiny_batch("bert", 4).items() if name != "labels"}
    kinds = []
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(
        lambda module, args, out: kinds.append(out.dtype)
    )
    for half in (True, False):
        args = training_arguments(tmp_path, bf16=half, max_steps=1)
        trainer = FlopsTrainer(model, args, train_dataset=data)
        trainer.train()
        head = trainer.session.chosen.head
        assert head is not None
        assert head.module is model.classifier
        kinds.clear()
        with torch.no_grad():
            trainer.model(**inputs)
        assert kinds == [torch.bfloat16 if half else torch.float32]
    assert "_original_forward" not in vars(model)
