"""What the image recipe leaves: a table, learning curves, and the images that got the most and the
fewest queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_flops import FlopsTrainer
from hf_flops.reporting.comparison_plots import draw_learning_curves, draw_queries, save_report
from recipes import runs
from recipes.images import ImageTask
from recipes.runs import Outcome
from recipes.solved_head import MOST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAD = (
    "method | test accuracy | training loss, solved head | validation accuracy | rows | rows/s | "
    "peak memory | seconds | steps | learning rate"
)


def row(o: Outcome) -> str:
    """Return an outcome's row of the table."""
    validation = f"{o.curve[-1][1]:.1%}" if o.curve else "–"
    return (
        f"{o.method} | **{o.after:.1%}** | {o.losses[-1][1]:.3f} | {validation} | {o.rows:,} | "
        f"{o.rows_per_second:,.0f} | +{o.peak_megabytes:,.0f} MB | {o.seconds:.0f} | {o.steps:,} | "
        f"{o.learning_rate:g}"
    )


def verdict(frozen: Outcome, outcomes: Sequence[Outcome]) -> str:
    """Say how much of what backprop gains over the frozen adapter each forward-only method
    gained.
    """
    loss = {o.method: o.losses[-1][1] for o in (frozen, *outcomes)}
    room = loss[frozen.method] - loss.get("backprop", loss[frozen.method])
    if room <= 0:
        return ""
    return "\n".join(
        f"{o.method} made {(loss[frozen.method] - loss[o.method]) / room:.0%} of backprop's "
        "reduction of the training loss below that of the frozen adapter."
        for o in outcomes
        if o.method != "backprop"
    )


def query_images(
    trainer: FlopsTrainer, task: ImageTask, most: int = 8
) -> tuple[list[float], dict[str, Any]]:
    """Collect the queries per step of every training image, and the images with the most and the
    fewest.
    """
    mean = {
        sample: queries / steps
        for sample, (steps, queries) in trainer.ledger.sample_queries.items()
    }
    order = sorted(mean, key=mean.__getitem__, reverse=True)

    def pictures(samples: list[int]) -> tuple[list[np.ndarray], list[str]]:
        rows = [task.train[sample] for sample in samples]
        names = [task.class_names[int(row["label"])] for row in rows]
        counts = [
            f"{mean[sample]:.0f} quer{'y' if round(mean[sample]) == 1 else 'ies'} a step"
            for sample in samples
        ]
        captions = [f"class {name}\n{count}" for name, count in zip(names, counts, strict=True)]
        return [np.asarray(row["image"]) for row in rows], captions

    return [mean[sample] for sample in order], {
        "These images got the most queries": pictures(order[:most]),
        "These got the fewest": pictures(order[-most:]),
    }


def notes(recipe: Any, task: ImageTask, parameters: int) -> str:
    """Say what the table's figures mean."""
    shuffled = (
        "The patches of every image are in one fixed random order, which the backbone was not "
        "trained on; the picture shows the images as they were. "
    )
    return (
        f"Data: {task.name}, classes {', '.join(task.class_names)}, {len(task.train):,} images for "
        f"training and {len(task.test):,} for testing; {parameters:,} trained parameters. "
        f"{shuffled if recipe.shuffle_patches else ''}The training loss is the mean cross-entropy "
        f"of up to {MOST:,} training images under a head solved on their features, the same way "
        "for all methods. The frozen adapter stays as it starts, and its head is solved on all "
        "training images. Rows: images through the model in training, clean forwards and checks "
        "included; a row of backprop also costs a backward pass. The picture shows training loss "
        "and validation accuracy along the run; the test images are looked at once, at its end. "
        "Seconds include the evaluations; peak memory is what training added to the process."
    )


def learning_curves(frozen: Outcome, outcomes: Sequence[Outcome]) -> list[Callable[[Axes], None]]:
    """Return what draws the training loss and the validation accuracy against rows."""
    draw = partial(draw_learning_curves, untrained=frozen.method)
    loss = partial(
        draw,
        curves={o.method: o.losses for o in outcomes},
        start=frozen.losses[-1][1],
        title="Loss against rows",
        measure="training loss, solved head",
        form=".3f",
    )
    curves = {o.method: o.curve for o in outcomes if o.curve}
    return [loss, partial(draw, curves=curves, start=frozen.curve[-1][1])]


def report(
    recipe: Any, args: Any, task: ImageTask, frozen: Outcome, found: Sequence[tuple[Outcome, Any]]
) -> None:
    """Write the report."""
    outcomes = [outcome for outcome, _ in found]
    queried = next((trainer for _, trainer in found if hasattr(trainer, "ledger")), None)
    panels = learning_curves(frozen, outcomes)
    images: dict[str, Any] = {}
    if queried is not None:
        mean, images = query_images(queried, task)
        average = sum(mean) / len(mean)
        panels.append(partial(draw_queries, mean_queries=mean, average=average))
    text = f"{runs.table(HEAD, map(row, (frozen, *outcomes)))}\n\n{verdict(frozen, outcomes)}"
    runs.report(
        *(recipe, args, [frozen, *outcomes], "Adapting a ViT", text),
        notes(recipe, task, outcomes[0].parameters),
        lambda path: save_report(path, panels, images),
    )
