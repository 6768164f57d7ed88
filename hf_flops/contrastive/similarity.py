"""Losses of similarities of images and texts: elements, derivatives, changes of a column.

Leading dimensions, where there are any, are those of several batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.transfer import onto


@dataclass(frozen=True)
class SoftmaxTerms:
    """Cross-entropy of texts over images, and of images over texts, with weighted targets.

    A text with weights w over its images contributes `sum_i w_i (logsumexp of its row - similarity
    to i)`.

    Attributes:
        by_text: (..., C, B) weights of the pairs in the texts' cross-entropies.
        by_image: (..., C, B) weights of the pairs in the images' cross-entropies.

    References:
        Radford et al. (2021), CLIP, arXiv 2103.00020, figure 3.
    """

    by_text: Tensor
    by_image: Tensor

    @property
    def T(self) -> SoftmaxTerms:
        """The same loss of the transposed similarities."""
        return SoftmaxTerms(self.by_image.mT, self.by_text.mT)

    def weighted(self, weights: Tensor) -> SoftmaxTerms:
        """Return the loss whose pairs weigh by their image: weights (..., B)."""
        columns = weights.unsqueeze(-2)
        return SoftmaxTerms(self.by_text * columns, self.by_image * columns)

    def elements(self, logits: Tensor) -> Tensor:
        """Return (..., C, B) what each pair contributes to the loss."""
        return -self.by_text * logits.log_softmax(-1) - self.by_image * logits.log_softmax(-2)

    def slopes(self, logits: Tensor) -> Tensor:
        """Return (..., C, B) the derivative of the loss."""
        return (
            self.by_text.sum(-1, keepdim=True) * logits.softmax(-1)
            + self.by_image.sum(-2, keepdim=True) * logits.softmax(-2)
            - (self.by_text + self.by_image)
        )

    def changes(self, logits: Tensor, columns: Tensor, shifts: Tensor) -> Tensor:
        """Return (R,) how the loss changes with a column: columns (R,) int64, shifts (R, C).

        A row's logsumexp changes by `log1p(p expm1(shift))`, which is exact for small shifts.
        """
        factors = shifts.expm1()
        by_text = self.by_text.sum(1) * (logits.softmax(1)[:, columns].T * factors).log1p()
        by_image = (
            self.by_image.sum(0)[columns]
            * (logits.softmax(0)[:, columns].T * factors).sum(1).log1p()
        )
        targets = (self.by_text + self.by_image)[:, columns].T
        return by_text.sum(1) + by_image - (targets * shifts).sum(1)


@dataclass(frozen=True)
class SigmoidTerms:
    """Every pair on its own: does this text belong to this image or not?

    Attributes:
        signs: (..., C, B) +1 for pairs, -1 for others.
        weights: (..., C, B) of the elements in the loss.

    References:
        Zhai et al. (2023), SigLIP, arXiv 2303.15343, section 3.2.
    """

    signs: Tensor
    weights: Tensor

    @property
    def T(self) -> SigmoidTerms:
        """See `SoftmaxTerms`."""
        return SigmoidTerms(self.signs.mT, self.weights.mT)

    def weighted(self, weights: Tensor) -> SigmoidTerms:
        """See `SoftmaxTerms`."""
        return SigmoidTerms(self.signs, self.weights * weights.unsqueeze(-2))

    def elements(self, logits: Tensor) -> Tensor:
        """See `SoftmaxTerms`."""
        return self.weights * F.softplus(-self.signs * logits)

    def slopes(self, logits: Tensor) -> Tensor:
        """See `SoftmaxTerms`."""
        return -self.weights * self.signs * (-self.signs * logits).sigmoid()

    def changes(self, logits: Tensor, columns: Tensor, shifts: Tensor) -> Tensor:
        """See `SoftmaxTerms`: `softplus(x + s) - softplus(x) = log1p(sigmoid(x) expm1(s))`."""
        signs, before = self.signs[:, columns].T, logits[:, columns].T
        changes = ((-signs * before).sigmoid() * (-signs * shifts).expm1()).log1p()
        return (self.weights[:, columns].T * changes).sum(1)


Terms = SoftmaxTerms | SigmoidTerms
"""A loss of the similarities (C, B) of C texts and B images, as a sum over their elements."""


def placed(terms: Terms, device: torch.device, dtype: torch.dtype) -> Terms:
    """Return a loss with its numbers on a device."""
    kind = type(terms)
    return kind(*(onto(getattr(terms, field.name), device, dtype) for field in fields(kind)))


def stacked(terms: Sequence[Terms]) -> Terms:
    """Return the losses of n batches of one shape and kind as one with a leading dimension."""
    kind = type(terms[0])
    parts = ([getattr(one, field.name) for one in terms] for field in fields(kind))
    return kind(*map(torch.stack, parts))
