"""The training objective against rows, on tasks that leave an adapter something to gain: ours,
each ingredient removed, opponents with the same head.

Every method trains the same LoRA matrices from the same start. J is the mean cross-entropy of all
training samples under a head that is solved for the adapter of the moment, whatever head the method
trained. Learning rates come from a grid (seed 0; mean of J over the second half of the logarithm of
rows), which grows until its best is not at its edge and is then refined around it; so do the rows
per sample. The best is run with fresh seeds. Every row is charged, clean ones too; evaluations are
not.

    python benchmarks/learning.py --task permuted --gap
    python benchmarks/learning.py --task permuted --methods flops "MeZO + head, Adam"
    python benchmarks/learning.py --task permuted --quick

Each run is kept in results/learning_<task>.json when it ends, and not repeated (unless --force), so
that a benchmark can be stopped, and two processes can share a task.
"""

from __future__ import annotations

import argparse
import math
import sys

import numpy as np
from torch import nn

from records import ROOT, SharedRecord, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from learning_head import SolvedHead
from learning_opponents import OPPONENTS, train_opponent
from learning_ours import OURS, QUERIES, RANDOM_SIGN, train_ours
from learning_tasks import TASKS, Task, features

Curve = list[tuple[int, float, float, float]]  # rows, J, test accuracy, seconds

METHODS = [*OURS, *OPPONENTS]
FROZEN = "frozen adapter"
SEEDS = [1, 2, 3]
# Middle of the first three learning rates, in powers of the square root of ten.
MIDDLE = {
    "MeZO + head, SGD": -3,
    "MeZO + head, Adam": -4,
    "shared one-sided + head": -3,
    "FZOO + head": -3,
    "ZO-Muon + head": -4,
    "backprop": -3,
}
EXTENSIONS = 4


def rate_of(exponent: float) -> float:
    """Return a learning rate of the grid, of exponents of the square root of ten."""
    return float(f"{10 ** (exponent / 2):.2g}")


def measure(task: Task, model: nn.Module, accuracy: bool = True) -> tuple[float, float]:
    """Return J, and the accuracy on the test split with the same head (nan if not asked for)."""
    found, labels = features(model, task.train), task.train["labels"]
    found = found.nan_to_num(0.0, 0.0, 0.0)
    head = SolvedHead(task.classes, found.shape[1])
    head.solve(found, labels)
    objective = float(head.losses(found, labels).mean())
    if not accuracy:
        return objective, math.nan
    answers = head.logits(features(model, task.test).nan_to_num(0.0, 0.0, 0.0)).argmax(-1)
    return objective, float((answers == task.test["labels"]).double().mean())


def score(curve: Curve) -> float:
    """Return the mean of J over the second half of a curve's points, which are log-spaced."""
    return float(np.mean([objective for _, objective, *_ in curve[len(curve) // 2 :]]))


def run(
    method: str, task: Task, rate: float, queries: int, seed: int, budget: int, points: int
) -> Curve:
    """Train once; returns what was measured at so many log-spaced numbers of rows.

    Accuracy is measured with fresh seeds only, as seed 0 is for the grid.
    """
    first = min(2000 if budget > 40_000 else 640, budget / 2)
    wanted = np.geomspace(first, budget, points).round()
    curve: Curve = []

    def look(rows: int, seconds: float, model: nn.Module) -> None:
        reached = int((rows >= wanted).sum()) - len(curve)
        if reached > 0:
            point = rows, *measure(task, model, seed != 0), round(seconds, 3)
            curve.extend([point] * reached)

    train = train_ours if method in OURS else train_opponent
    train(method, task, rate, queries, seed, budget, look)
    rows, objective, accuracy, seconds = curve[-1]
    print(
        f"{task.name:9} {method:30} lr {rate:<8g} q {queries:<3} seed {seed}  J {objective:.4f}, "
        f"accuracy {accuracy:.3f}, {rows:,} rows, {rows / max(seconds, 1e-9):,.0f} rows/s",
        flush=True,
    )
    return curve


class Benchmark:
    """The runs of a task, kept in its file.

    Args:
        task: what is trained.
        record: the file.
        options: of the command line.
    """

    def __init__(self, task: Task, record: SharedRecord, options: argparse.Namespace) -> None:
        self.task, self.record, self.options = task, record, options

    def curve(self, method: str, rate: float, queries: int, seed: int) -> Curve:
        """Return a run, from the file if it is there."""
        if method == "backprop":
            budget, points = self.task.backprop_budget, self.options.points
        elif seed == 0:
            budget, points = self.options.tuning_budget, self.options.points // 2
        else:
            budget, points = self.options.budget, self.options.points
        name = f"lr {rate:g}, q {queries}, seed {seed}, {budget} rows"
        found = self.record.read().get(method, {}).get("runs", {}).get(name)
        if found is None or self.options.force:
            found = run(method, self.task, rate, queries, seed, budget, points)
            with self.record.changed(method) as entry:
                entry.setdefault("runs", {})[name] = found
        return found

    def tune(self, method: str) -> tuple[float, int]:
        """Return the best rate and rows per sample; each grid of rates grows until its best is not
        at its edge, at most `EXTENSIONS` times, and the rates on both sides of the best one follow.
        """
        known = QUERIES[method] if method in OURS else OPPONENTS[method].queries
        middle, scores = float(MIDDLE.get(method, -4)), dict[tuple[float, int], float]()
        for queries in self.options.queries or known:
            own = dict[float, float]()
            wanted = [middle - 1, middle, middle + 1]
            while wanted and len(own) < 3 + EXTENSIONS:
                for exponent in wanted:
                    own[exponent] = score(self.curve(method, rate_of(exponent), queries, 0))
                middle = min(own, key=own.__getitem__)
                wanted = [e for e in (middle - 1, middle + 1) if e not in own]
            scores |= {(exponent, queries): found for exponent, found in own.items()}
            middle = min(scores, key=scores.__getitem__)[0]
        best, queries = min(scores, key=scores.__getitem__)
        for exponent in (best - 0.5, best + 0.5):
            found = score(self.curve(method, rate_of(exponent), queries, 0))
            scores[exponent, queries] = found
        return rate_of(min(scores, key=scores.__getitem__)[0]), queries

    def method(self, method: str) -> None:
        """Tune a method, and run it with fresh seeds."""
        if method == RANDOM_SIGN:
            best = self.record.read().get("flops", {}).get("best")
            if best is None:
                raise SystemExit(f"{RANDOM_SIGN!r} takes the rate of 'flops': run that first.")
            rate, queries = best["rate"], best["queries"]
        else:
            rate, queries = self.tune(method)
        with self.record.changed(method) as entry:
            entry["best"] = {"rate": rate, "queries": queries}
        for seed in self.options.seeds:
            self.curve(method, rate, queries, seed)

    def frozen(self) -> tuple[float, float]:
        """Return J and accuracy of the converged head on the frozen backbone."""
        objective, accuracy = measure(self.task, self.task.model(0))
        with self.record.changed(FROZEN) as entry:
            entry.update(J=objective, accuracy=accuracy)
        return objective, accuracy

    def gap(self) -> None:
        """Print what there is to gain."""
        before = self.frozen()
        self.method("backprop")
        best = self.record.read()["backprop"]["best"]
        ends = [self.curve("backprop", best["rate"], 1, seed)[-1] for seed in self.options.seeds]
        after = [float(np.mean([end[i] for end in ends])) for i in (1, 2)]
        spread = [float(np.std([end[i] for end in ends])) for i in (1, 2)]
        print(
            f"{self.task.name}: converged head on the frozen backbone J {before[0]:.3f}, accuracy "
            f"{before[1]:.1%}; backprop J {after[0]:.3f} ± {spread[0]:.3f}, accuracy "
            f"{after[1]:.1%} ± {spread[1]:.1%} ({len(ends)} seeds, {ends[0][0]:,} rows, lr "
            f"{best['rate']:g})"
        )


def main() -> None:
    """Tune, run, and fill results/learning_<task>.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=TASKS, default="permuted")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--gap", action="store_true", help="print what a task has to gain, and end")
    parser.add_argument("--budget", type=int, help="rows of a final run")
    parser.add_argument("--tuning_budget", type=int, help="rows of each run of the grid")
    parser.add_argument("--queries", nargs="+", type=int, help="rows per sample to try")
    parser.add_argument("--points", type=int, help="evaluations of a run")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--force", action="store_true", help="repeat runs that are in the file")
    parser.add_argument("--quick", action="store_true", help="few rows, one seed: the shape of it")
    options = parser.parse_args()
    quiet()
    task = TASKS[options.task]()
    if options.quick:
        options.budget, options.tuning_budget = 8_000, 4_000
        options.seeds, options.points = [1], 6
    options.budget = options.budget or task.budget
    options.points = options.points or task.points
    options.tuning_budget = options.tuning_budget or task.tuning_budget
    name = f"learning_{options.task}{'_quick' if options.quick else ''}"
    benchmark = Benchmark(task, SharedRecord(name, indent=None), options)
    if options.gap:
        return benchmark.gap()
    benchmark.frozen()
    for method in options.methods:
        benchmark.method(method)


if __name__ == "__main__":
    main()
