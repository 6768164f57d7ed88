"""Does `learning_rate_search` find the rate? From starts far too small and far too large, beside a
grid, at the same rows.

The tasks of accuracy_tasks.py with four rows per sample, and as many rows for every run: those of
the search are charged. A grid of five rates runs without the search. Starts are multiples of the
best rate of a grid.

    python benchmarks/learning_rate.py --task digits
    python benchmarks/learning_rate.py --task fashion
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from records import ROOT, Record, quiet
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(ROOT))

from accuracy_tasks import TASKS, LearningTask

from hf_flops import FlopsTrainer, FlopsTrainingArguments

FACTORS = [1e-2, 1e-1, 1.0, 1e1, 1e2]
GRID = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
# Best of a grid for four rows per sample, by the mean validation accuracy along 60,000 rows.
TUNED = {"digits": 3e-2, "fashion": 1e-2, "reviews": 3e-2}
BATCH, QUERIES = 32, 4


def train(
    task: LearningTask, rate: float, seed: int, rows: int, part: str, **options: Any
) -> dict[str, Any]:
    """Train once; returns the accuracy on a split, the rows, and how the rate went."""
    args = FlopsTrainingArguments(
        output_dir="outputs/learning_rate",
        per_device_train_batch_size=BATCH,
        max_steps=rows // (BATCH * QUERIES),
        max_queries=rows,
        queries_per_sample=QUERIES,
        rows_per_forward=64,
        learning_rate=rate,
        seed=seed,
        lr_scheduler_type=options.pop("schedule", "constant_with_warmup"),
        warmup_steps=0.05,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        pictures=False,
        **options,
    )
    trainer = FlopsTrainer(task.model(seed), args, train_dataset=task.train)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    found = {
        "accuracy": task.accuracy(trainer.model, part),
        "rows": trainer.ledger.all_rows,
        "steps": trainer.state.global_step,
        "rates": [entry["learning_rate"] for entry in logs],
    }
    middle = found["rates"][len(logs) // 2] if logs else float("nan")
    print(
        f"{task.name:8} {'search from' if args.learning_rate_search else 'fixed':12} {rate:<8g} "
        f"seed {seed} {part:10} {found['accuracy']:.3f}, {found['rows']:,} rows, {found['steps']} "
        f"steps, rate {middle:.2g} in the middle, {found['rates'][-1]:.2g} at the end",
        flush=True,
    )
    return found


def mean(runs: list[dict[str, Any]]) -> float:
    """Return the mean accuracy of runs."""
    return float(np.mean([run["accuracy"] for run in runs]))


def main() -> None:
    """Run all, and write results/learning_rate_<task>.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=TUNED, default="digits")
    parser.add_argument("--rows", type=int, default=26_000)
    parser.add_argument(
        "--factors", nargs="*", type=float, default=FACTORS, help="start over the tuned rate"
    )
    parser.add_argument("--grid", nargs="*", type=float, default=GRID)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--schedule", default="constant_with_warmup")
    parser.add_argument("--no_record", action="store_true", help="print only")
    options = parser.parse_args()
    quiet()
    task, tuned = TASKS[options.task](), TUNED[options.task]
    record = Record(f"learning_rate_{options.task}", indent=None)
    starts = {
        f"search from {factor:g} x": (factor * tuned, {"learning_rate_search": True})
        for factor in options.factors
    }
    for name, (rate, more) in {
        **{f"fixed {rate:g}": (rate, {}) for rate in options.grid},
        **starts,
    }.items():
        own = {
            **more,
            **(
                {} if options.schedule == "constant_with_warmup" else {"schedule": options.schedule}
            ),
        }
        runs = [train(task, rate, seed, options.rows, "test", **own) for seed in options.seeds]
        print(f"{task.name:8} {name:24} {mean(runs):.3f}", flush=True)
        if not options.no_record:
            record.keep(name, {"rate": rate, "runs": runs})


if __name__ == "__main__":
    main()
