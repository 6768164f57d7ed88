"""Tune a prompt of a language model, which is only asked for outputs, to tell classes of texts apart.

With no arguments, eight virtual tokens after the text teach SmolLM2-135M-Instruct whether a movie review is good, without a
backward pass. With a connection, any causal language model and data set of the Hub take their place:

    python recipes/prompt_tuning.py
    python recipes/prompt_tuning.py --domain products --compare backprop
    python recipes/prompt_tuning.py --objective accuracy
    python recipes/prompt_tuning.py --engine onnx-int8
    python recipes/prompt_tuning.py --model Qwen/Qwen2.5-0.5B-Instruct --domain cornell-movie-review-data/rotten_tomatoes
    python recipes/prompt_tuning.py recipes/prompt_tuning.yaml

It ends with a table (report.md, results.json), a picture (report.png) and the adapters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when hf_flops is not installed

from hf_flops import ConfigurationError, FlopsTrainer, FlopsTrainingArguments, MacroF1, Metric
from hf_flops.memory import PeakMemory
from recipes import common
from recipes.common import accuracy, stock_arguments
from recipes.engines import ENGINES, black_box
from recipes.prompt_report import Outcome, report
from recipes.prompts import (
    ADAPTERS,
    DOMAINS,
    Template,
    TextTask,
    WordClassifier,
    adapted,
    label_tokens,
    load_model,
    load_texts,
)

METHODS = ("flops", "backprop")
OBJECTIVES: dict[str, Callable[[], Metric | None]] = {
    "loss": lambda: None,
    "accuracy": lambda: Metric("accuracy"),
    "macro_f1": MacroF1,
}


@dataclass
class RecipeArguments:
    """What is tuned on what, and what it is compared with."""

    model: str | None = field(default=None, metadata={"help": "Hub id or folder; default: the embedded SmolLM2."})
    domain: str = field(
        default="movies",
        metadata={"help": f"Embedded sentences ({', '.join(DOMAINS)}), or a Hub id with columns text, label."},
    )
    template: str = field(default="{text} It was", metadata={"help": "How a text is put; the answer comes at its end."})
    chat: bool = field(default=False, metadata={"help": "Put the text as a user's message, in the model's chat template."})
    label_words: list[str] = field(
        default_factory=lambda: [" terrible", " great"], metadata={"help": "One token for each class, in their order."}
    )
    adapter: str = field(
        default="suffix",
        metadata={
            "help": "A prompt after the text (cheapest), before it, a prefix in every layer, or LoRA.",
            "choices": ADAPTERS,
        },
    )
    virtual_tokens: int = field(default=8, metadata={"help": "Length of the prompt or prefix."})
    init_text: str = field(
        default=" All in all, the movie was just",
        metadata={"help": "Text that a prompt starts as; empty for random tokens."},
    )
    lora_rank: int = field(default=2, metadata={"help": "Rank of LoRA on queries and values."})
    per_class: int = field(default=0, metadata={"help": "Training texts per class, 0 for all."})
    test_texts: int = field(default=500, metadata={"help": "Held-out texts that are reported on."})
    validation_texts: int = field(default=128, metadata={"help": "Held-out texts for the learning curve."})
    text_tokens: int = field(default=48, metadata={"help": "Tokens of a text that are kept."})
    objective: str = field(
        default="loss",
        metadata={"help": "'loss', or 'accuracy' or 'macro_f1', which have no gradient.", "choices": list(OBJECTIVES)},
    )
    engine: str | None = field(
        default=None,
        metadata={
            "help": "What runs the model, for a suffix or prompt: a black box that only answers; default: transformers.",
            "choices": ENGINES,
        },
    )
    compare: list[str] = field(
        default_factory=list, metadata={"help": "'backprop' runs beside it with the same prompt and rows."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "The model's numbers: float32, or bfloat16 where that is faster.",
            "choices": ["float32", "bfloat16"],
        },
    )

    def __post_init__(self) -> None:
        common.at_least(1, self, "virtual_tokens", "lora_rank", "test_texts", "text_tokens")
        common.at_least(0, self, "per_class", "validation_texts")


@dataclass
class RecipeTrainingArguments(FlopsTrainingArguments):
    """Training arguments with defaults for this recipe."""

    output_dir: str | None = "outputs/prompt_tuning"
    learning_rate: float | str | None = field(
        default=None,
        metadata={"help": "A number or 'auto'. Default: 5e-3; for metrics 2e-2, as their noise is larger, too."},
    )
    max_steps: int = 80
    queries_per_sample: int | str | None = 24
    perturbation_scale: float | str | None = field(
        default=None, metadata={"help": "Default: 1e-2, which suits embeddings; for metrics 0.1, near their own size."}
    )
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 32
    adam_beta2: float = 0.99
    eval_strategy: str = "steps"
    eval_steps: float = 20
    save_strategy: str = "no"
    logging_steps: float = 10
    report_to: str = "none"


class Curve(TrainerCallback):
    """Records (rows, validation accuracy) at every evaluation while it trains."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.points: list[tuple[float, float]] = []

    @property
    def rows(self) -> int:
        """Rows through the model in training so far."""
        if hasattr(self.trainer, "ledger"):
            return self.trainer.ledger.all_rows
        return self.trainer.state.global_step * self.trainer.args.train_batch_size

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if self.rows and "eval_accuracy" in metrics:
            self.points.append((self.rows, metrics["eval_accuracy"]))


def by_length(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples by length, so that batches of an evaluation have little padding."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def adapter_of(recipe: RecipeArguments, args: Any, base: Any, template: Template, words: list[int]) -> Any:
    """Put what the recipe tunes on the model, or before one that runs in an engine."""
    names = ("virtual_tokens", "init_text", *([] if recipe.engine else ["lora_rank"]))
    options = {name: getattr(recipe, name) for name in names}
    if recipe.engine:
        options |= {"folder": Path(str(args.output_dir)), "after": recipe.adapter == "suffix"}
        return black_box(recipe.engine, base, template, words, **options)
    return adapted(recipe.adapter, base, template, words, **options)


def trainer_for(method: str, model: Any, args: RecipeTrainingArguments, recipe: RecipeArguments, **options: Any) -> Trainer:
    """Build the trainer of a method: the stock one for backprop, ours otherwise."""
    if method not in METHODS:
        raise ConfigurationError(f"The method {method!r} is unknown: choose among {', '.join(METHODS)}.")
    options = {"model": model, "compute_metrics": accuracy, **options}
    objective = OBJECTIVES[recipe.objective]() if method == "flops" else None
    scale, rate = (0.1, 2e-2) if objective else (1e-2, 5e-3)
    scale = scale if args.perturbation_scale is None else args.perturbation_scale
    rate = rate if args.learning_rate is None else args.learning_rate
    args = replace(args, perturbation_scale=scale, learning_rate=rate)
    if method == "backprop":
        return Trainer(args=stock_arguments(args, include_num_input_tokens_seen="all"), **options)
    return FlopsTrainer(args=args, objective=objective, **options)


def run(
    method: str, recipe: RecipeArguments, args: RecipeTrainingArguments, task: TextTask, known: Outcome | None = None
) -> tuple[Outcome, Any]:
    """Measure the model as it is, tune it with one method, and measure again.

    Args:
        method: a name in `METHODS`.
        recipe: what is tuned.
        args: the trainer's arguments.
        task: the texts.
        known: an outcome of the same model and the same prompt to start with, whose accuracies before training hold.
    """
    with args.main_process_first(), common.usable(f"--model {recipe.model or '(SmolLM2)'}"):
        base, tokenizer = load_model(recipe.model, recipe.dtype)
    words = label_tokens(tokenizer, recipe.label_words, task.classes)
    template = Template(tokenizer, recipe.template, recipe.text_tokens, recipe.chat)
    collator, tail = DataCollatorWithPadding(tokenizer), recipe.adapter != "suffix"
    own = replace(args, output_dir=str(common.output_folder(args, method)))
    names = ("output_dir", "per_device_eval_batch_size", "use_cpu", "disable_tqdm", "report_to")
    plain = TrainingArguments(**{name: getattr(own, name) for name in names})

    def measured(asked: Any, *, tail: bool) -> float:
        trainer = Trainer(asked, plain, data_collator=collator, compute_metrics=accuracy)
        return trainer.evaluate(by_length(template.rows(task.test, tail=tail)))["eval_accuracy"]

    before = known.before if known else measured(WordClassifier(base, words), tail=True)
    set_seed(args.seed)
    model = adapter_of(recipe, args, base, template, words)
    start = known.start if known else measured(model, tail=tail)
    curve = Curve()
    data = {part: template.rows(getattr(task, part), tail=tail) for part in ("train", "validation", "test")}
    sets = {"train_dataset": data["train"], "eval_dataset": by_length(data["validation"])}
    curve.trainer = trainer = trainer_for(method, model, own, recipe, data_collator=collator, callbacks=[curve], **sets)
    with PeakMemory() as memory:
        begun = time.perf_counter()
        trainer.train(args.resume_from_checkpoint)
        seconds = time.perf_counter() - begun
    after = trainer.evaluate(by_length(data["test"]))["eval_accuracy"]
    if args.process_index == 0:
        getattr(model, "save_pretrained", trainer.save_model)(own.output_dir)
    trainer.save_state()  # for hf-flops plot
    outcome = Outcome(
        method=method,
        before=before,
        start=start,
        after=after,
        texts=len(data["test"]),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        rows=curve.rows,
        tokens=trainer.ledger.tokens if isinstance(trainer, FlopsTrainer) else int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        peak_megabytes=memory.megabytes,
        steps=trainer.state.global_step,
        curve=curve.points[:-1],
    )
    return outcome, trainer


def parse(arguments: list[str] | None = None) -> tuple[RecipeArguments, RecipeTrainingArguments]:
    """Read the command line, or a YAML file named on it."""
    return common.parse([RecipeArguments, RecipeTrainingArguments], __doc__, METHODS, arguments)


def main(arguments: list[str] | None = None) -> list[Outcome]:
    """Tune with forward passes, and by the methods that this is compared with."""
    recipe, args = parse(arguments)
    methods = common.begin(args, ["flops", *recipe.compare])
    if recipe.engine and (recipe.adapter not in ("suffix", "prompt") or "backprop" in methods):
        wants = "--adapter suffix or prompt, and no --compare backprop"
        raise SystemExit(f"--engine {recipe.engine} only answers: it needs {wants}.")
    sizes = {"validation": recipe.validation_texts, "test": recipe.test_texts, "per_class": recipe.per_class}
    with args.main_process_first(), common.usable(f"--domain {recipe.domain}"):
        task = load_texts(recipe.domain, seed=args.seed, **sizes)
    runs, first = [], args.process_index == 0
    for method in methods:
        if first:
            print(f"\n=== {method}: {len(task.train):,} texts of {task.name}")
        runs.append(run(method, recipe, args, task, known=runs[0][0] if runs else None))
    if first:
        report(Path(str(args.output_dir)), task, recipe, args, runs)
    return [outcome for outcome, _ in runs]


if __name__ == "__main__":
    common.start(main)
