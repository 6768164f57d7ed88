"""A trajectory log rebuilds the adapter bit for bit, survives a crash, and names what is wrong with
it.
"""

import filecmp
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_flops import ConfigurationError, FlopsTrainer, FlopsTrainingArguments, TrajectoryError
from hf_flops.allocators import OptimalWithZeros
from hf_flops.cli.main import main
from hf_flops.perturbations import (
    ActivationNoise,
    NoiseKeys,
    ParameterVector,
    RowwiseNoise,
    SharedNoise,
    streams,
)
from hf_flops.perturbations.replay import regenerate
from hf_flops.trainer.integrity import seal
from hf_flops.trajectory.base import check_base
from hf_flops.trajectory.framing import Appender, read
from hf_flops.trajectory.replay import Replay, replay
from hf_flops.trajectory.verify import verify
from tests.helpers.runs import adapted, data, flat, parameters
from tests.helpers.tiny import tiny_model, training_arguments

QUIET = {
    "max_examples": 5,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "queries_per_sample": 4,
        "max_steps": 2,
        "learning_rate": 0.02,
        "trajectory_log": True,
    }
    return training_arguments(folder, **{**defaults, **options})


def trained(
    folder, model=None, kind="vit", samples=12, resume=None, callbacks=(), options=None, **extra
):
    model = adapted(kind) if model is None else model
    args = arguments(folder, **(options or {}))
    trainer = FlopsTrainer(
        model, args, train_dataset=data(kind, samples), callbacks=list(callbacks), **extra
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(rebuilt, trainer):
    own = parameters(trainer)
    return list(rebuilt.parameters) == list(own) and all(
        torch.equal(value.detach(), own[name]) for name, value in rebuilt.parameters.items()
    )


# --- records in a file


@settings(max_examples=60, deadline=None)
@given(payloads=st.lists(st.binary(max_size=40), min_size=1, max_size=5), choice=st.data())
def test_a_damaged_record_is_named_and_an_unfinished_one_is_passed_over(
    tmp_path_factory, payloads, choice
):
    path = tmp_path_factory.mktemp("log") / "trajectory.log"
    file = Appender(path)
    for step, payload in enumerate(payloads):
        file.append(step, payload)
    file.close()
    content, records = path.read_bytes(), list(read(path))
    assert [(r.number, r.step, r.payload) for r in records] == [
        (i, i, p) for i, p in enumerate(payloads)
    ]

    place = choice.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= choice.draw(st.integers(1, 255))
    path.write_bytes(changed)
    damaged = next((record for record in records if record.offset <= place < record.end), None)
    named = (
        f"record {damaged.number} at byte {damaged.offset}, .*checksum"
        if damaged
        else "its mark, .* is damaged"
    )
    with pytest.raises(TrajectoryError, match=named):
        list(read(path))

    cut = choice.draw(st.integers(0, len(content) - 1))  # a crash while the file had this length
    path.write_bytes(content[:cut])
    assert list(read(path)) == [record for record in records if record.end <= cut]


def test_a_record_that_is_missing_is_noticed(tmp_path):
    file = Appender(tmp_path / "log")
    for step in range(3):
        file.append(step, b"abc")
    file.close()
    first, second, third = read(tmp_path / "log")
    content = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(content[: second.offset] + content[third.offset :])
    with pytest.raises(
        TrajectoryError,
        match=f"at byte {first.end}, after the one of step 0, record 1 should begin",
    ):
        list(read(tmp_path / "log"))


# --- an update again


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    size=st.integers(1, 5),
    shared=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_an_update_is_the_sum_of_coefficients_times_noise(rows, size, shared, seed):
    model = tiny_model("vit")
    vector = ParameterVector.of(model, {"classifier.weight", "classifier.bias"})
    perturbation = (
        SharedNoise(vector, "rademacher") if shared else RowwiseNoise(model, vector, "gaussian")
    )
    positions, queries = torch.arange(rows) % 3, torch.arange(rows) // 3
    coefficients = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    update = regenerate(perturbation, seed, 5, positions, queries, coefficients, queries, size)
    wanted = torch.zeros_like(update)
    for row in range(rows):
        keys = NoiseKeys.of(
            seed, 5, positions[row : row + 1], queries[row : row + 1], int(queries[row])
        )
        noise = perturbation.draw(keys)
        wanted += coefficients[row] * (noise if shared else noise[0])
    # Sums over Gaussian noise are float32's, in an order that depends on the processor; those over
    # signs are exact.
    torch.testing.assert_close(update, wanted, **({} if shared else {"rtol": 1e-6, "atol": 1e-6}))


# --- whole runs


@settings(**QUIET)
@given(
    optim=st.sampled_from(
        ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"]
    ),
    perturbation=st.sampled_from(["auto", "rowwise", "shared"]),
    noise=st.sampled_from(["rademacher", "gaussian", "rank_one"]),
    estimator=st.sampled_from(["one_sided", "antithetic"]),
    accumulation=st.sampled_from([1, 2]),
    clip=st.sampled_from([0.0, 0.01, 1.0]),
    decay=st.sampled_from([0.0, 0.1]),
    rows=st.sampled_from(["auto", 5]),
    parts=st.sampled_from(["both", "B_then_A"]),
    allocator=st.sampled_from(["optimal", "two_stage", "uniform"]),
    limit=st.sampled_from([None, 1.0]),
)
def test_a_replay_is_the_training_bit_for_bit(
    tmp_path,
    optim,
    perturbation,
    noise,
    estimator,
    accumulation,
    clip,
    decay,
    rows,
    parts,
    allocator,
    limit,
):
    options = {
        "optim": optim,
        "perturbation": perturbation,
        "noise": noise,
        "estimator": estimator,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": clip,
        "weight_decay": decay,
        "rows_per_forward": rows,
        "lora_parts": parts,
        "allocator": allocator,
        "delta_clip": limit,
        "queries_per_sample": 6,
    }
    trainer = trained(tmp_path, options=options)
    assert same(replay(tmp_path), trainer)


class Steep(OptimalWithZeros):
    """Favours some samples whatever the model says, and notes its counts."""

    def __init__(self):
        super().__init__(least_gain=1.0)
        self.seen = []

    def predict(self, features):
        return 4.0 ** torch.arange(len(features.losses), dtype=torch.float64)

    def counts(self, features, budget):
        self.seen.append(super().counts(features, budget))
        return self.seen[-1]


def test_samples_without_queries_are_replayed(tmp_path):
    options = {"queries_per_sample": 2, "gradient_accumulation_steps": 2}
    trainer = trained(tmp_path, options=options, allocator=(allocator := Steep()))
    assert all((counts == 0).any() for counts in allocator.seen)
    assert same(replay(tmp_path), trainer)
    assert trainer.ledger.rows == 2 * sum(len(counts) for counts in allocator.seen)


def frozen_a():
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    return model


def prompt(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(
            tiny_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )


def head_only():
    model = tiny_model("vit").requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


@pytest.mark.parametrize("case", ["lora_B", "prompt", "prefix", "half", "head"])
def test_what_is_saved_is_what_training_saved_byte_for_byte(case, tmp_path):
    model, kind = {
        "lora_B": lambda: (frozen_a(), "vit"),
        "prompt": lambda: (prompt(PromptTuningConfig), "llama"),
        "prefix": lambda: (prompt(PrefixTuningConfig), "llama"),
        "half": lambda: (adapted(model=tiny_model("vit").bfloat16()), "vit"),
        "head": lambda: (head_only(), "vit"),
    }[case]()
    trainer = trained(tmp_path / "run", model, kind)
    trainer.save_model(str(tmp_path / "saved"))
    rebuilt = replay(tmp_path / "run", tmp_path / "rebuilt")
    assert same(rebuilt, trainer)
    if case == "head":  # no adapter: the trainable tensors by name
        assert load_file(tmp_path / "rebuilt" / "trainable.safetensors").keys() == {
            "classifier.weight",
            "classifier.bias",
        }
    else:
        assert filecmp.cmp(
            *(tmp_path / f / "adapter_model.safetensors" for f in ("rebuilt", "saved")),
            shallow=False,
        )
        configs = [
            LoraConfig.from_json_file(tmp_path / f / "adapter_config.json")
            for f in ("rebuilt", "saved")
        ]
        # PEFT writes a set, in any order
        targets = [set(c.pop("target_modules", None) or ()) for c in configs]
        assert configs[0] == configs[1]
        assert targets[0] == targets[1]


def test_rows_that_were_dropped_are_replayed(tmp_path):
    def sometimes(outputs, inputs):
        losses = outputs.logits.square().sum(-1)
        return torch.where(losses > losses.median(), torch.nan, losses)

    trainer = trained(
        tmp_path, objective=sometimes, options={"allocator": "uniform", "estimator": "antithetic"}
    )
    assert trainer.ledger.last_step.metrics["dropped_rows"] > 0
    assert same(replay(tmp_path), trainer)


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = trained(tmp_path, options=options)
    reached = {step: flat_of(replay(tmp_path, step=step)) for step in range(1, 6)}
    log = tmp_path / "trajectory.log"
    log.write_bytes(log.read_bytes()[:-100])  # killed within the record of step 5
    resumed = trained(tmp_path, resume=str(tmp_path / "checkpoint-2"), options=options)
    assert torch.equal(flat(resumed), flat(whole))
    steps = [record.step for record in read(log)]
    assert steps == [0, 0, 1, 2, 2, 3, 4, 5]  # the start, two sessions, five steps
    assert all(
        torch.equal(flat_of(replay(tmp_path, step=step)), wanted)
        for step, wanted in reached.items()
    )


def flat_of(rebuilt):
    return torch.cat([value.detach().flatten() for value in rebuilt.parameters.values()])


def test_a_run_cannot_go_on_without_its_log_or_from_another_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trained(tmp_path, options=options)
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(
        ConfigurationError, match=r"cannot go on after step 2, because .* is not there"
    ):
        trained(tmp_path / "other", resume=str(checkpoint), options=options)
    change(checkpoint, 0)
    seal(tmp_path / "checkpoint-2")
    with pytest.raises(ConfigurationError, match=r"the checkpoint is not what .* led to"):
        trained(tmp_path, resume=str(checkpoint), options=options)


def test_a_step_that_the_budget_refuses_is_not_replayed(tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_queries": 160, "max_steps": 20}
    trainer = trained(tmp_path, options=options)
    assert trainer.state.global_step < 20
    assert same(replay(tmp_path), trainer)


# --- what is wrong is named


def change(folder, index, name="adapter_model.safetensors"):
    """Change one number of a tensor of a checkpoint; returns the tensor's name."""
    tensors = load_file(folder / name)
    key = sorted(tensors)[index]
    tensors[key].view(-1)[0] += 0.5
    save_file(tensors, folder / name, {"format": "pt"})
    return key


def test_verify_names_the_step_and_the_tensor(tmp_path, capsys):
    trained(tmp_path, options={"save_strategy": "steps", "save_steps": 1, "max_steps": 3})
    assert verify(tmp_path, tmp_path / "checkpoint-2").right
    assert main(["replay", str(tmp_path), "--verify", str(tmp_path / "checkpoint-2")]) == 0
    key = change(tmp_path / "checkpoint-2", 3)
    verdict = verify(tmp_path, tmp_path / "checkpoint-2")
    assert [(d.name, d.numbers, d.step) for d in verdict.departures] == [(key, 1, None)]
    assert main(["replay", str(tmp_path), "--verify", str(tmp_path / "checkpoint-2")]) == 1
    assert f"departs from the log at step 2:\n  {key}: 1 of" in capsys.readouterr().out
    # A checkpoint of another step: every tensor is said to be of that step.
    verdict = verify(tmp_path, tmp_path / "checkpoint-1", step=3)
    assert verdict.departures
    assert {d.step for d in verdict.departures} == {1}


def test_bad_input_is_refused_in_a_sentence(tmp_path, capsys):
    trained(tmp_path, options={"save_strategy": "steps", "save_steps": 2})
    log, out, saved = str(tmp_path), tmp_path / "out", tmp_path / "checkpoint-2"

    def refused(*options):
        assert main(["replay", log, *options]) == 1
        said = capsys.readouterr().err
        assert said.startswith("hf-flops replay: ")
        assert said.endswith(".\n")
        assert said.count("\n") == 1
        return said

    assert "trajectory.log has no step -1" in refused("--output", str(out), "--step", "-1")
    assert "trajectory.log has no step -1" in refused("--verify", str(saved), "--step", "-1")
    assert "The base /nowhere cannot be loaded as a ViTForImage" in refused(
        "--output", str(out), "--base", "/nowhere"
    )
    assert not out.exists()
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "in_it"):
        assert f"cannot be written to {place}" in refused("--output", str(place))
    for name, content in (
        ("trainer_state.json", ""),
        ("trainer_state.json", "{}"),
        ("trainer_state.json", '{"global_step": null}'),
        ("adapter_model.safetensors", (saved / "adapter_model.safetensors").read_bytes()[:-1]),
    ):
        damaged = tmp_path / "damaged"
        shutil.copytree(saved, damaged, dirs_exist_ok=True)
        (damaged / name).write_bytes(content.encode() if isinstance(content, str) else content)
        assert f"{damaged / name} is damaged" in refused("--verify", str(damaged))


def test_the_adapter_before_any_step_is_verified(tmp_path, capsys):
    trained(tmp_path / "run")
    replay(tmp_path / "run", tmp_path / "start", step=0)
    assert (
        main(["replay", str(tmp_path / "run"), "--verify", str(tmp_path / "start"), "--step", "0"])
        == 0
    )
    change(tmp_path / "start", 0)
    assert (
        main(["replay", str(tmp_path / "run"), "--verify", str(tmp_path / "start"), "--step", "0"])
        == 1
    )
    assert "departs from the log at step 0" in capsys.readouterr().out


def test_a_flipped_byte_of_a_run_is_named_by_its_record(tmp_path, capsys):
    trained(tmp_path)
    log = tmp_path / "trajectory.log"
    content, record = bytearray(log.read_bytes()), list(read(log))[3]
    content[record.end - 40] ^= 4
    log.write_bytes(content)
    assert main(["replay", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    said = (
        f"record 3 at byte {record.offset}, after the one of step 1, does not have its checksum. "
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert replay(tmp_path, step=1).step == 1  # what lies before it is whole


def test_what_else_moves_the_adapter_is_noticed(tmp_path):
    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.base_model.model.classifier.modules_to_save.default.bias.data += 1

    trained(
        tmp_path,
        callbacks=[Meddler()],
        options={"save_strategy": "steps", "save_steps": 1, "max_steps": 3},
    )
    with pytest.raises(
        TrajectoryError, match=r"departs from the training at step 3, in .*classifier"
    ):
        replay(tmp_path)
    verdict = verify(tmp_path, tmp_path / "checkpoint-3")
    assert verdict.first[0] == 3
    assert verify(tmp_path, tmp_path / "checkpoint-1").right


def test_another_base_is_noticed(tmp_path):
    trained(tmp_path)
    tiny_model("vit").save_pretrained(tmp_path / "base")
    says = Replay(tmp_path).says
    assert check_base(says, tmp_path / "base") > 30
    tiny_model("vit", seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(TrajectoryError, match="is not the base of the run"):
        check_base(says, tmp_path / "base")


@pytest.mark.parametrize(
    "option",
    [
        {"closed_form_head": "solve"},
        {"control_variate": "logit_jacobian"},
        {"perturbation": "activation"},
    ],
)
def test_what_cannot_be_replayed_is_refused_when_it_is_asked_for(option, tmp_path):
    with pytest.raises(ConfigurationError, match=f"{next(iter(option))}=.* cannot be replayed"):
        arguments(tmp_path, **option)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(FlopsTrainingArguments, "world_size", 2)
    with pytest.raises(ConfigurationError, match="needs all numbers of a step in one process"):
        arguments(tmp_path)


def test_it_is_off_where_nobody_asked_for_it(tmp_path, caplog):
    args = arguments(tmp_path)
    assert (args.closed_form_head, args.control_variate) == ("none", "none")
    assert "closed_form_head, control_variate" in caplog.text
    assert arguments(tmp_path, trajectory_log=False).closed_form_head == "solve"


def test_optimizers_and_perturbations_that_cannot_be_replayed_are_refused(tmp_path):
    class Own(torch.optim.SGD):
        pass

    model = adapted()
    with pytest.raises(
        ConfigurationError, match=r"cannot replay the optimizer .*Own: use one of torch.optim"
    ):
        trained(
            tmp_path,
            model,
            optimizers=(Own([p for p in model.parameters() if p.requires_grad], lr=0.1), None),
        )
    model = head_only()
    outputs = ActivationNoise(model, ParameterVector.of(model), "rademacher")
    with pytest.raises(ConfigurationError, match="cannot replay ActivationNoise"):
        trained(tmp_path, model, perturbation=outputs)


def test_no_log_is_written_unless_asked_for(tmp_path):
    trained(tmp_path, options={"trajectory_log": False})
    assert not (tmp_path / "trajectory.log").exists()
    with pytest.raises(TrajectoryError, match="There is no trajectory log at"):
        replay(tmp_path)
    shutil.rmtree(tmp_path)


def test_a_log_of_other_noise_is_not_replayed(tmp_path, monkeypatch):
    trained(tmp_path)
    kept = streams._signs
    # as another version of the library might draw them
    monkeypatch.setattr(streams, "_signs", lambda device: -kept(device))
    with pytest.raises(
        TrajectoryError, match=r"where the same seed draws other noise \(torch .*replay it there"
    ):
        replay(tmp_path)
    monkeypatch.setattr(streams, "_signs", kept)
    assert replay(tmp_path).step == 2
