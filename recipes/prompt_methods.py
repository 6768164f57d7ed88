"""How the prompt recipe trains: forward-only for a loss or a metric, or by backprop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Trainer

from hf_flops import ConfigurationError, FlopsTrainer, MacroF1, Metric
from recipes import runs, sums

METHODS = ("flops", "backprop")
# What is improved, with the scale of the noise and the learning rate that suit it.
OBJECTIVES: dict[str, tuple[Any, float, float]] = {
    "loss": (lambda: None, 1e-2, 5e-3),
    "accuracy": (lambda: Metric("accuracy"), 0.1, 2e-2),
    "macro_f1": (MacroF1, 0.1, 2e-2),
}


def trainer_for(method: str, model: Any, args: Any, recipe: Any, **options: Any) -> Trainer:
    """Build the trainer of a method: the stock one for backprop, ours otherwise."""
    if method not in METHODS:
        raise ConfigurationError(
            f"The method {method!r} is unknown: choose among {', '.join(METHODS)}."
        )
    rewarded = recipe.domain == sums.DOMAIN
    name = recipe.objective if method == "flops" and not rewarded else "loss"
    objective, *best = OBJECTIVES[name]
    best = [*sums.NOISE[recipe.adapter == "lora"]] if rewarded else best
    given = (args.perturbation_scale, args.learning_rate)
    scale, rate = (
        default if value is None else value for value, default in zip(given, best, strict=True)
    )
    args = replace(args, perturbation_scale=scale, learning_rate=rate)
    options = {"compute_metrics": runs.accuracy, **options}
    if method == "backprop":
        return Trainer(
            model, runs.stock_arguments(args, include_num_input_tokens_seen="all"), **options
        )
    if rewarded:
        tokenizer = options["data_collator"].tokenizer
        return sums.SumsTrainer(model, args, tokenizer, **options)
    return FlopsTrainer(model, args, objective=objective(), **options)
