"""Models whose weights accelerate keeps on the CPU or on disk train as models in memory do."""

import copy
from itertools import pairwise

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import OffloadedWeightsLoader
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_flops import FlopsTrainer, SuffixPromptModel
from hf_flops.errors import ConfigurationError
from hf_flops.trainer.offload import is_offloaded, offload_hook
from tests.helpers.runs import data, flat, short
from tests.helpers.tiny import tiny_model
from tests.helpers.worker import Hook

CPU = torch.device("cpu")
DISK = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    "model.layers": "disk",
}
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture(autouse=True)
def same_start():
    """Adapters and prompts start from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def on_disk(folder, model=None):
    """Return a model with its layers on disk and the rest offloaded to the CPU."""
    (tiny_model("llama") if model is None else model).save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=DISK, offload_folder=folder / "offloaded"
    )


PLACES = {
    "cpu": lambda folder: cpu_offload(tiny_model("llama"), execution_device=CPU),
    "disk": lambda folder: disk_offload(
        tiny_model("llama"), folder / "offloaded", execution_device=CPU
    ),
    "map": on_disk,
}


def trained(model, folder, config=None, resume=None, **options):
    torch.manual_seed(2)
    trainer = FlopsTrainer(
        model,
        short(folder, **options),
        train_dataset=data("llama"),
        peft_config=copy.deepcopy(config),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("place", PLACES)
def test_lora_ends_where_it_ends_in_memory(place, tmp_path):
    offloaded = trained(PLACES[place](tmp_path), tmp_path, ADAPTERS["lora"])
    assert is_offloaded(offloaded.model)
    plain = trained(tiny_model("llama"), tmp_path, ADAPTERS["lora"])
    torch.testing.assert_close(flat(offloaded), flat(plain))


@pytest.mark.parametrize("name", ["dora", "head", "prompt"])
def test_other_adapters_end_where_they_end_in_memory(name, tmp_path):
    offloaded = trained(on_disk(tmp_path), tmp_path, ADAPTERS[name])
    plain = trained(tiny_model("llama"), tmp_path, ADAPTERS[name])
    torch.testing.assert_close(flat(offloaded), flat(plain))


@pytest.mark.parametrize("head", [False, True])
def test_a_suffix_prompt_ends_where_it_ends_in_memory(head, tmp_path):
    ends = []
    for base in (on_disk(tmp_path), tiny_model("llama")):
        torch.manual_seed(3)
        model = SuffixPromptModel(base, 2, label_words=[5, 6], label_head=head)
        rows = [
            {**row, "labels": torch.tensor(i % 2)} if head else suffix(row)
            for i, row in enumerate(data("llama"))
        ]
        trainer = FlopsTrainer(model, short(tmp_path), train_dataset=rows)
        trainer.train()
        ends.append(flat(trainer))
    torch.testing.assert_close(*ends)


def suffix(row):
    """Return a row whose last token is its answer."""
    labels = row["labels"].clone()
    labels[: int(row["attention_mask"].sum()) - 1] = -100
    return {**row, "labels": labels}


def test_an_adapter_put_on_before_is_taken_out_of_offloading(tmp_path):
    ends = []
    for offload in (True, False):
        torch.manual_seed(3)
        model = get_peft_model(tiny_model("llama"), copy.deepcopy(ADAPTERS["lora"]))
        if offload:
            model = disk_offload(model, tmp_path / "offloaded", execution_device=CPU)
        trainer = trained(model, tmp_path)
        adapters = [m for n, m in trainer.model.named_modules() if "lora_A" in n]
        assert all(offload_hook(module) is None for module in adapters)
        ends.append(flat(trainer))
    torch.testing.assert_close(*ends)


def test_the_base_stays_where_it_is(tmp_path):
    trainer = trained(on_disk(tmp_path), tmp_path, ADAPTERS["lora"], eval_strategy="no")
    trainer.evaluate(data("llama"))
    layers = {n: p for n, p in trainer.model.named_parameters() if ".layers." in n}
    for name, parameter in layers.items():
        assert parameter.device.type == ("cpu" if "lora" in name else "meta"), name


def test_evaluation_comes_before_training(tmp_path):
    trainer = FlopsTrainer(
        on_disk(tmp_path),
        short(tmp_path),
        train_dataset=data("llama"),
        peft_config=LoraConfig(**LORA),
    )
    before = trainer.evaluate(data("llama"))["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data("llama"))["eval_loss"] != before


def test_a_metric_of_the_likeliest_words_needs_no_logits_of_the_vocabulary(tmp_path):
    seen = list[tuple[int, ...]]()

    def right(prediction):
        seen.append(prediction.predictions.shape)
        hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"right": float(hits[prediction.label_ids[:, 1:] >= 0].mean())}

    found = []
    for base in (on_disk(tmp_path), tiny_model("llama")):
        trainer = FlopsTrainer(
            base,
            short(tmp_path),
            train_dataset=data("llama"),
            peft_config=LoraConfig(**LORA),
            compute_metrics=right,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        found.append(trainer.evaluate(data("llama", 16))["eval_right"])
    assert found[0] == found[1]
    assert seen == [(16, 7)] * 2


def test_values_that_peft_has_lost_are_refused(tmp_path):
    model = get_peft_model(on_disk(tmp_path), copy.deepcopy(ADAPTERS["lora"]))
    with pytest.raises(ConfigurationError, match="peft_config="):
        FlopsTrainer(model, short(tmp_path), train_dataset=data("llama"))


def test_an_initialisation_that_changes_offloaded_weights_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="changes the weights underneath"):
        trained(on_disk(tmp_path), tmp_path, LoraConfig(**LORA, init_lora_weights="pissa"))


def test_weights_travel_twice_a_step_and_few_times_before_the_first(tmp_path, monkeypatch):
    fetched, after = [0], []
    original = OffloadedWeightsLoader.__getitem__

    def fetch(loader, key):
        weight = original(loader, key)
        fetched[0] += weight.nbytes
        return weight

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", fetch)
    model = PLACES["disk"](tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    options = {"queries_per_sample": 64, "max_steps": 3}
    trainer = FlopsTrainer(
        model,
        short(tmp_path, **options),
        train_dataset=data("llama"),
        peft_config=copy.deepcopy(ADAPTERS["lora"]),
        callbacks=[Hook(lambda step: after.append(fetched[0]))],
    )
    fetched[0] = 0
    trainer.train()
    steps = [stop - start for start, stop in pairwise([0, *after])]
    assert steps[0] <= 8 * size
    assert max(steps[1:]) <= 2.1 * size


def test_a_resumed_run_ends_like_one_in_a_piece(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(on_disk(tmp_path), tmp_path / "run", ADAPTERS["lora"], **options)
    middle = str(tmp_path / "run" / "checkpoint-2")
    again = trained(on_disk(tmp_path), tmp_path / "run", ADAPTERS["lora"], resume=middle, **options)
    assert torch.equal(flat(again), flat(whole))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "run" / "checkpoint-4")
    assert isinstance(loaded.get_base_model(), LlamaForCausalLM)


def test_accelerates_refusal_of_quantised_bases_on_disk_does_not_stop_the_run(tmp_path):
    """accelerate looks at the flag and the map only, so a plain model plays a quantised one."""
    base = on_disk(tmp_path)
    base.is_loaded_in_8bit = True
    trainer = trained(base, tmp_path, ADAPTERS["lora"])
    assert trainer.state.global_step == 2
    assert base.hf_device_map == DISK
