"""The quick proof of the first batch's decisions agrees with the checks that go one by one."""

from itertools import pairwise

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_flops import FlopsTrainer
from hf_flops.autotune import first_batch
from hf_flops.autotune.quick_check import prove
from hf_flops.autotune.row_loss_check import most_different
from hf_flops.base.rounding_error import precision_of
from tests.helpers.runs import adapted, data, flat, short
from tests.helpers.tiny import model_forward, tiny_batch, tiny_model
from tests.helpers.worker import Hook

ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "late": LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"
    ),
    "rank one": LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
}


def decided(model, tmp_path, monkeypatch, batch, *, quick=True, **options):
    """Return what the first batch decides, and how many forwards that takes."""
    forwards = [0]
    hook = model.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    with monkeypatch.context() as patch, torch.no_grad():
        if not quick:
            patch.setattr(first_batch, "prove", lambda *given: None)
        chosen = first_batch.set_up(
            short(tmp_path, **options), model, model_forward(model), batch, None, None, frozenset()
        )
    hook.remove()
    return chosen, forwards[0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_decisions_are_those_of_single_checks(name, tmp_path, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), ADAPTERS[name]).eval()
    batch = tiny_batch("llama")
    batch["labels"][:, :2] = -100
    quick, few = decided(model, tmp_path, monkeypatch, batch)
    single, many = decided(model, tmp_path, monkeypatch, batch, quick=False)
    assert few <= 6 < many
    assert type(quick.objective) is type(single.objective)
    assert quick.objective.after is single.objective.after
    assert quick.perturbation.vector.names == single.perturbation.vector.names
    assert type(quick.perturbation) is type(single.perturbation)
    assert dict(quick.reuse.modules) == dict(single.reuse.modules)
    assert quick.reuse.unread_inputs == single.reuse.unread_inputs


def test_what_only_other_recorded_modules_read_is_not_kept(tmp_path, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama", num_hidden_layers=4), ADAPTERS["late"]).eval()
    chosen, _ = decided(model, tmp_path, monkeypatch, tiny_batch("llama"))
    layers = model.get_base_model().model.layers
    assert layers[0] in chosen.reuse.modules
    assert model.get_base_model().model.embed_tokens in chosen.reuse.pass_through
    assert layers[0] not in chosen.reuse.pass_through  # the layer with the adapter reads it


class Swapped(nn.Module):
    """A layer that gives each row the next row's output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.roll(1, 0)).roll(-1, 0)


@pytest.mark.parametrize("fault", ["rows in another order", "a weight that is read elsewhere"])
def test_a_wrong_rule_is_not_proven(fault, tmp_path):
    model = adapted("llama")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    if fault.startswith("rows"):
        layer.lora_B["default"] = Swapped(layer.lora_B["default"])
    else:
        weight = layer.lora_A["default"].weight
        layer.register_forward_hook(lambda module, args, out: out + weight.sum())
    model.eval()
    with torch.no_grad():
        proven = prove(
            short(tmp_path),
            model,
            model_forward(model),
            tiny_batch("llama"),
            (),
            precision_of(model),
        )
    assert proven is None


def test_a_loss_of_the_batch_as_a_whole_is_not_proven(tmp_path):
    model = adapted("llama").eval()

    def forward(inputs):
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1]
        scaled = (logits / logits.std(0, keepdim=True).mean()).transpose(1, 2)
        return F.cross_entropy(scaled, inputs["labels"][:, 1:]), outputs

    with torch.no_grad():
        arguments = short(tmp_path), model, forward, tiny_batch("llama"), (), precision_of(model)
        assert prove(*arguments) is None


def test_parameters_and_hooks_are_as_before(tmp_path, monkeypatch):
    model = adapted("llama").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decided(model, tmp_path, monkeypatch, tiny_batch("llama"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_ends_where_it_ends_with_single_checks(tmp_path, monkeypatch):
    ends = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(first_batch, "prove", lambda *given: None)
        trainer = FlopsTrainer(adapted("llama"), short(tmp_path), train_dataset=data("llama"))
        torch.manual_seed(0)
        trainer.train()
        ends.append(flat(trainer))
    assert torch.equal(*ends)


def test_texts_tell_samples_apart_whose_labels_are_equal():
    inputs = {"labels": torch.ones(3), "text": ["a", "a", "b"]}
    assert most_different(inputs, torch.arange(3)).tolist() == [0, 2]


def test_the_first_step_takes_few_forwards_and_the_others_two(tmp_path):
    model, forwards, after = adapted("llama"), [0], []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    args = short(tmp_path, max_steps=3, rows_per_forward=64)
    hooks = [Hook(lambda step: after.append(forwards[0]))]
    FlopsTrainer(model, args, train_dataset=data("llama"), callbacks=hooks).train()
    assert after[0] <= 12
    assert [stop - start for start, stop in pairwise(after)] == [2, 2]
