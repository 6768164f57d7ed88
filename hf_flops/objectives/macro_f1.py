"""Macro F1 as an objective: a metric of a group of rows, taken apart into what each row's answer
adds to it.
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
    """Macro F1 of the batch as the objective of training: of every class that the batch has, at the
    same weight.

    With P_c answers and N_c labels of class c, TP_c of them both, `F_c = 2 TP_c / (P_c + N_c)`, and
    in first order one more answer c adds `(2 [right] - F_c) / (P_c + N_c)` to it. So the clean rows
    of a batch say what each answer is worth, and a query changes its own sample's answer, while the
    others stay. What is logged as the loss is the negative macro F1 of the clean rows.

    Classes without a label in the batch do not count; an answer of such a class is only wrong. Each
    batch is a group of its own, so that small ones say little about rare classes.

    Args:
        label_words: for a causal language model on texts with labels (R,): a token for each class.

    Raises:
        ConfigurationError: label words that cannot tell classes apart.

    Example:
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
        # (C, C) of each answer to a label; until clean rows are known, of right ones
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
        """Return the objective with what answers are worth in a batch, and the losses of its clean
        rows by it.

        Args:
            clean: what this objective found for the batch's samples as they are.
            inputs: the batch.
        """
        assert clean.logits is not None
        given, labels = (
            clean.logits.cpu().double(),
            F.one_hot(inputs["labels"].cpu(), clean.logits.shape[1]).double(),
        )
        score, worths = macro_f1(labels.T @ given)
        worths = worths * len(given)
        own = (labels @ worths * given).sum(1)
        settled = copy.copy(self)
        # so that the mean of the clean rows is the score
        settled.worths = (worths + score - own.mean()).float()
        return settled, RowLosses(
            -(own + score - own.mean()).float(), clean.counts, logits=clean.logits
        )


def macro_f1(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean F1 of the classes that have labels, and its derivative by the numbers of
    answers.

    Args:
        confusion: (C, C) how often a label (row) got an answer (column).

    Returns:
        The score, and (C, C) its derivative where the numbers of labels stay.
    """
    right, totals = confusion.diagonal(), (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    present = (confusion.sum(1) > 0).to(confusion)
    scores = 2 * right / totals
    each = (2 * torch.eye(len(confusion)).to(confusion) - scores) / totals
    return (scores * present).sum() / present.sum(), each * present / present.sum()
