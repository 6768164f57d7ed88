"""Nothing is lost and nothing is let in: damaged checkpoints, renamed folders, two runs in one
folder, full disks.
"""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, TaskType, get_peft_model
from torch.utils.data import IterableDataset

from hf_flops import (
    ConfigurationError,
    FlopsTrainer,
    StorageError,
)
from hf_flops.allocators import ALLOCATORS
from hf_flops.trainer.checkpoint_state import STATE_FILE, load_state, save_state
from hf_flops.trainer.checkpoints import last_checkpoint
from hf_flops.trainer.integrity import MANIFEST, damage, seal
from hf_flops.trainer.run_lock import LOCK, locked
from tests.helpers.ranks import played
from tests.helpers.runs import adapted, data, flat, logged, short
from tests.helpers.tiny import as_dataset, tiny_batch, tiny_model
from tests.helpers.worker import build

ROOT = Path(__file__).resolve().parent.parent.parent
OPTIONS = {"max_steps": 4, "samples": 4, "size": 14, "logging_steps": 1}
AUTO = {"rows_per_forward": "auto", "allocator": "optimal"}
EVERY = {"save_strategy": "steps", "save_steps": 1}


def run(folder, resume=None, **options):
    trainer = build({**OPTIONS, "output_dir": str(folder), **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# --- integrity


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run(folder, max_steps=1, **AUTO, **EVERY)
    return folder / "checkpoint-1"


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(saved, tmp_path):
    rng, folder = random.Random(0), tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    assert damage(folder) is None
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        size = len(content)
        places = {0, 7, size // 4, size // 2, 3 * size // 4, size - 1} | {
            rng.randrange(size) for _ in range(20)
        }
        for place in sorted(places & set(range(size))):
            changed = bytearray(content)
            changed[place] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            reason = damage(folder)
            assert reason is not None, (path.name, place)
            assert path.name in reason or path.name == MANIFEST
        path.write_bytes(content)
    assert damage(folder) is None


def test_a_flipped_bit_of_the_adapter_is_not_trained_on(saved, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"adapter_model\.safetensors does not have"):
        run(tmp_path, str(folder))
    with pytest.raises(ConfigurationError, match="Remove them to start anew"):
        last_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, STATE_FILE])
def test_a_checkpoint_without_a_file_of_ours_is_refused(name, saved, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    (folder / name).unlink()
    with pytest.raises(ConfigurationError, match=f"{name} is missing"):
        run(tmp_path, str(folder))


def test_a_stock_trainers_checkpoint_starts_our_parts_afresh_and_says_so(saved, tmp_path, caplog):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    for name in (MANIFEST, STATE_FILE, "flops_state.safetensors"):
        (folder / name).unlink()
    run(tmp_path, str(folder), max_steps=2)
    assert f"holds no {STATE_FILE}: these start afresh: ledger," in caplog.text


def test_a_missing_part_is_told(tmp_path, caplog):
    save_state(str(tmp_path), {})
    load_state(str(tmp_path), {"allocator": ALLOCATORS["optimal"]()})
    assert "has no state of the allocator, which starts afresh" in caplog.text


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("ledger", "rows"), -1),
        (("ledger", "samples"), [[1, 2]]),
        (("tuning", "chunks", "size"), 0),
        (("tuning", "chunks", "ceiling"), "many"),
        (("allocator", "history", "pairs"), 0),
        (("allocator", "history", "past"), [[0, -1.0, 1.0]]),
        (("allocator", "regression", "seen"), 0.0),
        (("allocator", "regression", "inner"), [[-9, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (("allocator", "calibration", "ratios"), [1.0]),
        (("allocator", "gain"), None),
        (("noise guard", "numbers"), [0, 0]),
        (("noise guard", "multiplier"), float("nan")),
        (("head", "mean"), "softmin"),
        (("stream", "epoch"), 0.5),
        (("batch", "samples"), 0),
    ],
)
def test_a_value_out_of_range_is_named_by_file_and_part(keys, value, saved, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    state = json.loads((folder / STATE_FILE).read_text())
    inner = state
    for key in keys[:-1]:
        inner = inner[key]
    assert keys[-1] in inner
    inner[keys[-1]] = value
    (folder / STATE_FILE).write_text(json.dumps(state))
    seal(folder)  # as a forger would
    expected = f"{STATE_FILE} is damaged in the state of the {keys[0]}: "
    with pytest.raises(ConfigurationError, match=expected):
        run(tmp_path, str(folder), **AUTO)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 is no file of this kind"])
def test_a_forged_file_of_the_stock_trainers_is_refused(name, content, saved, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    (folder / name).write_bytes(content)
    seal(folder)
    with pytest.raises(ConfigurationError, match="checkpoint-1 cannot be loaded: "):
        run(tmp_path, str(folder))


def test_a_forged_best_model_is_refused(tmp_path):
    judged(tmp_path, max_steps=2)
    folder = tmp_path / "checkpoint-1"
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    seal(folder)
    with pytest.raises(ConfigurationError, match="checkpoint-1 cannot be loaded: "):
        judged(tmp_path, str(tmp_path / "checkpoint-2"), max_steps=3)


# --- where a run lives


def judged(folder, resume=None, **options):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = build({**OPTIONS, **EVERY, **best, "output_dir": str(folder), **options})
    stock = trainer._determine_best_metric

    def determine(metrics, trial):
        return stock({**metrics, "eval_loss": float(trainer.state.global_step)}, trial)

    trainer._determine_best_metric = determine
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("relative", [False, True])
def test_a_renamed_run_keeps_and_ends_on_its_best_model(relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = (Path("a"), Path("./b")) if relative else (tmp_path / "a", tmp_path / "b")
    judged(before, max_steps=2, save_total_limit=2)
    before.rename(after)
    trainer = judged(after, resume=True, save_total_limit=2)
    assert Path(trainer.state.best_model_checkpoint) == after / "checkpoint-1"
    assert sorted(os.listdir(after)) == ["checkpoint-1", "checkpoint-4"]
    assert flat(trainer).equal(flat(run(tmp_path / "best", max_steps=1)))


def test_a_best_model_that_is_gone_is_forgotten(tmp_path):
    judged(tmp_path / "a", max_steps=2)
    shutil.rmtree(tmp_path / "a" / "checkpoint-1")
    trainer = judged(tmp_path / "a", resume=True, max_steps=3)
    assert trainer.state.best_model_checkpoint is None


HOLDER = """
import sys, time
from hf_flops.distributed.collectives import ProcessGroup
from hf_flops.trainer.run_lock import locked
with locked(sys.argv[1], ProcessGroup()):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_and_a_dead_ones_lock(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigurationError, match=f"{tmp_path}: process {holder.pid} on "):
        run(tmp_path, max_steps=1)
    assert os.listdir(tmp_path) == [LOCK]
    holder.kill()
    holder.communicate()
    run(tmp_path, max_steps=1, **EVERY)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_processes_of_one_run_share_its_lock_and_its_refusal(tmp_path):
    def act(group):
        with locked(str(tmp_path / "run"), group):
            group.all_gather_object(None)
            there = (tmp_path / "run" / LOCK).is_file()
            group.all_gather_object(None)
        return there

    assert played(2, act) == [True, True]
    (tmp_path / "file").touch()

    def refused(group):
        with pytest.raises(StorageError, match="nothing was changed"):
            locked(str(tmp_path / "file"), group).__enter__()
        return True

    assert played(2, refused) == [True, True]


# --- equality of a resumed run


@pytest.mark.parametrize("kind", ["p-tuning", "prefix projection"])
def test_a_prompt_encoder_resumes_exactly(kind, tmp_path):
    def build_one(folder, **options):
        common = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 2}
        configuration = (
            PromptEncoderConfig(**common, encoder_hidden_size=8)
            if kind == "p-tuning"
            else PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=8)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(tiny_model("llama"), configuration)
        args = short(folder, max_steps=4, learning_rate=0.05, optim="adamw_torch", **options)
        return FlopsTrainer(model, args, train_dataset=data("llama", 8))

    whole = build_one(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = build_one(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert flat(resumed).equal(flat(whole))
    folder = tmp_path / "checkpoint-2"
    for name in (MANIFEST, STATE_FILE, "flops_state.safetensors"):
        (folder / name).unlink()
    with pytest.raises(ConfigurationError, match="holds the prompts that these trained tensors"):
        build_one(tmp_path).train(resume_from_checkpoint=str(folder))


class Stream(IterableDataset):
    """Eight samples, in another order in each epoch, and no length."""

    def __init__(self):
        self.rows, self.epoch = data(samples=8), 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in random.Random(self.epoch).sample(range(8), 8):
            yield {**self.rows[i], "sample_id": i}


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_stream_shorter_than_the_run_resumes_exactly(step, tmp_path):
    def build_one(**options):
        args = short(tmp_path, max_steps=7, learning_rate=0.01, **options)
        return FlopsTrainer(adapted(), args, train_dataset=Stream())

    whole = build_one(save_strategy="steps", save_steps=1)
    whole.train()
    resumed = build_one()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == whole.state.global_step == 7
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert flat(resumed).equal(flat(whole))


# --- resources


def test_a_full_disk_is_told_with_the_path_and_what_is_left(tmp_path, monkeypatch):
    stock = torch.save

    def full(value, path, *args, **kwargs):
        if str(path).endswith("checkpoint-2/optimizer.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        stock(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(StorageError) as raised:
            run(tmp_path, **EVERY)
    assert f"{tmp_path}/checkpoint-2 could not be written: [Errno 28] No space" in str(raised.value)
    assert "Nothing that was saved before is lost" in str(raised.value)
    resumed = run(tmp_path, resume=True)
    assert flat(resumed).equal(flat(run(tmp_path / "alone")))


def test_a_folder_that_cannot_be_written_is_told_before_the_run(tmp_path, monkeypatch):
    trainer = build({**OPTIONS, "output_dir": str(tmp_path / "run")})
    stock = os.open

    def read_only(path, flags, *args, **kwargs):
        if str(path).endswith(LOCK):
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return stock(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(StorageError, match=r"run cannot be written .*has not begun"):
        trainer.train()


def test_a_token_is_not_written(tmp_path):
    token = "hf_" + 30 * "x"
    trainer = run(tmp_path, max_steps=1, hub_token=token, **EVERY)
    trainer.save_model()
    assert trainer.args.hub_token == token
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        path = folder / "training_args.bin"
        assert path.stat().st_mode & 0o077 == 0
        for file in folder.glob("*"):
            assert file.is_dir() or token.encode() not in file.read_bytes()
    args = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert args.hub_token is None
    assert pickle.dumps(trainer.args)


class Dying(torch.utils.data.Dataset):
    """A data set whose loader's worker is killed."""

    def __init__(self):
        self.rows = as_dataset(tiny_batch("vit", 8))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index]


def test_a_loader_worker_that_dies_is_named(tmp_path):
    code = """
        from hf_flops import FlopsTrainer, ProcessError
        from tests.helpers.runs import adapted, short
        from tests.trainer.test_integrity import Dying
        args = short({folder!r}, max_steps=4, dataloader_num_workers=1)
        try:
            FlopsTrainer(adapted(), args, train_dataset=Dying()).train()
        except ProcessError as error:
            print(error)
    """
    script = textwrap.dedent(code).format(folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "a process that loads its data has ended: DataLoader worker (pid" in done.stdout
    assert "resume_from_checkpoint=True" in done.stdout
