"""Late expansion against full expansion: the same losses and estimates, with fewer rows through the
lower layers.
"""

import logging
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hf_flops import BatchPosition, FlopsTrainer, FlopsTrainingArguments, Method, estimate_gradient
from hf_flops.allocators import ALLOCATORS
from hf_flops.autotune.padding_check import with_cropping
from hf_flops.estimators import ESTIMATORS
from hf_flops.objectives import BatchLoss, CallableObjective, Objective, TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.reuse import ReusePlan, choose_reuse
from hf_flops.trainer.preparation import without_cache
from tests.helpers.tiny import (
    CLASSES,
    SIZES,
    TASKS,
    VOCABULARY,
    as_dataset,
    double,
    generator,
    model_forward,
    tiny_batch,
    tiny_model,
)

SAMPLES, QUERIES, LAYERS = 5, 6, 3
DEPTH = {"gpt2": "n_layer", "t5": "num_layers"}
TARGETS = {
    "vit": ["q_proj", "fc1"],
    "bert": ["query", "dense"],
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn"],
    "opt": ["v_proj", "fc1"],
    "t5": ["q", "wo"],
}
# Where the layers of each kind are, and the sub-module that runs if and only if its layer does.
STACKS = {
    "vit": ("vit.layers", "layernorm_before"),
    "bert": ("bert.encoder.layer", "intermediate"),
    "llama": ("model.layers", "input_layernorm"),
    "gpt2": ("transformer.h", "ln_1"),
    "opt": ("decoder.layers", "self_attn_layer_norm"),
}


def lora(kind, layers=None, targets=None):
    targets = targets or TARGETS[kind]
    return LoraConfig(
        r=2, target_modules=targets, layers_to_transform=layers, task_type=TASKS[kind]
    )


def exact_batch(kind, samples=4):
    """A batch in float64, as the models here are: rounding differs from way to way, and differences
    of losses magnify it.
    """
    return double(tiny_batch(kind, samples))


def settled(model, config=None):
    """Wrap a model in float64, and move its adapters off their starting values, where half of them
    would not matter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (get_peft_model(model, config) if config else model).eval().double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(kind, config):
    return settled(tiny_model(kind, **{DEPTH.get(kind, "num_hidden_layers"): LAYERS}), config)


def method_for(
    model, objective=None, shared=(), estimator="one_sided", allocator="optimal", rows=7
):
    names = ParameterVector.of(model).names
    perturbation = perturb(
        model, rowwise=[name for name in names if name not in shared], shared=list(shared)
    )
    scale = 0.05  # large, so that differences of losses keep their digits
    return Method(
        objective or TappedLoss(),
        perturbation,
        ESTIMATORS[estimator](),
        ALLOCATORS[allocator](),
        QUERIES,
        scale,
        rows,
    )


def late(method, model, inputs):
    with torch.no_grad():
        reuse, reason = choose_reuse(
            model, method.objective, model_forward(model), inputs, method.perturbation
        )
    assert reason is None
    return replace(method, reuse=reuse)


def estimate(method, model, inputs, forward=None):
    model.zero_grad()
    result = estimate_gradient(
        forward or model_forward(model), inputs, method, BatchPosition(seed=3, step=2)
    )
    return result, torch.cat(
        [parameter.grad.flatten() for parameter in method.perturbation.vector.parameters]
    )


def assert_same_estimates(model, inputs, method):
    """Compare both ways; returns the method with late expansion."""
    reusing = late(method, model, inputs)
    assert_same(method, reusing.reuse, model, inputs)
    return reusing


def assert_same(method, reuse, model, inputs, forward=None):
    expected, wanted = estimate(method, model, inputs, forward)
    result, found = estimate(replace(method, reuse=reuse), model, inputs, forward)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=0)
    assert result.rows == expected.rows
    assert result.counts.equal(expected.counts)


@contextmanager
def rows_through(model, names):
    """Count the rows that reach each named module."""
    counts, modules = Counter(), dict(model.named_modules())

    def count(name):
        def hook(module, args, kwargs):
            counts[name] += len(args[0] if args else next(iter(kwargs.values())))

        return modules[name].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [count(name) for name in names]
    yield counts
    for handle in handles:
        handle.remove()


def layer_insides(model, kind):
    stack, inside = STACKS[kind]
    root = next(name for name, _ in model.named_modules() if name.endswith(stack))
    return [f"{root}.{i}.{inside}" for i in range(LAYERS)]


def names_of(model, modules):
    return {name for name, module in model.named_modules() if module in modules}


# --- equality ---


@pytest.mark.parametrize("layers", [[LAYERS - 1], None], ids=str)
@pytest.mark.parametrize("kind", list(TASKS))
def test_losses_and_estimates_are_those_of_full_expansion(kind, layers):
    model = adapted(kind, lora(kind, layers))
    assert assert_same_estimates(model, exact_batch(kind, SAMPLES), method_for(model)).reuse.modules


@pytest.mark.parametrize(
    ("estimator", "allocator", "noise"),
    [
        ("antithetic", "uniform", "rowwise"),
        ("antithetic", "uniform", "shared"),
        ("antithetic", "optimal", "mixed"),
        ("one_sided", "authors_bernoulli", "shared"),
    ],
)
def test_any_noise_estimator_and_allocator(estimator, allocator, noise):
    model = adapted("vit", lora("vit", [LAYERS - 1]))
    names = ParameterVector.of(model).names
    shared = {"rowwise": [], "shared": names, "mixed": names[::2]}[noise]
    assert_same_estimates(
        model, exact_batch("vit", SAMPLES), method_for(model, None, shared, estimator, allocator)
    )


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_adapters_in_one_half_of_an_encoder_and_decoder(part):
    config = lora("t5", targets=rf".*{part}\.block\.{LAYERS - 1}\..*\.(q|wo)")
    model = adapted("t5", config)
    reusing = assert_same_estimates(model, exact_batch("t5", SAMPLES), method_for(model))
    names = names_of(model, reusing.reuse.modules)
    prefix = "base_model.model."
    assert (prefix + "encoder" in names) == (part == "decoder")
    assert prefix + f"{part}.block.0" in names_of(model, reusing.reuse.pass_through)
    # the decoder's own blocks are reached through their attention to the encoder
    assert (prefix + "decoder.block.0" in names) == (part == "decoder")


@pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "opt"])
def test_soft_prompts_reach_every_layer(kind, adapter):
    model = adapted(kind, adapter(task_type=TASKS[kind], num_virtual_tokens=3))
    inside = layer_insides(model, kind)
    reusing = assert_same_estimates(model, exact_batch(kind, SAMPLES), method_for(model))
    layers = {name.rsplit(".", 1)[0] for name in inside}
    assert layers.isdisjoint(names_of(model, reusing.reuse.modules))


def classifier(kind):
    if kind == "llama":
        sizes = {**SIZES, "num_hidden_layers": LAYERS}
        return LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=VOCABULARY, num_labels=CLASSES, pad_token_id=0, use_cache=True, **sizes
            )
        )
    config = AlbertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, embedding_size=8, **SIZES)
    return AlbertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", ["q_proj"]), ("albert", ["query"]), ("albert", ["classifier"])]
)
def test_classifiers_with_a_cache_and_with_shared_layers(kind, targets):
    layers = [LAYERS - 1] if kind == "llama" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = classifier(kind)
    model = settled(model, LoraConfig(r=2, target_modules=targets, layers_to_transform=layers))
    reusing = assert_same_estimates(model, exact_batch("bert", SAMPLES), method_for(model))
    # a shared layer is called many times, so it is not replaced by itself; the encoder around it
    # can be
    shared = {name for name in names_of(model, reusing.reuse.modules) if "albert_layers" in name}
    assert not shared


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_the_other_tower_is_skipped_where_the_loss_belongs_to_the_batch(tower):
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 7, "eos_token_id": 2, **SIZES}
    vision = {"image_size": 8, "patch_size": 4, **SIZES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model = settled(model, LoraConfig(r=2, target_modules=rf".*{tower}.*\.q_proj"))
    inputs = {
        **exact_batch("bert", SAMPLES),
        "pixel_values": exact_batch("vit", SAMPLES)["pixel_values"],
        "return_loss": True,
    }
    del inputs["labels"]
    names = ParameterVector.of(model).names
    reusing = assert_same_estimates(
        model, inputs, method_for(model, BatchLoss(), names, "antithetic", "uniform")
    )
    other = {"text_model": "vision_model", "vision_model": "text_model"}[tower]
    assert f"base_model.model.{other}" in names_of(model, reusing.reuse.modules)


@given(
    samples=st.integers(1, 4),
    times=st.integers(1, 3),
    tail=st.lists(st.integers(1, 3), max_size=2),
    owner=st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_recorded_outputs_are_repeated_row_by_row(samples, times, tail, owner):
    class Flattens(nn.Module):
        def forward(self, x):
            return {"rows": x.flatten(0, 1), "constant": torch.ones(samples), "nothing": None}

    module, owner = Flattens(), torch.tensor([i % samples for i in owner])
    plan = ReusePlan({module: (True, False, False)})
    x = torch.randn(samples, times, *tail, generator=generator())
    inputs, rows = {"labels": x}, {"labels": x[owner]}
    with plan.recording(
        lambda given: module(given["labels"] if given is inputs else torch.zeros(1, 1))
    ) as recording:
        recording.record(inputs)
        found = recording.rows(rows, owner)(rows)
    assert found["rows"].equal(x[owner].flatten(0, 1))
    assert found["constant"].equal(torch.ones(samples))
    assert found["nothing"] is None


# --- what is saved ---


@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
@pytest.mark.parametrize("kind", list(STACKS))
def test_lower_layers_see_every_sample_once(kind, estimator):
    model = adapted(kind, lora(kind, [LAYERS - 1]))
    inputs, names = exact_batch(kind, SAMPLES), layer_insides(model, kind)
    method = method_for(model, estimator=estimator, allocator="uniform")
    reusing = late(method, model, inputs)
    with rows_through(model, names) as full:
        rows = estimate(method, model, inputs)[0].rows
    with rows_through(model, names) as counts:
        estimate(reusing, model, inputs)
    assert [full[name] for name in names] == [rows] * LAYERS
    assert [counts[name] for name in names[:-1]] == [SAMPLES] * (LAYERS - 1)
    # the last layer's first norm is not reached by noise either where it comes before the attention
    assert counts[names[-1]] in (rows, rows + SAMPLES * (estimator == "antithetic"))


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_nothing_is_skipped_in_a_stack_with_adapters_everywhere(kind):
    model = adapted(kind, lora(kind))
    inputs, stack = exact_batch(kind, SAMPLES), STACKS[kind][0]
    reusing = late(method_for(model), model, inputs)
    names = names_of(model, reusing.reuse.modules)
    assert not any(name.rsplit(".", 1)[0].endswith(stack) for name in names)


def test_outputs_that_nobody_reads_are_not_kept():
    model = adapted("llama", lora("llama", [LAYERS - 1]))
    inputs = exact_batch("llama", SAMPLES)
    reuse = late(method_for(model), model, inputs).reuse
    assert {name.split("model.", 3)[-1] for name in names_of(model, reuse.pass_through)} == {
        "embed_tokens",
        "layers.0",
    }
    inputs["output_hidden_states"] = True  # now they are read
    assert not late(method_for(model), model, inputs).reuse.pass_through
    assert_same_estimates(model, inputs, method_for(model))


# --- nothing is left behind ---


@pytest.mark.parametrize("failing", [False, True])
def test_modules_are_as_before_also_after_an_exception(failing):
    model = adapted("vit", lora("vit", [LAYERS - 1]))
    inputs, embeddings = exact_batch("vit", SAMPLES), model.get_base_model().vit.embeddings
    embeddings.forward = own = embeddings.forward  # somebody else's patch
    reusing = late(method_for(model), model, inputs)
    recordings, calls = [], []

    class Watched(ReusePlan):
        def recording(self, forward):
            recordings.append(super().recording(forward))
            return recordings[-1]

    reusing = replace(reusing, reuse=Watched(**vars(reusing.reuse)))

    def forward(inputs):
        calls.append("forward" in vars(model.get_base_model().vit.layers[0]))
        if failing and len(calls) == 3:
            raise ZeroDivisionError
        return model_forward(model)(inputs)

    try:
        estimate(reusing, model, inputs, forward)
    except ZeroDivisionError:
        assert failing
    assert all(calls)
    assert len(calls) == 3 if failing else len(calls) > 3
    assert [module for module in model.modules() if "forward" in vars(module)] == [embeddings]
    assert vars(embeddings)["forward"] is own
    assert [recording.outputs for recording in recordings] == [{}]


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 9])
def test_a_forward_that_fails_in_the_check_switches_it_off(call):
    model, inputs, forward = stacked(None)
    calls = []

    def failing(inputs):
        output = forward(inputs)
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError("at last")
        return output

    method = method_for(model)
    with torch.no_grad():
        reuse, reason = choose_reuse(model, method.objective, failing, inputs, method.perturbation)
    assert not any("forward" in vars(module) for module in model.modules())
    # found out in one way or another
    assert (reason, len(reuse.modules)) in [("ZeroDivisionError: at last", 0), (None, 2)]
    assert reuse.modules or len(calls) == call


# --- where it cannot be had ---


class Stack(nn.Module):
    """Two layers and a head; `flaw` says what makes the first one hard to replace."""

    def __init__(self, flaw=None):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).requires_grad_(False)
        self.head, self.flaw, self.seen = nn.Linear(4, CLASSES), flaw, []
        if flaw == "attribute":
            self.layers[0].register_forward_pre_hook(lambda module, args: None)
            self.layers[0].forward = self._remember

    def _remember(self, x):
        self.aside = x
        return nn.functional.linear(x, self.layers[0].weight)

    def forward(self, features, labels):
        first = self.layers[0](features).tanh()
        hidden = self.layers[1](first).tanh()
        if self.flaw == "twice":
            hidden = hidden + self.layers[1](hidden)
        if self.flaw == "random":
            hidden = hidden + torch.rand(1)
        if self.flaw == "attribute":
            hidden = hidden + self.aside
        if self.flaw == "in_place":
            hidden = self.layers[1](first).mul_(2).add_(self.layers[0](features))
        logits = self.head(hidden)
        return nn.functional.cross_entropy(logits, labels), logits


def stacked(flaw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Stack(flaw).eval().double()
    inputs = {
        "features": torch.randn(SAMPLES, 4, generator=generator()).double(),
        "labels": torch.tensor([0, 1, 2, 0, 1]),
    }
    return model, inputs, lambda inputs: model(**inputs)


@pytest.mark.parametrize(
    ("flaw", "skipped"),
    [(None, {0, 1}), ("twice", {0}), ("random", set()), ("in_place", set()), ("attribute", set())],
)
def test_models_with_unusual_layers_fall_back(flaw, skipped):
    model, inputs, forward = stacked(flaw)
    method = method_for(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reuse, reason = choose_reuse(model, method.objective, forward, inputs, method.perturbation)
    assert {i for i in range(2) if model.layers[i] in reuse.modules} == skipped
    assert (reason is not None) == (flaw in ("attribute", "random"))
    if flaw != "random":
        assert_same(method, reuse, model, inputs, forward)


@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
def test_rows_get_no_pixels_where_only_the_lower_modules_read_them(estimator):
    model, inputs = adapted("vit", lora("vit")), exact_batch("vit", SAMPLES)
    given = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["pixel_values"]), with_kwargs=True
    )
    reusing = assert_same_estimates(model, inputs, method_for(model, estimator=estimator))
    assert reusing.reuse.unread_inputs == {"pixel_values"}
    given.clear()
    result, _ = estimate(reusing, model, inputs)
    batch, *rows = given
    assert batch.equal(inputs["pixel_values"])
    assert all(pixels.isnan().all() and not any(pixels.stride()) for pixels in rows)
    assert sum(map(len, given)) == result.rows


def test_an_objective_may_read_the_pixels():
    model, inputs = adapted("vit", lora("vit")), exact_batch("vit", SAMPLES)

    def brightness(outputs, inputs):
        return outputs.logits[:, 0] * inputs["pixel_values"].mean((1, 2, 3))

    reusing = assert_same_estimates(model, inputs, method_for(model, CallableObjective(brightness)))
    assert reusing.reuse.modules
    assert not reusing.reuse.unread_inputs


def test_an_objective_may_look_inside_the_model():
    model, inputs, forward = stacked(None)
    caught = []
    model.layers[0].register_forward_hook(lambda module, args, out: caught.append(out))
    objective = CallableObjective(
        lambda outputs, inputs: caught.pop().square().sum(1) + outputs.square().sum(1)
    )
    method = method_for(model, objective)
    with torch.no_grad():
        reuse, reason = choose_reuse(model, objective, forward, inputs, method.perturbation)
    assert reason is None
    assert set(reuse.modules) == set(model.layers)
    assert not reuse.pass_through
    assert_same(method, reuse, model, inputs, forward)


def test_an_objective_may_run_the_model_on_something_else():
    class Doubled(Objective):
        def __call__(self, forward, inputs, *, features=False):
            other = {**inputs, "features": inputs["features"].flip(0)}
            first, second = TappedLoss()(forward, inputs), TappedLoss()(forward, other)
            return replace(first, sums=first.sums + second.sums.flip(0))

    model, inputs, forward = stacked(None)
    method = method_for(model, Doubled())
    with torch.no_grad():
        reuse, _ = choose_reuse(model, method.objective, forward, inputs, method.perturbation)
    assert reuse.modules
    assert_same(method, reuse, model, inputs, forward)


# --- under the trainer ---


def trained(tmp_path, kind, late_expansion, config, *, data=None, max_steps=3, **options):
    args = FlopsTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=max_steps,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        queries_per_sample=4,
        learning_rate=0.01,
        perturbation_scale=0.05,
        late_expansion=late_expansion,
        optim="sgd",  # Adam makes a whole step of the last bit of a gradient near zero
        **options,
    )
    model = adapted(kind, config)
    trainer = FlopsTrainer(model, args, train_dataset=data or as_dataset(exact_batch(kind, 12)))
    trainer.train()
    values = {
        name: value.detach()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }
    return values, trainer


@pytest.mark.parametrize(("kind", "preset"), [("vit", "flops"), ("llama", "flops"), ("t5", "mezo")])
def test_training_is_the_same_with_and_without(kind, preset, tmp_path, caplog):
    config = lora(kind, [LAYERS - 1])
    with caplog.at_level(logging.INFO, logger="hf_flops"):
        found, trainer = trained(tmp_path, kind, True, config, preset=preset)
        assert "run once per sample and step" in caplog.text
        assert trainer.session.chosen.reuse.modules
        caplog.clear()
        wanted, plain = trained(tmp_path, kind, False, config, preset=preset)
        assert "ate expansion" not in caplog.text
    assert not plain.session.chosen.reuse.modules
    assert trainer.ledger.rows == plain.ledger.rows
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_no_keys_and_values_are_kept(kind):
    for config in (None, PrefixTuningConfig(task_type=TASKS[kind], num_virtual_tokens=3)):
        model, inputs = adapted(kind, config), exact_batch(kind)
        without = without_cache(model, inputs)
        found, wanted = model(**without), model(**inputs)
        assert found.loss.equal(wanted.loss)
        assert config or (found.past_key_values is None and wanted.past_key_values is not None)
    assert without_cache(model, {"use_cache": True}) == {"use_cache": True}
    assert "use_cache" not in without_cache(adapted("vit", None), {})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "opt"])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_recorded_outputs_are_cut_with_the_padding_of_a_chunk(kind, estimator):
    model, sides = adapted(kind, lora(kind, [LAYERS - 1])), frozenset(["right"])
    inputs, forward = uneven(kind), model_forward(model)
    plain = replace(method_for(model, estimator=estimator, rows=3), trimmed=sides)
    reuse, reason = choose_reuse(model, plain.objective, forward, inputs, plain.perturbation)
    assert reason is None
    cropped = with_cropping(reuse, plain.objective, forward, inputs, sides)
    assert cropped.crop_padding
    stack, inner = STACKS[kind]
    layers = next(value for name, value in model.named_modules() if name.endswith(stack))
    rows = Counter()
    with counted_columns(layers[0].get_submodule(inner), rows):
        found = estimated(model, forward, inputs, replace(plain, reuse=cropped))
    assert set(rows) == {inputs["input_ids"].shape[1]}  # the batch as a whole, and nothing narrower
    expected = estimated(model, forward, inputs, plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Where it has not been shown that outputs may be cut, narrower chunks run through the whole
    # model.
    assert reuse.crop_padding is None
    with counted_columns(layers[0].get_submodule(inner), rows):
        found = estimated(model, forward, inputs, replace(plain, reuse=reuse))
    assert len(rows) > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def uneven(kind):
    """A right-padded batch with texts of 2 to 7 tokens."""
    inputs = exact_batch(kind, SAMPLES)
    inputs["attention_mask"] = (torch.arange(7) < torch.tensor([2, 7, 4, 3, 6])[:, None]).long()
    if kind != "bert":
        inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    return inputs


@contextmanager
def counted_columns(module, counter):
    """Count the widths that a module sees."""
    handle = module.register_forward_hook(
        lambda module, args, out: counter.update([args[0].shape[-2]])
    )
    try:
        yield
    finally:
        handle.remove()


def estimated(model, forward, inputs, method):
    model.zero_grad()
    estimate_gradient(forward, inputs, method, BatchPosition())
    return torch.cat([p.grad.flatten() for p in method.perturbation.vector.parameters])


class Answers(nn.Module):
    """Frozen patches of an image, and a text that asks which of them to look at."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.patches = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
            self.words = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.LayerNorm(16))
            self.query, self.out = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.patches.requires_grad_(False)
        self.words.requires_grad_(False)

    def forward(self, input_ids, attention_mask, patches, labels):
        seen, mask = self.patches(patches), attention_mask[..., None]
        asked = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        shares = (self.query(asked)[:, None] @ seen.transpose(1, 2)).softmax(-1)
        logits = self.out((shares @ seen)[:, 0] + asked)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@torch.no_grad()
def test_patches_are_not_cut_where_there_are_as_many_as_columns():
    model, sides, first = Answers().double(), frozenset(["right"]), uneven("bert")
    samples, columns = first["input_ids"].shape
    first["patches"] = torch.randn(samples, columns + 2, 8, generator=generator()).double()
    forward = model_forward(model)
    plain = replace(method_for(model, rows=3), trimmed=sides)
    reuse, reason = choose_reuse(model, plain.objective, forward, first, plain.perturbation)
    assert reason is None
    assert {model.patches, model.words} == set(reuse.modules)
    cropped = with_cropping(reuse, plain.objective, forward, first, sides)
    assert cropped.crop_padding
    assert {module for module, _ in cropped.token_axes} == {model.words}
    chance = {**first, "patches": first["patches"][:, :columns]}  # by chance in a later batch
    found = estimated(model, forward, chance, replace(plain, reuse=cropped))
    torch.testing.assert_close(
        found, estimated(model, forward, chance, plain), rtol=1e-4, atol=1e-5
    )
    cropped = with_cropping(reuse, plain.objective, forward, chance, sides)  # and in the first
    found = estimated(model, forward, chance, replace(plain, reuse=cropped))
    torch.testing.assert_close(
        found, estimated(model, forward, chance, plain), rtol=1e-4, atol=1e-5
    )
