"""What the image recipe leaves: a table, learning curves, and the images that got the most and the
fewest queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_flops import FlopsTrainer
from hf_flops.reporting.comparison_plots import save_report
from recipes import runs
from recipes.images import ImageTask
from recipes.runs import Outcome

HEAD = (
    "method | accuracy before | after | rows | rows/s | peak memory | seconds | steps | learning "
    "rate"
)


def row(o: Outcome) -> str:
    """Return an outcome's row of the table."""
    return (
        f"{o.method} | {o.before:.1%} | **{o.after:.1%}** | {o.rows:,} | {o.rows_per_second:,.0f} "
        f"| +{o.peak_megabytes:,.0f} MB | {o.seconds:.0f} | {o.steps:,} | {o.learning_rate:g}"
    )


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Say how far each forward-only method went on the way from the untrained adapter to
    backprop.
    """
    reference = next((o for o in outcomes if o.method == "backprop"), None)
    if reference is None or reference.after <= reference.before:
        return ""
    ways = [
        f"{o.method} went {(o.after - o.before) / (reference.after - o.before):.0%} of the way "
        "from the untrained adapter to backprop with the same adapter and epochs."
        for o in outcomes
        if o is not reference
    ]
    return "\n".join(ways)


def query_images(trainer: FlopsTrainer, task: ImageTask, most: int = 8) -> dict[str, Any]:
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

    return {
        "mean_queries": [mean[sample] for sample in order],
        "average": sum(mean.values()) / len(mean),
        "images": {
            "These images got the most queries": pictures(order[:most]),
            "These got the fewest": pictures(order[-most:]),
        },
    }


def report(recipe: Any, args: Any, task: ImageTask, found: Sequence[tuple[Outcome, Any]]) -> None:
    """Write the report."""
    outcomes = [outcome for outcome, _ in found]
    queried = next((trainer for _, trainer in found if hasattr(trainer, "ledger")), None)
    notes = (
        f"Data: {task.name}, classes {', '.join(task.class_names)}; {outcomes[0].parameters:,} "
        "trained parameters; accuracy on the test split. Rows: images through the model in "
        "training, clean forwards and checks included; a row of backprop also costs a backward "
        "pass. Seconds include the evaluations; peak memory is what training added to the process."
    )
    extra = query_images(queried, task) if queried is not None else {}
    curves = {o.method: o.curve for o in outcomes if o.curve}
    text = f"{runs.table(HEAD, map(row, outcomes))}\n\n{verdict(outcomes)}"
    runs.report(
        *(recipe, args, outcomes, "Adapting a ViT", text, notes),
        lambda path: save_report(path, curves, outcomes[0].before, **extra),
    )
