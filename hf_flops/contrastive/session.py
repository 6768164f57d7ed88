"""The gradient session of a contrastive loss: each tower has its own method and noise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..allocators import ALLOCATORS, Allocator
from ..autotune.first_batch import held_back
from ..autotune.protocol import Averaging, Batch, HandOver, Observer, RunArguments, Stateful
from ..autotune.tuning import Tuning, first_scale
from ..base.batch import Inputs, batch_size, take
from ..base.probe import Attempt, agree
from ..base.rounding_error import precision_of
from ..base.rows import BatchPosition
from ..core.method import StepResult
from ..errors import ConfigurationError
from ..estimators import ESTIMATORS, Estimator
from ..estimators.control_variate import control_variate
from ..objectives import Forward, RowLossError
from ..perturbations import ParameterVector
from .dual_encoder import (
    Scaling,
    contrastive_base,
    require_return_loss,
    same_texts,
    tower_forward,
    tower_inputs,
)
from .estimate import (
    Contrast,
    Tower,
    TowerInputs,
    TowerLoss,
    add_scale_gradients,
    estimate_alignment,
    join_results,
    numbered,
)
from .loss import SIDES, ContrastiveBatch, ContrastiveLoss
from .projection_solver import ProjectionSolver
from .shares import TowerShares
from .similarity import Terms
from .towers import build_tower

logger = logging.getLogger("hf_flops.trainer")


class ContrastiveSession:
    """Estimates the gradient of a contrastive loss: see `GradientSession` and `estimate_alignment`.

    Args:
        args: the run's arguments.
        model: the model, maybe with an adapter around it.
        contrast: the loss; None for the model's own, which the first batch must show to be the
            loss of the towers' embeddings.
        metered: wraps a forward to count its rows.
        allocator: an instance, which each tower copies, in place of the name in `args`.
        estimator: an instance, in place of the name in `args`.
    """

    counts_labels = counts_elements = False
    needs_clean = True
    method = None
    observers: Sequence[Observer] = ()

    def __init__(
        self,
        args: RunArguments,
        model: nn.Module,
        contrast: ContrastiveLoss | None,
        metered: Callable[[Forward], Forward],
        *,
        allocator: Allocator | None = None,
        estimator: Estimator | None = None,
    ) -> None:
        self.args, self.model = args, model
        base = contrastive_base(model)
        assert base is not None
        self.base, self.scaling = base, Scaling(base)
        self.contrast, self._own = contrast or ContrastiveLoss(), contrast is None
        self.estimator: Estimator = estimator or ESTIMATORS[args.estimator]()
        self.allocators = {
            side: deepcopy(allocator) or ALLOCATORS[args.allocator]() for side in SIDES
        }
        self.tunings = {side: Tuning.of(args) for side in SIDES}
        self.controls = {side: control_variate(args.control_variate) for side in SIDES}
        self.forwards = {side: metered(tower_forward(self.base, side)) for side in SIDES}
        self.towers: dict[str, Tower] = {}
        self.shares = TowerShares()
        self.solver = ProjectionSolver(self._terms)
        self._steps = 0
        self.check_rows, self._warned = 0, False
        # names of the frozen and of the trainable tensors for which the towers were built
        self._built_for: tuple[Collection[str], Collection[str]] | None = None

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
        self._steps = batch.steps
        frozen = held_back(self.model, self.args.lora_parts, batch.progress)
        wanted = frozen, ParameterVector.of(self.model).names
        if self._built_for == wanted:
            return
        parts, labels = self.split(batch.inputs)
        if self._own and labels is None and self._built_for is None:
            require_return_loss(self.base, batch.inputs)
            if not self._matches(batch, parts):
                logger.warning(
                    "The loss of %s is not a contrastive loss of its embeddings' cosines.",
                    type(self.base).__name__,
                )
                raise HandOver
        self.towers = {
            side: build_tower(
                side,
                self.args,
                self.model,
                self.forwards[side],
                parts[side],
                frozen,
                estimator=self.estimator,
                allocator=self.allocators[side],
                control=self.controls[side],
            )
            for side in SIDES
        }
        self._built_for = wanted
        if all(tower.method is None and tower.head is None for tower in self.towers.values()):
            raise ConfigurationError(
                "No embedding depends on a trainable parameter: add an adapter (peft_config=)."
            )

    def _matches(self, batch: Batch, parts: TowerInputs) -> bool:
        """Return whether the model's own loss of a batch is that of its towers' embeddings."""
        with Attempt("The towers' embeddings make no loss"):
            contrastive = self._loss_of(parts, self._contrast(None, self.scaling())).loss
            loss = batch.forward(batch.inputs)[0]
            return loss is not None and agree(
                torch.tensor(float(loss), dtype=torch.float64),
                torch.tensor(contrastive, dtype=torch.float64),
                10 * self.precision,
                1.0,
            )
        return False

    def unperturbed(self, batches: Sequence[Batch]) -> AbstractContextManager[Callable[[], Tensor]]:
        """See `GradientSession`; not supported, as a line search needs losses of whole batches."""
        raise ConfigurationError("A line search needs losses of whole batches.")

    def estimate(self, batch: Batch, position: BatchPosition, averaging: Averaging) -> StepResult:
        """See `GradientSession`; a row is an image or a text through its tower.

        Raises:
            ObjectiveError: the batch lacks images or texts, or does not pair them.
            ConfigurationError: too few queries.
        """
        parts, labels = self.split(batch.inputs)
        given = "labels" in batch.inputs
        scaling, batches = self.scaling(), averaging.batches
        contrast, solved = self._contrast(labels, scaling, given=given), self._bind_solver(*scaling)
        if solved and self.solver.primes(batch.step, self._steps):
            towers = {side: replace(tower, method=None) for side, tower in self.towers.items()}
        else:
            self._complete(parts, int(self.args.queries_per_sample), contrast, position.seed)
            towers = self.towers
        results, loss, features = estimate_alignment(towers, parts, contrast, position, batches)
        if solved:
            labels = torch.arange(batch.samples) if labels is None else labels
            self.solver.add(features, labels, batch.ids, given=given)
        add_scale_gradients(self.base, loss, batches)
        self.shares.update(self.towers, results)
        result = join_results(results, _sizes(parts), loss.loss / batches)
        for tuning in self.tunings.values():  # rows of the search for epsilon
            result, tuning.rows = replace(result, rows=result.rows + tuning.rows), 0
        return result

    def finish_step(self, epoch: float) -> None:
        """See `GradientSession`."""
        if self._bind_solver(*self.scaling()):
            self.solver.finish_step(epoch)

    def fall_back(self, error: RowLossError, *, recorded: bool) -> None:
        """See `GradientSession`; embeddings always have losses of their own."""
        raise error

    def discard(self) -> None:
        """See `GradientSession`."""
        self.solver.discard()

    def parts(self) -> Mapping[str, Stateful]:
        """See `GradientSession`."""
        by_side: dict[str, Mapping[str, Stateful | None]] = {
            "allocator": self.allocators,
            "tuning": self.tunings,
            "control variate": self.controls,
        }
        parts = {
            f"{side} {name}": part
            for side in SIDES
            for name, both in by_side.items()
            if (part := both[side]) is not None
        }
        return {"rows of the towers": self.shares, "projections": self.solver, **parts}

    def log(self) -> dict[str, float]:
        """See `GradientSession`."""
        solved = self.solver.objective
        return {} if solved is None else {"solved_head_loss": solved}

    def split(self, inputs: Inputs) -> tuple[TowerInputs, Tensor | None]:
        """Return the towers' inputs, numbered, and each image's text (B,), None for its own."""
        parts = tower_inputs(self.base, inputs)
        texts = batch_size(parts["text"])
        labels, distinct = self.contrast.pairing(inputs, texts, batch_size(parts["image"]))
        if len(distinct) < texts:
            parts["text"] = take(parts["text"], distinct)
        if labels is None and not self._warned and (warning := same_texts(inputs)):
            logger.warning("%s", warning)
            self._warned = True
        return {side: numbered(part) for side, part in parts.items()}, labels

    def _contrast(
        self, labels: Tensor | None, scaling: tuple[float, float], *, given: bool = False
    ) -> Contrast:
        """Return the function from embeddings of texts (C, D) and images (B, D) to their loss."""

        def batch(texts: Tensor, images: Tensor) -> ContrastiveBatch:
            terms = self._terms(len(texts), len(images), labels, given=given)
            return ContrastiveBatch(texts, images, terms, *scaling)

        return batch

    def _terms(self, texts: int, images: int, labels: Tensor | None, given: bool) -> Terms:
        """Return the loss of so many texts and images; see `ContrastiveLoss.terms`."""
        sigmoid = getattr(self.base, "logit_bias", None) is not None
        return self.contrast.terms(texts, images, labels, sigmoid=sigmoid, given=given)

    def _bind_solver(self, scale: float, bias: float) -> bool:
        """Return whether projections are solved for; tell the solver how things are now."""
        heads = {side: tower.head for side, tower in self.towers.items() if tower.head is not None}
        if self.args.closed_form_head != "solve" or not heads:
            return False
        self.solver.bind(heads, scale, bias)
        return True

    def _complete(self, parts: TowerInputs, queries: int, contrast: Contrast, seed: int) -> None:
        """Fill in the step's queries, epsilon and rows per forward."""
        precision = self.precision
        shares = self.shares.share(self.towers, _sizes(parts), queries)
        measured = all(self.tunings[side].found for side in shares)
        calibrates = self.args.perturbation_scale == "auto" and not measured
        batch = self._loss_of(parts, contrast) if calibrates else None
        for side, count in shares.items():
            tower = self.towers[side]
            assert tower.method is not None
            method = replace(
                tower.method,
                objective=TowerLoss(side, batch),
                queries_per_sample=1 + count,
                scale=first_scale(self.args, precision),
            )
            method = self.tunings[side].complete(
                method, tower.forward, parts[side], precision=precision, seed=seed
            )
            method = replace(method, objective=TowerLoss(side))  # the step's is not known yet
            self.towers[side] = replace(tower, method=method)

    def _loss_of(self, parts: TowerInputs, contrast: Contrast) -> ContrastiveBatch:
        """Return the loss of a batch's embeddings."""
        return contrast(*(self.forwards[side](parts[side])[1] for side in ("text", "image")))


def _sizes(parts: TowerInputs) -> dict[str, int]:
    """Return the number of images and of texts."""
    return {side: batch_size(part) for side, part in parts.items()}
