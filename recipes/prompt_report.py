"""What the prompt recipe found: one method's figures, and the report of all: a table, a picture and JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_flops.plots import save_report
from recipes.prompts import TextTask


@dataclass
class Outcome:
    """What one method reached: accuracies of the model as it is, of the adapter as it starts, and as it was tuned."""

    method: str
    before: float
    start: float
    after: float
    texts: int
    parameters: int
    rows: int
    tokens: int
    seconds: float
    peak_megabytes: float
    steps: int
    curve: list[tuple[float, float]]

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        z, n, p = 1.96, self.texts, self.after
        centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def table(outcomes: list[Outcome]) -> str:
    """Lay outcomes out as a Markdown table."""
    lines = [
        "| method | zero-shot | untrained | tuned | 95 % interval | rows | tokens | seconds | memory | steps | parameters |",
        "| --- " * 11 + "|",
    ]
    lines += [
        f"| {o.method} | {o.before:.1%} | {o.start:.1%} | **{o.after:.1%}** | {o.interval[0]:.1%} to {o.interval[1]:.1%} "
        f"| {o.rows:,} | {o.tokens:,} | {o.seconds:.0f} | +{o.peak_megabytes:,.0f} MB | {o.steps:,} | {o.parameters:,} |"
        for o in outcomes
    ]
    return "\n".join(lines)


def report(folder: Path, task: TextTask, recipe: Any, args: Any, runs: list[tuple[Outcome, Any]]) -> None:
    """Write the table, the figures as JSON and the picture, and print the table."""
    outcomes = [outcome for outcome, _ in runs]
    text = table(outcomes)
    print(f"\n{text}\n")
    notes = (
        f"Texts: {task.name}, {len(task.train):,} for training, accuracy on {outcomes[0].texts:,} held-out ones. Adapter: "
        f"{recipe.adapter}; objective: {recipe.objective}. Zero-shot is the model without the adapter, asked with "
        f"`{recipe.template}` for {', '.join(map(repr, recipe.label_words))}; untrained is the adapter as "
        "it starts. Rows and tokens are what went through the "
        "model in training, checks included, as if every row ran whole; a row of backprop also costs a backward pass. "
        "Seconds include the evaluations for the curve.\n"
    )
    curves = {o.method: o.curve for o in outcomes if o.curve}
    picture = "\n![report](report.png)\n" if curves else ""
    (folder / "report.md").write_text(f"# Prompt tuning\n\n{text}\n\n{notes}{picture}")
    rate = {"learning_rate": args.learning_rate, "queries_per_sample": args.queries_per_sample, "seed": args.seed}
    record = {"recipe": asdict(recipe), **rate, "outcomes": [asdict(outcome) for outcome in outcomes]}
    record |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    (folder / "results.json").write_text(json.dumps(record, indent=1))
    if curves:
        save_report(folder / "report.png", curves, outcomes[0].before)
    print(f"Report: {folder / 'report.md'}")
