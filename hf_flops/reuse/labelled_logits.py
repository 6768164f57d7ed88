"""Logits only where tokens have labels: a language model's head skips the other positions."""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..base.batch import Inputs, batch_size, take
from ..base.patching import Call, replaced_forward
from ..base.probe import Probe
from ..objectives import Forward, Objective, RowLosses, TappedLoss

logger = logging.getLogger(__name__)


class LastLogits(TappedLoss):
    """A language model's own loss, with logits only where any row of the batch has labels.

    Losses are unchanged: a label is predicted from the column before it, or from its own column in
    models that do not shift. A forward without labels (R, T) as a keyword argument, or with
    `logits_to_keep`, is not changed.

    Args:
        module: the language model, whose forward takes `labels` and `logits_to_keep`.

    Attributes:
        used: whether any forward has been shortened.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.used = module, False

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`."""
        with self.installed():
            return super().__call__(forward, inputs, features=features)

    def installed(self) -> AbstractContextManager[None]:
        """Return a context in which the module computes fewer logits."""
        return replaced_forward(self.module, self._shortened)

    def _shortened(self, original: Call) -> Call:
        def forward(*args: object, **kwargs: object) -> object:
            labels = kwargs.get("labels")
            fixed = {"logits_to_keep", "shift_labels"} & kwargs.keys()
            if torch.is_tensor(labels) and labels.dim() == 2 and not fixed:
                labelled = labels.ne(-100).any(0)
                ends = torch.stack([_first(labelled), _first(labelled.flip(0))])
                first, after = ends.tolist()
                last = labels.shape[1] - 1 - after
                if first > 1 or last < labels.shape[1] - 1:
                    # Indices, not a number: torch is slow if the head reads a slice, which is not
                    # contiguous.
                    columns = torch.arange(max(0, first - 1), last + 1, device=labels.device)
                    kwargs |= {"labels": labels[:, columns], "logits_to_keep": columns}
                    self.used = True
            return original(*args, **kwargs)

        return forward


def _first(labelled: Tensor) -> Tensor:
    """Return (...) int64, the first true column of (..., T); 0 if there is none."""
    return labelled.long().argmax(-1)


def with_last_logits(
    model: nn.Module,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    precision: float = 1e-4,
) -> Objective:
    """Return the objective with logits at labels only, if two samples keep their losses.

    Args:
        model: the model.
        objective: what is minimised; it is returned unchanged unless it is the model's own loss,
            because others may read all logits.
        forward: runs the model.
        inputs: a batch.
        precision: see `precision_of`.
    """
    short = last_logits(model, inputs)
    if type(objective) is not TappedLoss or short is None:
        return objective
    latest = _first(inputs["labels"].ne(-100)).topk(min(2, batch_size(inputs))).indices
    otherwise = "Logits are taken for every token"
    probe = Probe(objective, forward, take(inputs, latest.cpu()), precision / 20)
    if probe.difference(otherwise, objective=short) is not None:
        return objective
    if not short.used:
        logger.info("%s: labels begin with the text, or stay outside.", otherwise)
        return objective
    logger.info("Logits are taken where there are labels only.")
    return short


def last_logits(model: nn.Module, inputs: Inputs) -> LastLogits | None:
    """Return the loss with logits at labels only, unchecked, of a language model with labels
    (B, T).
    """
    labels, module = inputs.get("labels"), _language_model(model)
    wanted = module is not None and torch.is_tensor(labels) and labels.dim() == 2
    return LastLogits(module) if module is not None and wanted else None


def _language_model(model: nn.Module) -> nn.Module | None:
    """Return the outermost module whose forward takes labels and the number of logits to keep."""
    wanted = {"labels", "logits_to_keep"}
    takers = (
        m for m in model.modules() if wanted <= inspect.signature(m.forward).parameters.keys()
    )
    return next(takers, None)
