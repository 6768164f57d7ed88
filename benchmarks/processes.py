"""What several processes are worth and what they tell each other: rows per second, bytes per step,
and whether any number of them goes the same way.

    # two processes with one thread each against one process with one thread
    python benchmarks/processes.py speed
    python benchmarks/processes.py bytes   # both exchanges, adapters of 10^4 and 10^7 parameters
    # two recipes on 1, 2 and 4 processes, both exchanges and launchers
    python benchmarks/processes.py same

Speeds are those of runs that live side by side and take turns of a few seconds, stopped in between;
the ratio is the median over turns. "Two apart" are two runs of one process each at the same time,
that know nothing of each other: what the machine's second core is worth. Bytes are what a process
hands over, each counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from records import Record, quiet  # isort: skip

SPEED = {"hidden": 96, "layers": 4, "rank": 4, "samples": 32, "queries": 16, "rows": 64}
SMALL = {
    "hidden": 128,
    "layers": 2,
    "rank": 20,
    "samples": 32,
    "queries": 4,
    "steps": 3,
    "rows": 16,
}
LARGE = {
    "hidden": 512,
    "layers": 5,
    "rank": 1000,
    "samples": 8,
    "queries": 4,
    "steps": 2,
    "rows": 2,
}

RECIPES = {  # samples per optimizer step of all processes together, and options
    "vit": (32, "--queries_per_sample 16 --rows_per_forward 64 --max_steps 10"),
    "prompt_tuning": (
        8,
        "--queries_per_sample 9 --rows_per_forward 8 --max_steps 6 --test_texts 8 "
        "--validation_texts 8 --eval_strategy no",
    ),
}
FILES = ("adapter_model.safetensors", "model.safetensors")  # what recipes leave
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [
    "accelerate.commands.launch",
    "--main_process_port",
    "0",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
]
ACCELERATE += ["--dynamo_backend", "no", "--multi_gpu", "--num_processes"]


def work(options: dict[str, Any]) -> None:
    """Train a ViT of random weights for a few steps, and print what was measured; run by a
    launcher.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

    from hf_flops import FlopsTrainer, FlopsTrainingArguments

    quiet()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds, self.sent, self.rows = [], [], []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter())
            self.sent.append(trainer.group.sent)
            self.rows.append(trainer.ledger.rows)
            if args.process_index == 0:
                with Path(options["folder"], "steps").open("a") as file:
                    file.write(f"{self.seconds[-1]} {trainer.ledger.all_rows}\n")

    torch.manual_seed(0)
    sizes = {
        "hidden_size": options["hidden"],
        "intermediate_size": 4 * options["hidden"],
        "num_attention_heads": 4,
    }
    config = ViTConfig(
        image_size=32, patch_size=4, num_hidden_layers=options["layers"], num_labels=10, **sizes
    )
    adapter = LoraConfig(
        r=options["rank"], target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    model = get_peft_model(ViTForImageClassification(config), adapter)
    data = [
        {"pixel_values": torch.randn(3, 32, 32), "labels": i % 10}
        for i in range(4 * options["samples"])
    ]
    args = FlopsTrainingArguments(
        output_dir=options["folder"],
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        max_steps=options["steps"] + 2,
        queries_per_sample=options["queries"],
        rows_per_forward=options["rows"],
        reduce=options["reduce"],
        control_variate="none",
        per_device_train_batch_size=options["samples"] // int(os.environ.get("WORLD_SIZE", 1)),
    )
    clock = Clock()
    trainer = FlopsTrainer(model, args, train_dataset=data, callbacks=[clock])
    trainer.train()
    if args.process_index == 0:
        kept = slice(1, None)  # the first steps check, and warm up
        rows = np.diff(clock.rows)[kept]
        found = {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "rows_per_step": int(np.median(rows)),
            "rows_per_second": float(np.median(rows / np.diff(clock.seconds)[kept])),
            "sent_bytes_per_step": float(np.median(np.diff(clock.sent)[kept])),
            "loss": trainer.state.log_history[-1]["train_loss"],
        }
        Path(options["folder"], "found.json").write_text(json.dumps(found))


def launch(
    processes: int, script: list[str], launcher: list[str] = TORCHRUN
) -> subprocess.Popen[str]:
    """Start a script with one thread per process."""
    command = [
        sys.executable,
        *(["-m", *launcher, str(processes)] if processes > 1 else []),
        *script,
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes)


def finish(launched: subprocess.Popen[str]) -> None:
    """Wait for the end; what went wrong ends the benchmark, too."""
    _, errors = launched.communicate()
    if launched.returncode:
        raise SystemExit(errors[-3000:])


def start(
    processes: int, reduce: str, options: dict[str, Any], folder: str
) -> subprocess.Popen[str]:
    """Launch a run of `work`."""
    own = json.dumps({**options, "reduce": reduce, "folder": folder})
    return launch(processes, [str(Path(__file__).resolve()), "--worker", own])


def run(processes: int, reduce: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run to the end; returns what process 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        finish(start(processes, reduce, options, folder))
        return json.loads(Path(folder, "found.json").read_text())


class Side:
    """Runs that are under way together, and stopped together while others have their turn."""

    def __init__(self, launches: int, processes: int, reduce: str) -> None:
        self.folders = [tempfile.TemporaryDirectory() for _ in range(launches)]
        self.runs = [
            start(processes, reduce, {**SPEED, "steps": 10**6}, folder.name)
            for folder in self.folders
        ]

    def steps(self) -> list[np.ndarray]:
        """Return for each run (time, rows so far) at the end of its steps."""
        files = [Path(folder.name, "steps") for folder in self.folders]
        # the last: half
        return [
            np.loadtxt(file, ndmin=2)[:-1] if file.is_file() else np.zeros((0, 2)) for file in files
        ]

    def turn(self, seconds: float) -> float:
        """Go on for so long; returns rows per second, from the first step that ends in this time to
        the last.
        """
        begun = time.perf_counter()
        self.signal(signal.SIGCONT)
        time.sleep(seconds)
        self.signal(signal.SIGSTOP)
        own = [steps[steps[:, 0] > begun] for steps in self.steps()]
        return float(
            sum((steps[-1, 1] - steps[0, 1]) / (steps[-1, 0] - steps[0, 0]) for steps in own)
        )

    def signal(self, number: int) -> None:
        """Signal all processes; launchers put theirs into sessions of their own."""
        for launched in self.runs:
            for process in [
                *psutil.Process(launched.pid).children(recursive=True),
                psutil.Process(launched.pid),
            ]:
                process.send_signal(number)

    def close(self) -> None:
        """End the runs."""
        self.signal(signal.SIGKILL)
        for launched, folder in zip(self.runs, self.folders, strict=True):
            launched.communicate()
            folder.cleanup()


def speed(turns: int) -> None:
    """Compare rows per second; both exchanges."""
    record = Record("processes")
    print(
        "| exchange | rows/s, 1 process | rows/s, 2 processes | ratio | two apart |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for reduce in ("gradient", "scalars"):
        sides: list[Side] = []
        try:
            for launches, processes in ((1, 1), (1, 2), (2, 1)):  # warmed up one after the other
                sides.append(Side(launches, processes, reduce))
                while min(map(len, sides[-1].steps())) < 4:
                    if any(launched.poll() is not None for launched in sides[-1].runs):
                        raise SystemExit("A run has ended before it could be timed.")
                    time.sleep(0.5)
                sides[-1].signal(signal.SIGSTOP)
            # (turns, 3)
            rates = np.array([[side.turn(7.0) for side in sides] for _ in range(turns)])
        finally:
            for side in sides:
                side.close()
        ratios = rates[:, 1:] / rates[:, :1]
        (ratio, most), (one, two, _) = np.median(ratios, 0), np.median(rates, 0)
        quartiles = np.quantile(ratios[:, 0], [0.25, 0.75]).tolist()
        found = {
            "ratio": float(ratio),
            "quartiles": quartiles,
            "apart": float(most),
            "rows_per_second": rates.tolist(),
        }
        record.keep(f"speed-{reduce}", {**found, **SPEED})
        print(f"| {reduce} | {one:.0f} | {two:.0f} | {ratio:.2f} | {most:.2f} |", flush=True)


def bytes_sent() -> None:
    """Count bytes per step and query for a small and a large adapter; both exchanges."""
    record = Record("processes")
    print(
        "| parameters | exchange | bytes per step | bytes per query of a process |\n"
        "| --- | --- | --- | --- |"
    )
    for options in (SMALL, LARGE):
        for reduce in ("gradient", "scalars"):
            found = run(2, reduce, options)
            queries = (found["rows_per_step"] - options["samples"]) / 2
            found["sent_bytes_per_query"] = found["sent_bytes_per_step"] / queries
            record.keep(f"bytes-{reduce}-{found['parameters']}", {**found, **options})
            print(
                f"| {found['parameters']:,} | {reduce} | {found['sent_bytes_per_step']:,.0f} | "
                f"{found['sent_bytes_per_query']:,.1f} |",
                flush=True,
            )
            assert reduce == "gradient" or found["sent_bytes_per_query"] <= 16


def recipe(
    name: str, processes: int, reduce: str, launcher: list[str]
) -> tuple[list[float], dict[str, Any]]:
    """Run a recipe with one thread per process; returns its losses and the parameters it
    trained.
    """
    from safetensors.torch import load_file

    samples, options = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        script = [
            str(ROOT / "recipes" / f"{name}.py"),
            *options.split(),
            "--output_dir",
            folder,
            "--reduce",
            reduce,
        ]
        script += [
            "--per_device_train_batch_size",
            str(samples // processes),
            "--logging_steps",
            "1",
            "--use_cpu",
            "true",
        ]
        finish(launch(processes, script, launcher))
        history = json.loads(Path(folder, "flops", "trainer_state.json").read_text())["log_history"]
        file = next(
            Path(folder, "flops", own) for own in FILES if Path(folder, "flops", own).is_file()
        )
        return [entry["loss"] for entry in history if "loss" in entry], load_file(file)


def same_way(names: list[str]) -> None:
    """Compare losses and parameters of recipes on two and four processes with those on one."""
    record = Record("processes")
    print(
        "| recipe | exchange | launcher | processes | losses differ by | parameters by |\n| --- |"
        + " --- |" * 5
    )
    for name in names:
        for reduce in ("gradient", "scalars"):
            losses, parameters = recipe(name, 1, reduce, [])
            for launcher in (TORCHRUN, ACCELERATE):
                for processes in (2, 4):
                    other, others = recipe(name, processes, reduce, launcher)
                    loss = float(np.abs(np.subtract(losses, other)).max())
                    parameter = max(
                        float((others[key] - value).abs().max())
                        for key, value in parameters.items()
                    )
                    kind = launcher[0].split(".")[0]
                    found = {"steps": len(losses), "losses": loss, "parameters": parameter}
                    record.keep(f"same-{name}-{reduce}-{kind}-{processes}", found)
                    print(
                        f"| {name} | {reduce} | {kind} | {processes} | {loss:.1e} | "
                        f"{parameter:.1e} |",
                        flush=True,
                    )


def main() -> None:
    """Measure what the command line names; write results/processes.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="?", choices=["speed", "bytes", "same"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument(
        "--turns", type=int, default=9, help="of seven seconds, for each of three sides"
    )
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        return work(chosen.worker)
    quiet()
    if chosen.what in ("speed", None):
        speed(chosen.turns)
    if chosen.what in ("bytes", None):
        bytes_sent()
    if chosen.what in ("same", None):
        same_way(chosen.recipes)
    return None


if __name__ == "__main__":
    main()
