"""One step of a contrastive loss: estimates from noisy rows, and gradients that are exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.batch import ROW, Inputs, batch_size
from ..base.rows import BatchPosition
from ..base.transfer import to_host
from ..core.clean_forward import CleanPass, clean_pass
from ..core.estimate import estimate_from
from ..core.method import Method, StepResult
from ..estimators import ClosedFormHead
from ..objectives import CallableObjective, Forward, Objective, RowLosses
from ..objectives.elementwise import widen
from .loss import SIDES, ContrastiveBatch, DualEncoder

# texts have noise of their own, also where a tensor is in both towers: no image has this position
_TEXTS = 2**40
KEPT = 0.95  # weight of past steps in the towers' shares, from one step to the next
# metrics that are sums over towers; the others are averaged
_SUMS = ("gradient_variance", "gradient_signal", "sample_signal", "head_signal", "dropped_rows")
TowerInputs = Mapping[str, Inputs]  # by side, rows numbered
# maps embeddings of texts (C, D) and images (B, D) to the loss of the batch
Contrast = Callable[[Tensor, Tensor], ContrastiveBatch]


def projected(embeddings: Tensor, inputs: Inputs) -> Tensor:
    """Return a number per row that depends smoothly on all of its embedding (R, D)."""
    values = widen(embeddings)
    return values @ torch.arange(values.shape[1], device=values.device).to(values).cos()


class TowerLoss(Objective):
    """The loss of a batch with one embedding of a tower replaced: see `Objective`.

    Args:
        side: the tower, "image" or "text".
        batch: the loss; None for zero losses, as in the clean forward, which computes embeddings
            only.
    """

    logits = needs_clean = True
    surrogate = CallableObjective(projected)

    def __init__(self, side: str, batch: ContrastiveBatch | None = None) -> None:
        self.side, self.batch = side, batch

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`; the rows of `inputs` are numbered."""
        del features
        _, embeddings = forward(inputs)
        if self.batch is None:
            sums = torch.zeros(len(embeddings), dtype=torch.float64)
            return RowLosses(sums, torch.ones_like(sums), logits=widen(embeddings))
        return self.batch.replaced(self.side, inputs[ROW], embeddings)


@dataclass(frozen=True)
class Tower:
    """One of the two encoders.

    Attributes:
        forward: maps its inputs to (None, embeddings (R, D)).
        method: how its gradient is estimated, the loss left open; None where no noise enters it.
        head: what projects its embeddings, where that is trained and has its exact gradient.
    """

    forward: Forward
    method: Method | None = None
    head: ClosedFormHead | None = None

    def embeddings(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Run the batch once; return its embeddings (U, D) and the head's inputs."""
        if self.head is None:
            return self.forward(inputs)[1], None
        with self.head.watched() as features:
            embeddings = self.forward(inputs)[1]
        return embeddings, features[0]


def numbered(inputs: Inputs) -> Inputs:
    """Number the rows of a tower's inputs."""
    return {**inputs, ROW: torch.arange(batch_size(inputs))}


def estimate_alignment(
    towers: Mapping[str, Tower],
    inputs: TowerInputs,
    contrast: Contrast,
    place: BatchPosition,
    batches: float = 1.0,
) -> tuple[dict[str, StepResult], ContrastiveBatch, dict[str, Tensor]]:
    """Add an estimate of a contrastive loss's gradient to `.grad`; return results, loss, and by
    side the inputs of the head, or the embeddings where there is none.

    With u_i all embeddings, `dL = sum_i dL/du_i du_i`: the queries of an embedding, with the others
    of the batch fixed, estimate its term, and the sum is unbiased for any counts that are fixed
    before the noise. A tower without noise runs once.

    Args:
        towers: by side.
        inputs: of each tower, its rows numbered.
        contrast: maps embeddings of texts (C, D) and images (B, D) to the loss of the batch.
        place: where the batch lies in the run.
        batches: how many batches the optimizer step averages.
    """
    with torch.no_grad(), ExitStack() as stack:
        passes: dict[str, CleanPass] = {}
        clean: dict[str, tuple[Tensor, Tensor | None]] = {}
        for side, tower in towers.items():
            if tower.method is None:
                clean[side] = tower.embeddings(inputs[side])
                continue
            recording = stack.enter_context(tower.method.reuse.recording(tower.forward))
            apart = replace(place, position=place.position + _TEXTS * (side == "text"))
            passes[side] = clean_pass(recording, inputs[side], tower.method, apart)
            losses = passes[side].losses
            assert losses is not None
            assert losses.logits is not None
            found = passes[side].found
            clean[side] = losses.logits, None if found is None else found.features
        kept = [own if features is None else features for own, features in clean.values()]
        host = iter(to_host(*(own.detach() for own, _ in clean.values()), *kept))
        embeddings = {side: next(host) for side in clean}
        inputs_of = {side: next(host) for side in clean}
        batch = contrast(embeddings["text"], embeddings["image"])
        results = {}
        for side, tower in towers.items():
            losses, features = batch.clean(side), clean[side][1]
            if side in passes:
                results[side] = estimate_from(
                    passes[side].judged_by(TowerLoss(side, batch), losses), None, batches
                )
            elif tower.head is not None and features is not None:
                tower.head.vector.add_to_gradients(
                    tower.head.gradient(features, losses) / (len(losses.sums) * batches)
                )
    return results, batch, inputs_of


def add_scale_gradients(base: DualEncoder, loss: ContrastiveBatch, batches: float) -> None:
    """Add the exact gradients of the model's scale and bias, where they are trained.

    Args:
        base: the model of two towers.
        loss: of the batch.
        batches: how many batches the optimizer step averages.
    """
    slopes = {"logit_scale": loss.slope_of_scale, "logit_bias": loss.slope_of_bias}
    for name, slope in slopes.items():
        parameter = getattr(base, name, None)
        if parameter is not None and parameter.requires_grad:
            gradient = torch.full_like(parameter, slope / batches)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def join_results(
    results: Mapping[str, StepResult], sizes: Mapping[str, int], loss: float
) -> StepResult:
    """Join the towers' results; counts are those of the images, plus as many texts'.

    Args:
        results: of the towers with noise.
        sizes: embeddings of each tower.
        loss: the batch's share of the optimizer step's loss.
    """
    metrics = dict.fromkeys(_SUMS, 0.0)
    for name in {name for result in results.values() for name in result.metrics}:
        values = [result.metrics[name] for result in results.values()]
        metrics[name] = sum(values) if name in _SUMS else sum(values) / len(values)
    rows = {side: results[side].rows if side in results else sizes[side] for side in SIDES}
    metrics |= {f"{side}_rows": float(count) for side, count in rows.items()}
    counts = torch.zeros(sizes["image"], dtype=torch.int64)
    squares = torch.zeros(len(counts))
    for result in results.values():
        if len(result.counts) == len(counts):
            counts, squares = counts + result.counts, squares + result.mean_squares
    return StepResult(torch.tensor(loss), sum(rows.values()), counts, squares, metrics)
