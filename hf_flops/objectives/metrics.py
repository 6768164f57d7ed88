"""Objectives without a gradient: metrics of predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.batch import Inputs, batch_size
from ..errors import ConfigurationError, ObjectiveError
from .base import Forward, ModelOutputs, Objective, RowLosses
from .elementwise import widen

MetricFunction = Callable[[ModelOutputs, Inputs], object]
"""Maps the outputs and inputs of R rows to (R,) numbers."""


class SmoothSurrogate(Objective):
    """A number per row that depends smoothly on all logits of its real tokens.

    Metrics do not show small changes, so the checks of the first batch use this instead.
    """

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`."""
        del features
        _, outputs = forward(inputs)
        logits, rows, mask = widen(outputs.logits), batch_size(inputs), inputs.get("attention_mask")
        # Uneven weights, because the sum of all logits may not change where a softmax does.
        each = (
            (logits * torch.arange(logits.shape[-1], device=logits.device).cos())
            .sum(-1)
            .reshape(rows, -1)
        )
        kept = torch.ones_like(each)
        if (
            torch.is_tensor(mask)
            and mask.dim() == 2
            and each.shape[1] > 1
            and mask.shape[1] <= each.shape[1]
        ):
            kept[:, -mask.shape[1] :] = mask.to(each)  # virtual tokens come first
        return RowLosses((each * kept).sum(1) / kept.sum(1), torch.ones_like(each[:, 0]))


def last_logits(outputs: ModelOutputs, inputs: Inputs) -> Tensor:
    """Return the logits (R, V) of the token after the last real one, for either side of padding."""
    logits, mask = outputs.logits, inputs.get("attention_mask")
    if mask is None:
        return logits[:, -1]
    columns = torch.arange(mask.shape[1], device=mask.device)
    # from the end, as virtual tokens come first
    last = torch.where(mask.bool(), columns, -1).amax(1) - mask.shape[1]
    return logits[torch.arange(len(logits), device=logits.device), last]


def answers(
    what: str, outputs: ModelOutputs, inputs: Inputs, label_words: Sequence[int] | None
) -> tuple[Tensor, Tensor, int]:
    """Return the predicted classes (R,), the labels (R,), and the number of classes.

    Args:
        what: the caller, for the error.
        outputs: of the model.
        inputs: the batch.
        label_words: a token for each class, of a causal language model.

    Raises:
        ObjectiveError: the outputs or labels have another shape.
    """
    logits, labels = outputs.logits, inputs.get("labels")
    if label_words is not None and logits.dim() == 3:
        logits = last_logits(outputs, inputs)[:, list(label_words)]
    if labels is None or labels.dim() != 1 or logits.dim() != 2:
        shapes = tuple(logits.shape), None if labels is None else tuple(labels.shape)
        raise ObjectiveError(
            f"{what} needs logits (R, classes) and labels (R,), not {shapes[0]} and {shapes[1]}: "
            "give label_words=, a token per class, for a language model, or a function of your "
            "own."
        )
    return logits.argmax(-1), labels.to(logits.device), logits.shape[1]


@dataclass(frozen=True)
class _Accuracy:
    """Returns 1 for rows with the right answer, else 0."""

    label_words: tuple[int, ...] | None = None

    def __call__(self, outputs: ModelOutputs, inputs: Inputs) -> Tensor:
        predicted, labels, _ = answers("Metric('accuracy')", outputs, inputs, self.label_words)
        return (predicted == labels).float()


class Metric(Objective):
    """A metric of the model's outputs as the objective of training: an accuracy, a reward.

    The minimised number, which is logged as the loss, is the metric, negated if greater is better.

    Args:
        what: "accuracy", or a function that maps (outputs, inputs) of R rows to (R,) numbers.
        greater_is_better: whether larger values are better.
        label_words: for "accuracy" of a causal language model on texts with labels (R,): a token
            for each class.
        piecewise_constant: whether small changes of the parameters do not change most rows' metric.
            Then the default of `perturbation_scale` is "auto".

    Raises:
        ConfigurationError: an unknown name, or label words that cannot tell classes apart.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from hf_flops.objectives import Metric
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> inputs = {"logits": logits, "labels": torch.tensor([0, 0])}
        >>> forward = lambda inputs: (None, SimpleNamespace(logits=inputs["logits"]))
        >>> Metric("accuracy")(forward, inputs).sums.tolist()
        [-1.0, -0.0]
    """

    surrogate = SmoothSurrogate()

    def __init__(
        self,
        what: str | MetricFunction,
        *,
        greater_is_better: bool = True,
        label_words: Sequence[int] | None = None,
        piecewise_constant: bool = True,
    ) -> None:
        if isinstance(what, str) and what != "accuracy":
            raise ConfigurationError(
                f"Metric({what!r}) is unknown: use 'accuracy', a function, MacroF1, or "
                "GeneratedMetric for texts."
            )
        if label_words is not None and (
            len(set(label_words)) < len(label_words) or len(label_words) < 2
        ):
            raise ConfigurationError(
                f"label_words={list(label_words)!r} must be two or more different tokens."
            )
        words = None if label_words is None else tuple(label_words)
        self.function: MetricFunction = _Accuracy(words) if isinstance(what, str) else what
        self.sign, self.piecewise_constant = -1.0 if greater_is_better else 1.0, piecewise_constant
        self.words = words

    def run(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor | None, ModelOutputs]:
        """Run the model, without labels if they are classes, which a language model cannot use."""
        given = (
            inputs
            if self.words is None
            else {name: value for name, value in inputs.items() if name != "labels"}
        )
        return super().run(model, given)

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`."""
        del features
        _, outputs = forward(inputs)
        return signed_losses(self.function(outputs, inputs), self.sign, batch_size(inputs))


def signed_losses(scores: object, sign: float, rows: int) -> RowLosses:
    """Return scores (R,) times a sign as row losses."""
    sums = sign * widen(torch.as_tensor(scores))
    if sums.shape != (rows,):
        raise ObjectiveError(
            f"The metric returned numbers of shape {tuple(sums.shape)} for {rows} rows."
        )
    return RowLosses(sums, torch.ones_like(sums))
