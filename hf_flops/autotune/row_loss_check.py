"""The choice of the objective: the model's own loss is split into rows only if a check on two rows
confirms it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batch import Inputs, batch_size, misaligned, take
from ..base.calls import constants_of
from ..base.constants import Constants, same_values
from ..base.prng import seeds
from ..base.probe import FAILURES, Attempt, agree
from ..errors import NonFiniteError, ObjectiveError, in_one_line
from ..objectives import (
    BatchLoss,
    CoupledLoss,
    Forward,
    Objective,
    RowLossError,
    RowLosses,
    RowwiseLoss,
    TappedLoss,
)
from ..perturbations import moved
from .protocol import RunArguments

logger = logging.getLogger("hf_flops.trainer")
CHECK_SEED = 20410  # any number: the check's noise has a stream of its own
_COUPLED = (
    "Each query computes the loss of its whole batch, with the model's outputs for its own sample "
    "replaced: %s. An objective= with a loss per row avoids it."
)
TAPPED = "The loss is split into rows where torch's loss function is called."
_ROWWISE = (
    "The loss is computed once for each row, with the model's outputs for that row: %s. An "
    "objective= with a loss per row, or one call of torch's loss function, avoids it."
)
HELD = "it holds values constant that move with the parameters (no_grad, detach)"


def two_rows(objective: Objective, forward: Forward, inputs: Inputs) -> Inputs:
    """Return two samples of a batch (its only one twice) on which a check can fail.

    They differ most in their inputs. Samples with a non-finite loss are skipped, and, if there are
    others, those without a loss element.

    Raises:
        NonFiniteError: no sample has a finite loss.
    """
    index = most_different(inputs, torch.arange(batch_size(inputs)))
    pair = take(inputs, index)
    losses = objective(forward, pair)
    if bool((losses.sums.isfinite() & (losses.counts > 0)).all()):
        return pair
    losses = objective(forward, inputs)
    finite = losses.sums.isfinite()
    telling = finite & (losses.counts > 0)
    usable = torch.nonzero(telling if telling.any() else finite).flatten().cpu()
    if not len(usable):
        raise NonFiniteError(
            f"Not one of the first batch's {len(finite)} samples has a finite loss: look for NaN "
            "in it."
        )
    return take(inputs, most_different(inputs, usable))


def most_different(inputs: Inputs, usable: Tensor) -> Tensor:
    """Return (2,) the first of some samples, and the one whose inputs differ from it the most;
    other numbers of negative entries, such as ignored labels, weigh more than other values.
    """
    score = torch.zeros(len(usable))
    for value in inputs.values():
        if torch.is_tensor(value) and value.dim() > 0 and len(value) == batch_size(inputs):
            rows = value[usable.to(value.device)].reshape(len(usable), -1).float()
            score += (rows != rows[:1]).float().mean(1).cpu()
            negative = (rows < 0).float().mean(1).cpu()
            score += 100 * (negative - negative[0]).abs()
        elif isinstance(value, (list, tuple)):
            first = value[int(usable[0])]
            score += torch.tensor([float(not _same(value[i], first)) for i in usable.tolist()])
    return torch.stack([usable[0], usable[int(score.argmax())]])


def choose_objective(
    forward: Forward,
    inputs: Inputs,
    precision: float = 1e-4,
    model: nn.Module | None = None,
    loss: Forward | None = None,
    *,
    without: Mapping[type[Objective], str] = MappingProxyType({}),
) -> tuple[Objective, str | None]:
    """Return the finest objective that the model's own loss allows, and the reason if it is not per
    row.

    Args:
        forward: runs the model and computes its loss.
        inputs: a batch.
        precision: see `precision_of`.
        model: if it is given, the checks move its trainable tensors: a term of the loss may be zero
            where they start.
        loss: the same as `forward`, without counting rows; if it is given, a loss that the tap
            cannot split is computed for single rows.
        without: kinds of objectives that are not tried, with the reason.
    """
    odd = misaligned(inputs)
    if odd:
        return BatchLoss(), f"its inputs {odd} are not laid out one entry per sample"
    pair = take(inputs, most_different(inputs, torch.arange(batch_size(inputs))))
    warn_of_equal_samples(pair, inputs)
    makers: dict[type[Objective], Callable[[], Objective]] = {TappedLoss: TappedLoss}
    if loss is not None:
        makers[RowwiseLoss] = partial(RowwiseLoss, loss, forward, pair)
        makers[CoupledLoss] = partial(CoupledLoss, loss, forward, pair)
    reasons = list(without.values())
    for kind, make in makers.items():
        if kind in without:
            continue
        try:
            with nullcontext() if model is None else moved_parameters(model):
                objective = make()
                if not isinstance(objective, CoupledLoss):
                    check_split(objective, forward, inputs, precision)
            if isinstance(objective, CoupledLoss):
                objective.check_elsewhere()
                logger.warning(_COUPLED, joined(reasons))
            elif isinstance(objective, RowwiseLoss):
                logger.info(_ROWWISE, joined(reasons))
            else:
                logger.info(TAPPED)
            return objective, None
        except RowLossError as error:
            reasons.append(str(error))
    return BatchLoss(), joined(reasons)


def warn_of_equal_samples(pair: Inputs, inputs: Inputs) -> None:
    """Warn if the two samples of a batch that differ most are equal."""
    if same_rows(pair) and batch_size(inputs) > 1:
        logger.warning(
            "All samples of the first batch are equal, so nothing could be checked of how its "
            "loss is split into rows: begin with a batch of different samples."
        )


def loss_of_batch(args: RunArguments, reason: object, *, constants: bool = False) -> BatchLoss:
    """Return the objective for a model's loss that cannot be split into rows, and log why.

    Args:
        args: the run's arguments.
        reason: why it cannot.
        constants: whether it holds values constant that move with the parameters.

    Raises:
        ObjectiveError: the arguments want noise per row, or noise would move such values.
    """
    if constants:
        raise ObjectiveError(
            f"The loss cannot be taken for the batch as a whole, because {HELD}, and its "
            'rows are not replaced one by one with perturbation="shared", in a run of several '
            f"processes, or where that does not work ({reason}): pass objective= with a loss per "
            "row."
        )
    if args.perturbation == "rowwise":
        raise ObjectiveError(
            f'perturbation="rowwise" needs a loss per row, but {reason}; pass objective=.'
        )
    logger.warning(
        "The loss is taken for the batch as a whole, with shared noise: %s. An objective= with a "
        "loss per row avoids it.",
        reason,
    )
    return BatchLoss()


def joined(reasons: Iterable[str]) -> str:
    """Join reasons, each once."""
    return ", and ".join(dict.fromkeys(reason for reason in reasons if reason))


def check_moves(forward: Forward, inputs: Inputs, model: nn.Module) -> dict[type[Objective], str]:
    """Return the kinds of objectives under which noise would move what the loss holds constant, by
    `torch.no_grad` or `detach`; refuse a loss that does not move itself.

    Raises:
        ObjectiveError: the loss is the same wherever the parameters are.
    """
    pair = take(inputs, most_different(inputs, torch.arange(batch_size(inputs))))
    losses = list[Tensor | None]()

    def run(constants: Constants) -> None:
        with constants:
            losses.append(forward(pair)[0])

    outputs, values = constants_of(model, run)
    with moved_parameters(model):
        moved_outputs, moved_values = constants_of(model, run)
    start, end = (None if loss is None else loss.detach() for loss in losses)
    if start is not None and end is not None and torch.equal(start, end) and start.isfinite():
        raise ObjectiveError(
            f"The loss stays {float(start):.6g} when the trainable parameters move, so forward "
            "passes cannot train it: it may compare the model with a detached copy of itself, as "
            "GRPO, RLOO and PPO do on policy; pass what is to be improved as objective=, such as "
            "GeneratedMetric with the reward."
        )
    same = same_values(outputs, moved_outputs)
    if same and not same_values(values, moved_values) and end is not None:
        with Attempt(None) as attempt, moved_parameters(model):  # they may be for the log alone
            constants_of(model, run, values)
        held = losses[-1]
        same = attempt.reason is None and held is not None and agree(held, end, 1e-6)
    return {} if same else {TappedLoss: HELD, RowwiseLoss: HELD}


def same_rows(pair: Inputs) -> bool:
    """Return whether two samples have equal inputs."""
    return all(
        _same(value[0], value[1])
        for value in pair.values()
        if isinstance(value, (list, tuple)) or (torch.is_tensor(value) and value.dim() > 0)
    )


def _same(first: object, second: Any) -> bool:
    return torch.equal(first, second) if torch.is_tensor(first) else bool(first == second)


def check_split(objective: Objective, forward: Forward, inputs: Inputs, precision: float) -> None:
    """Check that an objective gives samples their own losses.

    Raises:
        RowLossError: the loss of a sample depends on others, or on how many of their labels count.
    """
    pair = two_rows(objective, forward, inputs)
    together = objective(forward, pair)
    twice = objective(forward, take(pair, torch.tensor([0, 0])))
    if not _same_first(together, twice, precision):
        raise RowLossError("the loss of a sample depends on the other samples of its batch")
    uneven = with_fewer_labels(pair)
    if uneven is None:
        return
    try:
        found = objective(forward, uneven)
    except RowLossError:
        raise
    except FAILURES as error:  # the model may know no such label
        logger.info("Fewer labels could not be tried: %s.", in_one_line(error))
        return
    if not _same_first(found, together, precision):
        raise RowLossError("the loss of a sample depends on which labels of others are ignored")


def _same_first(found: RowLosses, wanted: RowLosses, precision: float) -> bool:
    """Return whether the first rows have the same mean loss."""
    means = [
        torch.where(losses.counts > 0, losses.sums / losses.counts, losses.sums)[:1]
        for losses in (found, wanted)
    ]
    return agree(means[0], means[1], precision / 2)


def with_fewer_labels(pair: Inputs) -> dict[str, Any] | None:
    """Return two samples, half the labels of the second ignored, if both have as many labels that
    count; None if they do not, or have one label each.
    """
    labels = pair.get("labels")
    if not torch.is_tensor(labels) or labels.dim() < 2 or labels.dtype != torch.int64:
        return None
    counted = (labels >= 0).reshape(2, -1)
    if int(counted[0].sum()) != int(counted[1].sum()) or int(counted[0].sum()) < 2:
        return None
    fewer = labels.reshape(2, -1).clone()
    own = torch.nonzero(counted[1]).flatten()
    fewer[1, own[len(own) // 2 :]] = -100
    return {**pair, "labels": fewer.reshape(labels.shape)}


def moved_parameters(model: nn.Module) -> AbstractContextManager[None]:
    """Move all trainable tensors off their starting values inside the context."""
    return moved(model, seeds(CHECK_SEED, 0))
