"""What the prompt recipe leaves: a table, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_flops.reporting.comparison_plots import draw_learning_curves, save_report
from recipes import runs
from recipes.prompts import TextTask

HEAD = (
    "method | zero-shot | untrained | tuned | 95 % interval | rows | tokens | seconds | memory | "
    "steps | parameters"
)


@dataclass(kw_only=True)
class PromptOutcome(runs.Outcome):
    """Accuracies of the model as it is, before, of the adapter as it starts, and as it was tuned,
    on so many texts.
    """

    start: float
    texts: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        z, n, p = 1.96, self.texts, self.after
        centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)

    @property
    def row(self) -> str:
        """Its row of the table."""
        low, high = self.interval
        return (
            f"{self.method} | {self.before:.1%} | {self.start:.1%} | **{self.after:.1%}** | "
            f"{low:.1%} to {high:.1%} | {self.rows:,} | {self.tokens:,} | {self.seconds:.0f} | "
            f"+{self.peak_megabytes:,.0f} MB | {self.steps:,} | {self.parameters:,}"
        )


def report(recipe: Any, args: Any, task: TextTask, outcomes: Sequence[PromptOutcome]) -> None:
    """Write the report."""
    head = (
        "A linear head that starts as the label words' rows of the output layer is trained; lines "
        "that end in -words read the words' logits. "
    )
    words = f" for {', '.join(map(repr, recipe.label_words))}" if recipe.label_words else ""
    notes = (
        f"Texts: {task.name}, {len(task.train):,} for training, accuracy on {outcomes[0].texts:,} "
        f"held-out ones. Adapter: {recipe.adapter}; objective: {recipe.objective}. Zero-shot is "
        f"the model without the adapter, asked with `{recipe.template}`"
        f"{words}; untrained is the adapter as it starts. "
        f"{head if recipe.label_head else ''}Rows and tokens are what went through the model in "
        "training, checks included, as if every row ran whole; a row of backprop also costs a "
        "backward pass. Seconds include the evaluations for the curve."
    )
    curves = {o.method: o.curve for o in outcomes if o.curve}
    panel = partial(draw_learning_curves, curves=curves, start=outcomes[0].before)
    draw = (lambda path: save_report(path, [panel])) if curves else None
    text = runs.table(HEAD, (outcome.row for outcome in outcomes))
    runs.report(recipe, args, outcomes, "Prompt tuning", text, notes, draw)
