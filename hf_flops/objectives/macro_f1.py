"""Macro F1 as an objective: a metric of a batch, linearised into contributions of single
answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.batch import Inputs
from ..errors import ObjectiveError
from .base import Forward, RowLosses
from .metrics import Metric, answers


class MacroF1(Metric):
    """Macro F1 of the batch as the objective of training; every class in the batch has the same
    weight.

    With P_c answers and N_c labels of class c, TP_c of them both, `F_c = 2 TP_c / (P_c + N_c)`, and
    to first order one more answer c adds `(2 [right] - F_c) / (P_c + N_c)` to it. So the clean rows
    of a batch determine the value of each answer, and a query changes the answer of its own sample
    only. What is logged as the loss is the negative macro F1 of the clean rows.

    Classes without a label in the batch do not count; answers of such a class are wrong. F1 is per
    batch, so small batches say little about rare classes.

    Args:
        label_words: for a causal language model on texts with labels (R,): a token for each class.

    Raises:
        ConfigurationError: label words that cannot tell classes apart.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from hf_flops.objectives import MacroF1
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> inputs = {"logits": logits, "labels": torch.tensor([0, 0])}
        >>> forward = lambda inputs: (None, SimpleNamespace(logits=inputs["logits"]))
        >>> objective = MacroF1()
        >>> clean = objective(forward, inputs)
        >>> objective, losses = objective.bind_batch(clean, inputs)
        >>> losses.sums.mean()
        tensor(-0.6667)

    References:
        Parambath, Usunier and Grandvalet (2014), Optimizing F-Measures by Cost-Sensitive
        Classification, section 3.
    """

    needs_clean = True

    def __init__(self, *, label_words: Sequence[int] | None = None) -> None:
        super().__init__("accuracy", label_words=label_words)
        # (C, C) value of each answer to a label; the identity until clean rows are known
        self.worths: Tensor | None = None

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`; the logits (R, C) are one where the answer is, and zero elsewhere."""
        del features
        _, outputs = forward(inputs)
        found, labels, classes = answers("MacroF1", outputs, inputs, self.words)
        found, labels = found.cpu(), labels.cpu()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ObjectiveError(
                f"MacroF1 needs labels from 0 to {classes - 1}, not {int(labels.min())} to "
                f"{int(labels.max())}."
            )
        worths = torch.eye(classes) if self.worths is None else self.worths
        return RowLosses(
            -worths[labels, found], torch.ones(len(found)), logits=F.one_hot(found, classes).float()
        )

    def bind_batch(self, clean: RowLosses, inputs: Inputs) -> tuple[MacroF1, RowLosses]:
        """See `Objective.bind_batch`: the values of answers are set from the clean rows."""
        assert clean.logits is not None
        chosen = clean.logits.cpu().double()
        labels = F.one_hot(inputs["labels"].cpu(), clean.logits.shape[1]).double()
        score, worths = macro_f1(labels.T @ chosen)
        worths = worths * len(chosen)
        own = (labels @ worths * chosen).sum(1)
        bound = copy.copy(self)
        # so that the mean of the clean rows is the score
        bound.worths = (worths + score - own.mean()).float()
        return bound, RowLosses(
            -(own + score - own.mean()).float(), clean.counts, logits=clean.logits
        )


def macro_f1(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean F1 of the classes that have labels, and its derivative.

    Args:
        confusion: (C, C) number of answers (column) to labels (row).

    Returns:
        The score, and (C, C) its derivative with respect to `confusion` for fixed label counts.
    """
    right, totals = confusion.diagonal(), (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    present = (confusion.sum(1) > 0).to(confusion)
    scores = 2 * right / totals
    each = (2 * torch.eye(len(confusion)).to(confusion) - scores) / totals
    return (scores * present).sum() / present.sum(), each * present / present.sum()
