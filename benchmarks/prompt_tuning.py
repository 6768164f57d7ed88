"""Run recipes/prompt_tuning.py with several seeds, and say what the seeds agree on.

What this does not know itself is the recipe's: options that are given there belong to the entry's
name. Runs that the record holds are not repeated. Seconds are of the processor, in training with
the evaluations of the curve.

    python benchmarks/prompt_tuning.py --methods flops backprop
    python benchmarks/prompt_tuning.py --domain products
    python benchmarks/prompt_tuning.py --objective accuracy --max_steps 40
    python benchmarks/prompt_tuning.py --engine onnx-int8
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np

from records import ROOT, Record, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from recipes import prompt_tuning
from recipes.prompts import load_task

# what training begins with lacks them
AFTERWARDS = ("label_head", "objective", "compare", "per_class", "validation_texts", "lora_rank")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's, two-sided, by the number of seeds


def begins_as(options: Sequence[str]) -> dict[str, Any]:
    """Return the options that say what is measured before training, whatever the seed; nothing if
    it is random.
    """
    recipe = prompt_tuning.parse(list(options))[0]
    if recipe.adapter not in ("suffix", "prompt") or not recipe.init_text:
        return {}
    return {name: value for name, value in asdict(recipe).items() if name not in AFTERWARDS}


def known_start(options: Sequence[str], entries: dict[str, Any]) -> SimpleNamespace | None:
    """Return what the record says before training of the same model and prompt, if anything."""
    start = begins_as(options)
    for name, entry in entries.items():
        if start and begins_as(shlex.split(name) if name != "defaults" else []) == start:
            for run in (run for runs in entry["runs"].values() for run in runs.values()):
                return SimpleNamespace(before=run["before"], start=run["start"])
    return None


def measure(
    method: str, options: Sequence[str], seed: int, known: SimpleNamespace | None
) -> dict[str, Any]:
    """Train and test once, quietly; returns what the recipe found, with processor time and what the
    trainer's log says.
    """
    always = ("--disable_tqdm", "True", "--output_dir", "outputs/benchmark", "--seed", str(seed))
    recipe, args = prompt_tuning.parse([*options, *always])
    recipe = prompt_tuning.lines_of(recipe, args)[""]
    task = load_task(recipe, seed)
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        outcome, trainer = prompt_tuning.run(method, recipe, args, task, known)
    found = asdict(outcome) | {"processor_seconds": time.process_time() - start}
    log = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    found |= {name: log[name] for name in ("perturbation_scale", "changed_queries") if name in log}
    print(
        f"{' '.join(options) or 'defaults'}, {method}, seed {seed}: {outcome.before:.1%} "
        f"zero-shot, {outcome.start:.1%} untrained, {outcome.after:.1%} after {outcome.steps} "
        f"steps, {outcome.rows:,} rows, {found['processor_seconds']:.0f} processor seconds",
        flush=True,
    )
    return found


def spread(values: Sequence[float]) -> str:
    """Format the mean of accuracies, and where that of further seeds is expected, with 95 %
    confidence.
    """
    mean = f"{np.mean(values):.1%}"
    if len(values) not in T_95:
        return mean
    half = T_95[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean} ({np.mean(values) - half:.1%} to {np.mean(values) + half:.1%})"


def table(entries: dict[str, Any]) -> str:
    """Lay all entries out as a Markdown table, seeds together."""
    lines = [
        "| options | method | seeds | untrained | tuned | improvement, 95 % | of backprop's gain | "
        "rows | seconds |",
        "| --- " * 9 + "|",
    ]
    for name, entry in entries.items():
        gains = {
            m: {s: run["after"] - run["start"] for s, run in entry["runs"][m].items()}
            for m in entry["runs"]
        }
        for method, runs in entry["runs"].items():
            after, start = ([run[moment] for run in runs.values()] for moment in ("after", "start"))
            both = sorted(set(gains[method]) & set(gains.get("backprop", {})))
            ours, most = (
                (sum(gains[m][s] for s in both) for m in (method, "backprop")) if both else (0, 0)
            )
            share = f"{ours / most:.0%}" if both else ""
            tuned = (
                f"{np.mean(after):.1%} ± {np.std(after, ddof=1):.1%}"
                if len(after) > 1
                else f"{after[0]:.1%}"
            )
            rows, seconds = (
                np.median([run[n] for run in runs.values()]) for n in ("rows", "processor_seconds")
            )
            lines.append(
                f"| {name} | {method} | {len(runs)} | {np.mean(start):.1%} | {tuned} | "
                f"{spread(list(gains[method].values()))} | {share} | {rows:,.0f} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what the record lacks, write results/prompt_tuning.json and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", default=["flops"], choices=prompt_tuning.METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--table", action="store_true", help="run nothing, print what the record holds"
    )
    own, options = parser.parse_known_args()
    quiet()
    record = Record("prompt_tuning")
    name = shlex.join(options) or "defaults"
    entry = record.entries.get(name, {"runs": {}})
    for seed in [] if own.table else own.seeds:
        for method in own.methods:
            runs = entry["runs"].setdefault(method, {})
            if str(seed) not in runs:
                runs[str(seed)] = measure(
                    method, options, seed, known_start(options, record.entries)
                )
                record.keep(name, entry)
    print(table(record.entries))


if __name__ == "__main__":
    main()
