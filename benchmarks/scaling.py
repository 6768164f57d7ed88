"""Beyond one machine, by measured constants and simulation: what a step costs, that lost rows do no
harm, time to a target.

    # seconds per row, and per number of noise that is drawn again
    python benchmarks/scaling.py measure
    # 8 to 4,096 workers that only exchange a scalar per query; docs/scaling.png
    python benchmarks/scaling.py simulate

Workers are simulated: their rows are real (noise of `hf_flops`, summed by `regenerate`), their
times and losses are drawn.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.records import Record, quiet
from benchmarks.workers import MESSAGE, Costs, Problem, bias, noise_of, race
from hf_flops.perturbations.replay import regenerate

WORKERS = (8, 32, 128, 512, 2048, 4096)


def measure() -> dict[str, Any]:
    """Measure processor seconds per row of MiniLM with LoRA, and per number of noise that is drawn
    and summed again.
    """
    from benchmarks.tasks import reviews
    from hf_flops.base.batch import take

    torch.set_num_threads(1)
    task = reviews(0)
    batch, _ = next(task.batches(0, 4))
    rows = take(batch, torch.arange(64) % 4)
    times, per_number = [], {}
    with torch.no_grad():
        for _ in range(5):
            start = time.process_time()
            task.model(**rows)
            times.append((time.process_time() - start) / 64)
    for d, kind in (
        (12_288, "rademacher"),
        (73_728, "rademacher"),
        (294_912, "rademacher"),
        (73_728, "rank_one"),
    ):
        noise, found = noise_of(d, kind), []
        queries = torch.arange(64)
        for step in range(5):
            start = time.process_time()
            regenerate(noise, 0, step, queries, queries, torch.ones(64), queries, 64)
            found.append((time.process_time() - start) / 64 / d)
        per_number[f"{kind} {d}"] = float(np.median(found))
    tokens = int(batch["input_ids"].shape[1])
    return {
        "row_seconds": float(np.median(times)),
        "tokens": tokens,
        "number_seconds": per_number,
        "parameters": 73_728,
    }


def simulate(record: Record, numbers: list[int], repeats: int, seeds: int) -> None:
    """Simulate, print, keep and draw."""
    constants = record.entries["constants"]
    d = constants["parameters"]
    costs = Costs(constants["row_seconds"], constants["number_seconds"][f"rademacher {d}"], d)
    problem, found = Problem(), record.entries.get("simulation", {"workers": {}})["workers"]
    for workers in numbers:
        own: dict[str, Any] = {"bias": bias(problem, workers, max(64, repeats * 8 // workers))}
        for name, quorum in (("quorum", True), ("everyone", False)):
            runs = [race(problem, workers, costs, seed, quorum=quorum) for seed in range(seeds)]
            own[name] = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
            own[name]["range"] = [
                min(run["seconds"] for run in runs),
                max(run["seconds"] for run in runs),
            ]
        queries = 8 * workers
        own["step"] = {
            "forward": 8 * costs.row,
            "again": costs.again(queries),
            "scalars": costs.exchange(queries, workers, scalars=True),
            "gradient": costs.exchange(queries, workers, scalars=False),
            "received_bytes": {"scalars": MESSAGE * queries, "gradient": 8 * d},
        }
        found[str(workers)] = own
        bars = ", ".join(
            f"{name} {mean:.3f} ± {half:.3f}" for name, (mean, half) in own["bias"].items()
        )
        print(
            f"{workers:>5} workers: {bars}; to the target: {own['quorum']['seconds']:,.0f} s with "
            f"a quorum in {own['quorum']['steps']:.0f} steps, {own['everyone']['seconds']:,.0f} s "
            "with everyone"
        )
    found = {key: found[key] for key in sorted(found, key=int)}
    record.keep("simulation", {"workers": found, "seeds": seeds, "target": problem.target})


def draw(record: Record) -> None:
    """Draw docs/scaling.png from the record."""
    from hf_flops.reporting.comparison_plots import pyplot

    plt, found = pyplot(), record.entries["simulation"]["workers"]
    workers = [int(key) for key in found]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    names = {
        "spread": "spread over the sample's rows",
        "not spread": "not spread",
        "blocks": "whole samples are lost",
    }
    for shift, (name, label) in zip((0.94, 1.0, 1.06), names.items(), strict=True):
        mean, half = np.array([found[str(w)]["bias"][name] for w in workers]).T
        left.errorbar(
            np.array(workers) * shift, mean, half, fmt="o", markersize=4, capsize=3, label=label
        )
    left.axhline(1, color="#52525b", linewidth=1, linestyle="--")
    left.set(
        title="A tenth of the workers is lost", ylabel="estimate along the gradient, 95 % interval"
    )
    parts = {"forward": "forward, 8 rows", "again": "noise drawn and summed again"}
    for key, label in (
        parts | {"scalars": "exchange of scalars", "gradient": "exchange of a gradient"}
    ).items():
        middle.plot(
            workers, [found[str(w)]["step"][key] for w in workers], "o-", markersize=4, label=label
        )
    middle.set(title="What a step is made of", ylabel="seconds", yscale="log")
    for name, label in (
        ("quorum", "first 90 % of the answers"),
        ("everyone", "waiting for everyone"),
    ):
        right.plot(
            workers,
            [found[str(w)][name]["seconds"] for w in workers],
            "o-",
            markersize=4,
            label=label,
        )
    first = found[str(workers[0])]["quorum"]["seconds"]
    right.plot(
        workers,
        [first * workers[0] / w for w in workers],
        ":",
        color="#a1a1aa",
        label="in proportion",
    )
    right.set(title="Time to the target", ylabel="seconds", yscale="log")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(workers, [f"{w:,}" if w != 2048 else "" for w in workers])
        axes.set_xlabel("workers")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "scaling.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, simulate or draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("measure", "simulate", "draw"))
    parser.add_argument(
        "--repeats",
        type=int,
        default=2000,
        help="estimates for each interval at 8 workers, fewer at more",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=list(WORKERS), help="what to simulate (again)"
    )
    given = parser.parse_args()
    quiet()
    record = Record("scaling")
    if given.what == "measure":
        record.keep("constants", measure())
        print(record.entries["constants"])
    if given.what == "simulate":
        simulate(record, given.workers, given.repeats, given.seeds)
    if given.what != "measure":
        draw(record)


if __name__ == "__main__":
    main()
