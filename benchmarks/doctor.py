"""Is what the doctor suggests as good as a grid? Five learning rates by three epsilons, beside its
own, at the same rows.

The tasks of accuracy_tasks.py. The best of the grid is that of the mean validation accuracy along
the run with seed 0; it and the doctor's suggestion are then run with other seeds and judged on the
test split. The doctor looks at the training split, and nothing is tuned afterwards.

    python benchmarks/doctor.py --task digits
    python benchmarks/doctor.py --task fashion
    python benchmarks/doctor.py --task reviews
    python benchmarks/doctor.py --task reviews --again --seeds 1 2 3 4 5 6 7 8
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from records import ROOT, Record, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from accuracy import GRID, Run, train  # isort: skip
from accuracy_tasks import TASKS, LearningTask

from hf_flops import FlopsTrainingArguments, doctor

EPSILONS = [1e-4, 1e-3, 1e-2]


def suggested(task: LearningTask, queries: int) -> dict[str, Any]:
    """Ask the doctor, with the batches that training will have; returns its facts by name."""
    args = FlopsTrainingArguments(
        output_dir="outputs/doctor",
        per_device_train_batch_size=task.batch,
        queries_per_sample=queries,
        rows_per_forward=64,
        report_to="none",
    )
    found = doctor(task.model(0), task.train, args=args)
    return {name: fact.value for name, fact in found.facts.items()}


def main() -> None:
    """Run all, and write results/doctor_<task>.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--rows", type=int, default=26_000)
    parser.add_argument("--queries", type=int, default=4, help="rows of a sample")
    parser.add_argument("--points", type=int, default=8, help="evaluations of a run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--again", action="store_true", help="take the grid of an earlier run")
    parser.add_argument(
        "--only_doctor", action="store_true", help="print what it suggests, and run nothing"
    )
    options = parser.parse_args()
    quiet()
    task = TASKS[options.task]()
    record, name = Record(f"doctor_{options.task}", indent=1), f"{options.rows} rows"
    before = record.entries.get(name) if options.again else None
    if options.again and before is None:
        parser.error(f"--again: benchmarks/results holds no run of {options.task} with {name} yet.")
    facts = suggested(task, options.queries)
    print(
        {name: value if value is None else float(f"{value:.3g}") for name, value in facts.items()},
        flush=True,
    )
    if options.only_doctor:
        return

    def run(rate: float, scale: float, seed: int, part: str) -> Run:
        own = replace(task, scale=scale)
        return train(
            "flops", own, Run(rate, options.queries, seed), options.rows, part, options.points
        )

    if before:
        grid = before["grid"]
        best = before["best of the grid"]["rate"], before["best of the grid"]["epsilon"]
    else:
        means = {
            (rate, scale): run(rate, scale, 0, "validation").mean
            for scale in EPSILONS
            for rate in GRID
        }
        grid = {f"lr {rate:g}, epsilon {scale:g}": mean for (rate, scale), mean in means.items()}
        best = max(means, key=lambda pair: means[pair])
    found: dict[str, Any] = {"facts": facts, "grid": grid}
    for who, (rate, scale) in {
        "best of the grid": best,
        "doctor": (facts["learning_rate"], facts["epsilon"]),
    }.items():
        runs = [run(rate, scale, seed, "test") for seed in options.seeds]
        ends = [own.end for own in runs]
        found[who] = {
            "rate": rate,
            "epsilon": scale,
            "accuracy": ends,
            "rows": runs[0].curve[-1][0],
        }
        print(
            f"{task.name:8} {who}: lr {rate:g}, epsilon {scale:.2g}: {np.mean(ends):.1%}",
            flush=True,
        )
    record.keep(name, found)


if __name__ == "__main__":
    main()
