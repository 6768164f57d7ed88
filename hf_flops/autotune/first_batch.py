"""What the first batch decides: the objective, where noise enters, what runs once per sample."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from ..base.batch import Inputs, take
from ..base.rounding_error import precision_of
from ..errors import ConfigurationError
from ..estimators import ClosedFormHead, HeadSolver, find_head
from ..estimators.control_variate import MOST_LOGITS
from ..objectives import CoupledLoss, Forward, Objective, RowLossError, TappedLoss
from ..perturbations import ParameterVector, Perturbation
from ..reuse import CachedPlan, ReusePlan, SampleStore, choose_reuse, with_last_logits
from .protocol import RunArguments
from .quick_check import prove
from .row_loss_check import HELD, check_moves, choose_objective, loss_of_batch
from .rule_check import choose_perturbation

logger = logging.getLogger("hf_flops.trainer")
_LATE = "Late expansion is off, every row runs through the whole model: %s."


@dataclass(frozen=True)
class Chosen:
    """What the first batch decided.

    Attributes:
        objective: what is minimised.
        perturbation: where noise enters.
        reuse: what runs once per sample.
        head: the layer whose gradient is exact, if there is one.
        solved: whether its weights are solved for.
    """

    objective: Objective
    perturbation: Perturbation
    reuse: ReusePlan
    head: ClosedFormHead | None
    solved: bool = False


def held_back(model: nn.Module, parts: str, progress: float) -> frozenset[str]:
    """Return the names of the tensors that get no noise for now: `lora_A`, while `parts` says so.

    At its initialisation `lora_B = 0` hides `lora_A` from the loss: noise on it would carry no
    signal, and only move it.

    Args:
        model: the model.
        parts: "both", "B", "B_then_A", or "auto" where there is no LoRA.
        progress: steps done over all steps.
    """
    if parts in ("auto", "both") or (parts == "B_then_A" and progress >= 0.5):
        return frozenset()
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if ".lora_A." in name and parameter.requires_grad
    )


def set_up(
    args: RunArguments,
    model: nn.Module,
    forward: Forward,
    inputs: Inputs,
    objective: Objective | None,
    perturbation: Perturbation | None,
    frozen: Collection[str],
    loss: Forward | None = None,
    *,
    without: Mapping[type[Objective], str] = MappingProxyType({}),
) -> Chosen:
    """Choose with the first batch what the user did not, and log what falls short of the ideal.

    Args:
        args: the run's arguments.
        model: the model, in evaluation mode, gradients off.
        forward: runs the model, which does not generate text.
        inputs: a batch.
        objective: what is minimised, None for the model's own loss; one that moves in steps has a
            `surrogate` to check with.
        perturbation: where noise enters, None for what the arguments say.
        frozen: names of trainable tensors that stay as they are for now.
        loss: see `choose_objective`.
        without: see `choose_objective`.

    Raises:
        ObjectiveError: the arguments want noise per row, but there is no loss per row.
        ConfigurationError: noise or a prefix cache does not work as the arguments want it.
    """
    precision = precision_of(model, autocast=args.bf16)
    given = args, model, forward, inputs, perturbation, frozen, precision
    # an objective of the user's is left as it is, unless it keeps logits itself
    if objective is not None:
        objective.look(forward, inputs)
        return _set_up(objective, *given, ours=objective.logits)
    usual = TappedLoss not in without and perturbation is None
    if usual and (proven := prove(args, model, forward, inputs, frozen, precision)):
        return Chosen(proven.objective, proven.perturbation, logged_plan(model, proven.reuse), None)
    without = dict(without)
    if not set(ParameterVector.of(model).names) <= set(frozen):
        without |= check_moves(forward, inputs, model)
    if args.world_size > 1 or args.perturbation == "shared":
        without[CoupledLoss] = ""
    while True:
        objective, reason = choose_objective(
            forward, inputs, precision, model, loss, without=without
        )
        if reason is not None:
            whole = loss_of_batch(args, reason, constants=HELD in without.values())
            return _set_up(whole, *given, ours=False)
        try:
            tried = type(objective)
            objective = with_last_logits(model, objective, forward, inputs, precision)
            return _set_up(objective, *given, ours=True)
        except RowLossError as error:  # later checks move the parameters further
            without[tried] = str(error)


def _set_up(
    objective: Objective,
    args: RunArguments,
    model: nn.Module,
    forward: Forward,
    inputs: Inputs,
    perturbation: Perturbation | None,
    frozen: Collection[str],
    precision: float,
    *,
    ours: bool,
) -> Chosen:
    """Do what `set_up` does once the objective is known; `ours` tells that we chose it."""
    if ours:
        prepare_tap(model, objective, forward, inputs, control=args.control_variate != "none")
    head, solved, surrogate = None, False, objective.surrogate
    if perturbation is None:
        if ours and args.closed_form_head != "none":
            head = find_head(model, objective, forward, inputs, frozen)
        choose = partial(
            noise_for,
            args,
            model,
            surrogate,
            forward,
            inputs,
            precision=precision,
            replayed=args.reduce != "scalars",
        )
        try:
            perturbation = choose(frozen if head is None else {*frozen, *head.vector.names})
        except ConfigurationError as error:  # beside the head there may be no tensor that matters
            if head is None:
                raise
            logger.info("The head has noise too, as without it there is no noise: %s", error)
            head = None
            perturbation = choose(frozen)
        if head is not None:
            objective.logits = True
            solved = args.closed_form_head == "solve" and solvable(head, objective, forward, inputs)
            logger.info(
                "The head gets no noise, because its %s exact: %s.",
                "weights are" if solved else "gradient is",
                ", ".join(head.vector.names),
            )
    if objective.generates:  # the checks saw other forwards than those that generate
        return Chosen(objective, perturbation, ReusePlan(), head, solved)
    reuse = late_expansion(args, model, surrogate, forward, inputs, perturbation, precision)
    return Chosen(objective, perturbation, reuse, head, solved)


def solvable(head: ClosedFormHead, objective: Objective, forward: Forward, inputs: Inputs) -> bool:
    """Return whether a head's weights can be solved for, and let the objective keep what that
    needs.
    """
    objective.targets = True
    losses = objective(forward, take(inputs, torch.tensor([0])), features=True)
    objective.targets = HeadSolver.solves(head, losses)
    return objective.targets


def noise_for(
    args: RunArguments,
    model: nn.Module,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    frozen: Container[str],
    *,
    precision: float,
    replayed: bool = True,
) -> Perturbation:
    """Choose where noise enters, as the arguments want it, and log the notes: see
    `choose_perturbation`.
    """
    logged = args.trajectory_log and args.perturbation == "auto"
    perturbation, notes = choose_perturbation(
        model,
        objective,
        forward,
        inputs,
        mode="weights" if logged else args.perturbation,
        distribution=args.noise,
        precision=precision,
        frozen=frozen,
        replayed=replayed,
    )
    for note in notes:
        logger.warning("%s", note)
    return perturbation


def prepare_tap(
    model: nn.Module,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    *,
    control: bool,
) -> None:
    """Let the tap on a model's loss keep logits, if a control variate is wanted and they are few,
    and start to record as late in the forward as it can.
    """
    if control and type(objective) is TappedLoss:
        objective.logits = objective.predictable = few_logits(forward, inputs)
    if isinstance(objective, TappedLoss):
        objective.listen_late(model, forward, take(inputs, torch.tensor([0])))


def few_logits(forward: Forward, inputs: Inputs) -> bool:
    """Return whether a sample's loss has few enough logits for a control variate.

    Losses of tokens do not: they have as many logits as the padding leaves tokens.
    """
    labels = inputs.get("labels")
    if torch.is_tensor(labels) and labels.dim() > 1 and not labels.is_floating_point():
        return False
    logits = TappedLoss(logits=True)(forward, take(inputs, torch.tensor([0]))).logits
    return logits is not None and logits.shape[1] <= MOST_LOGITS


def late_expansion(
    args: RunArguments,
    model: nn.Module,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    perturbation: Perturbation,
    precision: float,
) -> ReusePlan:
    """Return what may run once per sample if the arguments allow it, and log it: see
    `choose_reuse`.

    Raises:
        ConfigurationError: `prefix_cache` does not work with this model or loss.
    """
    if not args.late_expansion:
        return ReusePlan()
    if any(isinstance(each, list) and torch.is_tensor(each[0]) for each in inputs.values()):
        logger.warning(_LATE, "samples have different numbers of image patches")
        return ReusePlan()
    cached = args.prefix_cache is not None
    # outputs recorded for one batch would not fit answers of another length
    if hasattr(model, "cached_texts"):
        if cached:
            raise ConfigurationError(
                f"prefix_cache does not work with a {type(model).__name__}, which caches its texts."
            )
        return ReusePlan()
    if cached and not objective.per_row:
        raise ConfigurationError(
            "prefix_cache needs a loss per sample, but this one belongs to the batch as a whole."
        )
    reuse, reason = choose_reuse(
        model, objective, forward, inputs, perturbation, precision, cached=cached
    )
    if reason:
        logger.warning(_LATE, reason)
    if not cached:
        return logged_plan(model, reuse)
    folder = Path(args.output_dir) if args.prefix_cache == "disk" else None
    return CachedPlan.of(logged_plan(model, reuse), SampleStore(args.prefix_cache_gb, folder))


def logged_plan(model: nn.Module, reuse: ReusePlan) -> ReusePlan:
    """Log what runs once per sample, and return it."""
    names = [name for name, module in model.named_modules() if module in reuse.modules]
    if names:
        listed = len(names), ", ".join(names)
        logger.info("Late expansion: %d modules run once per sample and step (%s).", *listed)
    return reuse
