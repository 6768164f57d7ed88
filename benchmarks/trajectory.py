"""What a trajectory log takes, and how much faster than training its replay is: the adapter must be
the same bit for bit.

    python benchmarks/trajectory.py --task reviews --steps 500

The replay is timed in the process, and as the command `hf-flops replay` in one of its own; all
times are of the processor.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from benchmarks.accuracy_tasks import TASKS
from benchmarks.records import Record, quiet
from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.base.padding import TrimmedBatch
from hf_flops.trajectory.framing import read
from hf_flops.trajectory.replay import replay
from hf_flops.trajectory.verify import verify


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples and cut the padding that none of them needs."""
    batch = {
        name: torch.as_tensor([s[name] for s in samples]) if name == "sample_id" else None
        for name in samples[0]
    }
    batch = {
        name: torch.stack([s[name] for s in samples]) if value is None else value
        for name, value in batch.items()
    }
    return TrimmedBatch(batch, frozenset(["right"])).whole


def children() -> float:
    """Return the processor seconds of all commands that were run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Clock(TrainerCallback):
    """Times the steps alone: from the first step's end, so that the checks of the first batch do
    not count.
    """

    def __init__(self) -> None:
        self.first, self.last, self.rows = 0.0, 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.process_time()
        self.first = self.first or self.last


def measure(name: str, steps: int, batch: int, queries: int, repeats: int) -> dict[str, Any]:
    """Train, replay and compare."""
    task = TASKS[name]()
    folder, clock = tempfile.mkdtemp(), Clock()
    args = FlopsTrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        queries_per_sample=queries,
        rows_per_forward=64,
        learning_rate=5e-3,
        save_strategy="steps",
        save_steps=steps,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=steps,
        trajectory_log=True,
    )
    trainer = FlopsTrainer(
        task.model(0), args, train_dataset=task.train, data_collator=collate, callbacks=[clock]
    )
    before = task.accuracy(trainer.model, "validation")
    trainer.train()
    per_step = (clock.last - clock.first) / (steps - 1)
    after = task.accuracy(trainer.model, "validation")
    times, commands = [], []
    for _ in range(repeats):
        start = time.process_time()
        rebuilt = replay(folder, Path(folder, "rebuilt"))
        times.append(time.process_time() - start)
        start = children()
        command = [
            sys.executable,
            "-m",
            "hf_flops.cli.main",
            "replay",
            folder,
            "--output",
            str(Path(folder, "again")),
        ]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        commands.append(children() - start)
    checkpoint = Path(folder, f"checkpoint-{steps}")
    saved = [
        p.read_bytes()
        for p in (
            checkpoint / "adapter_model.safetensors",
            Path(folder, "rebuilt/adapter_model.safetensors"),
        )
    ]
    records = list(read(Path(folder, "trajectory.log")))
    size, first = records[-1].end, records[0].end
    rows = trainer.ledger.rows - steps * batch  # the clean ones have no noise
    own = dict(trainer.model.named_parameters())
    training, replayed = per_step * steps, sorted(times)[len(times) // 2]
    return {
        "task": task.name,
        "parameters": sum(p.numel() for p in rebuilt.parameters.values()),
        "steps": steps,
        "queries": rows,
        "validation_accuracy": [before, after],
        "training_seconds": training,
        "replay_seconds": replayed,
        "command_seconds": sorted(commands)[len(commands) // 2],
        "ratio": training / replayed,
        "command_ratio": training / sorted(commands)[len(commands) // 2],
        "identical": all(
            torch.equal(p.detach(), own[name].detach()) for name, p in rebuilt.parameters.items()
        ),
        "same_file": saved[0] == saved[1],
        "verified": verify(folder, checkpoint).right,
        "log_bytes": size,
        "start_bytes": first,
        "bytes_per_query": (size - first) / rows,
        "bytes_per_step": (size - first) / steps,
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=list(TASKS), default="reviews")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--queries", type=int, default=8, help="rows per sample and step")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    quiet()
    found = measure(given.task, given.steps, given.batch, given.queries, given.repeats)
    for key, value in found.items():
        print(f"{key}: {value}")
    Record("trajectory").keep(given.task, found)


if __name__ == "__main__":
    main()
