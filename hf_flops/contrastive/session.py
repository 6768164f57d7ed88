"""The gradient session of a contrastive loss: finds what of each tower is trained and how, and
shares queries out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..allocators import ALLOCATORS, Allocator
from ..autotune.first_batch import held_back, late_expansion
from ..autotune.rule_check import choose_perturbation
from ..autotune.session import Averaging, Batch, HandOver
from ..autotune.tuning import Tuning
from ..base.batch import batch_size, take
from ..base.probe import Attempt, agree
from ..base.rounding_error import precision_of
from ..base.rows import BatchPosition
from ..core.method import Method, StepResult
from ..errors import ConfigurationError
from ..estimators import ESTIMATORS, Estimator, find_head
from ..estimators.control_variate import control_variate
from ..objectives import Forward, RowLossError
from ..perturbations import ParameterVector
from .dual_encoder import (
    contrastive_base,
    require_return_loss,
    same_texts,
    tower_forward,
    tower_inputs,
    used_tensors,
)
from .estimate import Tower, TowerLoss, estimate_alignment, numbered
from .loss import SIDES, ContrastiveBatch, ContrastiveLoss
from .shares import TowerShares

logger = logging.getLogger("hf_flops.trainer")
_SUMS = ("gradient_variance", "gradient_signal", "sample_signal", "head_signal", "dropped_rows")
Inputs = dict[str, dict[str, Any]]


class ContrastiveSession:
    """Estimates the gradient of a contrastive loss: see `GradientSession` and `estimate_alignment`.

    Args:
        args: the run's arguments.
        model: the model, maybe with an adapter around it.
        contrast: the loss; None for the model's own, which is then compared with that of the
            towers' embeddings.
        metered: wraps what runs the model, to count rows.
        allocator: an instance that each tower gets a copy of, in place of the name in `args`.
        estimator: an instance, in place of the name in `args`.

    Raises:
        ConfigurationError: arguments that need a loss per batch.
    """

    counts_labels = False
    needs_clean = True
    method = None

    def __init__(
        self,
        args: Any,
        model: nn.Module,
        contrast: ContrastiveLoss | None,
        metered: Callable[[Forward], Forward],
        *,
        allocator: Allocator | None = None,
        estimator: Estimator | None = None,
    ) -> None:
        self.args, self.model, self.base = args, model, contrastive_base(model)
        self.contrast, self._own = contrast or ContrastiveLoss(), contrast is None
        self.estimator: Estimator = estimator or ESTIMATORS[args.estimator]()
        self.allocators = {
            side: deepcopy(allocator) or ALLOCATORS[args.allocator]() for side in SIDES
        }
        self.tunings = {side: Tuning.of(args) for side in SIDES}
        self.controls = {side: control_variate(args.control_variate) for side in SIDES}
        self.forwards = {side: metered(tower_forward(self.base, side)) for side in SIDES}
        self.towers: dict[str, Tower] = {}
        self.shares, self.check_rows, self._warned = TowerShares(), 0, False
        # what was held back and trainable
        self._known: tuple[Collection[str], Collection[str]] | None = None

    @property
    def observers(self) -> Sequence[Any]:
        """See `GradientSession`."""
        return []

    @property
    def precision(self) -> float:
        """See `precision_of`."""
        return precision_of(self.model, autocast=self.args.bf16)

    def rows(self, samples: int, step: int) -> int:
        """See `GradientSession`."""
        return samples * int(self.args.queries_per_sample)

    def prepare(self, batch: Batch) -> None:
        """See `GradientSession`.

        Raises:
            HandOver: the model's own loss is not that of its towers' embeddings.
            ObjectiveError: the batch asks for no loss, lacks images or texts, or does not pair
                them.
            ConfigurationError: nothing is trained.
        """
        frozen = held_back(self.model, self.args.lora_parts, batch.progress)
        now = frozen, ParameterVector.of(self.model).names
        if self._known == now:
            return
        parts, labels = self._split(batch.inputs)
        if self._own and labels is None and self._known is None:
            require_return_loss(self.base, batch.inputs)
            if not self._matches(batch, parts):
                logger.warning(
                    "The loss of %s is not that of its embeddings' cosines.",
                    type(self.base).__name__,
                )
                raise HandOver
        self.towers = {side: self._tower(side, parts[side], frozen) for side in SIDES}
        self._known = now
        if all(tower.method is None and tower.head is None for tower in self.towers.values()):
            raise ConfigurationError(
                "No embedding depends on a trainable parameter: add an adapter (peft_config=)."
            )

    def _matches(self, batch: Batch, parts: Inputs) -> bool:
        """Say whether the model's own loss of a batch is that of its towers' embeddings."""
        with Attempt("The towers' embeddings make no loss"):
            with self._linked(parts, self._contrast(None, given=False)) as found:
                loss = batch.forward(batch.inputs)[0]
            both = (
                None
                if loss is None
                else torch.tensor([float(loss), found.loss], dtype=torch.float64)
            )
            return both is not None and agree(both[0], both[1], 10 * self.precision, 1.0)
        return False

    def unperturbed(self, batches: Sequence[Batch]) -> AbstractContextManager[Callable[[], Tensor]]:
        """See `GradientSession`; only losses of whole batches can be searched along."""
        raise ConfigurationError(
            "The losses of single images and texts are not those of a line search."
        )

    def estimate(self, batch: Batch, position: BatchPosition, averaging: Averaging) -> StepResult:
        """See `GradientSession`; a row is an image or a text through its tower.

        Raises:
            ObjectiveError: the batch lacks images or texts, or does not pair them.
            ConfigurationError: too few queries.
        """
        own, labels = self._split(batch.inputs)
        contrast = self._contrast(labels, given="labels" in batch.inputs)
        self._complete(own, int(self.args.queries_per_sample), contrast, position.seed)
        results, found = estimate_alignment(self.towers, own, contrast, position, averaging.batches)  # type: ignore[arg-type]
        self._add_scale(found, averaging.batches)
        self.shares.update(self.towers, results)
        return self._joined(results, found, own, averaging.batches)

    def fall_back(self, error: RowLossError, *, recorded: bool) -> None:
        """See `GradientSession`: the losses of embeddings are never lost."""
        raise error

    def discard(self) -> None:
        """See `GradientSession`: nothing is put off."""

    def parts(self) -> dict[str, Any]:
        """See `GradientSession`."""
        families: dict[str, Any] = {
            "allocator": self.allocators,
            "tuning": self.tunings,
            "control variate": self.controls,
        }
        found = {f"{side} {name}": part[side] for name, part in families.items() for side in SIDES}
        return {
            "rows of the towers": self.shares,
            **{name: part for name, part in found.items() if part is not None},
        }

    def log(self) -> dict[str, float]:
        """See `GradientSession`."""
        return {}

    def _split(self, inputs: Mapping[str, Any]) -> tuple[Inputs, Tensor | None]:
        """Return the towers' inputs, rows numbered, and the text (B,) of each image, None for its
        own.
        """
        own = tower_inputs(self.base, inputs)
        labels, kept = self.contrast.pairing(
            inputs, batch_size(own["text"]), batch_size(own["image"])
        )
        if len(kept) < batch_size(own["text"]):
            own["text"] = take(own["text"], kept)
        if labels is None and not self._warned and (warning := same_texts(inputs)):
            logger.warning("%s", warning)
            self._warned = True
        return {side: numbered(part) for side, part in own.items()}, labels

    def _contrast(
        self, labels: Tensor | None, *, given: bool
    ) -> Callable[[Tensor, Tensor], ContrastiveBatch]:
        """Return what makes the loss of a batch of its embeddings of texts (C, D) and images
        (B, D).
        """
        bias = getattr(self.base, "logit_bias", None)
        scale, shift = (
            float(self.base.logit_scale.double().exp()),
            0.0 if bias is None else float(bias),
        )

        def batch(texts: Tensor, images: Tensor) -> ContrastiveBatch:
            sizes = len(texts), len(images)
            terms = self.contrast.terms(*sizes, labels, sigmoid=bias is not None, given=given)
            return ContrastiveBatch(texts, images, terms, scale, shift)

        return batch

    def _tower(self, side: str, inputs: Mapping[str, Any], frozen: Collection[str]) -> Tower:
        """Find out what of a tower is trained, and how, with the first batch."""
        model, forward, loss = self.model, self.forwards[side], TowerLoss(side)
        trained = set(ParameterVector.of(model).names)
        names = used_tensors(model, forward, take(inputs, torch.tensor([0]))) - set(frozen)
        exact = bool(names) and self.args.closed_form_head
        head = find_head(model, loss, forward, inputs, trained - names) if exact else None
        if head is not None:
            names -= set(head.vector.names)
            logger.info(
                "Noise leaves what projects %ss alone, whose gradient is exact: %s.",
                side,
                *head.vector.names,
            )
        if not names:
            return Tower(loss, forward, None, head)
        out = trained - names
        options = {
            "mode": self.args.perturbation,
            "distribution": self.args.noise,
            "precision": self.precision,
        }
        perturbation, notes = choose_perturbation(
            model, loss.surrogate, forward, inputs, frozen=out, **options
        )
        for note in notes:
            logger.warning("%s", note)
        args = copy(self.args)
        # texts have no ids of their own
        args.prefix_cache = self.args.prefix_cache if side == "image" else None
        reuse = late_expansion(
            args, model, loss.surrogate, forward, inputs, perturbation, self.precision
        )
        method = Method(
            objective=loss,
            perturbation=perturbation,
            estimator=self.estimator,
            allocator=self.allocators[side],
            queries_per_sample=0,
            scale=1e-3,
            rows_per_forward=1,
            reuse=reuse,
            head=head,
            control=self.controls[side],
        )
        return Tower(loss, forward, method, head)

    def _complete(self, own: Inputs, queries: int, contrast: Any, seed: int) -> None:
        """Fill in what the step's method is made of: queries, epsilon, rows per forward."""
        scale, precision = self.args.perturbation_scale, self.precision
        number = scale if isinstance(scale, (int, float)) else 1e-3 if precision < 1e-3 else 1e-2
        shares = self.shares.share(
            self.towers, {side: batch_size(part) for side, part in own.items()}, queries
        )
        unknown = scale == "auto" and not all(self.tunings[side].found for side in shares)
        with self._linked(own, contrast) if unknown else nullcontext():
            for side, count in shares.items():
                tower, tuning = self.towers[side], self.tunings[side]
                method = replace(tower.method, queries_per_sample=1 + count, scale=number)  # type: ignore[type-var]
                tower.method = tuning.complete(
                    method,  # type: ignore[arg-type]
                    tower.forward,
                    own[side],
                    precision=precision,
                    seed=seed,
                )

    @contextmanager
    def _linked(self, own: Inputs, contrast: Any) -> Iterator[ContrastiveBatch]:
        """Let the towers' losses be those of the batch for a while."""
        batch = contrast(*(self.forwards[side](own[side])[1] for side in ("text", "image")))
        for tower in self.towers.values():
            tower.loss.batch = batch
        try:
            yield batch
        finally:
            for tower in self.towers.values():
                tower.loss.batch = None

    def _add_scale(self, batch: ContrastiveBatch, batches: float) -> None:
        """Add the exact gradients of scale and bias, where they are trained."""
        for name, slope in (
            ("logit_scale", batch.slope_of_scale),
            ("logit_bias", batch.slope_of_bias),
        ):
            parameter = getattr(self.base, name, None)
            if parameter is not None and parameter.requires_grad:
                gradient = torch.full_like(parameter, slope / batches)
                parameter.grad = (
                    gradient if parameter.grad is None else parameter.grad.add_(gradient)
                )

    def _joined(
        self, results: dict[str, StepResult], batch: ContrastiveBatch, own: Inputs, batches: float
    ) -> StepResult:
        """Put together what the towers' estimates found; the counts are those of the images, with
        their texts' in pairs.
        """
        metrics = dict.fromkeys(_SUMS, 0.0)
        for name in {name for found in results.values() for name in found.metrics}:
            values = [found.metrics[name] for found in results.values()]
            metrics[name] = sum(values) if name in _SUMS else sum(values) / len(values)
        still = {side: batch_size(part) for side, part in own.items() if side not in results}
        metrics |= {
            f"{side}_rows": float(results[side].rows if side in results else still[side])
            for side in SIDES
        }
        counts = torch.zeros(batch_size(own["image"]), dtype=torch.int64)
        squares = torch.zeros(len(counts))
        for found in results.values():
            if len(found.counts) == len(counts):
                counts, squares = counts + found.counts, squares + found.mean_squares
        rows = sum(found.rows for found in results.values()) + sum(still.values())
        for tuning in self.tunings.values():
            rows, tuning.rows = rows + tuning.rows, 0  # what epsilon took, if it was measured
        return StepResult(torch.tensor(batch.loss / batches), rows, counts, squares, metrics)
