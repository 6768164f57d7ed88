"""Pictures of a run: accuracy against rows, and where the queries went (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS = {"flops": "#c2410c", "mezo": "#2563eb", "flops-authors": "#7c3aed", "backprop": "#52525b"}


def pyplot() -> Any:
    """Import matplotlib without a screen."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hf_flops[plots]'.") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def draw_learning_curves(
    axes: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], start: float
) -> None:
    """Draw accuracy against the rows that went through the model.

    Args:
        axes: where to draw.
        curves: method → (rows, accuracy) pairs.
        start: accuracy of the untrained adapter.
    """
    for method, points in curves.items():
        rows, accuracies = np.array(points, dtype=float).T
        axes.plot(
            rows,
            accuracies,
            ".-",
            color=COLOURS.get(method),
            label=method,
            markersize=4,
            linewidth=1.4,
        )
        axes.annotate(
            f"{accuracies[-1]:.1%}",
            (rows[-1], accuracies[-1]),
            textcoords="offset points",
            xytext=(4, -3),
        )
    axes.axhline(start, color="#a1a1aa", linestyle=":", label="untrained adapter")
    axes.set(
        xlabel="rows through the model", ylabel="validation accuracy", title="Accuracy against rows"
    )
    drawn = [rows for points in curves.values() for rows, _ in points if rows > 0]
    # labels of a shorter logarithmic axis run into each other
    if drawn and max(drawn) >= 10 * min(drawn):
        axes.set(xscale="log", xlabel="rows through the model (log scale)")
    axes.margins(x=0.15)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(edgecolor="none", loc="lower right")


def draw_queries(axes: Axes, mean_queries: Sequence[float], average: float) -> None:
    """Draw how many queries a step gave to each sample, samples in order.

    Args:
        axes: where to draw.
        mean_queries: queries per step of each sample.
        average: queries per step that equal counts would give.
    """
    queries = np.sort(np.asarray(mean_queries, dtype=float))[::-1]
    axes.fill_between(
        np.arange(len(queries)),
        queries,
        step="mid",
        color=COLOURS["flops"],
        alpha=0.35,
        linewidth=0,
    )
    axes.axhline(average, color="#52525b", linestyle="--", linewidth=1)
    axes.annotate("equal counts", (len(queries) * 0.98, average), ha="right", va="bottom")
    axes.set(
        xlabel="samples, most queried first",
        ylabel="queries per step, on average",
        title="Where the queries went",
    )
    axes.set_ylim(bottom=0)


def draw_images(
    figure: SubFigure, images: Sequence[np.ndarray], captions: Sequence[str], title: str
) -> None:
    """Draw a row of images, (H, W) or (H, W, C) each, under a title."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    row = figure.subplots(1, max(len(images), 2))
    for axes, image, caption in zip(row, images, captions, strict=False):
        axes.imshow(image, cmap="gray" if np.ndim(image) == 2 else None)
        axes.set_title(caption, fontsize=8)
    for axes in row:
        axes.axis("off")


def save_report(
    path: str | Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    start: float,
    mean_queries: Sequence[float] = (),
    average: float = 0.0,
    images: Mapping[str, tuple[Sequence[np.ndarray], Sequence[str]]] | None = None,
) -> None:
    """Save one picture of a run.

    Args:
        path: where to; the ending decides the format.
        curves: see `draw_learning_curves`.
        start: accuracy of the untrained adapter.
        mean_queries: see `draw_queries`; left out where empty.
        average: see `draw_queries`.
        images: title → (images, captions), a row each.
    """
    plt = pyplot()
    images = images or {}
    figure = plt.figure(figsize=(11, 4.2 + 2.0 * len(images)), layout="constrained")
    parts = np.atleast_1d(
        figure.subfigures(1 + len(images), 1, height_ratios=[4.2] + [2.0] * len(images))
    )
    panels = np.atleast_1d(parts[0].subplots(1, 2 if mean_queries else 1))
    draw_learning_curves(panels[0], curves, start)
    if mean_queries:
        draw_queries(panels[1], mean_queries, average)
    for part, (title, (pictures, captions)) in zip(parts[1:], images.items(), strict=True):
        draw_images(part, pictures, captions, title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
