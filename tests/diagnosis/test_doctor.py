"""The doctor says what the trainer then does, and leaves no trace."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_flops import ConfigurationError, FlopsTrainer
from hf_flops.cli import doctor as command
from hf_flops.cli.main import main
from hf_flops.diagnosis import doctor
from hf_flops.perturbations import ActivationNoise, ParameterVector
from scripts.peft_methods import OPTIONS, configure
from tests.helpers.tiny import TASKS, as_dataset, tiny_batch, tiny_model, training_arguments

FEW = {"per_device_train_batch_size": 4, "queries_per_sample": 4, "rows_per_forward": 16}
CASES = [
    *(("vit", name) for name in ("LORA", "IA3", "VERA", "LN_TUNING", "LILY")),
    *(("bert", name) for name in ("LORA", "IA3", "VERA", "PREFIX_TUNING", "PROMPT_TUNING")),
    *(("llama", name) for name in ("LORA", "IA3", "OFT", "PREFIX_TUNING", "PROMPT_TUNING")),
]
FAST = {
    ("vit", "LORA"),
    ("vit", "LILY"),
    ("bert", "PROMPT_TUNING"),
    ("bert", "VERA"),
    ("llama", "OFT"),
}


def config_of(kind, name):
    return configure(kind, name, OPTIONS.get(name, {}))


def ways_of(trainer):
    """Read off a trainer where noise enters: tensor → way."""
    ways = {}
    for part in trainer.session.chosen.perturbation.parts:
        kind = (
            "on outputs"
            if isinstance(part, ActivationNoise)
            else "shared"
            if part.shares_noise
            else "per row"
        )
        looped = {
            part.vector.names[index]
            for site in (part.sites if kind == "per row" else [])
            for index in site.tensors.values()
            if site.rule.__name__ == "looped"
        }
        ways.update({name: "row by row" if name in looped else kind for name in part.vector.names})
    if trainer.session.chosen.head is not None:
        ways.update(dict.fromkeys(trainer.session.chosen.head.vector.names, "exact"))
    return {name: ways.get(name, "none") for name in ParameterVector.of(trainer.model).names}


@pytest.mark.filterwarnings("ignore")  # whatever PEFT says while it builds adapters
@pytest.mark.parametrize(
    ("kind", "name"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_its_rules_are_those_that_the_trainer_then_takes(kind, name, tmp_path):
    data, model = as_dataset(tiny_batch(kind, 8)), tiny_model(kind)
    args = training_arguments(tmp_path, **FEW, max_steps=1)
    found = doctor(model, data, args=args, peft_config=config_of(kind, name), steps=2)
    trainer = FlopsTrainer(model, args, train_dataset=data, peft_config=config_of(kind, name))
    trainer.train()
    assert {rule.tensor: rule.way for rule in found.rules} == ways_of(trainer)
    assert all(rule.reason for rule in found.rules)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "ln", "prefix"])
@pytest.mark.parametrize("name", ["vit", "minilm", "smollm2"])
def test_its_rules_are_the_trainers_on_real_models(name, method, tmp_path):
    if name == "smollm2":
        pytest.importorskip("gguf")
    if (name, method) == ("vit", "prefix"):
        method = "vera"  # prefixes are for models of text
    model, samples, collate, task_type = command.loaded(name, None)
    config = command.configured(method, model, task_type, 4)
    args = training_arguments(tmp_path, **FEW, max_steps=1)
    found = doctor(model, samples, args=args, peft_config=config, steps=2, data_collator=collate)
    trainer = FlopsTrainer(
        model, args, train_dataset=samples, peft_config=config, data_collator=collate
    )
    trainer.train()
    assert {rule.tensor: rule.way for rule in found.rules} == ways_of(trainer)


def adapted():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj"],
            task_type=TASKS["vit"],
            modules_to_save=["classifier"],
        )
        return get_peft_model(tiny_model("vit").to(torch.bfloat16), config)


@pytest.mark.parametrize("wrapped", [True, False])
def test_it_leaves_no_trace(wrapped, tmp_path):
    model = adapted() if wrapped else tiny_model("vit")
    config = (
        None
        if wrapped
        else LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["classifier"])
    )
    batch = tiny_batch("vit", 8)
    data = as_dataset(
        {**batch, "pixel_values": batch["pixel_values"].to(next(model.parameters()).dtype)}
    )
    before = {
        name: (p.detach().clone(), p.data_ptr(), p.requires_grad)
        for name, p in model.named_parameters()
    }
    modules, state = [type(module) for module in model.modules()], torch.get_rng_state()
    drawn = random.getstate(), np.random.get_state()[1].tolist()
    args = training_arguments(tmp_path, **FEW, learning_rate=0.1)
    found = doctor(model, data, args=args, peft_config=config, steps=3)
    after = {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(
        after[name][0].equal(old[0]) and after[name][1:] == old[1:] for name, old in before.items()
    )
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.get_rng_state().equal(state)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn
    assert list(tmp_path.iterdir()) == []
    assert 0 < found["learning_rate"] < math.inf
    assert 1e-4 <= found["epsilon"] <= 0.1
    assert 2 <= found["queries_per_sample"] <= 64
    assert found["rows per second"] > 0
    assert found["precision"] == (3e-2 if wrapped else 1e-4)
    ratio, steps = found["signal to noise of a step"], found["steps to signal to noise 1"]
    assert steps == (None if ratio == 0 else math.ceil(1 / ratio))


def test_the_command_prints_a_table_or_json(monkeypatch, capsys):
    loaded = tiny_model("vit"), as_dataset(tiny_batch("vit", 16)), None, None
    monkeypatch.setattr(command, "loaded", lambda name, data: loaded)
    few = ["doctor", "--rank", "2", "--batch_size", "4", "--steps", "2"]
    assert main(few) == 0
    shown = capsys.readouterr().out
    assert all(
        words in shown
        for words in (
            "per row",
            "exact",
            "classifier",
            "epsilon",
            "learning_rate",
            "queries_per_sample",
        )
    )
    assert main([*few, "--json", "--peft", "ia3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {rule["way"] for rule in found["rules"]} == {"per row", "exact"}
    assert found["facts"]["learning_rate"]["value"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--peft", "lorra"],
            "--peft lorra is no method of the installed PEFT: choose one of dora, prompt,",
        ),
        (["--adapter", "nowhere"], "--adapter nowhere holds no adapter_config.json"),
        (["--model", "/nowhere"], "--model /nowhere with --data of its kind cannot be loaded"),
        (["--rank", "0"], "--rank 0 is too small: give 1 or more"),
        (["--batch_size", "0"], "--batch_size 0 is too small: give 1 or more"),
        (["--queries_per_sample", "1"], "--queries_per_sample 1 is too small: give 2 or more"),
        (["--steps", "-4"], "--steps -4 is too small: give 2 or more"),
        (["--peft", "prompt"], "--peft prompt is for models of text"),
        (["--peft", "shadow"], "--peft shadow is for models of text"),
        (["--peft", "adalora"], "--peft adalora needs total_step in its configuration"),
        (["--peft", "poly"], "--peft poly needs task_ids in the data"),
        (
            ["--peft", "vblora"],
            "--peft vblora does not suit --model vit: `in_features` 16 must be divisible by",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(options, words, monkeypatch, capsys):
    if "--model" not in options:
        monkeypatch.setattr(
            command, "loaded", lambda name, data: (tiny_model("vit"), [], None, None)
        )
    assert main(["doctor", *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"hf-flops doctor: {words}")
    assert said.endswith(".\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Expecting property name"),
        ("{}", "there is no 'peft_type'"),
        (
            '{"peft_type": "LORA", "target_modules": ["elsewhere"]}',
            "Target modules {'elsewhere'} not found",
        ),
        (None, "Found missing adapter keys while loading the checkpoint: ['base_model.model"),
    ],
)
def test_an_adapter_that_does_not_suit_the_model_is_refused(
    content, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "loaded", lambda name, data: (tiny_model("vit"), [], None, None))
    adapted().save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    else:  # an adapter of another model
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors = {name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert main(["doctor", "--adapter", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"hf-flops doctor: --adapter {tmp_path} does not suit --model vit: {words}"
    )
    assert said.count("\n") == 1


def test_what_is_offered_is_configured_and_texts_have_tokens(monkeypatch):
    assert command.configured("oft", tiny_model("vit"), None, 2).oft_block_size > 0
    task = SimpleNamespace(train=[("some", 0), ("", 1)])
    monkeypatch.setattr(
        command, "recipe", lambda name: SimpleNamespace(load_texts=lambda *given, **options: task)
    )

    def tokenizer(text, **options):
        return {"input_ids": [*map(ord, text)], "attention_mask": [1] * len(text)}

    tokenizer.pad_token = "<pad>"
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: tokenizer)
    with pytest.raises(ConfigurationError, match="text '' has no tokens"):
        command.texts("llama", None, causal=True)


def test_what_training_refuses_it_refuses(tmp_path):
    model = tiny_model("vit").requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        doctor(model, as_dataset(tiny_batch("vit", 4)))
