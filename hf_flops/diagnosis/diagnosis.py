"""What training would do with a model, a method and data, and what it would take: found by a short
trial on a copy.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from transformers.trainer_callback import PrinterCallback

from ..base.rounding_error import precision_of
from ..perturbations import ActivationNoise, ParameterVector
from ..trainer import FlopsTrainingArguments
from .sandbox import copied, generators_kept, listening
from .trial import LONGEST, Trial

_OF_A_RUN = 2.0  # the best rate of a run over that of a few steps
_QUIET: dict[str, Any] = {
    "max_queries": None,
    "num_train_epochs": 1e6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
    "pictures": False,
    "trajectory_log": False,
    "learning_rate_search": True,
}


@dataclass(frozen=True)
class Rule:
    """How the gradient of a trainable tensor is had.

    Attributes:
        tensor: its name.
        size: of how many numbers it is.
        way: "exact", "per row", "row by row", "on outputs", "shared", "held back" or "none".
        reason: why.
    """

    tensor: str
    size: int
    way: str
    reason: str


@dataclass(frozen=True)
class Fact:
    """Something that was found or is suggested, and why."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """What the trial found.

    Attributes:
        rules: one for each trainable tensor, in the model's order.
        facts: by name: what was measured and what is suggested.
        notes: what the trainer said.
    """

    rules: list[Rule]
    facts: dict[str, Fact]
    notes: list[str]

    def __getitem__(self, name: str) -> Any:
        """Return the value of a fact."""
        return self.facts[name].value

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return asdict(self)

    def __str__(self) -> str:
        alike: dict[tuple[str, str], list[Rule]] = {}
        for rule in self.rules:
            alike.setdefault((rule.way, rule.reason), []).append(rule)
        lines = [f"{'noise':<12}{'tensors':>8}{'numbers':>10}  reason"]
        for (way, reason), rules in alike.items():
            lines.append(
                f"{way:<12}{len(rules):>8}{sum(rule.size for rule in rules):>10,}  {reason}"
            )
            lines += [f"{'':32}{rule.tensor}" for rule in rules[:2]]
            lines += [f"{'':32}... and {len(rules) - 2} more"] * (len(rules) > 2)
        lines += ["", f"{'':28}{'value':>12}  reason"]
        lines += [
            f"{fact.name:<28}{_shown(fact.value):>12}  {fact.reason}"
            for fact in self.facts.values()
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def doctor(
    model: nn.Module,
    train_dataset: Any,
    *,
    args: FlopsTrainingArguments | None = None,
    peft_config: Any = None,
    steps: int = 32,
    target: float = 1.0,
    **kwargs: Any,
) -> Diagnosis:
    """Find out what training would do, by a few steps of it on a copy; nothing of the model is
    changed.

    The copy shares what is frozen, so it takes the memory of the adapter only.

    Args:
        model: a model with trainable parameters, or a plain one together with `peft_config`.
        train_dataset: a few batches of data as for training.
        args: as for training; by default 4 rows for each of 32 samples. Its `learning_rate` is
            where the search starts.
        peft_config: a PEFT configuration to wrap the copy with.
        steps: optimizer steps of the trial, 2 or more; up to four times as many are taken where no
            rate shows that it is better than standing still.
        target: signal to noise to predict the steps for.
        kwargs: what else `FlopsTrainer` takes: an objective, a collator, ...

    Raises:
        ConfigurationError: what training would refuse.
    """
    with tempfile.TemporaryDirectory() as folder, generators_kept(), listening() as notes:
        if args is None:
            args = FlopsTrainingArguments(
                folder, per_device_train_batch_size=32, queries_per_sample=4, report_to="none"
            )
        queries = 4 if args.queries_per_sample == "auto" else args.queries_per_sample
        batch = args.per_device_train_batch_size
        changes = {
            **_QUIET,
            "output_dir": folder,
            "queries_per_sample": queries,
            "per_device_eval_batch_size": batch,
        }
        trial = replace(args, max_steps=LONGEST * max(2, steps) + 1, **changes)
        trainer = Trial(copied(model, peft_config), trial, train_dataset=train_dataset, **kwargs)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return Diagnosis(
            rules_of(trainer), {fact.name: fact for fact in _facts(trainer, target)}, notes
        )


def rules_of(trainer: Any) -> list[Rule]:
    """Return how a trainer that has taken a step gets the gradient of each trainable tensor."""
    ways: dict[str, tuple[str, str]] = {}
    session = trainer.session
    for part in session.chosen.perturbation.parts:
        for site in getattr(part, "sites", []) if not isinstance(part, ActivationNoise) else []:
            if getattr(site.rule, "__name__", "") == "looped":
                names = [part.vector.names[index] for index in site.tensors.values()]
                ways.update(
                    dict.fromkeys(
                        names, ("row by row", "no rule for all rows at once agrees with moving it")
                    )
                )
        for name in part.vector.names:
            ways.setdefault(name, _way(part, trainer))
    if session.chosen.head is not None:
        reason = "it makes the loss's logits: residual times input, from the clean forward"
        ways.update(dict.fromkeys(session.chosen.head.vector.names, ("exact", reason)))
    ways.update(
        dict.fromkeys(session.frozen, ("held back", f"lora_parts={trainer.args.lora_parts!r}"))
    )
    vector, idle = ParameterVector.of(trainer.model), ("none", "the loss does not depend on it")
    pairs = zip(vector.names, vector.parameters, strict=True)
    return [Rule(name, parameter.numel(), *ways.get(name, idle)) for name, parameter in pairs]


def _way(part: Any, trainer: Any) -> tuple[str, str]:
    """Return how the noise of a part of the perturbation enters, and why."""
    if isinstance(part, ActivationNoise):
        return "on outputs", "agrees with moving it, and takes fewer random numbers than weights"
    if not part.shares_noise:
        return "per row", "gave each row the loss that moving it explicitly gives"
    if trainer.args.perturbation == "shared":
        return "shared", "asked for"
    if not trainer.session.chosen.objective.per_row:
        return "shared", "the loss belongs to the batch as a whole"
    return "shared", "no rule per row agrees with moving it explicitly"


def _facts(trainer: Trial, target: float) -> Iterator[Fact]:
    """Yield what was measured and what is suggested."""
    method, found, steps = trainer.session.method, trainer.calibration, trainer.state.global_step
    assert method is not None
    assert trainer._rate is not None
    precision = precision_of(trainer.model, autocast=trainer.args.bf16)
    yield Fact("trained numbers", ParameterVector.of(trainer.model).size, "of the tensors above")
    yield Fact(
        "precision",
        precision,
        f"relative rounding of a loss in {'16' if precision > 1e-3 else '32'} bits",
    )
    if found.scale is None:
        reason = "no step of the difference shows any signal"
    elif method.objective.piecewise_constant:
        reason = (
            f"the least at which queries see a step of the objective: {found.signal_to_noise:.0%} "
            "of them do"
        )
    else:
        reason = (
            "least error of differences: their signal to noise there is "
            f"{found.signal_to_noise:.3g}"
        )
    scale = method.scale if found.scale is None else found.scale
    yield Fact("epsilon", scale, f"{reason}; training would take {method.scale:.3g}")
    speed = float(np.median(trainer.speeds[1:] or trainer.speeds))
    yield Fact("rows per second", speed, f"median of {len(trainer.speeds[1:]) or 1} steps")
    yield Fact(
        "peak memory (MB)", trainer.megabytes, "of one step, above what the process held before"
    )
    signal, variance = np.array(trainer.found or [(0.0, 1.0)]).mean(0).tolist()
    ratio = max(signal, 0.0) / max(variance, 1e-30)
    each = f"{method.queries_per_sample} rows for each of {trainer.args.train_batch_size} samples"
    yield Fact(
        "signal to noise of a step",
        ratio,
        f"squared gradient without an exact head over variance, {each}",
    )
    wanted = math.ceil(target / ratio) if ratio > 0 else None
    reason = "whose mean has it" if ratio > 0 else f"no signal was seen in {steps} steps"
    yield Fact(f"steps to signal to noise {target:g}", wanted, reason)
    rate = _OF_A_RUN * trainer.args.learning_rate * trainer._rate.multiplier
    reason = (
        f"{_OF_A_RUN:g} times what line searches in {trainer.searched} steps found: the best of "
        "few is short for a run"
    )
    yield Fact("learning_rate", float(f"{rate:.2g}"), reason)
    queries = trainer.auto.at(steps)
    yield Fact(
        "queries_per_sample",
        queries,
        "most progress per row at this signal and noise, the exact head's included",
    )


def _shown(value: Any) -> str:
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
