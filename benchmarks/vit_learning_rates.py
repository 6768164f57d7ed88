"""Tune the learning rate of every method of recipes/vit.py on the same grid, then measure each at
its best.

The grid is searched on the validation split with one seed; the best value of each method is then
run with other seeds and tested. Rows, adapter, epochs, schedule and everything else are the same
for all.

    python benchmarks/vit_learning_rates.py --dataset digits
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from typing import Any

import numpy as np

from records import ROOT, Record, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from recipes.runs import Outcome
from recipes.vit import METHODS, RecipeArguments, RecipeTrainingArguments, load_data, run

GRID = [3e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1]


def measure(
    method: str, rate: float, recipe: RecipeArguments, seed: int, epochs: float, data: Any
) -> Outcome:
    """Train and test once, quietly."""
    args = RecipeTrainingArguments(
        output_dir="outputs/benchmark",
        learning_rate=rate,
        num_train_epochs=epochs,
        seed=seed,
        disable_tqdm=True,
        logging_strategy="no",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        outcome, _ = run(method, recipe, args, *data)
    print(
        f"{method:14} lr {rate:<6g} seed {seed}: validation {outcome.curve[-1][1]:.3f}, test "
        f"{outcome.after:.3f}, {outcome.rows:,} rows, {outcome.seconds:.0f} s",
        flush=True,
    )
    return outcome


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Average runs that differ in the seed."""
    after = np.array([o.after for o in outcomes])
    return {
        "learning_rate": outcomes[0].learning_rate,
        "before": float(np.mean([o.before for o in outcomes])),
        "after": float(after.mean()),
        "standard_deviation": float(after.std(ddof=1)) if len(after) > 1 else None,
        "rows": outcomes[0].rows,
        "steps": outcomes[0].steps,
        "parameters": outcomes[0].parameters,
        "rows_per_second": float(np.median([o.rows_per_second for o in outcomes])),
        "seconds": float(np.median([o.seconds for o in outcomes])),
    }


def main() -> None:
    """Search the grid, measure the best, write results/vit_<dataset>.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--per_class", type=int)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--grid", nargs="+", type=float, default=GRID)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    quiet()
    recipe = RecipeArguments(dataset=options.dataset, per_class=options.per_class)
    data = load_data(recipe, seed=42)
    record = Record(f"vit_{data[1].name}")
    for method in options.methods:
        grid = {
            rate: measure(method, rate, recipe, 0, options.epochs, data) for rate in options.grid
        }
        validation = {rate: outcome.curve[-1][1] for rate, outcome in grid.items()}
        best = max(validation, key=validation.__getitem__)
        outcomes = [
            measure(method, best, recipe, seed, options.epochs, data) for seed in options.seeds
        ]
        found = {"epochs": options.epochs, "validation_by_rate": validation, **summary(outcomes)}
        record.keep(method, found)


if __name__ == "__main__":
    main()
