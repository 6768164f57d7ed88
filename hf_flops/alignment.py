"""What the trainer does for a contrastive model: finds what of each tower is trained and how, and shares queries out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .allocators import ALLOCATORS, Allocator
from .contrastive import SIDES, ContrastiveBatch, ContrastiveLoss
from .errors import ConfigurationError
from .estimators import Estimator
from .heads import find_head
from .image_text import contrastive_base, require_return_loss, same_texts, tower_forward, tower_inputs, used_tensors
from .method import Method, StepResult
from .objectives import Forward
from .perturbations import ParameterVector
from .probe_runs import Attempt, agree
from .rows import Place, batch_size, take
from .selfcheck import choose_perturbation, precision_of
from .setup import late_expansion
from .towers import Controls, Tower, TowerLoss, TowerShares, estimate_alignment, numbered
from .tuning import Tuning

logger = logging.getLogger("hf_flops.trainer")
_SUMS = ("gradient_variance", "gradient_signal", "sample_signal", "head_signal", "dropped_rows")
Inputs = dict[str, dict[str, Any]]


class Alignment:
    """Estimates the gradient of a contrastive loss: see `estimate_alignment`.

    Args:
        args: the run's arguments.
        model: the model, maybe with an adapter around it.
        contrast: the loss.
        estimator: the finite difference.
        allocator: an instance that each tower gets a copy of, or None for what the arguments say.
        metered: wraps what runs the model, to count rows.
    """

    def __init__(
        self,
        args: Any,
        model: nn.Module,
        contrast: ContrastiveLoss,
        estimator: Estimator,
        allocator: Allocator | None,
        metered: Callable[[Forward], Forward],
    ) -> None:
        self.args, self.model, self.base = args, model, contrastive_base(model)
        self.contrast, self.estimator = contrast, estimator
        self.allocators = {side: deepcopy(allocator) or ALLOCATORS[args.allocator]() for side in SIDES}
        self.tunings = {side: Tuning.of(args) for side in SIDES}
        self.controls = Controls(args.control_variate)
        self.forwards = {side: metered(tower_forward(self.base, side)) for side in SIDES}
        self.towers: dict[str, Tower] = {}
        self._held: Collection[str] | None = None
        self.stale = False  # whether other tensors are trainable than there were
        self.shares, self._warned = TowerShares(), False

    @property
    def precision(self) -> float:
        """See `precision_of`."""
        return precision_of(self.model, autocast=self.args.bf16)

    def set_up(self, forward: Forward, inputs: Mapping[str, Any], held: Collection[str], *, own: bool) -> bool:
        """Find out, with the first batch or where other tensors than before are trained, what of each tower is trained.

        Args:
            forward: runs the whole model.
            inputs: a batch.
            held: names of trainable tensors that stay as they are for now.
            own: whether the loss should be the model's own, which is then looked at.

        Returns:
            Whether the loss of a batch that is taken from the towers' embeddings is what the model returns.

        Raises:
            ObjectiveError: the batch asks for no loss, lacks images or texts, or does not pair them.
            ConfigurationError: nothing is trained.
        """
        if self._held == held and not self.stale:
            return True
        parts, labels = self._split(inputs)
        if own and labels is None and self._held is None:
            require_return_loss(self.base, inputs)
            if not self._matches(forward, inputs, parts):
                return False
        self.towers = {side: self._tower(side, parts[side], held) for side in SIDES}
        self._held, self.stale = held, False
        if all(tower.method is None and tower.head is None for tower in self.towers.values()):
            raise ConfigurationError("No embedding depends on a trainable parameter: add an adapter (peft_config=).")
        return True

    def _matches(self, forward: Forward, inputs: Mapping[str, Any], parts: Inputs) -> bool:
        """Say whether the model's own loss of a batch is that of its towers' embeddings."""
        with Attempt("The towers' embeddings make no loss"):
            with self._linked(parts, self._contrast(None, given=False)) as batch:
                loss = forward(inputs)[0]
            both = None if loss is None else torch.tensor([float(loss), batch.loss], dtype=torch.float64)
            return both is not None and agree(both[0], both[1], 10 * self.precision, 1.0)
        return False

    def step(self, inputs: Mapping[str, Any], place: Place, queries: int, batches: int) -> tuple[StepResult, Method | None]:
        """Estimate the gradient of a batch; returns what was found, and the method of a tower that noise enters.

        Args:
            inputs: the batch.
            place: where it lies in the run.
            queries: rows per image, all included; a row is an image or a text through its tower.
            batches: over how many batches the optimizer step averages.

        Raises:
            ObjectiveError: the batch lacks images or texts, or does not pair them.
            ConfigurationError: too few queries.
        """
        own, labels = self._split(inputs)
        contrast = self._contrast(labels, given="labels" in inputs)
        self._complete(own, queries, contrast, place.seed)
        results, batch = estimate_alignment(self.towers, own, contrast, place, batches)
        self._add_scale(batch, batches)
        self.shares.learn(self.towers, results)
        noisy = (tower.method for tower in self.towers.values() if tower.method is not None)
        return self._joined(results, batch, own, batches), next(noisy, None)

    def _split(self, inputs: Mapping[str, Any]) -> tuple[Inputs, Tensor | None]:
        """Return the towers' inputs, rows numbered, and the text (B,) of each image, None for its own."""
        own = tower_inputs(self.base, inputs)
        labels, kept = self.contrast.pairing(inputs, batch_size(own["text"]), batch_size(own["image"]))
        if len(kept) < batch_size(own["text"]):
            own["text"] = take(own["text"], kept)
        if labels is None and not self._warned and (warning := same_texts(inputs)):
            logger.warning("%s", warning)
            self._warned = True
        return {side: numbered(part) for side, part in own.items()}, labels

    def _contrast(self, labels: Tensor | None, *, given: bool) -> Callable[[Tensor, Tensor], ContrastiveBatch]:
        """Return what makes the loss of a batch of its embeddings of texts (C, D) and images (B, D)."""
        bias = getattr(self.base, "logit_bias", None)
        scale, shift = float(self.base.logit_scale.double().exp()), 0.0 if bias is None else float(bias)

        def batch(texts: Tensor, images: Tensor) -> ContrastiveBatch:
            sizes = len(texts), len(images)
            terms = self.contrast.terms(*sizes, labels, sigmoid=bias is not None, given=given)
            return ContrastiveBatch(texts, images, terms, scale, shift)

        return batch

    def _tower(self, side: str, inputs: Mapping[str, Any], held: Collection[str]) -> Tower:
        """Find out what of a tower is trained, and how, with the first batch."""
        model, forward, loss = self.model, self.forwards[side], TowerLoss(side)
        trained = set(ParameterVector.of(model).names)
        names = used_tensors(model, forward, take(inputs, torch.tensor([0]))) - set(held)
        exact = bool(names) and self.args.closed_form_head
        head = find_head(model, loss, forward, inputs, trained - names) if exact else None
        if head is not None:
            names -= set(head.vector.names)
            logger.info("Noise leaves what projects %ss alone, whose gradient is exact: %s.", side, *head.vector.names)
        if not names:
            return Tower(loss, forward, None, head)
        out = trained - names
        options = {"mode": self.args.perturbation, "distribution": self.args.noise, "precision": self.precision}
        perturbation, notes = choose_perturbation(model, loss.surrogate, forward, inputs, held=out, **options)
        for note in notes:
            logger.warning("%s", note)
        args = copy(self.args)
        args.prefix_cache = self.args.prefix_cache if side == "image" else None  # texts have no ids of their own
        reuse = late_expansion(args, model, loss.surrogate, forward, inputs, perturbation, self.precision)
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
            control=self.controls.parts[side],
        )
        return Tower(loss, forward, method, head)

    def _complete(self, own: Inputs, queries: int, contrast: Any, seed: int) -> None:
        """Fill in what the step's method is made of: queries, epsilon, rows per forward."""
        scale, precision = self.args.perturbation_scale, self.precision
        number = scale if isinstance(scale, (int, float)) else 1e-3 if precision < 1e-3 else 1e-2
        shares = self.shares.share(self.towers, {side: batch_size(part) for side, part in own.items()}, queries)
        unknown = scale == "auto" and not all(self.tunings[side].found for side in shares)
        with self._linked(own, contrast) if unknown else nullcontext():
            for side, count in shares.items():
                tower, tuning = self.towers[side], self.tunings[side]
                method = replace(tower.method, queries_per_sample=1 + count, scale=number)  # type: ignore[type-var]
                tower.method = tuning.complete(method, tower.forward, own[side], precision=precision, seed=seed)  # type: ignore[arg-type]

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

    def _add_scale(self, batch: ContrastiveBatch, batches: int) -> None:
        """Add the exact gradients of scale and bias, where they are trained."""
        for name, slope in (("logit_scale", batch.slope_of_scale), ("logit_bias", batch.slope_of_bias)):
            parameter = getattr(self.base, name, None)
            if parameter is not None and parameter.requires_grad:
                gradient = torch.full_like(parameter, slope / batches)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _joined(self, results: dict[str, StepResult], batch: ContrastiveBatch, own: Inputs, batches: int) -> StepResult:
        """Put together what the towers' estimates found; the counts are those of the images, with their texts' in pairs."""
        metrics = dict.fromkeys(_SUMS, 0.0)
        for name in {name for found in results.values() for name in found.metrics}:
            values = [found.metrics[name] for found in results.values()]
            metrics[name] = sum(values) if name in _SUMS else sum(values) / len(values)
        still = {side: batch_size(part) for side, part in own.items() if side not in results}
        metrics |= {f"{side}_rows": float(results[side].rows if side in results else still[side]) for side in SIDES}
        counts = torch.zeros(batch_size(own["image"]), dtype=torch.int64)
        squares = torch.zeros(len(counts))
        for found in results.values():
            if len(found.counts) == len(counts):
                counts, squares = counts + found.counts, squares + found.mean_squares
        rows = sum(found.rows for found in results.values()) + sum(still.values())
        for tuning in self.tunings.values():
            rows, tuning.rows = rows + tuning.rows, 0  # what epsilon took, if it was measured
        return StepResult(torch.tensor(batch.loss / batches), rows, counts, squares, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as JSON-serialisable values."""
        parts: dict[str, dict[str, Any]] = {"allocators": self.allocators, "tunings": self.tunings}
        found = {name: {side: part[side].state_dict() for side in SIDES} for name, part in parts.items()}
        return {**found, "shares": self.shares.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        for side in SIDES:
            self.allocators[side].load_state_dict(state["allocators"][side])
            self.tunings[side].load_state_dict(state["tunings"][side])
        self.shares.weights = dict(state["shares"])
