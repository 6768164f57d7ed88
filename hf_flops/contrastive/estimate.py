"""One step of a contrastive loss: each tower's noisy rows on their own, what the clean forward
tells exactly beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base.batch import ROW, batch_size
from ..base.rows import BatchPosition
from ..core.clean_forward import CleanPass, clean_pass
from ..core.estimate import estimate_from
from ..core.method import Method, StepResult
from ..estimators import ClosedFormHead
from ..objectives import Forward, Objective, RowLosses
from ..objectives.elementwise import widen
from .loss import ContrastiveBatch

# texts have noise of their own, also where a tensor is in both towers: no image has this position
_TEXTS = 2**40
KEPT = 0.95  # of what past steps told about the towers' shares


class TowerSurrogate(Objective):
    """A number per row that depends smoothly on all of its embedding: what the checks of the first
    batch look at.
    """

    def __call__(
        self, forward: Forward, inputs: Mapping[str, Any], *, features: bool = False
    ) -> RowLosses:
        """See `Objective`."""
        del features
        values = widen(forward(inputs)[1])
        sums = values @ torch.arange(values.shape[1], device=values.device).to(values).cos()
        return RowLosses(sums, torch.ones_like(sums))


class TowerLoss(Objective):
    """The loss of a batch with one embedding of a tower replaced: see `Objective`.

    Args:
        side: whose embeddings, of "image" or "text".
        batch: the loss; until it is known, as in the clean forward, embeddings are found only.
    """

    logits = needs_clean = True
    surrogate = TowerSurrogate()

    def __init__(self, side: str, batch: ContrastiveBatch | None = None) -> None:
        self.side, self.batch = side, batch

    def __call__(
        self, forward: Forward, inputs: Mapping[str, Any], *, features: bool = False
    ) -> RowLosses:
        """See `Objective`; `inputs` number their rows."""
        del features
        _, embeddings = forward(inputs)
        if self.batch is None:
            sums = torch.zeros(len(embeddings), dtype=torch.float64)
            return RowLosses(sums, torch.ones_like(sums), logits=widen(embeddings))
        return self.batch.replaced(self.side, inputs[ROW], embeddings)


@dataclass
class Tower:
    """One of the two encoders.

    Attributes:
        loss: what is minimised, one of its embeddings at a time.
        forward: maps its inputs to (None, embeddings (R, D)).
        method: how its gradient is estimated; None where no noise enters it.
        head: what projects its embeddings, where that is trained and has its exact gradient.
    """

    loss: TowerLoss
    forward: Forward
    method: Method | None = None
    head: ClosedFormHead | None = None

    def embeddings(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Run the batch once; returns its embeddings (U, D), and what the head was given."""
        if self.head is None:
            return self.forward(inputs)[1], None
        with self.head.watched() as seen:
            embeddings = self.forward(inputs)[1]
        return embeddings, seen[0]


def numbered(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Number the rows of a tower's inputs."""
    return {**inputs, ROW: torch.arange(batch_size(inputs))}


def estimate_alignment(
    towers: Mapping[str, Tower],
    inputs: Mapping[str, Mapping[str, Any]],
    contrast: Callable[[Tensor, Tensor], ContrastiveBatch],
    place: BatchPosition,
    batches: int = 1,
) -> tuple[dict[str, StepResult], ContrastiveBatch]:
    """Add an estimate of a contrastive loss's gradient to `.grad`; return what noisy towers found,
    and the loss.

    With u_i all embeddings, `dL = sum_i dL/du_i du_i`: an embedding's queries, the batch's others
    as they are, estimate its part, and the sum is unbiased for any counts that are fixed before the
    noise. A tower without noise runs once.

    Args:
        towers: by side.
        inputs: of each tower, its rows numbered.
        contrast: maps embeddings of texts (C, D) and images (B, D) to the loss of the batch.
        place: where the batch lies in the run.
        batches: over how many batches the optimizer step averages.
    """
    with torch.no_grad(), ExitStack() as stack:
        passes: dict[str, CleanPass] = {}
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for side, tower in towers.items():
            if tower.method is None:
                found[side] = tower.embeddings(inputs[side])
                continue
            recording = stack.enter_context(tower.method.reuse.recording(tower.forward))
            own = place if side == "image" else replace(place, position=place.position + _TEXTS)
            passes[side] = clean_pass(recording, inputs[side], tower.method, own)
            losses = passes[side].losses
            assert losses is not None
            assert losses.logits is not None
            found[side] = losses.logits, None
        batch = contrast(found["text"][0], found["image"][0])
        results = {}
        for side, tower in towers.items():
            clean, given = batch.clean(side), found[side][1]
            if side in passes:
                results[side] = estimate_from(
                    passes[side].judged_by(TowerLoss(side, batch), clean), None, batches
                )
            elif tower.head is not None and given is not None:
                tower.head.vector.add_to_gradients(
                    tower.head.gradient(given, clean) / (len(clean.sums) * batches)
                )
    return results, batch
