"""Projections of two towers that are solved instead of stepped, on the kept features of pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.state import State
from ..base.transfer import to_host
from ..estimators import ClosedFormHead
from ..estimators.feature_solver import FeatureSolver, minimise
from .loss import SIDES
from .projection_loss import Group, ProjectionLoss
from .similarity import Terms, stacked

MOST_NUMBERS = 2**22  # of the kept batches, 16 MiB; the oldest batches are dropped

MakeTerms = Callable[[int, int, Tensor, bool], Terms]
"""(texts, images, the text of each image (B,), whether the user gave them) → the loss of a batch"""


@dataclass(frozen=True)
class KeptBatch:
    """What a clean forward showed of a batch.

    Attributes:
        inputs: by side, (S, H) float32 of the projection; embeddings of a side without one.
        labels: (B,) the text of each image.
        given: whether the labels are the user's.
        ids: (B,) of the images.
        number: how many images came before.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    given: bool
    ids: tuple[int, ...]
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of texts and of images."""
        return len(self.inputs["text"]), len(self.inputs["image"])

    @property
    def size(self) -> int:
        """How many numbers are kept."""
        return sum(part.numel() for part in self.inputs.values())


class ProjectionSolver(FeatureSolver):
    """Keeps the batches that clean forwards show to two projections, and solves for the weights of
    both after each optimizer step: see `FeatureSolver`.

    Batches are kept whole, as the other tower's embeddings are the negatives of a contrastive loss.
    A sample that comes again counts in its last batch only, and is a mere negative in earlier ones.

    The loss does not change with the length of embeddings, and is not convex; for its prior see
    `ProjectionLoss`.

    Args:
        terms: makes the loss of a batch.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.contrastive import ContrastiveLoss
        >>> from hf_flops.contrastive.projection_solver import ProjectionSolver
        >>> from hf_flops.estimators import ClosedFormHead
        >>> loss, layer = ContrastiveLoss(), nn.Linear(2, 2, bias=False)
        >>> solver = ProjectionSolver(
        ...     lambda texts, images, labels, given: loss.terms(
        ...         texts, images, labels, sigmoid=False, given=given
        ...     )
        ... )
        >>> solver.bind({"image": ClosedFormHead(layer, {"weight": "projection.weight"})}, 9.0)
        >>> solver.add({"image": torch.eye(2), "text": torch.eye(2).flip(0)}, torch.arange(2))
        >>> solver.solve()
        >>> layer(torch.eye(2)).argmax(1).tolist()
        [1, 0]
    """

    def __init__(self, terms: MakeTerms) -> None:
        super().__init__()
        self.terms = terms
        self.heads: dict[str, ClosedFormHead] = {}
        self._scale, self._bias = 1.0, 0.0
        self._batches: list[KeptBatch] = []
        self._prior: dict[str, Tensor] = {}
        self._solution: dict[str, Tensor] = {}  # the weights of the last solution
        self._unnamed = 0
        self._last: dict[int, int] = {}  # id → the `number` of its last batch

    @property
    def samples(self) -> int:
        """See `FeatureSolver`."""
        return len(self._last)

    def bind(self, heads: Mapping[str, ClosedFormHead], scale: float, bias: float = 0.0) -> None:
        """Solve these projections from now on; others than before start without samples.

        Args:
            heads: by side.
            scale: factor of the cosines.
            bias: added to the scaled cosines.
        """
        if self.heads and _names(self.heads) != _names(heads):
            self._batches, self._last, self._prior, self._solution = [], {}, {}, {}
        self.heads, self._scale, self._bias = dict(heads), scale, bias
        for side in heads.keys() - self._solution.keys():
            self._solution[side] = heads[side].weights()
            self._prior.setdefault(side, self._solution[side])

    def add(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        ids: Sequence[int] | None = None,
        *,
        given: bool = False,
    ) -> None:
        """Keep a batch, unless something in it is not finite.

        Args:
            inputs: by side, (S, H) of the projection in the clean forward; embeddings of a side
                without one.
            labels: (B,) the text of each image.
            ids: (B,) of the images, if they have any.
            given: whether the labels are the user's.
        """
        values = to_host(*(part.detach().float() for part in inputs.values()))
        parts = dict(zip(inputs, values, strict=True))
        if not all(bool(part.isfinite().all()) for part in parts.values()):
            return
        number = len(labels)
        if ids is None:
            ids = range(self._unnamed - number, self._unnamed)
            self._unnamed -= number
        self._repeated = self._repeated or not self._last.keys().isdisjoint(ids)
        self._new = True
        self._batches.append(KeptBatch(parts, labels.cpu(), given, tuple(ids), self.seen))
        self._last |= dict.fromkeys(ids, self.seen)
        self.seen += number
        self._batches = [batch for batch in self._batches if bool(self._newest(batch).any())]
        while sum(batch.size for batch in self._batches) > MOST_NUMBERS:
            dropped = self._batches.pop(0)
            self._last = {id_: at for id_, at in self._last.items() if at != dropped.number}

    def _newest(self, batch: KeptBatch) -> Tensor:
        """Return (B,) whether this is the last batch of its images."""
        return torch.tensor([self._last[id_] == batch.number for id_ in batch.ids])

    def solve(self) -> None:
        """Move the projections to a minimum of the loss on the kept batches."""
        if not self._batches:
            return
        numbers = [batch.number for batch in self._batches]
        ages = self.age_weights(numbers).unbind()
        weights = [
            age * self._newest(batch) for age, batch in zip(ages, self._batches, strict=True)
        ]
        loss = ProjectionLoss(
            self.heads, self._prior, self._groups(weights), self._scale, self._bias
        )
        total = float(torch.cat(weights).sum())
        vector = loss.vector(self._solution)  # not from where the optimizer moved the weights

        def mean(vector: Tensor) -> tuple[Tensor, Tensor]:
            objective, gradient = loss.evaluate(vector)
            return objective / total, gradient / total

        minimise(vector, mean)
        if bool(vector.isfinite().all()):
            for side, weight in loss.weights(vector).items():
                self._solution[side] = self.heads[side].write(weight)
            self.objective = sum(batch.loss for batch in loss.batches(vector)) / total

    def _groups(self, weights: Sequence[Tensor]) -> list[Group]:
        """Return the batches, those of the same shape together, with weights (B,) of the images."""
        members: dict[tuple[int, int], list[tuple[KeptBatch, Tensor]]] = {}
        for batch, weight in zip(self._batches, weights, strict=True):
            members.setdefault(batch.shape, []).append((batch, weight))
        groups = []
        for (texts, images), same in members.items():
            # the loss of a batch is a mean over its images, and that of all is a sum
            terms = [
                self.terms(texts, images, batch.labels, batch.given).weighted(images * weight)
                for batch, weight in same
            ]
            inputs = {
                side: torch.stack([batch.inputs[side] for batch, _ in same]).double()
                for side in SIDES
            }
            groups.append(Group(stacked(terms), inputs))
        return groups

    def state_dict(self) -> State:
        """Return the kept batches, the prior's mean, and whether priming may go on."""
        batches = self._batches
        if not batches:
            return {"collecting": self._collecting}
        inputs = {side: torch.cat([batch.inputs[side] for batch in batches]) for side in SIDES}
        return {
            "collecting": self._collecting,
            "seen": self.seen,
            "prior": self._prior,
            "labels": torch.cat([batch.labels for batch in batches]),
            "ids": torch.tensor([id_ for batch in batches for id_ in batch.ids]),
            "given": [batch.given for batch in batches],
            "numbers": [batch.number for batch in batches],
            "shapes": [[*batch.shape] for batch in batches],
            "inputs": inputs,
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self._collecting = state["collecting"]
        if "ids" not in state:
            return
        texts, images = zip(*state["shapes"], strict=True)
        parts = zip(
            state["inputs"]["text"].split(texts),
            state["inputs"]["image"].split(images),
            state["labels"].split(images),
            state["given"],
            state["ids"].split(images),
            state["numbers"],
            strict=True,
        )
        self._batches = [
            KeptBatch({"image": x, "text": y}, labels, given, tuple(ids.tolist()), number)
            for y, x, labels, given, ids, number in parts
        ]
        for batch in self._batches:
            self._last |= dict.fromkeys(batch.ids, batch.number)
        self._unnamed = min(0, *self._last)
        self._prior, self.seen = state["prior"], state["seen"]


def _names(heads: Mapping[str, ClosedFormHead]) -> dict[str, dict[str, str]]:
    return {side: head.names for side, head in heads.items()}
