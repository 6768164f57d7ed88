"""What the alignment recipe leaves: a table, and a picture with images and their nearest sentences
before and after.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_flops.reporting.comparison_plots import COLOURS, pyplot
from recipes import runs
from recipes.pairs import HELD_OUT_TEMPLATES, PixelRows, embed

MEASURES = {
    "accuracy": "zero-shot\naccuracy",
    "image_to_text_1": "image to text\nrecall at 1",
    "image_to_text_5": "image to text\nrecall at 5",
    "text_to_image_1": "text to image\nrecall at 1",
    "text_to_image_5": "text to image\nrecall at 5",
}
RIGHT, WRONG, BEFORE = "#15803d", "#b91c1c", "#d4d4d8"
SHADES = {**COLOURS, "spsa-gc": "#0d9488"}


HEAD = (
    "method | classes | zero-shot accuracy before | after | image to text, recall at 1 | at 5 | "
    "text to image, at 1 | at 5 | rows | seconds | learning rate"
)


@dataclass(kw_only=True)
class AlignmentOutcome(runs.Outcome):
    """Scores by the set of classes that they were measured on, and the accuracy on validation
    images.
    """

    validation: float

    @property
    def table_rows(self) -> list[str]:
        """Its rows of the table: one for each set of classes."""
        rows = []
        for name, after in self.after.items():
            recalls = " | ".join(f"{after[measure]:.1%}" for measure in list(MEASURES)[1:])
            rows.append(
                f"{self.method} | {name} | {self.before[name]['accuracy']:.1%} | "
                f"**{after['accuracy']:.1%}** | {recalls} | {self.rows:,} | {self.seconds:.0f} | "
                f"{self.learning_rate:g}"
            )
        return rows


def verdict(outcomes: Sequence[Any]) -> str:
    """Say how much of backprop's gain each forward-only method had, and how base and new classes go
    together.
    """
    lines = []
    reference = next((o for o in outcomes if o.method == "backprop"), None)
    for o in outcomes:
        if reference is not None and o is not reference:
            name = next(iter(o.after))
            gain, best = (
                x.after[name]["accuracy"] - x.before[name]["accuracy"] for x in (o, reference)
            )
            lines.append(
                f"{o.method} had {gain / best:.0%} of backprop's gain in zero-shot accuracy on "
                f"{name} classes."
            )
        if "new" in o.after:
            base, new = (o.after[name]["accuracy"] for name in ("base", "new"))
            lines.append(
                f"{o.method}: harmonic mean of base and new classes "
                f"{2 * base * new / max(base + new, 1e-9):.1%}."
            )
    return "\n".join(lines)


def chosen(rows: PixelRows, most: int = 10) -> PixelRows:
    """Return one image of each of the first classes, the second of each, as the first of a data set
    is shown everywhere.
    """
    labels = rows.labels.numpy()
    kept = [np.flatnonzero(labels == label)[:2][-1] for label in np.unique(labels)[:most]]
    return PixelRows(rows.pixels[kept], rows.labels[kept])


def nearest(model: nn.Module, rows: PixelRows, task: Any) -> list[tuple[str, bool]]:
    """Return the held-out sentence that is nearest to each image, and whether it is about its
    class.
    """
    classes = list(range(len(task.sentences.words)))
    texts = [
        text for template in HELD_OUT_TEMPLATES for text in task.sentences.texts(template, classes)
    ]
    images, sentences = embed(model, rows, task.sentences, texts)
    found = (images @ sentences.T).argmax(1).tolist()
    return [
        (texts[i], i % len(classes) == label)
        for i, label in zip(found, rows.labels.tolist(), strict=True)
    ]


def _draw_measures(axes: Any, outcomes: Sequence[Any]) -> None:
    name = next(iter(outcomes[0].after))
    series = {"untrained": outcomes[0].before[name], **{o.method: o.after[name] for o in outcomes}}
    width = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        places = np.arange(len(MEASURES)) + (index - (len(series) - 1) / 2) * width
        bars = axes.bar(
            places,
            [values[m] for m in MEASURES],
            width * 0.94,
            label=label,
            color=SHADES.get(label, BEFORE),
        )
        axes.bar_label(
            bars,
            [f"{100 * values[m]:.0f}" for m in MEASURES],
            padding=1,
            fontsize=8,
            color="#3f3f46",
        )
    axes.set_xticks(range(len(MEASURES)), list(MEASURES.values()))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.1)
    axes.set_title(f"Sentences that were not trained on, {name} classes", loc="left")
    axes.legend(frameon=False, ncols=len(series), loc="upper right", bbox_to_anchor=(1, 1.16))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_example(
    axes: Any, pixels: torch.Tensor, before: tuple[str, bool], after: tuple[str, bool]
) -> None:
    picture = (
        ((pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6))
        .permute(1, 2, 0)
        .numpy()
    )
    axes.imshow(
        picture[..., 0] if picture.shape[2] == 1 else picture,
        cmap="gray_r",
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#e4e4e7")
    for place, moment, (text, right) in ((-0.06, "before", before), (-0.48, "after", after)):
        lines = "\n".join(textwrap.wrap(text, 26))
        own = {
            "transform": axes.transAxes,
            "va": "top",
            "ha": "left",
            "fontsize": 8.5,
            "linespacing": 1.15,
        }
        mark, colour = ("✓", RIGHT) if right else ("✗", WRONG)
        axes.text(0, place, f"{moment} {mark}", color=colour, fontweight="bold", **own)
        axes.text(0, place - 0.1, lines, color="#18181b" if moment == "after" else "#71717a", **own)


def draw(path: Path, task: Any, start: nn.Module, runs: Sequence[tuple[Any, nn.Module]]) -> None:
    """Draw what was measured above images with their nearest sentences, by the first run's
    model.
    """
    plt = pyplot()
    rows = chosen(next(iter(task.test.values())))
    before, after = nearest(start, rows, task), nearest(runs[0][1], rows, task)
    columns = min(5, len(rows))
    lines = -(-len(rows) // columns)
    figure = plt.figure(figsize=(2.1 * max(columns, 4) + 0.6, 3.4 + 3.15 * lines), layout="none")
    height = 3.4 + 3.15 * lines
    _draw_measures(
        figure.add_axes((0.06, 1 - 2.7 / height, 0.92, 2.0 / height)),
        [outcome for outcome, _ in runs],
    )
    count = len(HELD_OUT_TEMPLATES) * len(task.sentences.words)
    title = (
        f"Images and the nearest of {count} sentences, before and after training with "
        f"{runs[0][0].method}"
    )
    figure.text(0.06, 1 - 3.5 / height, title, fontsize=12)
    for index in range(len(rows)):
        line, column = divmod(index, columns)
        left = 0.06 + column * 0.94 / columns
        axes = figure.add_axes(
            (left, 1 - (5.15 + 3.15 * line) / height, 0.8 * 0.94 / columns, 1.5 / height)
        )
        axes.set_anchor("SW")
        _draw_example(axes, rows.pixels[index], before[index], after[index])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(
    recipe: Any, args: Any, task: Any, start: nn.Module, found: Sequence[tuple[Any, nn.Module]]
) -> None:
    """Write the report."""
    outcomes = [outcome for outcome, _ in found]
    notes = (
        f"Data: {task.images.name}, {task}; {outcomes[0].parameters:,} trained parameters. "
        f"Measured with {len(HELD_OUT_TEMPLATES)} templates that were not trained on. Rows: an "
        "image, a text or (for backprop and methods that perturb a batch as a whole) a pair "
        "through the model in training; clean ones and checks count too, and a row of backprop "
        "also costs a backward pass."
    )
    text = (
        f"{runs.table(HEAD, (row for outcome in outcomes for row in outcome.table_rows))}\n\n"
        f"{verdict(outcomes)}"
    )
    runs.report(
        *(recipe, args, outcomes, "Images and sentences", text, notes),
        lambda path: draw(path, task, start, found),
    )
