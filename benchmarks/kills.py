"""A run that is killed again and again (`kill -9` at random moments) and resumed each time, on one
process or two, in a folder that is renamed in between.

It must end with the parameters of the run that was never disturbed (in float64: rounding differs
with the number of processes, and Adam enlarges it). Every process of the run is killed at once, so
that a kill can hit the middle of a save. Lives are forks of this process, which has imported
everything already.

    python benchmarks/kills.py --kills 40
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file

from hf_flops.trainer.checkpoints import UNFINISHED, last_checkpoint
from tests.helpers.worker import build, finish

from records import Record, quiet  # isort: skip

FORK = multiprocessing.get_context("fork")
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
# name → the arguments in which a configuration differs
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "scalars": {"reduce": "scalars"},
    # 64 samples: of a number that processes cannot share evenly, the stock loss counts some twice
    "best model": {**BEST, "save_total_limit": 2, "size": 64},
    "max_queries": {"max_queries": 0},  # filled in: the steps less a quarter
}


def live(options: dict[str, Any], rank: int, world: int, port: int) -> None:
    """Be a process of a run."""
    quiet()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    trainer = build(dict(options))
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    finish(trainer, "final")
    os._exit(0)


class Run:
    """The processes of a life."""

    def __init__(self, processes: int, options: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            FORK.Process(target=live, args=(options, rank, processes, port))
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    @property
    def alive(self) -> bool:
        """Whether one of them lives."""
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """End all of them at once."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> list[int | None]:
        """Return the statuses, once all have ended."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def steps(folder: Path) -> int:
    """Return the step of the last checkpoint."""
    return max([int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")], default=0)


def disturb(options: dict[str, Any], kills: int, rng: random.Random) -> list[dict[str, Any]]:
    """Run to the end, with kills on the way; return what happened at each."""
    seen: list[dict[str, Any]] = []
    name = Path(options["output_dir"]).name
    while True:
        folder = Path(options["output_dir"])
        if folder.exists() and rng.random() < 0.5:
            folder = folder.rename(folder.with_name(f"{name} moved {len(seen)}"))
            options["output_dir"] = str(folder)
        processes, before = rng.choice([1, 2]), steps(folder)
        run, begun = Run(processes, options), time.monotonic()
        while len(seen) < kills and run.alive and steps(folder) <= before:
            time.sleep(0.01)  # the first step of a new life is over
            if time.monotonic() - begun > 600:
                raise SystemExit("a life took no step in 600 s")
        if len(seen) < kills and run.alive:
            time.sleep(rng.uniform(0.0, 0.6))
        if len(seen) == kills or not run.alive:
            if any(run.wait()):
                raise SystemExit(f"the run on {processes} processes failed: {run.wait()}")
            return seen
        run.kill()
        half = (folder / UNFINISHED).exists()
        life = {"processes": processes, "folder": folder.name, "resumed_at": before}
        seen.append({**life, "killed_after": steps(folder), "half_written": half})
        print(seen[-1], flush=True)


def compare(name: str, chosen: argparse.Namespace, kills: int, scratch: Path) -> dict[str, Any]:
    """Return the kills of a configuration, and how far its end is from the undisturbed run's."""
    common = {
        "double": True,
        "samples": 8,
        "size": 62,
        "max_steps": chosen.steps,
        "logging_steps": 50,
    }
    common |= {"save_total_limit": 3, "save_strategy": "steps", "save_steps": 1}
    common |= CONFIGURATIONS[name]
    if "max_queries" in common:  # rows of a step, and of the checks
        common["max_queries"] = 32 * chosen.steps * 3 // 4 + 200
    alone, killed = scratch / f"{name} alone", scratch / f"{name} killed"
    saves = {} if "best" in name else {"save_strategy": "no"}
    run = Run(1, {**common, **saves, "output_dir": str(alone)})
    if any(run.wait()):
        raise SystemExit("the undisturbed run failed")
    options = {**common, "output_dir": str(killed)}
    seen = disturb(options, kills, random.Random(chosen.seed))
    folders = alone, Path(options["output_dir"])
    wanted, found = (load_file(folder / "final.safetensors") for folder in folders)
    error = max(float((wanted[key] - found[key]).abs().max()) for key in wanted)
    logs = [json.loads((folder / "final.json").read_text()) for folder in folders]
    reached = [max(entry["step"] for entry in log) for log in logs]
    print(f"{name}: {len(seen)} kills, largest difference {error:.2g}, steps {reached}")
    return {"kills": seen, "largest_difference": error, "steps": reached}


def main() -> None:
    """Compare disturbed runs with those that were left alone; write results/kills.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="of all configurations")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no other threads
    names = [chosen.only] if chosen.only else list(CONFIGURATIONS)
    scratch = Path(tempfile.mkdtemp(prefix="hf_flops_kills_"))
    for name in names:
        found = compare(name, chosen, chosen.kills // len(names), scratch)
        Record("kills").keep(name, found)
        missing = "the run was over too early: raise --steps"
        assert len(found["kills"]) == chosen.kills // len(names), missing
        assert found["largest_difference"] <= 1e-5
        assert len(set(found["steps"])) == 1
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
