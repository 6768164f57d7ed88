"""A head over label words: it starts as the model's preference among them, its gradient is exact,
and it is kept with the adapter.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F

from hf_flops import (
    ConfigurationError,
    FlopsTrainer,
    FlopsTrainingArguments,
    LabelHeadModel,
    SuffixPromptModel,
)
from hf_flops.estimators import find_head
from hf_flops.objectives import TappedLoss
from hf_flops.prompts.label_head import HEAD_FILE
from tests.helpers.tiny import SIZES, VOCABULARY, generator, model_forward, tiny_model
from tests.prompts.test_suffix_prompt import KINDS, base_model, batch, draw_rows, options, suffix

WORDS = [4, 9, 7]
ADAPTERS = {
    "none": None,
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


def classifier(kind="llama", adapter="lora"):
    model = base_model(kind)
    if ADAPTERS[adapter] is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(model, ADAPTERS[adapter]())
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_()
    return LabelHeadModel(model, WORDS).eval()


def texts(side="right", samples=3):
    """Texts of several lengths, with classes."""
    lengths = [(5, 0), (2, 0), (6, 0), (3, 0)] * samples
    columns = batch(draw_rows(lengths[:samples]), side)
    return {**columns, "labels": torch.arange(samples) % len(WORDS)}


def moved(head):
    """Change a head as training would."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += torch.randn(parameter.shape, generator=generator(parameter.numel()))


@pytest.mark.parametrize(
    ("adapter", "side"),
    [*((name, "right") for name in ADAPTERS), ("none", "left"), ("lora", "left")],
)
@torch.no_grad()
def test_it_starts_as_the_models_preference_among_the_words(adapter, side):
    model, inputs = classifier(adapter=adapter), texts(side)
    found = model(**inputs)
    for row, logits in enumerate(found.logits):
        alone = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        wanted = model.model(input_ids=alone[None]).logits[0, -1, WORDS]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, F.cross_entropy(found.logits, inputs["labels"]))
    summed = model(**inputs, num_items_in_batch=6).loss
    torch.testing.assert_close(summed, found.loss / 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_suffix_prompt_with_a_head_starts_as_one_without(kind):
    plain, model, inputs = (
        suffix(kind, label_words=WORDS),
        suffix(kind, label_words=WORDS, label_head=True),
        texts(),
    )
    wanted = plain(**inputs)
    shapes = []
    model.base.get_output_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append(out.shape[-1])
    )
    for clean in (False, True):
        with model.cached_texts(inputs, clean=clean):
            torch.testing.assert_close(model(**inputs).logits, wanted.logits, rtol=1e-4, atol=1e-5)
    # one row of the vocabulary's logits is computed where packing is checked, none elsewhere
    shapes.clear()
    torch.testing.assert_close(model(**inputs).loss, wanted.loss, rtol=1e-4, atol=1e-5)
    assert set(shapes) == {SIZES["hidden_size"]}
    # labels that are tokens get the vocabulary's logits all the same
    rows = batch(draw_rows([(5, 1), (2, 2)]))
    found = model(**rows)
    assert found.logits.shape == (2, 2, VOCABULARY)
    torch.testing.assert_close(found.loss, plain(**rows).loss)


@pytest.mark.parametrize("make", ["suffix", "lora", "prompt", "prefix"])
@torch.no_grad()
def test_its_gradient_is_exact(make):
    if make == "suffix":
        model = suffix("llama", label_words=WORDS, label_head=True)
    else:
        model = classifier(adapter=make)
    moved(model.head)
    inputs, objective = texts(), TappedLoss(logits=True)
    forward = model_forward(model)
    head = find_head(model, objective, forward, inputs)
    assert head is not None
    assert head.module is model.head
    with head.watched() as seen:
        losses = objective(forward, inputs, features=True)
    found = head.gradient(seen[0], losses) / len(inputs["labels"])
    with torch.enable_grad():
        model(**inputs).loss.backward()
    wanted = torch.cat([model.head.weight.grad.flatten(), model.head.bias.grad])
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-6)


def test_a_prompt_and_its_head_are_saved_together(tmp_path):
    model, inputs = suffix("llama", label_words=WORDS, label_head=True), texts()
    moved(model.head)
    model.save_pretrained(tmp_path)
    loaded = SuffixPromptModel.from_pretrained(base_model("llama"), tmp_path)
    assert loaded(**inputs).logits.equal(model(**inputs).logits)
    # what a user's own code serves from the folder
    state = load_file(tmp_path / "model.safetensors")
    assert set(state) == {"prompt.weight", "label_words", "head.weight", "head.bias"}
    text = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]
    base = base_model("llama")
    rows = torch.cat([base.get_input_embeddings()(text), state["prompt.weight"]])
    states = base.base_model(inputs_embeds=rows[None]).last_hidden_state
    served = states[0, -1] @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(served, model(**inputs).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_and_its_head_are_saved_together(adapter, tmp_path):
    model, inputs = classifier(adapter=adapter), texts()
    moved(model.head)
    model.save_pretrained(tmp_path)
    trains = {"is_trainable": True} if adapter == "lora" else {}
    loaded = LabelHeadModel.from_pretrained(base_model("llama"), tmp_path, **trains).eval()
    assert loaded(**inputs).logits.equal(model(**inputs).logits)
    assert loaded.label_words.tolist() == WORDS
    trained, again = (
        {name for name, value in one.named_parameters() if value.requires_grad}
        for one in (model, loaded)
    )
    assert again >= {"head.weight", "head.bias"}
    assert adapter != "lora" or again == trained
    assert set(load_file(tmp_path / HEAD_FILE)) == {"label_words", "weight", "bias"}
    # a checkpoint holds what is trained and nothing else
    assert set(model.state_dict()) == trained | {"label_words"}
    before = copy.deepcopy(model.state_dict())
    moved(model.head)
    model.load_state_dict(before)
    assert model(**inputs).logits.equal(loaded(**inputs).logits)


def two_classes(samples=16):
    """Texts whose last token tells the class."""
    found = []
    for i in range(samples):
        tokens = torch.randint(10, VOCABULARY, (4,), generator=generator(i))
        tokens[-1] = 5 + i % 2
        found.append({"input_ids": tokens, "labels": i % 2})
    return found


@pytest.mark.parametrize("make", ["suffix", "lora"])
def test_forward_only_training_learns_it_and_resumes(make, tmp_path):
    def build():
        if make == "suffix":
            return suffix("llama", 2, label_words=[4, 9], label_head=True)
        return LabelHeadModel(classifier().model, [4, 9])

    def trainer(model):
        own = {"rows_per_forward": 16, "save_steps": 6, "pictures": False, "learning_rate": 0.03}
        args = FlopsTrainingArguments(**options(tmp_path, **own))
        return FlopsTrainer(model=model, args=args, train_dataset=two_classes())

    first = trainer(build())
    first.train()
    assert first.session.chosen.head.module is first.model.head
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    resumed = trainer(build())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for one, other in zip(first.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_base_in_16_bits_has_a_head_in_32():
    model = LabelHeadModel(tiny_model("llama").bfloat16(), WORDS)
    assert model.head.weight.dtype == torch.float32
    assert model(**texts()).logits.dtype == torch.float32


def test_what_has_no_words_or_no_output_layer_is_refused():
    with pytest.raises(ConfigurationError, match="label_head=True needs label_words="):
        suffix("llama", label_head=True)
    with pytest.raises(ConfigurationError, match="A LlamaModel has no output layer"):
        LabelHeadModel(tiny_model("llama").model, WORDS)
