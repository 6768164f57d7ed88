"""Tables and figures of docs/results.md and README.md, from what benchmarks/learning.py wrote.

python benchmarks/learning_report.py
python benchmarks/learning_report.py --tasks permuted
python benchmarks/learning_report.py --write
"""

from __future__ import annotations

import argparse
import json
import math
import re
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from records import ROOT  # isort: skip

SHARES = (0.25, 0.5, 0.8, 0.9)  # of backprop's gain in J
SMALL_SHARES = (0.05, 0.1, 0.25, 0.5)  # of tasks on which no run comes far
SHARES_OF = {"reviews": SMALL_SHARES}
SHORT_SHARES = (0.5, 0.8)  # in the table of README.md
SHORT_TASK = "permuted"
FROZEN, BACKPROP = "frozen adapter", "backprop"
MEZO = ("MeZO + head, SGD", "MeZO + head, Adam")
TITLES = {
    "permuted": "Small ViT, digits in shuffled patches",
    "noisy": "Small ViT, noisy digits",
    "reviews": "MiniLM, movie reviews",
}
COLOURS = {
    "flops": "#c2410c",
    "flops, equal counts": "#f59e0b",
    "flops, no control variate": "#84cc16",
    "flops, mean control variate": "#15803d",
    "own noise, equal counts": "#fb7185",
    "flops, head by exact gradient": "#be185d",
    "random sign": "#a1a1aa",
    "MeZO + head, SGD": "#2563eb",
    "MeZO + head, Adam": "#38bdf8",
    "shared one-sided + head": "#7c3aed",
    "FZOO + head": "#0f766e",
    "ZO-Muon + head": "#854d0e",
    "backprop": "#18181b",
}


class Line:
    """The fresh runs of a method with its best rate and rows per sample.

    Attributes:
        rate: learning rate.
        queries: rows per sample.
        curves: (seeds, points, 4): rows, J, accuracy, seconds.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self.rate, self.queries = entry["best"]["rate"], entry["best"]["queries"]
        own = f"lr {self.rate:g}, q {self.queries}, seed "
        runs = {
            name.removeprefix(own): curve
            for name, curve in entry.get("runs", {}).items()
            if name.startswith(own) and not name.startswith(f"{own}0,")
        }
        most = max((_budget(name) for name in runs), default=0)
        chosen = [curve for name, curve in runs.items() if _budget(name) == most]
        self.curves = np.array(chosen, dtype=float)

    def rows_to(self, level: float) -> list[float]:
        """Return each seed's rows to a level of J, interpolated over the logarithm of rows; inf
        where it was not reached.
        """
        return [_crossing(curve[:, 0], curve[:, 1], level) for curve in self.curves]

    @property
    def ends(self) -> np.ndarray:
        """The last point of each seed, (seeds, 4)."""
        return self.curves[:, -1]


def _budget(name: str) -> int:
    """Return the budget in a run's name."""
    return int(name.split(", ")[-1].removesuffix(" rows"))


def _crossing(rows: np.ndarray, objective: np.ndarray, level: float) -> float:
    below = np.flatnonzero(objective <= level)
    if not len(below):
        return math.inf
    first = int(below[0])
    if first == 0:
        return float(rows[0])
    (x0, x1), (y0, y1) = np.log(rows[first - 1 : first + 1]), objective[first - 1 : first + 1]
    return float(np.exp(x0 + (x1 - x0) * (y0 - level) / (y0 - y1)))


def lines_of(entries: dict[str, Any]) -> dict[str, Line]:
    """Return the lines that have fresh runs, in the figure's order."""
    found = {name: Line(entries[name]) for name in COLOURS if "best" in entries.get(name, {})}
    return {name: line for name, line in found.items() if len(line.curves)}


def thousands(values: list[float]) -> str:
    """Format median and range of rows."""
    low, middle, high = min(values), float(np.median(values)), max(values)
    if math.isinf(middle):
        return "–" if math.isinf(low) else f"– (one at {low / 1000:.3g})"
    end = "–" if math.isinf(high) else f"{high / 1000:.3g}"
    return f"{middle / 1000:.3g} ({low / 1000:.3g} to {end})"


def ratio(own: list[float], others: list[list[float]], budget: float) -> str:
    """Format how many times our rows the best of the others takes."""
    mine = float(np.median(own))
    best = min((float(np.median(other)) for other in others), default=math.nan)
    if math.isinf(mine) or math.isnan(best):
        return ""
    return f" **{best / mine:.1f}×**" if math.isfinite(best) else f" **> {budget / mine:.1f}×**"


def levels_of(entries: dict[str, Any], shares: tuple[float, ...]) -> list[float]:
    """Return the values of J at shares of backprop's gain."""
    start, end = entries[FROZEN]["J"], float(lines_of(entries)[BACKPROP].ends[:, 1].mean())
    return [start - share * (start - end) for share in shares]


def short_table(entries: dict[str, Any]) -> str:
    """Lay out thousand rows to shares of backprop's gain, and the accuracy at the end."""
    levels = levels_of(entries, SHORT_SHARES)
    heads = [f"thousand rows to {share:.0%} of backprop's gain" for share in SHORT_SHARES]
    columns = ["method", *heads, "test accuracy at the end"]
    never = ["–"] * len(SHORT_SHARES)
    cells = [columns, ["---"] * len(columns)]
    cells.append([FROZEN, *never, f"{entries[FROZEN]['accuracy']:.1%}"])
    for name, line in lines_of(entries).items():
        reached = [thousands(line.rows_to(level)) for level in levels]
        cells.append([name, *reached, mean(line.ends[:, 2], ".1%")])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def table(entries: dict[str, Any], shares: tuple[float, ...] = SHARES) -> str:
    """Lay the methods of a task out as a Markdown table, with rows to shares of backprop's gain."""
    lines, frozen = lines_of(entries), entries[FROZEN]
    levels = levels_of(entries, shares)
    mezo = [lines[name] for name in MEZO if name in lines]
    budget = max((float(line.ends[:, 0].max()) for line in mezo), default=math.nan)
    heads = [f"J {level:.3f} ({share:.0%})" for level, share in zip(levels, shares, strict=True)]
    columns = ["method", "rate", "rows per sample", *heads, "rows", "J at the end", "accuracy"]
    cells = [columns, ["---"] * len(columns)]
    untrained = [f"{frozen['J']:.3f}", f"{frozen['accuracy']:.1%}"]
    cells.append([FROZEN, *[""] * (3 + len(shares)), *untrained])
    for name, line in lines.items():
        reached = [line.rows_to(level) for level in levels]
        others = [[other.rows_to(level) for other in mezo] for level in levels]
        ours = name not in (*MEZO, BACKPROP)
        rows = [
            thousands(own) + (ratio(own, other, budget) if ours else "")
            for own, other in zip(reached, others, strict=True)
        ]
        settings = [f"{line.rate:g}", str(line.queries)]
        ends = [mean(line.ends[:, 1], ".3f"), mean(line.ends[:, 2], ".1%")]
        cells.append([name, *settings, *rows, f"{line.ends[0, 0]:,.0f}", *ends])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def mean(values: np.ndarray, form: str) -> str:
    """Format mean and standard deviation of seeds."""
    spread = f" ± {values.std(ddof=1):{form}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{spread}"


def draw(title: str, entries: dict[str, Any]) -> Any:
    """Draw J and accuracy against rows: mean of the seeds, and their range as a band."""
    lines, frozen = lines_of(entries), entries[FROZEN]
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    for axes, column, key, label in (
        (panels[0], 1, "J", "objective J: cross-entropy of the training samples"),
        (panels[1], 2, "accuracy", "accuracy on the test samples"),
    ):
        axes.set_title(f"{'Training' if key == 'J' else 'Test'}, every method with a solved head")
        for name, line in lines.items():
            rows, values = line.curves[:, :, 0].mean(0), line.curves[:, :, column]
            wide = 2.4 if name == "flops" else 1.3
            axes.plot(rows, values.mean(0), color=COLOURS[name], label=name, linewidth=wide)
            axes.fill_between(
                rows, values.min(0), values.max(0), color=COLOURS[name], alpha=0.12, linewidth=0
            )
        end = float(lines[BACKPROP].ends[:, column].mean())
        axes.axhline(frozen[key], color="#52525b", linestyle="--", linewidth=1)
        axes.axhline(end, color=COLOURS[BACKPROP], linestyle="--", linewidth=1)
        right = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate("frozen adapter", (0.99, frozen[key]), fontsize=8, **right)
        axes.annotate("end of backprop", (0.99, end), fontsize=8, **right)
        axes.set(xscale="log", xlabel="rows through the model (log scale)", ylabel=label)
        axes.grid(alpha=0.3)
    span = frozen["J"] - float(lines[BACKPROP].ends[:, 1].mean())
    panels[1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    panels[0].set_ylim(frozen["J"] - 1.15 * span, frozen["J"] + 0.35 * span)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{TITLES.get(title, title)}: mean of the seeds, and their range")
    return figure


def write(page: str, task: str, content: str) -> None:
    """Replace what is between `<!-- table: learning_<task> -->` and `<!-- end -->` in a page."""
    path = ROOT / page
    marker = f"<!-- table: learning_{task} -->"
    between = re.compile(f"({re.escape(marker)}\n).*?(<!-- end -->)", re.DOTALL)
    text, number = between.subn(
        lambda found: f"{found[1]}\n{content}\n\n{found[2]}", path.read_text()
    )
    if number != 1:
        raise SystemExit(f"{page} has {number} places for a table, not one: {marker}")
    path.write_text(text)


def write_pages(task: str, entries: dict[str, Any]) -> None:
    """Put a task's table and figure into the pages that have a place for them."""
    figure = f"![J and test accuracy against rows]({{folder}}learning_{task}.png)"
    write(
        "docs/results.md",
        task,
        f"{table(entries, SHARES_OF.get(task, SHARES))}\n\n{figure.format(folder='')}",
    )
    if task == SHORT_TASK:
        content = f"{short_table(entries)}\n\n{figure.format(folder='docs/')}"
        write("README.md", task, content)


def main() -> None:
    """Print the tables, write docs/learning_<task>.png, and the pages if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", help="by default all that have been run")
    parser.add_argument(
        "--write", action="store_true", help="put the tables into docs/results.md and README.md"
    )
    options = parser.parse_args()
    for path in sorted((ROOT / "benchmarks" / "results").glob("learning_*.json")):
        name, entries = path.stem.removeprefix("learning_"), json.loads(path.read_text())
        wanted = name in options.tasks if options.tasks else not name.endswith("_quick")
        if not wanted or FROZEN not in entries or BACKPROP not in lines_of(entries):
            continue
        print(f"\n## {name}\n\n{table(entries, SHARES_OF.get(name, SHARES))}")
        figure = draw(name, entries)
        figure.savefig(ROOT / "docs" / f"learning_{name}.png", dpi=110)
        plt.close(figure)
        if options.write:
            write_pages(name, entries)


if __name__ == "__main__":
    main()
