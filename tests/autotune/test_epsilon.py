"""The step of the finite difference is found where rounding and curvature are both small."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_flops import CallableObjective, FlopsTrainer, FlopsTrainingArguments, Method
from hf_flops.allocators import Uniform
from hf_flops.autotune.epsilon import GRID, calibrate, choose_scale
from hf_flops.estimators import Antithetic, OneSided
from hf_flops.objectives import BatchLoss, TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from tests.helpers.tiny import TASKS, as_dataset, generator, model_forward, tiny_batch, tiny_model

SCALES = torch.tensor(GRID, dtype=torch.float64)[:, None]


def simulated(rounding, curvature, seed, rows=64, rounded=None):
    """(K, R) deltas with errors `rounding / eps` and `curvature eps`, and their RMS errors at every
    scale.

    `rounded` seeds the rounding errors alone, which is what two machines differ in.
    """
    rng = generator(seed)
    truth, bend = torch.randn(2, rows, generator=rng).double()
    noise = torch.randn(
        len(GRID), rows, generator=rng if rounded is None else generator(rounded)
    ).double()
    error = curvature * SCALES * bend + rounding * noise / SCALES
    return truth + error, error.square().mean(1).sqrt()


@settings(max_examples=60)
@given(rounding=st.floats(-9, -4), curvature=st.floats(-2, 1.5), seed=st.integers(0, 99))
def test_the_chosen_scale_is_nearly_the_best_one(rounding, curvature, seed):
    rounding, curvature = 10**rounding, 10**curvature
    deltas, _ = simulated(rounding, curvature, seed)
    scale, ratio = choose_scale(deltas)
    assert scale in GRID
    error, least = (
        (rounding / s) ** 2 + (curvature * s) ** 2
        for s in (scale, min(max((rounding / curvature) ** 0.5, 1e-4), 0.1))
    )
    assert error**0.5 < 4 * least**0.5
    assert 0.2 / error**0.5 < ratio < 8 / error**0.5 or ratio > 1e6


@given(
    best=st.integers(1, len(GRID) - 2),
    off=st.floats(-0.1, 0.1),
    machines=st.tuples(*[st.integers(0, 999)] * 2),
)
def test_machines_that_round_differently_choose_the_same_scale(best, off, machines):
    optimum = GRID[best] * 10**off  # the nearest other scale is 10**0.4 away or more
    same = [
        choose_scale(simulated(optimum**2, 1.0, 0, rounded=machine)[0])[0] for machine in machines
    ]
    assert same == [GRID[best]] * 2


@pytest.mark.parametrize(
    ("rounding", "curvature", "end"), [(0.0, 1.0, GRID[:2]), (1e-3, 0.0, GRID[-2:])]
)
def test_where_one_error_alone_is_visible_the_scale_is_at_that_end_of_the_grid(
    rounding, curvature, end
):
    assert {choose_scale(simulated(rounding, curvature, seed)[0])[0] for seed in range(20)} <= set(
        end
    )


def test_a_perturbation_that_rounding_swallows_is_no_signal():
    deltas, _ = simulated(1e-6, 1.0, 0)
    deltas[:3] = 0.0  # they agree perfectly
    assert choose_scale(deltas)[0] > GRID[2]
    assert choose_scale(torch.zeros(len(GRID), 9)) == (None, 0.0)
    assert choose_scale(torch.full((len(GRID), 9), float("nan"))) == (None, 0.0)


def adapted(kind="vit", dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj"],
            task_type=TASKS[kind],
            modules_to_save=["classifier"],
        )
        model = get_peft_model(tiny_model(kind).to(dtype), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model


def method(model, kind="rowwise", **options):
    defaults = {
        "objective": TappedLoss(),
        "perturbation": perturb(model, **{kind: ParameterVector.of(model).names}),
        "estimator": OneSided(),
        "allocator": Uniform(),
        "queries_per_sample": 4,
        "scale": 1.0,
        "rows_per_forward": 7,
    }
    return Method(**{**defaults, **options})


def batch(dtype=torch.float32):
    inputs = tiny_batch("vit", samples=6)
    return {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}


@pytest.mark.parametrize("kind", ["rowwise", "shared"])
@pytest.mark.parametrize("estimator", [OneSided(), Antithetic()])
@torch.no_grad()
def test_sixteen_bits_need_larger_steps_and_every_row_is_charged(kind, estimator):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, seen = adapted(dtype=dtype), []
        model.register_forward_pre_hook(
            lambda m, a, k, seen=seen: seen.append(len(k["labels"])), with_kwargs=True
        )
        own = method(model, kind, estimator=estimator)
        found[dtype] = calibrate(model_forward(model), batch(dtype), own, seed=1)
        assert (
            found[dtype].rows == sum(seen) == 32 * 7 * len(estimator.signs) + 6 * estimator.baseline
        )
        assert found[dtype].scale in GRID
    assert found[torch.float32].scale < 2e-2
    assert found[torch.bfloat16].scale > found[torch.float32].scale
    assert found[torch.float32].signal_to_noise > 30
    assert 1 < found[torch.bfloat16].signal_to_noise < found[torch.float32].signal_to_noise


@torch.no_grad()
def test_the_loss_of_a_whole_batch_is_calibrated_with_few_queries():
    model, seen = adapted(), []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["labels"])), with_kwargs=True)
    found = calibrate(model_forward(model), batch(), method(model, "shared", objective=BatchLoss()))
    assert found.rows == sum(seen) == (8 * 7 + 1) * 6
    assert found.signal_to_noise > 30


@torch.no_grad()
def test_a_loss_in_steps_has_no_such_scale():
    model = nn.Linear(3, 2)
    inputs = {"features": 100 * torch.randn(5, 3, generator=generator()), "labels": torch.zeros(5)}
    objective = CallableObjective(lambda outputs, inputs: (outputs[:, 0] > outputs[:, 1]).float())
    found = calibrate(
        lambda inputs: (None, model(inputs["features"])),
        inputs,
        method(model, objective=objective),
        seed=3,
    )
    assert found.scale is None or found.signal_to_noise < 3


def trainer(tmp_path, **options):
    few = {
        "queries_per_sample": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
    }
    common = {
        "save_strategy": "no",
        "perturbation_scale": "auto",
        "report_to": "none",
        "use_cpu": True,
    }
    args = FlopsTrainingArguments(str(tmp_path), **{**few, **common, **options})
    return FlopsTrainer(adapted(), args, train_dataset=as_dataset(tiny_batch("vit", 8)))


def test_the_trainer_calibrates_once_and_a_resumed_run_keeps_the_scale(tmp_path):
    whole = trainer(tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    logs = [entry for entry in whole.state.log_history if "perturbation_scale" in entry]
    assert len(logs) == 2
    assert logs[0]["perturbation_scale"] == logs[1]["perturbation_scale"]
    assert logs[0]["perturbation_scale"] in GRID
    assert whole.ledger.rows == 32 * 7 + 4 + 2 * 16
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.ledger.rows == whole.ledger.rows
    assert resumed.session.tuning.found == whole.session.tuning.found
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(one.equal(two) for one, two in pairs)


def test_an_objective_without_such_a_scale_keeps_the_default_and_says_so(tmp_path, caplog):
    run = trainer(tmp_path, max_steps=1)
    run.objective = CallableObjective(lambda outputs, inputs: outputs.logits.argmax(-1) * 0.0)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert run.session.tuning.found == {
        "perturbation_scale": 1e-3,
        "changed_queries": 0.0,
    }
    assert "No query of the first batch changes the objective" in caplog.text


def on_embeddings(dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        configuration = LoraConfig(r=2, target_modules=["embed_tokens"], task_type=TASKS["llama"])
        return get_peft_model(tiny_model("llama").to(dtype), configuration)


@torch.no_grad()
def slope_error(scale):
    """Return the relative error of differences at a scale, without that of rounding."""
    model, inputs = on_embeddings(torch.float64).eval(), tiny_batch("llama", 8)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rng, errors, truths = generator(3), [], []

    def slope(noise, step):
        losses = []
        for length in (0, step):
            for parameter, value in zip(trained, noise, strict=True):
                parameter.add_(length * value)
            losses.append(float(model(**inputs).loss))
            for parameter, value in zip(trained, noise, strict=True):
                parameter.sub_(length * value)
        return (losses[1] - losses[0]) / step

    for _ in range(16):
        noise = [torch.randn(p.shape, generator=rng).sign().to(p.dtype) for p in trained]
        truths.append(slope(noise, 1e-6))
        errors.append(slope(noise, scale) - truths[-1])
    return float(torch.tensor(errors).norm() / torch.tensor(truths).norm())


def looked_at(folder, model, kind, **options):
    few = {"queries_per_sample": 4, "per_device_train_batch_size": 4, "max_steps": 2}
    quiet = {"save_strategy": "steps", "save_steps": 1, "report_to": "none", "use_cpu": True}
    args = FlopsTrainingArguments(str(folder), logging_steps=1, **{**few, **quiet, **options})
    return FlopsTrainer(model, args, train_dataset=as_dataset(tiny_batch(kind, 8)))


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers")
def test_where_noise_has_a_large_effect_the_default_is_not_taken(tmp_path, caplog):
    run = looked_at(tmp_path, on_embeddings(torch.bfloat16), "llama")
    run.train()
    scale = run.session.tuning.scale
    assert slope_error(1e-2) > 0.5
    assert slope_error(scale) < slope_error(1e-2) / 3
    assert f"perturbation_scale is {scale:.2g}: at the default, 0.01, curvature" in caplog.text
    assert run.state.log_history[0]["perturbation_scale"] == scale
    resumed = looked_at(tmp_path, on_embeddings(torch.bfloat16), "llama")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.session.tuning.scale == scale
    given = looked_at(tmp_path, on_embeddings(torch.bfloat16), "llama", perturbation_scale=1e-2)
    given.train()
    assert given.session.tuning.scale == 1e-2


def test_a_look_costs_few_rows(tmp_path):
    def rows(**options):
        run = looked_at(tmp_path, adapted(), "vit", max_steps=1, **options)
        run.train()
        assert run.session.tuning.scale == 1e-3
        assert run.ledger.rows == 16
        return run.ledger.all_rows

    assert rows() - rows(perturbation_scale=1e-3) <= 8 + 2 * 8
