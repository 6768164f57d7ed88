"""The choice of the objective: the model's own loss is split into rows only if a check on two rows
confirms it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..base.batch import Inputs, batch_size, misaligned, take
from ..base.prng import seeds
from ..base.probe import agree
from ..errors import NonFiniteError
from ..objectives import BatchLoss, Forward, Objective, RowLossError, TappedLoss
from ..perturbations import moved

CHECK_SEED = 20410  # any number: the check's noise has a stream of its own


def two_rows(objective: Objective, forward: Forward, inputs: Inputs) -> Inputs:
    """Return the first two samples of a batch (its only one twice) on which a check can fail.

    It skips samples with a non-finite loss and, if there are others, those without a loss element.

    Raises:
        NonFiniteError: no sample has a finite loss.
    """
    pair = take(inputs, torch.tensor([0, min(1, batch_size(inputs) - 1)]))
    losses = objective(forward, pair)
    if bool((losses.sums.isfinite() & (losses.counts > 0)).all()):
        return pair
    losses = objective(forward, inputs)
    finite = losses.sums.isfinite()
    telling = finite & (losses.counts > 0)
    index = torch.nonzero(telling if telling.any() else finite).flatten().cpu()
    if not len(index):
        raise NonFiniteError(
            f"Not one of the first batch's {len(finite)} samples has a finite loss: look for NaN "
            "in it."
        )
    return take(inputs, index[[0, min(1, len(index) - 1)]])


def choose_objective(
    forward: Forward,
    inputs: Inputs,
    precision: float = 1e-4,
    model: nn.Module | None = None,
) -> tuple[Objective, str | None]:
    """Return the finest objective that the model's own loss allows, and the reason if it is not per
    row.

    With the model given, the check moves its trainable tensors: a term of the loss may be zero
    where they start.
    """
    odd = misaligned(inputs)
    if odd:
        return BatchLoss(), f"its inputs {odd} are not laid out one entry per sample"
    tapped = TappedLoss()
    try:
        pair = two_rows(tapped, forward, inputs)
        with nullcontext() if model is None else moved_parameters(model):
            together = tapped(forward, pair).sums
            alone = tapped(forward, take(pair, torch.tensor([0, 0]))).sums
    except RowLossError as error:
        return BatchLoss(), str(error)
    if not agree(together[:1], alone[:1], precision / 2):
        return BatchLoss(), "the loss of a sample depends on the other samples of its batch"
    return tapped, None


def moved_parameters(model: nn.Module) -> AbstractContextManager[None]:
    """Move all trainable tensors off their starting values inside the context."""
    return moved(model, seeds(CHECK_SEED, 0))
