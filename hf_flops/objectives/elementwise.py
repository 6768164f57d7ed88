"""Torch's standard loss functions, element by element: weights, and derivatives with respect to the
logits.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Arguments: TypeAlias = dict[str, Any]
"""The arguments of a loss function by name."""


def widen(values: Tensor) -> Tensor:
    """Convert to float32, or keep float64."""
    return values if values.dtype == torch.float64 else values.float()


def mean_cross_entropy(logits: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
    """Return the cross-entropy of (E, C) logits, summed over `items`, Trainer's
    `num_items_in_batch`; None for its mean.
    """
    loss = F.cross_entropy(widen(logits), targets, reduction="mean" if items is None else "sum")
    return loss if items is None else loss / items


def element_weights(
    name: str, losses: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    """Return the weight of each element in the denominator of a mean, in the shape of `losses`."""
    if name in ("cross_entropy", "nll_loss") and not target.is_floating_point():
        kept = target != ignore_index
        if weight is None:
            return kept.to(losses.dtype)
        return torch.where(kept, weight[target.where(kept, 0).long()], 0.0).to(losses.dtype)
    if name == "mse_loss" and weight is not None:
        return weight.expand_as(losses)
    return torch.ones_like(losses)


def squared_residuals(name: str, prediction: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return `||d loss / d prediction||^2` of each element, ignoring class weights and label
    smoothing.
    """
    if name == "mse_loss":
        return (2 * (prediction - target)).square()
    if name == "binary_cross_entropy_with_logits":
        return (prediction.sigmoid() - target).square()
    dimension = 1 if prediction.dim() > 1 else 0
    probabilities = prediction.softmax(dimension) if name == "cross_entropy" else prediction.exp()
    if target.is_floating_point():
        return (probabilities - target).square().sum(dimension)
    kept = target != ignore_index
    index = target.where(kept, 0).long().unsqueeze(dimension)
    chosen = probabilities.gather(dimension, index).squeeze(dimension)
    # ||p - onehot||^2 = ||p||^2 - 2 p_y + 1, without building the one-hot matrix
    # (negative only by rounding)
    return torch.where(
        kept, (probabilities.square().sum(dimension) - 2 * chosen + 1).clamp(min=0), 0.0
    )


def slopes(name: str, given: Arguments) -> Tensor:
    """Return the derivative of each element's loss with respect to its logits, in their shape.

    Class weights, label smoothing, ignored targets and soft targets are accounted for.

    Args:
        name: of the loss function.
        given: its arguments by name.
    """
    logits, target, weight = given["input"], given["target"], given.get("weight")
    if name == "mse_loss":
        return 2 * (logits - target) * (1 if weight is None else weight)
    if name == "binary_cross_entropy_with_logits":
        positive = target if given.get("pos_weight") is None else target * given["pos_weight"]
        slope = (positive + 1 - target) * logits.sigmoid() - positive
        return slope if weight is None else slope * weight
    wanted = _wanted(logits, target, given)
    if name == "nll_loss":
        return -wanted
    dimension = 1 if logits.dim() > 1 else 0
    return logits.softmax(dimension) * wanted.sum(dimension, keepdim=True) - wanted


def linear_targets(name: str, given: Arguments) -> tuple[Tensor, Tensor] | None:
    """Return (targets, weights) in the logits' shape, with `slopes = weights * (mean(logits) -
    targets)` for the loss's mean function (`MEANS`); None for a loss that is not of this form.

    A loss of this form is that of a generalised linear model with its canonical link, so it is
    convex in the weights of a linear layer that outputs the logits.

    Args:
        name: of the loss function.
        given: its arguments by name.

    References:
        McCullagh and Nelder (1989), Generalized Linear Models, section 2.2.
    """
    logits, target, weight = given["input"], given["target"], given.get("weight")
    if name == "mse_loss":
        weights = torch.full_like(logits, 2.0) * (1 if weight is None else weight)
        return target.to(logits).expand_as(logits), weights
    if name == "binary_cross_entropy_with_logits":
        positive = target if given.get("pos_weight") is None else target * given["pos_weight"]
        total = positive + 1 - target
        return positive / total, total if weight is None else total * weight
    if name != "cross_entropy":
        return None
    wanted = _wanted(logits, target, given)
    total = wanted.sum(1 if logits.dim() > 1 else 0, keepdim=True)
    return wanted / torch.where(total > 0, total, 1.0), total.expand_as(wanted)


MEANS = {
    "cross_entropy": "softmax",
    "binary_cross_entropy_with_logits": "sigmoid",
    "mse_loss": "identity",
}
"""The mean function of each loss that has the form of `linear_targets`."""


def _wanted(logits: Tensor, target: Tensor, given: Arguments) -> Tensor:
    """Return a in `loss = -sum_c a_c log p_c`, the target weight of each class in cross-entropy, in
    the shape of the logits.
    """
    dimension, classes = (1, logits.shape[1]) if logits.dim() > 1 else (0, len(logits))
    weight, smoothing = given.get("weight"), given.get("label_smoothing", 0.0)
    shape = [-1 if i == dimension else 1 for i in range(logits.dim())]
    weights = logits.new_ones(classes).view(shape) if weight is None else weight.view(shape)
    if target.is_floating_point():
        return weights * (target * (1 - smoothing) + smoothing / classes)
    kept = target != given.get("ignore_index", -100)
    index = target.where(kept, 0).long().unsqueeze(dimension)
    chosen = torch.zeros_like(logits).scatter_(dimension, index, 1.0)
    return kept.unsqueeze(dimension) * weights * (chosen * (1 - smoothing) + smoothing / classes)
