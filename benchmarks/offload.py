"""A step on a model whose layers lie on disk, against plain inference of the same rows under the
same map, MeZO (one noise for the batch, a forward for each perturbation and sign) and backprop
with gradient checkpointing.

A Llama with random weights is written once. Every side loads it in a process of its own with
accelerate's device map, takes one step before the measured ones, and plain inference and ours take
turns; the other two run once. Once loaded, a process may take no more than three quarters of the
model's size (a limit of the system, RLIMIT_DATA), and every forward finds the system's cache of the
files empty, so that it reads from the disk. Peak memory is what the process holds above what it
held before it loaded the model, pages of files that are mapped included. Where other programs use
the processor, compare its own seconds (CPU).

    python benchmarks/offload.py
    python benchmarks/offload.py --layers 2 --width 256 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import OffloadedWeightsLoader
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from records import Record, quiet  # isort: skip

from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.base.memory import PeakMemory
from hf_flops.trainer.offload import materialise_trainable, weights_at_hand

SAMPLES, QUERIES = 8, 32  # 256 rows
WORDS = 3000
MAP = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    "model.layers": "disk",
}
SIDES = ("plain", "ours", "mezo", "backprop")


def write(folder: Path, layers: int, width: int) -> int:
    """Write a model with so many layers, of 206 MB at a width of 2048, and return their bytes."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="50MB")
    return sum(parameter.nbytes for parameter in model.model.layers.parameters())


def load(folder: Path) -> LlamaForCausalLM:
    """Return the model with its layers on disk."""
    return LlamaForCausalLM.from_pretrained(
        folder, device_map=dict(MAP), offload_folder=folder / "offloaded"
    )


def adapter() -> LoraConfig:
    """Return LoRA in all layers."""
    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return texts of random words, each its own label."""
    words = torch.randint(WORDS, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}


def limit_memory(size: int) -> None:
    """Let this process allocate so many bytes more than it has now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (now + size, now + size))


class Fetched:
    """Counts the bytes of weights that forwards fetch, and lets each read them from the disk.

    Args:
        folder: holds the weights.
    """

    def __init__(self, folder: Path) -> None:
        self.bytes, original = 0, OffloadedWeightsLoader.__getitem__

        def fetch(loader: OffloadedWeightsLoader, key: str) -> torch.Tensor:
            if "layers.0.self_attn.q_proj" in key:
                empty_cache(folder)
            weight = original(loader, key)
            self.bytes += weight.nbytes
            return weight

        OffloadedWeightsLoader.__getitem__ = fetch

    @staticmethod
    def read() -> int:
        """Return the bytes that the process has read from the disk itself, not from its cache."""
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def empty_cache(folder: Path) -> None:
    """Drop a folder's files from the system's cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Steps(TrainerCallback):
    """Keeps the time and the bytes at every step's end.

    Args:
        fetched: counts bytes.
    """

    def __init__(self, fetched: Fetched) -> None:
        self.fetched, self.marks = fetched, list[tuple[float, float, int, int]]()

    def mark(self) -> None:
        """Keep the time and the bytes so far."""
        times = time.perf_counter(), time.process_time()
        self.marks.append((*times, self.fetched.bytes, self.fetched.read()))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Mark the beginning of the first step."""
        if not self.marks:
            self.mark()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Mark the end of a step."""
        self.mark()


def trained(
    model: LlamaForCausalLM, preset: str, steps: Steps, options: argparse.Namespace
) -> None:
    """Train with a preset."""
    with tempfile.TemporaryDirectory() as folder:
        chunk: dict[str, Any] = {} if preset == "flops" else {"rows_per_forward": SAMPLES}
        args = FlopsTrainingArguments(
            folder,
            preset=preset,
            lora_parts="both",
            queries_per_sample=QUERIES,
            per_device_train_batch_size=SAMPLES,
            max_steps=options.steps,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            pictures=False,
            save_strategy="no",
            logging_strategy="no",
            **chunk,
        )
        texts = batch(SAMPLES, options.tokens)
        data = [{name: value[i] for name, value in texts.items()} for i in range(SAMPLES)]
        FlopsTrainer(
            model, args, train_dataset=data, peft_config=adapter(), callbacks=[steps]
        ).train()


def repeated(
    model: LlamaForCausalLM, steps: Steps, options: argparse.Namespace, *, backward: bool
) -> None:
    """Run 256 rows forward, or the samples forward and backward with checkpoints."""
    config = adapter()
    with weights_at_hand(config):
        adapted: Any = get_peft_model(model, config)
    materialise_trainable(adapted)
    if backward:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train(backward)
    inputs = batch(SAMPLES if backward else SAMPLES * QUERIES, options.tokens)
    steps.mark()
    for _ in range(options.steps):
        with torch.set_grad_enabled(backward):
            loss = adapted(**inputs).loss
            if backward:
                loss.backward()
                adapted.zero_grad()
        del loss
        steps.mark()


def one(folder: Path, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the steps of a side take, in this process."""
    steps = Steps(Fetched(folder))
    run: dict[str, Callable[[LlamaForCausalLM], None]] = {
        "plain": lambda model: repeated(model, steps, options, backward=False),
        "ours": lambda model: trained(model, "flops", steps, options),
        "mezo": lambda model: trained(model, "mezo", steps, options),
        "backprop": lambda model: repeated(model, steps, options, backward=True),
    }
    with PeakMemory(torch.device("cpu")) as memory:
        model = load(folder)
        limit_memory(3 * options.size // 4)
        run[side](model)
    columns = [np.diff(column).tolist() for column in zip(*steps.marks, strict=True)]
    return {
        "megabytes": memory.megabytes,
        **dict(zip(("seconds", "cpu_seconds", "fetched", "read"), columns, strict=True)),
    }


def main() -> None:
    """Measure the sides in turn; write results/offload.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--size", type=int, default=2**62)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "SIDE"))
    options = parser.parse_args()
    quiet()
    if options.one:
        print(json.dumps(one(Path(options.one[0]), options.one[1], options)))
        return
    record, environment = Record("offload"), {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), options.layers, options.width)
        given = ["--steps", str(options.steps), "--tokens", str(options.tokens)]
        for number in range(options.rounds):
            for side in options.sides if number == 0 else SIDES[:2]:
                command = [sys.executable, __file__, "--one", folder, side, "--size", str(size)]
                done = subprocess.run(
                    [*command, *given], env=environment, capture_output=True, text=True
                )
                if done.returncode == 0:
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
                elif "Cannot allocate memory" in done.stderr and side not in SIDES[:2]:
                    print(f"{side} does not run within the limit.", flush=True)
                else:
                    raise SystemExit(done.stderr)
    name = f"{options.layers} layers of {options.width}, {options.tokens} tokens"
    record.keep(name, report(found, size))


def report(found: dict[str, list[dict[str, Any]]], size: int) -> dict[str, Any]:
    """Print a table, and return its figures.

    Args:
        found: what `one` returned in each round, by side.
        size: bytes of the weights on disk.
    """
    print(
        "| side | peak / weights | seconds of a step | / plain | CPU / plain | read / weights "
        "| fetched, first step |\n| --- |" + " --- |" * 6
    )
    result: dict[str, Any] = {"weights": size, "rounds": found}
    for side, rounds in found.items():
        if not rounds:
            continue
        figures = {
            "peak": float(np.median([own["megabytes"] for own in rounds])) * 2**20 / size,
            "seconds": float(np.median([min(own["seconds"][1:]) for own in rounds])),
            "over_plain": over(rounds, found["plain"], "seconds"),
            "cpu_over_plain": over(rounds, found["plain"], "cpu_seconds"),
            "read": max(own["read"][-1] for own in rounds) / size,
            "first": max(own["fetched"][0] for own in rounds) / size,
        }
        result[side] = figures
        row = " | ".join(f"{value:.2f}" for value in figures.values())
        print(f"| {side} | {row} |", flush=True)
    return result


def over(rounds: list[dict[str, Any]], plain: list[dict[str, Any]], name: str) -> float:
    """Return the median over rounds of a side's fastest step over plain inference's."""
    pairs = zip(rounds, plain, strict=False)
    return float(np.median([min(own[name][1:]) / min(p[name][1:]) for own, p in pairs]))


if __name__ == "__main__":
    main()
