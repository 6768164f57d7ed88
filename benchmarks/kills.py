"""A run that is killed again and again (`kill -9` at random moments) and resumed each time, on one
process or two.

It must end with the parameters of the run that was never disturbed. Every process of the run is
killed at once, so that a kill can hit the middle of a save.

    python benchmarks/kills.py --kills 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil
from safetensors.torch import load_file

from hf_flops.trainer.checkpoints import UNFINISHED

from records import Record  # isort: skip


def command(processes: int, options: dict[str, Any]) -> list[str]:
    """Return what starts a run."""
    worker = [str(ROOT / "tests" / "helpers" / "worker.py"), json.dumps([options])]
    if processes == 1:
        return [sys.executable, *worker]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *worker,
    ]


def start(processes: int, options: dict[str, Any]) -> subprocess.Popen:
    """Start a run in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command(processes, options), env=environment, stdout=quiet, stderr=quiet
    )


def kill(run: subprocess.Popen) -> None:
    """End all processes of a run at once."""
    launcher = psutil.Process(run.pid)
    for process in [*launcher.children(recursive=True), launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()


def steps(folder: Path) -> int:
    """Return the step of the last checkpoint."""
    return max([int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")], default=0)


def disturb(options: dict[str, Any], kills: int, rng: random.Random) -> list[dict[str, Any]]:
    """Run to the end, with kills on the way; returns what happened at each."""
    folder, seen = Path(options["output_dir"]), []
    while True:
        processes, before = rng.choice([1, 2]), steps(folder)
        run, begun = start(processes, options), time.monotonic()
        while (
            len(seen) < kills
            and run.poll() is None
            and steps(folder) <= before
            and time.monotonic() - begun < 120
        ):
            time.sleep(0.01)  # the first step of a new life is over
        if len(seen) < kills and run.poll() is None:
            time.sleep(rng.uniform(0.0, 0.6))
        if len(seen) == kills or run.poll() is not None:
            if run.wait() != 0:
                raise SystemExit(
                    f"the run on {processes} processes failed with status {run.returncode}"
                )
            return seen
        kill(run)
        half = (folder / UNFINISHED).exists()
        seen.append(
            {
                "processes": processes,
                "resumed_at": before,
                "killed_after": steps(folder),
                "half_written": half,
            }
        )
        print(seen[-1], flush=True)


def main() -> None:
    """Compare a disturbed run with one that was left alone; write results/kills.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reduce", default="gradient")
    chosen = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="hf_flops_kills_"))
    common = {
        "samples": 8,
        "size": 62,
        "max_steps": chosen.steps,
        "logging_steps": 50,
        "save_total_limit": 3,
    }
    common |= {"reduce": chosen.reduce, "resume": True}
    alone = {**common, "output_dir": str(scratch / "alone")}
    assert start(1, alone).wait() == 0
    options = {
        **common,
        "output_dir": str(scratch / "killed"),
        "save_strategy": "steps",
        "save_steps": 1,
    }
    seen = disturb(options, chosen.kills, random.Random(chosen.seed))
    wanted, found = (
        load_file(scratch / name / "final.safetensors") for name in ("alone", "killed")
    )
    error = max(float((wanted[name] - found[name]).abs().max()) for name in wanted)
    print(
        f"{len(seen)} kills, {sum(kill['half_written'] for kill in seen)} of them in the middle of "
        f"a save; the final parameters differ from the undisturbed run's by {error:.2g} at most"
    )
    Record("kills").keep(
        chosen.reduce, {"steps": chosen.steps, "kills": seen, "largest_difference": error}
    )
    shutil.rmtree(scratch)
    assert len(seen) == chosen.kills, f"the run was over after {len(seen)} kills: raise --steps"
    assert error <= 1e-5


if __name__ == "__main__":
    main()
