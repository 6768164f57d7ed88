"""Runs that a launcher starts: several processes go the way of one, resume from each other's
checkpoints, and never hang.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_flops.distributed.exchange import REDUCE
from tests.helpers.worker import build

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = str(ROOT / "tests" / "helpers" / "worker.py")
# In float64 and with SGD: rounding differs with the number of rows per forward and the processor,
# and Adam makes a whole step of the last bit of a gradient near zero.
EXACT = {"double": True, "optim": "sgd"}
# the last batch of an epoch has 6 samples
BASE = {"max_steps": 6, "samples": 8, "size": 30, "logging_steps": 1, **EXACT}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--main_process_port",
    "0",
    "--num_machines",
    "1",
]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"]

MULTI = [*ACCELERATE[:-1], "--multi_gpu", ACCELERATE[-1]]


def launch(launcher, runs, *, timeout=300, environment=None):
    """Start a launcher on the runs that `tests/helpers/worker.py` is to make one after the
    other.
    """
    own = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    command = [*launcher, WORKER, json.dumps(runs)]
    return subprocess.run(
        command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def alone(folder, resume=None, **options):
    trainer = build({**BASE, "output_dir": str(folder), **options})
    trainer.train(resume_from_checkpoint=resume)
    parameters = {
        name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    return parameters, [entry for entry in trainer.state.log_history if "loss" in entry]


def same(folder, name, wanted):
    """Compare the parameters and the losses that a launched run has left with those of a run of one
    process.
    """
    parameters, log = (
        load_file(folder / f"{name}.safetensors"),
        json.loads((folder / f"{name}.json").read_text()),
    )
    entries = [entry for entry in log if "loss" in entry]
    for key, value in wanted[0].items():
        torch.testing.assert_close(parameters[key], value, rtol=0, atol=1e-5)
    for entry, other in zip(entries, wanted[1][-len(entries) :], strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert entry["rows"] == other["rows"]
    return entries


def test_two_processes_go_the_way_of_one_and_one_goes_on_from_their_checkpoint(tmp_path):
    every = {"save_strategy": "steps", "save_steps": 2}
    search = {r: {"learning_rate_search": r == "gradient"} for r in REDUCE}
    runs = [
        {**BASE, **every, **search[r], "output_dir": str(tmp_path / r), "reduce": r, "name": r}
        for r in REDUCE
    ]
    whole = {"accelerator_config": {"split_batches": True}, "name": "split"}
    runs.append({**BASE, **every, **whole, "output_dir": str(tmp_path / "split")})
    done = launch([*TORCHRUN, "2"], runs)
    assert done.returncode == 0, done.stderr
    wanted = alone(tmp_path / "alone")
    same(tmp_path / "split", "split", wanted)
    again = alone(tmp_path / "split", resume=str(tmp_path / "split" / "checkpoint-2"))[0]
    torch.testing.assert_close(again, wanted[0], rtol=0, atol=1e-5)
    for reduce in REDUCE:
        folder, wanted = (
            tmp_path / reduce,
            alone(tmp_path / "alone", reduce=reduce, **search[reduce]),
        )
        entries = same(folder, reduce, wanted)
        assert all(entry["sent_bytes"] > 0 for entry in entries)
        again = build({**BASE, **search[reduce], "output_dir": str(folder), "reduce": reduce})
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        for name, value in wanted[0].items():
            torch.testing.assert_close(
                again.model.get_parameter(name).detach(), value, rtol=0, atol=1e-5
            )


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["base", "all"])
def test_two_processes_that_share_a_model_go_the_way_of_one_that_has_it_whole(spread, tmp_path):
    """The 15 rows of the last batch of an epoch take one process a forward, the other two."""
    run = {**BASE, "kind": "llama", "rows_per_forward": 7, "samples": 6, "size": 29}
    run["late_expansion"] = spread == "all"
    saved = {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path)}
    soft = {**run, "prompt": True, "max_steps": 2}
    prompts = {**soft, "output_dir": str(tmp_path), "name": "prompt"}
    shared = [{**one, "sharded": spread} for one in ({**run, **saved}, prompts)]
    done = launch([*TORCHRUN, "2"], shared)
    assert done.returncode == 0, done.stderr
    wanted = alone(tmp_path / "alone", **run)
    assert len(same(tmp_path, "final", wanted)) == BASE["max_steps"]
    assert len(same(tmp_path, "prompt", alone(tmp_path / "alone", **soft))) == 2
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = {**run, **saved, "sharded": spread, "resume": True, "name": "resumed"}
    done = launch([*TORCHRUN, "2"], [resumed])
    assert done.returncode == 0, done.stderr
    same(tmp_path, "resumed", wanted)


@pytest.mark.slow
def test_models_that_transformers_shards_train_and_those_that_it_divides_are_refused(tmp_path):
    run = {**BASE, "kind": "llama", "max_steps": 2, "output_dir": str(tmp_path)}
    done = launch([*TORCHRUN, "2"], [{**run, "sharded": "fsdp_size"}])
    assert done.returncode == 0, done.stderr
    wanted = {key: value for key, value in run.items() if key != "output_dir"}
    same(tmp_path, "final", alone(tmp_path / "alone", **wanted))
    done = launch([*TORCHRUN, "2"], [{**run, "sharded": "tp_size"}])
    assert done.returncode != 0
    assert "is divided among processes by tensor parallelism" in done.stderr


@pytest.mark.slow
def test_a_run_with_its_base_on_disk_that_is_killed_goes_on_to_the_same_end(tmp_path):
    common = {**BASE, "kind": "llama", "save_strategy": "steps", "save_steps": 2}
    run = {**common, "offload": True, "output_dir": str(tmp_path)}
    done = launch([sys.executable], [{**run, "end": [signal.SIGKILL, 0, 3]}])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "final.json").exists()
    done = launch([sys.executable], [{**run, "resume": True}])
    assert done.returncode == 0, done.stderr
    same(tmp_path, "final", alone(tmp_path / "alone", **common))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("launcher", [TORCHRUN, MULTI], ids=["torchrun", "accelerate"])
def test_launchers_and_kinds_of_models(launcher, processes, tmp_path):
    variants = {
        "llama": {"kind": "llama"},
        "accumulated": {
            "gradient_accumulation_steps": 2,
            "allocator": "uniform",
            "preset": "mezo",
            "queries_per_sample": 8,
        },
        "auto": {"queries_per_sample": "auto"},
        "budget": {"max_queries": 700},
        "calibrated": {"perturbation_scale": "auto", "allocator": "two_stage"},
    }
    # Whole forwards for four processes: products of a few rows round in their own way, and a loss
    # feels that.
    common = {**BASE, "samples": 16, "size": 48, "queries_per_sample": 9}
    runs = {
        f"{name}-{reduce}": {**common, "reduce": reduce, **own}
        for name, own in variants.items()
        for reduce in REDUCE
    }
    done = launch(
        [*launcher, str(processes)],
        [{**own, "output_dir": str(tmp_path), "name": n} for n, own in runs.items()],
    )
    assert done.returncode == 0, done.stderr
    for name, own in runs.items():
        same(tmp_path, name, alone(tmp_path / "alone", **own))


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_dies_is_named_by_the_others(gone, tmp_path):
    run = {**BASE, "output_dir": str(tmp_path), "max_steps": 50, "end": [signal.SIGKILL, gone, 3]}
    done = launch([*TORCHRUN, "2"], [run], timeout=120)
    assert done.returncode != 0
    assert f"process {gone} (pid" in done.stderr
    assert "ProcessError" in done.stderr


@pytest.mark.slow
def test_sigterm_to_one_process_lets_all_save_and_leave(tmp_path):
    common = {**BASE, "output_dir": str(tmp_path), "save_strategy": "no"}
    done = launch([*TORCHRUN, "2"], [{**common, "end": [signal.SIGTERM, 1, 3]}], timeout=120)
    assert done.returncode != 0
    # it is told at the next batch
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    done = launch([*TORCHRUN, "2"], [{**common, "resume": True}])
    assert done.returncode == 0, done.stderr
    same(tmp_path, "final", alone(tmp_path / "alone"))


@pytest.mark.slow
def test_processes_that_differ_are_refused(tmp_path):
    script = (
        "import json, os, sys; sys.argv[1] = json.dumps([{**json.loads(sys.argv[1])[0], 'seed': "
        "int(os.environ['RANK'])}]);import runpy; runpy.run_path(sys.argv.pop(0) if False else '"
        + WORKER
        + "', run_name='__main__')"
    )
    file = tmp_path / "differ.py"
    file.write_text(script)
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "2", str(file), json.dumps([{**BASE, "output_dir": str(tmp_path)}])]
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert (
        "The processes differ at the start: seed is 0 in process 0 and 1 in process 1"
        in done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        (
            [*ACCELERATE[:-1], "--cpu", ACCELERATE[-1], "2"],
            "asked for several processes but started one",
        ),
        ([*TORCHRUN, "2"], "2 processes were started, but they are not connected"),
    ],
)
def test_launchers_that_start_something_else_are_refused(launcher, message, tmp_path):
    cpu = "--cpu" in launcher
    done = launch(
        launcher, [{**BASE, "output_dir": str(tmp_path / "run"), "use_cpu": cpu}], timeout=120
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
