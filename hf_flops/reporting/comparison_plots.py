"""Pictures of a run: accuracy against rows, and where the queries went (needs matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS = {"flops": "#c2410c", "mezo": "#2563eb", "flops-authors": "#7c3aed", "backprop": "#18181b"}


def pyplot() -> ModuleType:
    """Import matplotlib without a screen."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hf_flops[plots]'.") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def draw_bars(axes: Axes, values: Mapping[str, float], measure: str, form: str) -> None:
    """Draw a labelled bar for each value: what one evaluation can show.

    Args:
        axes: where to draw.
        values: name → value.
        measure: what the values are.
        form: format of a value.
    """
    colours = [COLOURS.get(name, COLOURS["flops"]) for name in values]
    bars = axes.bar(range(len(values)), list(values.values()), width=0.5, color=colours, alpha=0.8)
    axes.bar_label(bars, [f"{value:{form}}" for value in values.values()], padding=2)
    axes.set_xticks(range(len(values)), list(values))
    axes.set_xlim(-1, len(values))
    axes.set(xlabel="", ylabel=measure)


def draw_learning_curves(
    axes: Axes,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    start: float,
    untrained: str = "untrained adapter",
    title: str = "Accuracy against rows",
    measure: str = "validation accuracy",
    form: str = ".1%",
) -> None:
    """Draw accuracy, or another measure, against the rows that went through the model.

    Args:
        axes: where to draw.
        curves: method → (rows, accuracy) pairs.
        start: accuracy without training.
        untrained: what has that accuracy.
        title: of the axes.
        measure: what is drawn, and of which split.
        form: format of a value.
    """
    if curves and all(len(points) == 1 for points in curves.values()):
        draw_bars(axes, {name: points[0][1] for name, points in curves.items()}, measure, form)
        axes.axhline(start, color="#a1a1aa", linestyle="--", label=untrained)
        axes.set_title(title)
        axes.legend(edgecolor="none", loc="upper center", bbox_to_anchor=(0.5, -0.15))
        return
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
            f"{accuracies[-1]:{form}}",
            (rows[-1], accuracies[-1]),
            textcoords="offset points",
            xytext=(4, -3),
        )
    axes.axhline(start, color="#a1a1aa", linestyle="--", label=untrained)
    axes.set(xlabel="rows through the model", ylabel=measure, title=title)
    drawn = [rows for points in curves.values() for rows, _ in points if rows > 0]
    # labels of a shorter logarithmic axis run into each other
    if drawn and max(drawn) >= 10 * min(drawn):
        # linear from 0 to the first point
        axes.set_xscale("symlog", linthresh=min(drawn), linscale=0.3)
        decades = range(math.ceil(math.log10(min(drawn))), math.ceil(math.log10(max(drawn))))
        ticks = [0, *(10**decade for decade in decades)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="rows through the model (log scale)")
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.18)
    if form.endswith("%"):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(edgecolor="none", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


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
    axes.annotate(
        f"{average:.3g} each, if all samples got the same",
        (len(queries) * 0.98, average),
        ha="right",
        va="bottom",
    )
    axes.set(
        xlabel="samples, the one with most queries first",
        ylabel="mean number of queries in a step",
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
    panels: Sequence[Callable[[Axes], None]],
    images: Mapping[str, tuple[Sequence[np.ndarray], Sequence[str]]] | None = None,
) -> None:
    """Save one picture of a run.

    Args:
        path: where to; the ending decides the format.
        panels: each draws on axes, side by side; see `draw_learning_curves` and `draw_queries`.
        images: title → (images, captions), a row each.
    """
    plt = pyplot()
    images = images or {}
    width = max(11, 5 * len(panels))
    figure = plt.figure(figsize=(width, 4.2 + 2.0 * len(images)), layout="constrained")
    parts = np.atleast_1d(
        figure.subfigures(1 + len(images), 1, height_ratios=[4.2] + [2.0] * len(images))
    )
    for axes, draw in zip(parts[0].subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
    for part, (title, (pictures, captions)) in zip(parts[1:], images.items(), strict=True):
        draw_images(part, pictures, captions, title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
