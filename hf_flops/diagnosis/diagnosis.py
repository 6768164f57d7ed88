"""What training would do, and what it would cost: measured in a short trial on a copy."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_callback import PrinterCallback

from ..autotune.session import SampleSession
from ..perturbations import ActivationNoise, ParameterVector, Perturbation, RowwiseNoise
from ..perturbations.row_loop import looped
from ..trainer import FlopsTrainer, FlopsTrainingArguments
from .clock import Clock
from .facts import Fact, facts_of
from .sandbox import copied, generators_kept, listening
from .trial import LONGEST, Trial

if TYPE_CHECKING:
    from peft import PeftConfig

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
    """How training gets the gradient of a trainable tensor.

    Attributes:
        tensor: its name.
        size: its number of elements.
        way: "exact", "per row", "row by row", "on outputs", "shared", "held back" or "none".
        reason: why.
    """

    tensor: str
    size: int
    way: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` reports.

    Attributes:
        rules: one for each trainable tensor, in the model's order.
        facts: measured and suggested numbers, by name.
        notes: warnings of the trainer.

    Examples:
        >>> rule = Rule("lora_B", 64, "per row", "gave the loss that moving it explicitly gives")
        >>> fact = Fact("learning_rate", 1e-3, "from line searches")
        >>> diagnosis = Diagnosis([rule], {fact.name: fact}, [])
        >>> diagnosis["learning_rate"]
        0.001
        >>> print(diagnosis)
        noise        tensors   numbers  reason
        per row            1        64  gave the loss that moving it explicitly gives
                                        lora_B
        <BLANKLINE>
                                           value  reason
        learning_rate                      0.001  from line searches
    """

    rules: list[Rule]
    facts: dict[str, Fact]
    notes: list[str]

    def __getitem__(self, name: str) -> float | None:
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
    train_dataset: object,
    *,
    args: FlopsTrainingArguments | None = None,
    peft_config: PeftConfig | None = None,
    steps: int = 32,
    target: float = 1.0,
    minutes: float | None = None,
    bar: bool = False,
    **kwargs: Any,
) -> Diagnosis:
    """Find out what training would do by a few steps on a copy; the model does not change.

    The copy shares the frozen tensors, so it takes the memory of the adapter only. Ctrl-C ends the
    trial with what it has found.

    Args:
        model: a model with trainable parameters, or a plain one together with `peft_config`.
        train_dataset: a few batches of data as for training.
        args: as for training; by default 4 rows for each of 32 samples. The search for a learning
            rate starts from its `learning_rate`.
        peft_config: a PEFT configuration to wrap the copy with.
        steps: optimizer steps of the trial, 2 or more; it takes up to four times as many if no rate
            is clearly better than no step at all.
        target: signal to noise to predict the steps for.
        minutes: that the trial may take, once the model is loaded; the step under way is finished.
            Default: no limit. With less time it takes fewer steps and judges by fewer samples.
        bar: whether to show a progress bar.
        kwargs: for `FlopsTrainer`: an objective, a collator, ...

    Raises:
        ConfigurationError: training would refuse the model, the data or the arguments.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> config = ViTConfig(**small, intermediate_size=8, image_size=4, patch_size=2)
        >>> model = ViTForImageClassification(config)
        >>> images = [{"pixel_values": torch.rand(3, 4, 4), "labels": i % 2} for i in range(8)]
        >>> adapter = LoraConfig(target_modules="all-linear", modules_to_save=["classifier"])
        >>> diagnosis = doctor(model, images, peft_config=adapter, steps=2)
        >>> [rule.tensor.split(".")[-2] for rule in diagnosis.rules if rule.way == "exact"]
        ['default', 'default']
    """
    with tempfile.TemporaryDirectory() as folder, generators_kept(), listening() as records:
        if args is None:
            args = FlopsTrainingArguments(
                folder, per_device_train_batch_size=32, queries_per_sample=4, report_to="none"
            )
        quiet = replace(
            args,
            **_QUIET,
            output_dir=folder,
            max_steps=LONGEST * max(2, steps) + 1,
            queries_per_sample=4 if args.queries_per_sample == "auto" else args.queries_per_sample,
            per_device_eval_batch_size=args.per_device_train_batch_size,
        )
        options = {"train_dataset": train_dataset, "clock": Clock(minutes, bar=bar), **kwargs}
        trainer = Trial(copied(model, peft_config), quiet, **options)
        trainer.remove_callback(PrinterCallback)
        notes = _tried(trainer)
        facts = {fact.name: fact for fact in facts_of(trainer, target)}
        notes += [record.getMessage() for record in records]
        return Diagnosis(rules_of(trainer), facts, notes)


def _tried(trainer: Trial) -> list[str]:
    """Run a trial, which Ctrl-C ends if it has taken a step; return what to note about its end."""
    try:
        trainer.train()
    except KeyboardInterrupt:
        if not trainer.signals:
            raise
        return [f"interrupted after {trainer.state.global_step} steps: more would tell more"]
    finally:
        trainer.clock.close()
    if trainer.clock.left > 0:
        return []
    return [f"the time ended after {trainer.state.global_step} steps: more would tell more"]


def rules_of(trainer: FlopsTrainer) -> list[Rule]:
    """Return how a trainer that has taken a step gets the gradient of each trainable tensor."""
    ways: dict[str, tuple[str, str]] = {}
    session = trainer.session
    assert isinstance(session, SampleSession)
    assert session.chosen is not None
    for part in session.chosen.perturbation.parts:
        ways |= dict.fromkeys(part.vector.names, _way(part, session))
        for site in part.sites if isinstance(part, RowwiseNoise) else ():
            if site.rule is looped:
                way = "row by row", "no rule for all rows at once agrees with moving it"
                ways |= dict.fromkeys([part.vector.names[i] for i in site.tensors.values()], way)
    if session.chosen.head is not None:
        way = "exact", "it outputs the logits: residual times input, from the clean forward"
        ways |= dict.fromkeys(session.chosen.head.vector.names, way)
    way = "held back", f"lora_parts={trainer.args.lora_parts!r}"
    ways |= dict.fromkeys(session.frozen, way)
    vector, idle = ParameterVector.of(trainer.model), ("none", "the loss does not depend on it")
    return [
        Rule(name, parameter.numel(), *ways.get(name, idle))
        for name, parameter in zip(vector.names, vector.parameters, strict=True)
    ]


def _way(part: Perturbation, session: SampleSession) -> tuple[str, str]:
    """Return how the noise of a part of the perturbation enters, and why."""
    if isinstance(part, ActivationNoise):
        return "on outputs", "agrees with moving it, and takes fewer random numbers than weights"
    if not part.shares_noise:
        return "per row", "gave each row the loss that moving it explicitly gives"
    if session.args.perturbation == "shared":
        return "shared", "as perturbation='shared' wants it"
    if session.chosen is not None and not session.chosen.objective.per_row:
        return "shared", "the loss belongs to the batch as a whole"
    return "shared", "no rule per row agrees with moving it explicitly"


def _shown(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
