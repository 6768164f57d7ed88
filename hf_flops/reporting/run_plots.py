"""Plots of a run's log: learning curve, queries of samples and classes, signal to noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .comparison_plots import COLOURS, draw_bars, draw_queries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Log = Sequence[Mapping[str, Any]]  # entries of the stock trainer's log
# rows so far, class → (samples, their queries)
Windows = Sequence[tuple[int, Mapping[int, Sequence[int]]]]


def curve_of(history: Log) -> tuple[str, list[tuple[float, float, float]]]:
    """Return what a learning curve shows, and its (rows, seconds, value) triples.

    The value is accuracy where the log has it, else the validation loss, else the training loss.
    Evaluations happen at the rows of the last log that is not after them; that of the untrained
    model, with `eval_on_start=True`, at zero.
    """
    names = ("eval_accuracy", "eval_loss", "loss")
    name = next((name for name in names if any(name in entry for entry in history)), "loss")
    points, rows, seconds = list[tuple[float, float, float]](), 0.0, 0.0
    for entry in history:
        rows, seconds = entry.get("rows", rows), entry.get("seconds", seconds)
        if name in entry and (rows or entry.get("step") == 0) and math.isfinite(entry[name]):
            points.append((rows, seconds, entry[name]))
    return {
        "eval_accuracy": "validation accuracy",
        "eval_loss": "validation loss",
        "loss": "training loss",
    }[name], points


def series_of(history: Log, name: str) -> list[tuple[float, float]]:
    """Return (rows, value) of a number in the log, where it is finite."""
    return [
        (entry["rows"], entry[name])
        for entry in history
        if "rows" in entry and math.isfinite(entry.get(name, math.nan))
    ]


def draw_seeds(
    axes: Axes, curves: Sequence[Sequence[tuple[float, float]]], xlabel: str, measure: str
) -> None:
    """Draw a learning curve: of one run, or mean and standard deviation of several seeds.

    Args:
        axes: where to draw.
        curves: (x, value) pairs of each run.
        xlabel: what x is.
        measure: what the value is.
    """
    runs = [np.array(curve, dtype=float).T for curve in curves]
    accuracy = "accuracy" in measure
    axes.set_title(f"{measure.capitalize()} against {xlabel.split()[0]}")
    if len(curves) == 1 and len(curves[0]) == 1:
        (x, value) = curves[0][0]
        name = f"after {x:,.0f} {xlabel}"
        draw_bars(axes, {name: value}, measure, ".1%" if accuracy else ".3g")
        return
    if len(runs) == 1:
        axes.plot(*runs[0], ".-", color=COLOURS["flops"], markersize=5, linewidth=1.4)
    else:  # where all runs have been
        grid = np.linspace(max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs), 100)
        values = np.array([np.interp(grid, x, y) for x, y in runs])
        mean, spread = values.mean(0), values.std(0, ddof=1)
        axes.plot(
            grid, mean, color=COLOURS["flops"], linewidth=1.6, label=f"mean of {len(runs)} seeds"
        )
        axes.fill_between(
            grid,
            mean - spread,
            mean + spread,
            label="± standard deviation",
            color=COLOURS["flops"],
            alpha=0.2,
            linewidth=0,
        )
        axes.legend(frameon=False)
    if accuracy:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.set(xlabel=xlabel, ylabel=measure)


def draw_classes(axes: Axes, windows: Windows) -> None:
    """Draw the queries per sample of each class, over the whole run.

    Args:
        axes: where to draw.
        windows: (rows so far, {class: (samples, their queries)}) of each stretch of the run.
    """
    labels, grid = _per_class(windows)
    samples, queries = grid.sum(0).T
    axes.bar(range(len(labels)), queries / samples, color=COLOURS["flops"], alpha=0.6)
    axes.axhline(queries.sum() / samples.sum(), color="#52525b", linestyle="--", linewidth=1)
    _class_ticks(axes.xaxis, labels)
    axes.set(
        xlabel="class", ylabel="queries per sample", title="Queries of each class (dashed: all)"
    )


def draw_classes_over_time(axes: Axes, windows: Windows) -> None:
    """Draw the queries per sample of each class in each stretch; see `draw_classes`."""
    labels, grid = _per_class(windows)
    edges = [0, *(rows for rows, _ in windows)]
    with np.errstate(invalid="ignore"):
        # NaN, which stays white, where a class was not drawn
        values = (grid[..., 1] / grid[..., 0]).T
    axes.xaxis.set_major_formatter("{x:,.0f}")
    mesh = axes.pcolormesh(edges, np.arange(len(labels) + 1) - 0.5, values, cmap="YlOrBr")
    axes.figure.colorbar(mesh, ax=axes, label="queries per sample")
    _class_ticks(axes.yaxis, labels)
    axes.set(
        xlabel="rows through the model",
        ylabel="class",
        title="Queries of each class over time (white: none drawn)",
    )


def _per_class(windows: Windows) -> tuple[list[int], np.ndarray]:
    """Return the classes, and (windows, classes, 2): samples and their queries."""
    labels = sorted({label for _, classes in windows for label in classes})
    return labels, np.array(
        [[classes.get(label, (0, 0)) for label in labels] for _, classes in windows], dtype=float
    )


def _class_ticks(axis: Axis, labels: Sequence[int]) -> None:
    step = -(-len(labels) // 12)
    axis.set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])


def _panels(count: int, across: int = 3) -> tuple[Figure, np.ndarray]:
    """Return a figure and `count` axes, so many beside each other, without a word to pyplot, whose
    backend is the user's.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hf_flops[plots]'.") from error
    down, across = -(-count // across), min(count, across)
    figure = Figure(figsize=(5.5 * across, 4.0 * down), layout="constrained")
    axes = np.atleast_1d(figure.subplots(down, across)).ravel()
    for empty in axes[count:]:
        empty.axis("off")
    return figure, axes[:count]


def save_learning_curve(
    path: str | Path, curves: Sequence[Sequence[tuple[float, float, float]]], measure: str
) -> None:
    """Save a learning curve against rows and against seconds.

    Args:
        path: where to; the ending decides the format.
        curves: (rows, seconds, value) triples of each run; several differ in their seed.
        measure: what the value is.
    """
    figure, panels = _panels(2)
    _draw_both(panels, curves, measure)
    figure.savefig(path, dpi=120)


def _draw_both(
    panels: Iterable[Axes], curves: Sequence[Sequence[tuple[float, float, float]]], measure: str
) -> None:
    for axes, column, xlabel in zip(
        panels, (0, 1), ("rows through the model", "seconds"), strict=True
    ):
        draw_seeds(
            axes,
            [[(point[column], point[2]) for point in curve] for curve in curves],
            xlabel,
            measure,
        )


def save_queries(path: str | Path, samples: Sequence[float], windows: Windows) -> None:
    """Save where the queries went: to which samples, to which classes, and when.

    Args:
        path: where to; the ending decides the format.
        samples: queries per step of each sample; left out where empty.
        windows: see `draw_classes`; left out where empty.
    """
    figure, panels = _panels(bool(samples) + 2 * bool(windows))
    if samples:
        draw_queries(panels[0], samples, float(np.mean(samples)))
    if windows:
        draw_classes(panels[-2], windows)
        draw_classes_over_time(panels[-1], windows)
    figure.savefig(path, dpi=120)


def draw_signal(axes: Axes, signal: Sequence[tuple[float, float]]) -> None:
    """Draw signal to noise, (rows, ratio) pairs, and its mean over a fifth of the run.

    Single entries are noisy, and 0 where the estimate of the signal came out negative.
    """
    rows, ratios = np.array(signal, dtype=float).T
    width = max(1, len(rows) // 10)
    sums = np.convolve(ratios, np.ones(2 * width + 1))[width:-width]
    means = sums / np.convolve(np.ones(len(rows)), np.ones(2 * width + 1))[width:-width]
    axes.plot(rows, ratios, ".", color=COLOURS["flops"], alpha=0.35, markersize=5)
    axes.plot(rows, means, color=COLOURS["flops"], linewidth=1.6)
    axes.set(
        xlabel="rows through the model",
        ylabel="squared gradient / variance of an estimate",
        title="Signal to noise",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)


def save_signal(
    path: str | Path, signal: Sequence[tuple[float, float]], gain: Sequence[tuple[float, float]]
) -> None:
    """Save signal to noise and the gain of the allocation over time; (rows, value) pairs each."""
    figure, (left, right) = _panels(2)
    draw_signal(left, signal)
    rows, values = np.array(gain, dtype=float).reshape(-1, 2).T
    right.plot(rows, values, ".-", color=COLOURS["flops"], markersize=4, linewidth=1.2)
    right.axhline(1.0, color="#52525b", linestyle="--", linewidth=1)
    right.set(
        xlabel="rows through the model",
        ylabel="variance with equal counts / with ours",
        title="What the allocation gained (dashed: nothing)",
    )
    right.xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(path, dpi=120)


def save_run(
    path: str | Path,
    curve: Sequence[tuple[float, float, float]],
    measure: str,
    signal: Sequence[tuple[float, float]] = (),
    queries: Sequence[float] = (),
) -> None:
    """Save one picture of a whole run.

    Args:
        path: where to; the ending decides the format.
        curve: (rows, seconds, value) triples.
        measure: what the value is.
        signal: see `draw_signal`; left out where empty.
        queries: queries per step of each sample; left out where empty.
    """
    figure, panels = _panels(2 + bool(signal) + bool(queries), across=2)
    _draw_both(panels[:2], [curve], measure)
    if signal:
        draw_signal(panels[2], signal)
    if queries:
        draw_queries(panels[-1], queries, float(np.mean(queries)))
    figure.savefig(path, dpi=120)
