"""Checkpoints: whole or not there, exact to resume from, and saved when the run is told to
leave.
"""

import json
import os
import shutil
import signal
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from hf_flops import ConfigurationError
from hf_flops.allocators import ALLOCATORS, Optimal
from hf_flops.trainer.checkpoint_state import STATE_FILE, TENSOR_FILE, load_state, save_state
from hf_flops.trainer.checkpoints import MANIFEST, UNFINISHED, is_whole, last_checkpoint
from tests.helpers.worker import build

# a step of two samples ends an epoch
OPTIONS = {"max_steps": 5, "samples": 4, "size": 14, "logging_steps": 1}


def flat(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def run(folder, act=None, resume=None, **options):
    trainer = build({**OPTIONS, "output_dir": str(folder), **options}, act)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def some(allocators):
    return [
        name if name in allocators else pytest.param(name, marks=pytest.mark.slow)
        for name in ALLOCATORS
    ]


@pytest.mark.parametrize("allocator", some(["two_stage", "gaussian"]))
def test_every_allocator_resumes_in_the_middle_of_an_epoch(allocator, tmp_path):
    whole = run(
        tmp_path,
        allocator=allocator,
        save_strategy="steps",
        save_steps=2,
        gradient_accumulation_steps=2,
    )
    again = run(
        tmp_path,
        None,
        str(tmp_path / "checkpoint-2"),
        allocator=allocator,
        gradient_accumulation_steps=2,
    )
    assert flat(again).equal(flat(whole))
    assert again.session.allocator.state_dict() == whole.session.allocator.state_dict()


def test_sigterm_saves_and_leaves_and_the_resumed_run_is_the_undisturbed_one(tmp_path):
    def told(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run(tmp_path / "told", told)
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert os.listdir(tmp_path / "told") == ["checkpoint-3"]
    assert flat(run(tmp_path / "told", None, True)).equal(flat(run(tmp_path / "alone")))


def test_a_checkpoint_appears_when_it_is_whole(tmp_path):
    trainer = build(
        {**OPTIONS, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    )
    stock, fail = trainer._save_rng_state, [4]

    def save_rng_state(folder):
        if trainer.state.global_step in fail:
            raise OSError("the disk is full")
        stock(folder)

    trainer._save_rng_state = save_rng_state
    with pytest.raises(OSError, match="full"):
        trainer.train()
    assert sorted(os.listdir(tmp_path)) == [UNFINISHED, "checkpoint-2"]
    assert (
        get_last_checkpoint(tmp_path) == last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    )
    fail.clear()
    trainer.train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert flat(trainer).equal(flat(run(tmp_path / "alone")))


def test_a_checkpoint_that_lost_a_file_or_its_end_is_passed_over(tmp_path, caplog):
    run(tmp_path, save_strategy="steps", save_steps=1)
    folders = [tmp_path / f"checkpoint-{step}" for step in range(1, 6)]
    assert all(map(is_whole, folders))
    (folders[4] / "optimizer.pt").unlink()
    (folders[3] / "optimizer.pt").write_bytes(b"PK")
    (folders[2] / "trainer_state.json").unlink()
    folders[1].rename(tmp_path / "keep-2")
    assert last_checkpoint(tmp_path) == str(folders[0])
    assert "checkpoint-5 is not a whole checkpoint" in caplog.text
    with pytest.raises(
        ConfigurationError, match=r"checkpoint-4' is not a whole checkpoint: optimizer\.pt has 2"
    ):
        run(tmp_path, None, str(folders[3]))
    shutil.rmtree(folders[0])
    with pytest.raises(ConfigurationError, match="holds no whole checkpoint"):
        run(tmp_path, None, True)


def test_what_cannot_be_read_of_a_checkpoint_is_named_or_passed_over(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    for content in ("", "[]", '{"optimizer.pt":'):
        (second / MANIFEST).write_text(content)
        assert not is_whole(second)
    assert last_checkpoint(tmp_path) == str(first)
    with pytest.raises(
        ConfigurationError, match=rf"checkpoint-2' is not a whole checkpoint: {MANIFEST} is damaged"
    ):
        run(tmp_path, None, str(second))
    (first / STATE_FILE).write_text("x" * (first / STATE_FILE).stat().st_size)
    with pytest.raises(
        ConfigurationError, match=f"checkpoint-1 is not a whole checkpoint: {STATE_FILE} does not"
    ):
        run(tmp_path, None, True)
    for no_checkpoint in (tmp_path, tmp_path / "checkpoint-77"):
        with pytest.raises(
            ConfigurationError,
            match=f"'{no_checkpoint}' holds no trainer_state.json: give the folder of a",
        ):
            run(tmp_path, None, str(no_checkpoint))


def test_a_replaced_checkpoint_is_the_old_one_or_the_new_one(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=5)
    (tmp_path / UNFINISHED).mkdir()
    # killed before the new one's turn
    (tmp_path / "checkpoint-5").rename(tmp_path / UNFINISHED / "checkpoint-5.old")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "mark").touch()
    run(tmp_path, save_strategy="steps", save_steps=5)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-5"]
    assert "mark" not in os.listdir(tmp_path / "checkpoint-5")


def test_the_best_model_is_known_by_where_it_is(tmp_path):
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = run(tmp_path, load_best_model_at_end=True, save_total_limit=2, **every)
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert {os.path.basename(best), "checkpoint-5"} <= set(os.listdir(tmp_path))
    assert len(os.listdir(tmp_path)) == 2
    assert (
        json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())[
            "best_model_checkpoint"
        ]
        == best
    )
    saved = load_file(f"{best}/adapter_model.safetensors")
    mine = {name: p for name, p in trainer.model.named_parameters() if "lora_B" in name}
    assert all(p.equal(saved[name.replace(".default", "")]) for name, p in mine.items())


@pytest.mark.parametrize(("output_dir", "kept"), [("./out", 1), ("out/.", 2), ("a//b", 2)])
def test_the_best_model_is_found_however_the_folder_is_spelled(
    output_dir, kept, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    after = []
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
    }
    # the first is the best
    options |= {"metric_for_best_model": "epoch", "greater_is_better": False}
    trainer = build(
        {
            **OPTIONS,
            **options,
            "output_dir": output_dir,
            "load_best_model_at_end": True,
            "save_total_limit": kept,
        }
    )
    monkeypatch.setattr(trainer, "evaluate", lambda *args, **kwargs: judged(trainer, after))
    trainer.train()
    assert os.path.samefile(
        trainer.state.best_model_checkpoint, os.path.join(output_dir, "checkpoint-1")
    )
    assert sorted(os.listdir(output_dir)) == ["checkpoint-1", "checkpoint-3"][:kept]
    assert flat(trainer).equal(after[0])
    assert not flat(trainer).equal(after[-1])


def judged(trainer, after):
    after.append(flat(trainer).clone())
    metrics = {"eval_epoch": float(trainer.state.global_step)}
    trainer.control = trainer.callback_handler.on_evaluate(
        trainer.args, trainer.state, trainer.control, metrics
    )
    return metrics


def test_generators_come_back_on_another_number_of_processes(tmp_path):
    trainer = run(tmp_path, save_strategy="steps", save_steps=5)
    folder = tmp_path / "checkpoint-5"
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    torch.manual_seed(7)
    trainer._load_rng_state(str(folder))
    state = torch.load(folder / "rng_state_0.pth", weights_only=False)["cpu"]
    assert torch.get_rng_state().equal(state)


def test_another_batch_is_noticed(tmp_path, caplog):
    run(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    run(tmp_path, None, True, max_steps=3, samples=2)
    assert "4 samples in an optimizer step, this one has 2" in caplog.text


@pytest.mark.parametrize(
    ("before", "now"), [("uniform", "optimal"), ("optimal", "bernoulli"), ("gaussian", "two_stage")]
)
def test_another_allocator_than_the_checkpoints_starts_afresh(before, now, tmp_path, caplog):
    save_state(str(tmp_path), {"image allocator": ALLOCATORS[before]()})
    part = ALLOCATORS[now]()
    start = part.state_dict()
    load_state(str(tmp_path), {"image allocator": part})
    assert part.state_dict() == start
    old, new = ALLOCATORS[before].__name__, ALLOCATORS[now].__name__
    assert (
        f"The image allocator of the checkpoint's run was {old}, this one's is {new} and starts "
        "afresh" in caplog.text
    )


class Remembers:
    """A part of a run whose state is whatever it is given."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.integers(0, 3).map(lambda n: torch.arange(n) / 3),
)
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


def equal(one, two):
    if torch.is_tensor(one):
        return torch.is_tensor(two) and one.equal(two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(
            equal(value, two[name]) for name, value in one.items()
        )
    if isinstance(one, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


@given(nested, nested)
def test_any_nested_state_comes_back(first, second):
    with tempfile.TemporaryDirectory() as folder:
        save_state(folder, {"first": Remembers(first), "second": Remembers(second)})
        found = {"first": Remembers(), "second": Remembers()}
        load_state(folder, found)
    assert equal(first, found["first"].state)
    assert equal(second, found["second"].state)


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no tensors")]
)
def test_lost_or_damaged_tensors_are_named(damage, tmp_path):
    save_state(str(tmp_path), {"part": Remembers({"weight": torch.ones(2)})})
    damage(tmp_path / TENSOR_FILE)
    with pytest.raises(ConfigurationError, match=TENSOR_FILE):
        load_state(str(tmp_path), {"part": Remembers()})


def test_a_checkpoint_of_an_older_version_says_no_classes(tmp_path, caplog):
    save_state(str(tmp_path), {"allocator": Optimal()})
    state = json.loads((tmp_path / STATE_FILE).read_text())
    assert state.pop("kinds")["allocator"] == "Optimal"
    state["allocator"]["calibration"]["steps"] *= 2
    (tmp_path / STATE_FILE).write_text(json.dumps(state))
    load_state(str(tmp_path), {"allocator": (optimal := Optimal())})
    assert optimal.state_dict() == state["allocator"]
    assert not caplog.text


def test_a_manifest_names_every_file(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=5)
    names = set(os.listdir(tmp_path / "checkpoint-5"))
    assert set(json.loads((tmp_path / "checkpoint-5" / MANIFEST).read_text())) == names - {MANIFEST}
