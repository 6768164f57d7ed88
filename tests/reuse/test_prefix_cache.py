"""The prefix cache against late expansion alone: the same estimates, and known samples do not run
again.
"""

from dataclasses import replace

import pytest
import torch

from hf_flops import BatchPosition, ConfigurationError, FlopsTrainingArguments, estimate_gradient
from hf_flops.base.batch import take
from hf_flops.reuse import CachedPlan, SampleStore, choose_reuse
from hf_flops.reuse.prefix_cache import identify
from tests.helpers.tiny import TOKENS, as_dataset, model_forward
from tests.reuse.test_late_expansion import (
    LAYERS,
    adapted,
    exact_batch,
    layer_insides,
    lora,
    method_for,
    rows_through,
    trained,
)


def chosen(method, model, inputs):
    with torch.no_grad():
        reuse, reason = choose_reuse(
            model, method.objective, model_forward(model), inputs, method.perturbation, cached=True
        )
    assert reason is None
    return reuse


def cached(method, model, inputs, store):
    return CachedPlan.of(chosen(method, model, inputs), store)


def estimates(method, reuse, model, inputs, batches):
    """Return the estimates of several steps, on batches of sample ids."""
    found = []
    for step, ids in enumerate(batches):
        model.zero_grad()
        place = BatchPosition(step=step, ids=tuple(ids))
        estimate_gradient(
            model_forward(model),
            take(inputs, torch.tensor(ids)),
            replace(method, reuse=reuse),
            place,
        )
        found.append(
            torch.cat(
                [parameter.grad.flatten() for parameter in method.perturbation.vector.parameters]
            )
        )
    return torch.stack(found)


@pytest.mark.parametrize(
    ("kind", "estimator"), [("vit", "one_sided"), ("llama", "antithetic"), ("t5", "one_sided")]
)
def test_estimates_are_those_without_it(kind, estimator, tmp_path):
    model, inputs = adapted(kind, lora(kind, [LAYERS - 1])), exact_batch(kind, 6)
    method = method_for(model, estimator=estimator, allocator="uniform")
    batches = [[0, 1, 2], [3, 1, 4, 0], [4, 3, 2, 1, 0, 5]]
    wanted = estimates(method, method.reuse, model, inputs, batches)
    reuse = chosen(method, model, inputs)
    # the last has room for some only
    for store in (SampleStore(1.0), SampleStore(1.0, tmp_path), SampleStore(8e-6)):
        found = estimates(method, CachedPlan.of(reuse, store), model, inputs, batches)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_known_samples_do_not_run_again(kind):
    model, inputs = adapted(kind, lora(kind, [LAYERS - 1])), exact_batch(kind, 6)
    method = method_for(model)
    reuse = cached(method, model, inputs, SampleStore(1.0))
    for batch, run in (([0, 1, 2], 3), ([0, 1, 2], 0), ([2, 3, 0, 4], 2), ([4, 2, 3], 0), ([5], 1)):
        with rows_through(model, layer_insides(model, kind)[: LAYERS - 1]) as counts:
            estimates(method, reuse, model, inputs, [batch])
        assert list(counts.values()) == [run] * (LAYERS - 1 if run else 0)


def test_only_what_nothing_else_gives_is_kept():
    model, inputs = adapted("llama", lora("llama", [LAYERS - 1])), exact_batch("llama", 4)
    method, store = method_for(model), SampleStore(1.0)
    reuse = cached(method, model, inputs, store)
    estimates(method, reuse, model, inputs, [[0, 1, 2, 3]])
    layer = model.get_base_model().model.layers[LAYERS - 2]
    # has no parameters, and its output is the same for all rows
    rotary = model.get_base_model().model.rotary_emb
    assert {module for module, _ in reuse.leaves()} - {rotary} == {layer}
    hidden = store.get(identify(inputs, range(4))[2])[-1]
    assert hidden.shape == (1, 7, 16)


def test_the_room_is_not_exceeded():
    store, tensor = SampleStore(1e-6), torch.zeros(100, dtype=torch.bfloat16)
    samples = identify({"labels": torch.arange(7)}, range(7))
    for sample in samples:
        store.put(sample, [tensor])
    assert [store.get(sample) is not None for sample in samples] == [True] * 5 + [False] * 2


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_is_kept_comes_back(on_disk, dtype, tmp_path):
    store = SampleStore(1.0, tmp_path if on_disk else None)
    samples = identify({"labels": torch.arange(3)}, range(3))
    values = [
        [(torch.arange(6) + i).to(dtype).view(1, 2, 3), torch.full((2, 1), i).to(dtype)]
        for i in range(3)
    ]
    for sample, tensors in zip(samples, values, strict=True):
        store.put(sample, tensors)
    for sample, tensors in reversed(list(zip(samples, values, strict=True))):
        assert all(
            a.equal(b) and a.dtype == b.dtype
            for a, b in zip(store.get(sample), tensors, strict=True)
        )


def test_changed_inputs_are_refused_and_other_padding_is_not():
    model, inputs = adapted("bert", lora("bert", [LAYERS - 1])), exact_batch("bert", 3)
    method = method_for(model)
    reuse = cached(method, model, inputs, SampleStore(1.0))
    estimates(method, reuse, model, inputs, [[0, 1, 2]])
    longer = {
        name: torch.nn.functional.pad(v, (0, 2)) if v.dim() == 2 else v
        for name, v in inputs.items()
    }
    found = estimates(method, reuse, model, longer, [[0, 1, 2]])
    wanted = estimates(method, method.reuse, model, longer, [[0, 1, 2]])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    changed = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    with pytest.raises(ConfigurationError, match="inputs of sample 0 have changed"):
        estimates(method, reuse, model, changed, [[0, 1]])
    with pytest.raises(ConfigurationError, match="add a column sample_id"):
        estimate_gradient(
            model_forward(model), inputs, replace(method, reuse=reuse), BatchPosition()
        )


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_training_from_a_prefix_cache_is_the_same(place, tmp_path):
    config, batch = lora("bert", [LAYERS - 1]), exact_batch("bert", 8)
    data = [{**sample, "sample_id": i} for i, sample in enumerate(as_dataset(batch))]
    found, trainer = trained(
        tmp_path, "bert", True, config, data=data, max_steps=4, prefix_cache=place
    )
    wanted, _ = trained(tmp_path, "bert", False, config, data=data, max_steps=4)
    kept = [trainer.session.chosen.reuse.store.get(sample) for sample in identify(batch, range(8))]
    # what the last layer is given
    assert [[value.shape for value in values] for values in kept] == [[(1, TOKENS, 16)]] * 8
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigurationError, match="add a column sample_id"):
        trained(tmp_path, "bert", True, config, prefix_cache=place)


def test_the_cache_needs_late_expansion_and_room(tmp_path):
    for options, message in (
        ({"late_expansion": False}, "needs late_expansion"),
        ({"prefix_cache_gb": 0.0}, "prefix_cache_gb=0.0 must be positive"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            FlopsTrainingArguments(output_dir=str(tmp_path), prefix_cache="memory", **options)
