"""Contrastive losses: of a batch, their derivatives, and with one embedding replaced.

Such a loss is no sum over samples: it compares every embedding with all of the other tower's. But
its gradient is a sum over embeddings, so a query is one row through one tower, and its loss is that
of the batch with this one embedding replaced: this takes a row or column of similarities, and no
other forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.batch import Inputs
from ..base.transfer import onto, to_host
from ..errors import ConfigurationError, ObjectiveError
from ..objectives import Forward, Objective, RowLosses
from ..objectives.elementwise import widen
from ..perturbations import accumulator
from .similarity import SigmoidTerms, SoftmaxTerms, Terms, placed

SIDES = ("image", "text")
KINDS = ("auto", "softmax", "sigmoid")


class DualEncoder(Protocol):
    """A model of images and texts, such as CLIP and SigLIP, which also has a `logit_bias`."""

    logit_scale: Tensor
    get_image_features: Callable[..., Any]
    get_text_features: Callable[..., Any]


class ContrastiveBatch:
    """The loss of one batch, computed in float64 from the towers' embeddings without autograd.

    Leading dimensions are those of several batches, whose losses are added.

    Args:
        texts: (..., C, D) embeddings, not normalised.
        images: (..., B, D).
        terms: the loss of their similarities.
        scale: factor of the cosines.
        bias: added to the scaled cosines.
    """

    def __init__(
        self, texts: Tensor, images: Tensor, terms: Terms, scale: float, bias: float = 0.0
    ) -> None:
        texts, images = to_host(texts.detach(), images.detach())
        self.embeddings = {"text": texts.double(), "image": images.double()}
        self.units = {
            side: F.normalize(values, dim=-1, eps=1e-30) for side, values in self.embeddings.items()
        }
        self.terms, self.scale, self.bias = terms, scale, bias
        self.logits = scale * self.units["text"] @ self.units["image"].mT + bias
        self._places = dict[torch.device, _Place]()

    @cached_property
    def slopes(self) -> Tensor:
        """(..., C, B) derivative of the loss by the similarities."""
        return self.terms.slopes(self.logits)

    @property
    def loss(self) -> float:
        """The loss of the batch."""
        return float(self.terms.elements(self.logits).sum())

    @property
    def slope_of_scale(self) -> float:
        """Derivative of the loss by the logarithm of the scale."""
        return float((self.slopes * (self.logits - self.bias)).sum())

    @property
    def slope_of_bias(self) -> float:
        """Derivative of the loss by the bias."""
        return float(self.slopes.sum())

    def by_embedding(self, side: str) -> Tensor:
        """Return the derivative (..., S, D) of the loss by the images or texts before they are
        normalised: for `u = a / ||a||` and h the derivative by u, that by a is
        `(h - (h . u) u) / ||a||`.
        """
        slopes, other = (self.slopes, "image") if side == "text" else (self.slopes.mT, "text")
        units = self.units[side]
        by_unit = self.scale * slopes @ self.units[other]
        across = by_unit - (by_unit * units).sum(-1, keepdim=True) * units
        return across / self.embeddings[side].norm(dim=-1, keepdim=True)

    def clean(self, side: str) -> RowLosses:
        """Return the clean losses of the images or texts; their mean is the loss of the batch.

        `slopes` are by the embeddings: see `by_embedding`.
        """
        elements, embeddings = self.terms.elements(self.logits), self.embeddings[side]
        size = len(embeddings)
        by_embedding = size * self.by_embedding(side)
        sums = size * elements.sum(1 if side == "text" else 0)
        ones, norms = torch.ones_like(sums), by_embedding.norm(dim=1)
        return RowLosses(sums, ones, norms, embeddings, by_embedding)

    def replaced(self, side: str, owner: Tensor, embeddings: Tensor) -> RowLosses:
        """Return the losses of rows that each replace one embedding, for itself alone.

        Args:
            side: whose embeddings, of "image" or "text".
            owner: (R,) int64, which one each row replaces.
            embeddings: (R, D) by what, not normalised.
        """
        device = embeddings.device
        if device not in self._places:
            self._places[device] = _Place.of(self, device)
        place = self._places[device]
        owner, embeddings = onto(owner, device), embeddings.detach().to(place.logits.dtype)
        terms, logits, other = place.terms, place.logits, "text"
        if side == "text":
            terms, logits, other = terms.T, logits.T, "image"
        moved = F.normalize(embeddings, dim=1, eps=1e-30) - place.units[side][owner]
        changes = terms.changes(logits, owner, self.scale * moved @ place.units[other].T)
        sums = len(place.units[side]) * (terms.elements(logits).sum(0)[owner] + changes)
        return RowLosses(sums, torch.ones_like(sums), logits=embeddings)


@dataclass(frozen=True)
class _Place:
    """What `ContrastiveBatch.replaced` reads of a batch, on a device."""

    units: Mapping[str, Tensor]
    logits: Tensor
    terms: Terms

    @classmethod
    def of(cls, batch: ContrastiveBatch, device: torch.device) -> _Place:
        """Send a batch to a device."""
        wide = accumulator(device)
        units = {side: onto(values, device, wide) for side, values in batch.units.items()}
        return cls(units, onto(batch.logits, device, wide), placed(batch.terms, device, wide))


class ContrastiveLoss(Objective):
    """The loss that aligns `image_embeds` with `text_embeds` of a model, as of CLIP and SigLIP.

    Image i of a batch belongs to text i. Where the batch has `labels`, image i belongs to text
    `labels[i]` instead; there may be any number of texts then, as the names of all classes, and for
    the softmax kind only the images choose.

    As an objective of `FlopsTrainer` every image and every text gets queries of its own through its
    own tower, and what projects its embedding, the scale and the bias get their exact gradients.
    With `perturbation="shared"` the loss of the batch as a whole is perturbed.

    Args:
        kind: "softmax" (CLIP), "sigmoid" (SigLIP), or "auto": sigmoid for models that have a
            `logit_bias`.
        same_texts: what equal texts in a batch are to the images of each other: "negatives", as in
            the models' own loss, or "positives", each text taken once.

    Raises:
        ConfigurationError: an unknown kind or meaning of equal texts.

    Examples:
        >>> import math
        >>> from types import SimpleNamespace
        >>> embeddings = torch.eye(2)  # image i and text i agree, all others are orthogonal
        >>> outputs = SimpleNamespace(text_embeds=embeddings, image_embeds=embeddings)
        >>> loss = ContrastiveLoss().loss(outputs, {}, torch.tensor(math.log(4.0)))
        >>> math.isclose(loss, math.log1p(math.exp(-4.0)), rel_tol=1e-5)
        True
    """

    per_row = False

    def __init__(self, kind: str = "auto", same_texts: str = "negatives") -> None:
        if kind not in KINDS:
            raise ConfigurationError(
                f"ContrastiveLoss(kind={kind!r}) is unknown: use {', '.join(KINDS)}."
            )
        if same_texts not in ("negatives", "positives"):
            raise ConfigurationError(
                f"same_texts={same_texts!r} is unknown: use 'negatives' or 'positives'."
            )
        self.kind, self.same_texts = kind, same_texts

    def terms(
        self, texts: int, images: int, labels: Tensor | None, *, sigmoid: bool, given: bool
    ) -> Terms:
        """Return the loss for so many texts and images.

        Args:
            texts: C.
            images: B.
            labels: (B,) the text of each image; None for pairs.
            sigmoid: whether the model is made for the sigmoid kind.
            given: whether the labels are the user's.
        """
        labels = torch.arange(images) if labels is None else labels.cpu()
        if images and not 0 <= int(labels.min()) <= int(labels.max()) < texts:
            raise ObjectiveError(
                f"labels from {int(labels.min())} to {int(labels.max())} do not number {texts} "
                "texts."
            )
        wanted = F.one_hot(labels, texts).T.double()
        if self.kind == "sigmoid" or (self.kind == "auto" and sigmoid):
            return SigmoidTerms(2 * wanted - 1, torch.full_like(wanted, 1 / images))
        if given:
            return SoftmaxTerms(torch.zeros_like(wanted), wanted / images)
        return SoftmaxTerms(wanted / (2 * images), wanted / (2 * images))

    def pairing(self, inputs: Inputs, texts: int, images: int) -> tuple[Tensor | None, Tensor]:
        """Return the text (B,) of each image, None for its own, and the distinct texts (C,).

        Raises:
            ObjectiveError: there are no labels, and not as many texts as images.
        """
        labels, everyone = inputs.get("labels"), torch.arange(texts)
        if labels is not None and torch.as_tensor(labels).shape == (images,):
            return torch.as_tensor(labels), everyone
        if texts != images:
            raise ObjectiveError(
                f"The batch has {images} images and {texts} texts: pair them one to one, or add "
                "labels (B,), the number of each image's text."
            )
        if self.same_texts == "negatives":
            return None, everyone
        _, labels = torch.unique(text_keys(inputs), dim=0, return_inverse=True)
        first = torch.full((int(labels.max()) + 1,), texts).scatter_reduce_(
            0, labels, everyone, "amin"
        )
        return labels, first

    def loss(
        self, outputs: Any, inputs: Inputs, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch as a differentiable scalar, for training by backprop.

        Args:
            outputs: of the model, with `text_embeds` (C, D) and `image_embeds` (B, D).
            inputs: the batch.
            scale: the model's `logit_scale`, a logarithm.
            bias: its `logit_bias`, if it has one.
        """
        texts, images = (widen(values) for values in (outputs.text_embeds, outputs.image_embeds))
        labels, distinct = self.pairing(inputs, len(texts), len(images))
        terms = self.terms(
            len(distinct), len(images), labels, sigmoid=bias is not None, given="labels" in inputs
        )
        texts = F.normalize(texts[distinct.to(texts.device)], dim=1)
        cosines = (texts @ F.normalize(images, dim=1).T).double().cpu()
        logits = scale.double().cpu().exp() * cosines
        return terms.elements(logits if bias is None else logits + bias.double().cpu()).sum()

    def run(self, model: Any, inputs: Inputs) -> tuple[None, Any]:
        """Run a model for its embeddings."""
        return None, model(
            **{
                name: value
                for name, value in inputs.items()
                if name not in ("labels", "return_loss")
            }
        )


class BatchContrast(Objective):
    """A contrastive loss of the batch as a whole: see `Objective`.

    Args:
        contrast: the loss.
        model: what has `logit_scale` and maybe `logit_bias`.
    """

    per_row = False

    def __init__(self, contrast: ContrastiveLoss, model: DualEncoder) -> None:
        self.contrast, self.model = contrast, model

    def run(self, model: object, inputs: Inputs) -> tuple[None, Any]:
        """See `ContrastiveLoss.run`."""
        return self.contrast.run(model, inputs)

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`."""
        del features
        scale, bias = self.model.logit_scale, getattr(self.model, "logit_bias", None)
        loss = self.contrast.loss(forward(inputs)[1], inputs, scale, bias)
        return RowLosses(loss.reshape(1), torch.ones(1, dtype=torch.float64))


def text_keys(inputs: Inputs) -> Tensor:
    """Return (C, L) what tells the texts of a batch apart: their tokens, padding left out."""
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    return (tokens if mask is None else torch.where(mask != 0, tokens, -1)).cpu()
