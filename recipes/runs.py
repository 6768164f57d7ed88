"""Runs of a recipe: what one method reached, and the report of all: a table, a picture and JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_flops import ConfigurationError
from hf_flops.base.memory import PeakMemory
from hf_flops.reporting.model_card import baseline_card
from recipes.common import usable


@dataclass(kw_only=True)
class Outcome:
    """What one method reached.

    Attributes:
        before, after: accuracy on the test split, or what else was measured there.
        rows, tokens: through the model in training, checks included.
        curve: (rows, validation accuracy) at every evaluation.
        losses: (rows, training loss) then and at the end, where `train` was given what measures it.
        stopped: says when `max_queries` ended the run, if it did.
    """

    method: str
    before: Any
    after: Any
    learning_rate: float
    parameters: int
    rows: int
    tokens: int
    seconds: float
    peak_megabytes: float
    steps: int
    curve: list[tuple[float, float]]
    losses: list[tuple[float, float]] = field(default_factory=list)
    stopped: str = ""

    @property
    def rows_per_second(self) -> float:
        """Rows through the model per second of training, evaluation included."""
        return self.rows / self.seconds


class Curve(TrainerCallback):
    """Records (rows, validation accuracy), and what `loss` returns, at every evaluation while a
    trainer trains.
    """

    def __init__(self, trainer: Any, loss: Callable[[], float] | None = None) -> None:
        self.trainer, self.loss = trainer, loss
        self.points: list[tuple[float, float]] = []
        self.losses: dict[float, float] = {}

    @property
    def rows(self) -> int:
        """Rows through the model in training so far: one per sample and epoch for backprop."""
        if hasattr(self.trainer, "ledger"):
            return self.trainer.ledger.all_rows
        state, args = self.trainer.state, self.trainer.args
        epochs = math.ceil(state.epoch or 0) * len(self.trainer.train_dataset)
        return min(
            state.global_step * args.train_batch_size * args.gradient_accumulation_steps, epochs
        )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        if "eval_accuracy" in metrics:
            self.points.append((self.rows, metrics["eval_accuracy"]))
            self.measure()

    def measure(self) -> None:
        """Measure the loss, if asked for."""
        if self.loss is not None:
            self.losses[self.rows] = self.loss()


def accuracy(prediction: Any) -> dict[str, float]:
    """Compute the share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def stock_arguments(args: Any, **changes: Any) -> TrainingArguments:
    """Return the part of the arguments that the stock trainer knows."""
    stock = {
        name: getattr(args, name)
        for name in TrainingArguments.__dataclass_fields__
        if name[0] != "_"
    }
    return TrainingArguments(**{**stock, **changes})


def accuracy_of(model: Any, args: Any, data: Any, collate: Any) -> float:
    """Measure a model that is not trained."""
    names = ("output_dir", "per_device_eval_batch_size", "use_cpu", "disable_tqdm", "report_to")
    plain = TrainingArguments(**{name: getattr(args, name) for name in names})
    return Trainer(model, plain, data_collator=collate, compute_metrics=accuracy).evaluate(data)[
        "eval_accuracy"
    ]


def begin(args: Any, methods: Sequence[str]) -> list[str]:
    """Return the methods to run, each once.

    Raises:
        ConfigurationError: backprop by several processes: the stock trainer is measured before it
            trains, and then not wrapped; or a checkpoint to resume from, where there is none or
            several methods would.
    """
    transformers_logging.disable_progress_bar()  # of loading and saving; training keeps its own
    methods, checkpoint = list(dict.fromkeys(methods)), args.resume_from_checkpoint
    if args.world_size > 1 and "backprop" in methods:
        raise ConfigurationError(
            f"backprop is for comparison by one process, not {args.world_size}: leave it out, or "
            "start one."
        )
    if checkpoint and len(methods) > 1:
        raise ConfigurationError(
            f"--resume_from_checkpoint {checkpoint} is of one method, and {', '.join(methods)} "
            "would start from it: run one."
        )
    if checkpoint and not Path(checkpoint, "trainer_state.json").is_file():
        raise ConfigurationError(
            f"--resume_from_checkpoint {checkpoint} is no checkpoint: name a folder such as "
            f"{Path(args.output_dir, methods[0], 'checkpoint-100')}."
        )
    return methods


def announced(methods: Sequence[str], args: Any, what: Any) -> Iterator[str]:
    """Yield one method after another, each under a line that says what it is trained on."""
    for method in methods:
        if args.process_index == 0:
            print(f"\n=== {method}: {what}")
        yield method


def method_arguments(args: Any, method: str, learning_rate: float | None = None) -> Any:
    """Return the arguments of one method: a folder of its own, which is made, and its learning rate
    if none was given.

    Raises:
        ConfigurationError: the folder cannot be made.
    """
    folder = Path(args.output_dir, method)
    with usable(f"--output_dir {args.output_dir}"):
        folder.mkdir(parents=True, exist_ok=True)
    rate = learning_rate if args.learning_rate is None else args.learning_rate
    return replace(args, output_dir=str(folder), learning_rate=rate)


def tested(trainer: Any, data: Any) -> float:
    """Return the accuracy on data that the learning curve knows nothing of."""
    return trainer.evaluate(data, metric_key_prefix="test")["test_accuracy"]


def train(
    trainer: Any, checkpoint: str | None, loss: Callable[[], float] | None = None
) -> dict[str, Any]:
    """Train; returns what an `Outcome` says about it."""
    curve = Curve(trainer, loss)
    trainer.add_callback(curve)
    with PeakMemory() as memory:
        start = time.perf_counter()
        trainer.train(checkpoint)
        seconds = time.perf_counter() - start
    curve.measure()  # the end may not be the last evaluation's
    trainer.save_state()  # for hf-flops plot
    ledger = getattr(trainer, "ledger", None)
    return {
        "learning_rate": trainer.args.learning_rate,
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "rows": curve.rows,
        "tokens": ledger.tokens if ledger else int(trainer.state.num_input_tokens_seen),
        "seconds": seconds,
        "peak_megabytes": memory.megabytes,
        "steps": trainer.state.global_step,
        "curve": curve.points,
        "losses": list(curve.losses.items()),
        "stopped": trainer.query_budget.stopped if ledger else "",
    }


def write_card(trainer: Any, data: str) -> None:
    """Write the card of an adapter beside it."""
    if hasattr(trainer, "ledger"):
        trainer.create_model_card(dataset=data)
    elif (
        isinstance(trainer.model, (PeftModel, PreTrainedModel)) and trainer.is_world_process_zero()
    ):
        trainer.create_model_card(dataset=data)
        baseline_card(trainer.args.output_dir, trainer.model, trainer.train_dataset)


def freeze(model: Any, part: str) -> None:
    """Leave out of training what has a part in its name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and part not in name)


def table(head: str, rows: Iterable[str]) -> str:
    """Lay rows of cells, which | separates, out as a Markdown table."""
    rule = " | ".join(["---"] * (head.count("|") + 1))
    return "\n".join(f"| {row} |" for row in (head, rule, *rows))


def report(
    recipe: Any,
    args: Any,
    outcomes: Sequence[Outcome],
    title: str,
    text: str,
    notes: str,
    draw: Callable[[Path], Any] | None,
) -> None:
    """Write a report with a table, the figures as JSON and, by `draw`, a picture; print the
    table.
    """
    ended = [f"{outcome.method} was {outcome.stopped}." for outcome in outcomes if outcome.stopped]
    text = "\n\n".join([text, *ended])
    print(f"\n{text}\n")
    folder = Path(args.output_dir)
    picture = "\n![report](report.png)\n" if draw else ""
    (folder / "report.md").write_text(f"# {title}\n\n{text}\n\n{notes}\n{picture}")
    record = {
        "recipe": asdict(recipe),
        **{name: getattr(args, name) for name in ("learning_rate", "queries_per_sample", "seed")},
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1))
    print(f"Report: {folder / 'report.md'}")
    if draw:
        draw(folder / "report.png")
        print(f"Picture: {folder / 'report.png'}")
