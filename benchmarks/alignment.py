"""Tune the learning rate of every method of recipes/alignment.py on a grid, then measure each at
its best.

Grids of five rates (for SGD, of six decades) are searched on validation images, by zero-shot
accuracy with seed 0; the best value of each method is then run with three other seeds, which also
choose the training images and the new projections, and tested. Rows, trained parameters, batches
and epochs are the same for all. Runs that the record holds are not repeated.

    python benchmarks/alignment.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np

from records import ROOT, Record, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from recipes.alignment import RecipeArguments, RecipeTrainingArguments, run
from recipes.alignment_methods import METHODS
from recipes.alignment_task import Task, load_task

ALONE = "flops, projections alone"  # no noise and no query: what is exact is all that is trained
ADAM = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
GRIDS = {
    "flops": ADAM,
    ALONE: ADAM,
    "mezo": ADAM,
    "backprop": ADAM,
    "spsa-gc": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
}  # SGD: steps of decades
MEASURES = ("accuracy", "image_to_text_1", "image_to_text_5", "text_to_image_1", "text_to_image_5")


@cache
def task(classes: str, seed: int, adapter: str) -> tuple[RecipeArguments, Task]:
    """Load the recipe's default task with the training images of a seed."""
    recipe = RecipeArguments(classes=classes, adapter=adapter)
    return recipe, load_task(recipe, seed)


def measure(name: str, rate: float, classes: str, seed: int) -> dict[str, Any]:
    """Train and test once, quietly."""
    options = {"disable_tqdm": True, "logging_strategy": "no", "output_dir": "outputs/benchmark"}
    args = RecipeTrainingArguments(learning_rate=rate, seed=seed, **options)
    method, adapter = ("flops", "none") if name == ALONE else (name, "lora")
    recipe, own = task(classes, seed, adapter)
    with contextlib.redirect_stdout(io.StringIO()):
        found = asdict(run(method, recipe, args, own)[0])
    after = ", ".join(f"{name} {scores['accuracy']:.3f}" for name, scores in found["after"].items())
    print(
        f"{name:24} lr {rate:<6g} seed {seed}: validation {found['validation']:.3f}, test {after}, "
        f"{found['rows']:,} rows, {found['seconds']:.0f} s",
        flush=True,
    )
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Average runs that differ in the seed."""
    found: dict[str, Any] = {}
    for name in runs[0]["after"]:
        for moment in ("before", "after"):
            values = np.array(
                [[run[moment][name][measure] for measure in MEASURES] for run in runs]
            )
            spread = values.std(0, ddof=1) if len(runs) > 1 else np.full(len(MEASURES), np.nan)
            pairs = zip(MEASURES, values.mean(0), spread, strict=True)
            found.setdefault(name, {})[moment] = {
                measure: [float(m), float(s)] for measure, m, s in pairs
            }
    return {
        **found,
        "rows": runs[0]["rows"],
        "seconds": float(np.median([run["seconds"] for run in runs])),
    }


def main() -> None:
    """Search the grids, measure the best, write results/alignment_<classes>.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--classes", default="all", choices=["all", "base"])
    parser.add_argument(
        "--methods", nargs="+", default=[*METHODS, ALONE], choices=[*METHODS, ALONE]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    quiet()
    record = Record(f"alignment_{options.classes}")
    for method in options.methods:
        entry = record.entries.get(method, {"runs": {}})

        def measured(
            rate: float, seed: int, method: str = method, entry: dict[str, Any] = entry
        ) -> dict[str, Any]:
            name = f"learning rate {rate:g}, seed {seed}"
            if name not in entry["runs"]:
                entry["runs"][name] = measure(method, rate, options.classes, seed)
                record.keep(method, entry)
            return entry["runs"][name]

        validation = {rate: measured(rate, 0)["validation"] for rate in GRIDS[method]}
        best = max(validation, key=validation.__getitem__)
        found = summary([measured(best, seed) for seed in options.seeds])
        record.keep(
            method, {**entry, "learning_rate": best, "validation_by_rate": validation, **found}
        )


if __name__ == "__main__":
    main()
