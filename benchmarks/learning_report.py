"""Tables and the figure of docs/results.md, from what benchmarks/learning.py wrote.

python benchmarks/learning_report.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from learning import Run  # isort: skip
from records import ROOT  # isort: skip

COLUMNS = 3
SHARE = 0.9  # of the way from the untrained adapter to backprop
COLOURS = {
    "flops": "tab:blue",
    "mezo": "tab:orange",
    "flops-authors": "tab:red",
    "fzoo": "tab:green",
    "backprop": "black",
}


def runs_of(entry: dict[str, Any]) -> list[Run]:
    """Return the runs of a method."""
    return [
        Run(entry["rate"], entry["queries"], int(seed), [(int(r), s, a) for r, s, a in curve])
        for seed, curve in entry["curves"].items()
    ]


def target_of(entries: dict[str, Any]) -> float:
    """Return the accuracy that counts as reached."""
    curves = np.array(
        [[accuracy for _, _, accuracy in run.curve] for run in runs_of(entries["backprop"])]
    )
    start, best = curves[:, 0].mean(), curves.mean(0).max()
    return float(start + SHARE * (best - start))


def spread(values: Sequence[float]) -> str:
    """Format mean and standard deviation of accuracies."""
    return f"{np.mean(values):.1%}" + (
        f" ± {np.std(values, ddof=1):.1%}" if len(values) > 1 else ""
    )


def reached(runs: list[Run], target: float) -> list[str]:
    """Format how many runs get to the target, and the median of their rows and seconds, others
    counting as infinite.
    """
    found = [run.to(target) for run in runs]
    arrived = f"{sum(point is not None for point in found)} of {len(runs)}"
    rows, seconds = sorted(point or (10**12, 0.0) for point in found)[len(found) // 2]
    return [arrived, *(["not reached"] * 2 if rows == 10**12 else [f"{rows:,}", f"{seconds:.1f}"])]


def table(entries: dict[str, Any]) -> str:
    """Lay the methods of a task out as a Markdown table."""
    target = target_of(entries)
    columns = [
        "method",
        "learning rate",
        "rows per sample",
        "accuracy at the end",
        "along the run",
        "rows",
        "seconds",
    ]
    columns += ["at the target", "rows to target", "seconds to target"]
    lines = [columns, ["---"] * len(columns)]
    for name, entry in entries.items():
        runs = runs_of(entry)
        rows, seconds, last = zip(*(run.curve[-1] for run in runs), strict=True)
        along = np.mean([run.mean for run in runs])
        tuned = [f"{entry['rate']:g}", str(entry["queries"])]
        spent = [f"{rows[0]:,}", f"{np.mean(seconds):.0f}"]
        lines.append([name, *tuned, spread(last), f"{along:.1%}", *spent, *reached(runs, target)])
    return f"Target: {target:.1%}.\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(axes: Any, title: str, entries: dict[str, Any]) -> None:
    """Draw mean and range of the accuracy over rows."""
    for name, entry in entries.items():
        if name not in COLOURS:
            continue
        curves = [run.curve for run in runs_of(entry)]
        rows = np.array([row for row, _, _ in curves[0]])
        accuracy = np.array([[point for _, _, point in curve[: len(rows)]] for curve in curves])
        rows = rows[: accuracy.shape[1]]
        axes.plot(rows[1:], accuracy.mean(0)[1:], color=COLOURS[name], label=name)
        axes.fill_between(
            rows[1:],
            accuracy.min(0)[1:],
            accuracy.max(0)[1:],
            color=COLOURS[name],
            alpha=0.15,
            linewidth=0,
        )
    axes.axhline(target_of(entries), color="grey", linestyle=":", label="target")
    axes.set(title=title, xscale="log", xlabel="rows through the model", ylabel="test accuracy")
    axes.grid(alpha=0.3)


def main() -> None:
    """Print the tables and write docs/learning.png."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("learning_*.json"))
    tasks = {path.stem.removeprefix("learning_"): json.loads(path.read_text()) for path in paths}
    tasks = {
        name: entries
        for name, entries in tasks.items()
        if "backprop" in entries and not name.endswith("_quick")
    }
    lines = -(-len(tasks) // COLUMNS)
    figure, grid = plt.subplots(
        lines, COLUMNS, figsize=(5 * COLUMNS, 3.8 * lines), squeeze=False, layout="constrained"
    )
    all_axes = list(grid.flat)
    for axes in all_axes[len(tasks) :]:
        axes.set_axis_off()
    for axes, (name, entries) in zip(all_axes, tasks.items(), strict=False):
        print(f"\n## {name}\n\n{table(entries)}")
        draw(axes, name, entries)
    max(all_axes, key=lambda axes: len(axes.lines)).legend(fontsize=8)  # it names every method
    figure.savefig(ROOT / "docs" / "learning.png", dpi=110)


if __name__ == "__main__":
    main()
