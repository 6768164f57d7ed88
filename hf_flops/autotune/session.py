"""A gradient session: all that a run learns about its gradient, and the estimate of every batch.

The trainer asks one session for gradients. It does not know what is minimised, where noise enters,
or what was found out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..allocators import ALLOCATORS, Allocator
from ..base.batch import batch_size
from ..base.padding import TrimmedBatch
from ..base.rounding_error import precision_of
from ..base.rows import BatchPosition
from ..core.clean_forward import clean_forward
from ..core.estimate import estimate_gradient
from ..core.method import Method, StepResult
from ..distributed.collectives import ProcessGroup
from ..distributed.exchange import EXCHANGES
from ..errors import ObjectiveError
from ..estimators import ESTIMATORS, Estimator
from ..estimators.control_variate import control_variate
from ..objectives import Forward, Objective, RowLossError
from ..perturbations import ParameterVector, Perturbation
from ..reuse import ReusePlan
from .first_batch import Chosen, held_back, loss_of_batch, set_up
from .tuning import Tuning

logger = logging.getLogger("hf_flops.trainer")


@dataclass(frozen=True)
class Batch:
    """A batch of an optimizer step.

    Attributes:
        inputs: what the model is given: B samples.
        forward: runs the model.
        step: optimizer steps that are done.
        progress: these over the steps of the run.
        ids: (B,) numbers of the samples, if they have any.
        checks: runs the model for the checks of the first batch, where `forward` generates text.
    """

    inputs: Mapping[str, Any]
    forward: Forward
    step: int = 0
    progress: float = 0.0
    ids: tuple[int, ...] | None = None
    checks: Forward | None = None

    @property
    def samples(self) -> int:
        """B."""
        return batch_size(self.inputs)


@dataclass(frozen=True)
class Averaging:
    """What the gradient of a batch is averaged over.

    Attributes:
        batches: how many batches like this one the optimizer step has.
        last: whether the batch is the last of its optimizer step.
    """

    batches: float = 1.0
    last: bool = True


class HandOver(Exception):
    """Another session is to estimate gradients from this batch on."""


class GradientSession(Protocol):
    """Owns what a run learns about its gradient: self-checks, tuned numbers, what is reused, state.

    Attributes:
        counts_labels: whether batches weigh by the stock trainer's count of labels; else they weigh
            alike.
        needs_clean: whether every batch runs unperturbed, too.
        method: how the gradient of the batch that `prepare` has seen last is estimated, if there is
            one method.
        check_rows: rows that finding epsilon has taken and the ledger does not know of yet.
        observers: what learns from finished batches.
    """

    check_rows: int

    @property
    def counts_labels(self) -> bool:
        """See above."""
        ...

    @property
    def needs_clean(self) -> bool:
        """See above."""
        ...

    @property
    def method(self) -> Method | None:
        """See above."""
        ...

    @property
    def observers(self) -> Sequence[Any]:
        """See above."""
        ...

    def prepare(self, batch: Batch) -> None:
        """Find out what is not known yet: with the first batch, or where other tensors are
        trainable than before.

        Raises:
            HandOver: the loss is not one that this session knows how to estimate.
            ObjectiveError: the loss cannot be had, or not the way that was asked for.
        """
        ...

    def rows(self, samples: int, step: int) -> int:
        """Return how many rows a batch takes at an optimizer step."""
        ...

    def unperturbed(self, batches: Sequence[Batch]) -> AbstractContextManager[Callable[[], Tensor]]:
        """Return a context with a function that gives the losses (B,) of batches, parameters being
        as they are by then.
        """
        ...

    def estimate(self, batch: Batch, position: BatchPosition, averaging: Averaging) -> StepResult:
        """Add an estimate of the batch's gradient to `.grad`; `prepare` has seen the batch.

        Raises:
            NonFiniteError: not one perturbed row has a finite loss.
        """
        ...

    def fall_back(self, error: RowLossError, *, recorded: bool) -> None:
        """Go on without losses per row, which `error` says cannot be had any more.

        Args:
            error: why.
            recorded: whether earlier batches of the optimizer step are recorded in a trajectory
                log.
        """
        ...

    def discard(self) -> None:
        """Drop the batches of an optimizer step that is not taken."""
        ...

    def parts(self) -> dict[str, Any]:
        """Return what has a state, by name."""
        ...

    def log(self) -> dict[str, float]:
        """Return numbers for the training log."""
        ...


class SampleSession:
    """Estimates the gradient of a sum of losses, one for each sample or one for the batch.

    Args:
        args: the run's arguments.
        model: the model.
        group: the processes of the run.
        objective: what is minimised; None for the model's own loss.
        allocator: an instance, in place of the name in `args`.
        estimator: an instance, in place of the name in `args`.
        perturbation: an instance, in place of the name in `args`; it skips the self-check.
        default: returns what is minimised in place of `objective` once there is a batch to look at,
            None for no other.
    """

    def __init__(
        self,
        args: Any,
        model: nn.Module,
        group: ProcessGroup,
        *,
        objective: Objective | None = None,
        allocator: Allocator | None = None,
        estimator: Estimator | None = None,
        perturbation: Perturbation | None = None,
        default: Callable[[Batch], Objective | None] = lambda batch: None,
    ) -> None:
        self.args, self.model, self.group = args, model, group
        self.objective, self._given, self._default = objective, perturbation, default
        self.allocator: Allocator = allocator or ALLOCATORS[args.allocator]()
        self.estimator: Estimator = estimator or ESTIMATORS[args.estimator]()
        self.control = control_variate(args.control_variate)
        self.exchange = EXCHANGES[args.reduce](group, every_batch=args.queries_per_sample == "auto")
        self.tuning = Tuning.of(args, objective)
        self.chosen: Chosen | None = None
        self._method: Method | None = None
        self.frozen: frozenset[str] = frozenset()
        self.check_rows = 0
        self._trainable: list[str] = []
        # what is minimised once losses per row could not be had any more
        self._whole: Objective | None = None

    @property
    def counts_labels(self) -> bool:
        """See `GradientSession`."""
        return self.objective is None and self.chosen is not None and self.chosen.objective.per_row

    @property
    def needs_clean(self) -> bool:
        """See `GradientSession`."""
        return self.estimator.baseline or self.allocator.needs_clean

    @property
    def method(self) -> Method | None:
        """See `GradientSession`."""
        return self._method

    @property
    def observers(self) -> Sequence[Any]:
        """See `GradientSession`."""
        return [self.tuning]

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self.args.seed if self.args.noise_seed is None else self.args.noise_seed

    def queries_at(self, step: int) -> int:
        """Return the rows per sample of an optimizer step, for which all before are done."""
        return self.tuning.queries_at(step, self.args)

    def rows(self, samples: int, step: int) -> int:
        """See `GradientSession`."""
        return samples * self.queries_at(step)

    def prepare(self, batch: Batch) -> None:
        """See `GradientSession`."""
        frozen = held_back(self.model, self.args.lora_parts, batch.progress)
        trainable = ParameterVector.of(self.model).names
        if (frozen, trainable) != (self.frozen, self._trainable):
            self.frozen, self._trainable, self.chosen = frozen, trainable, None
        new = self.chosen is None
        if new:
            objective = self._whole or self._default(batch) or self.objective
            forward = batch.checks or batch.forward
            self.chosen = set_up(
                self.args, self.model, forward, batch.inputs, objective, self._given, self.frozen
            )
        precision = precision_of(self.model, autocast=self.args.bf16)
        method = self._assembled(precision, batch.step)
        method = self.tuning.complete(
            method, batch.forward, batch.inputs, precision=precision, seed=self.seed
        )
        assert self.chosen is not None
        self.chosen = replace(self.chosen, reuse=method.reuse)  # of which more may be known now
        self._method = self._agreed(method) if new else method
        self.check_rows, self.tuning.rows = self.check_rows + self.tuning.rows, 0

    def _assembled(self, precision: float, step: int) -> Method:
        """Put the method together, as far as the arguments fix it."""
        assert self.chosen is not None
        scale = self.args.perturbation_scale
        return Method(
            objective=self.chosen.objective,
            perturbation=self.chosen.perturbation,
            estimator=self.estimator,
            allocator=self.allocator,
            queries_per_sample=self.queries_at(step),
            scale=scale if isinstance(scale, (int, float)) else 1e-3 if precision < 1e-3 else 1e-2,
            rows_per_forward=1,
            reuse=self.chosen.reuse,
            head=self.chosen.head,
            control=self.control if self.chosen.objective.predictable else None,
            exchange=self.exchange,
        )

    def _agreed(self, method: Method) -> Method:
        """Let all processes take the same way, which the first batch has shown; returns the method
        with it.
        """
        named = {id(module): name for name, module in self.model.named_modules()}
        self.group.assert_same(
            {
                "the objective": type(method.objective).__name__,
                "noise": [type(part).__name__ for part in method.perturbation.parts],
                "the tensors with noise": method.perturbation.vector.names,
                "the closed-form head": None if method.head is None else method.head.vector.names,
                "what runs once per sample": [
                    named.get(id(module)) for module in method.reuse.modules
                ],
                "the padding that is cut off": sorted(method.trimmed),
            },
            "in what the first batch shows",
        )
        scale = self.group.broadcast(method.scale)
        self.tuning.agree(scale)
        return replace(method, scale=scale)

    @contextmanager
    def unperturbed(self, batches: Sequence[Batch]) -> Iterator[Callable[[], Tensor]]:
        """See `GradientSession`."""
        assert self._method is not None
        method, ids = self._method, batches[0].ids
        # what is known of the next batch says nothing of these
        if len(batches) > 1 or batches[0].step < 0:
            method, ids = replace(method, reuse=ReusePlan()), None
        feeds = [TrimmedBatch(batch.inputs, method.trimmed) for batch in batches]

        with ExitStack() as stack:
            recordings = [
                stack.enter_context(method.reuse.recording(batch.forward)) for batch in batches
            ]
            recordings[0].recall(feeds[0].whole, ids)

            def losses() -> Tensor:
                found = [
                    clean_forward(recording, method, batch.samples, feed, method.rows_per_forward)  # type: ignore[arg-type]
                    for recording, batch, feed in zip(recordings, batches, feeds, strict=True)
                ]
                return torch.cat([clean.losses.sums for clean in found])

            yield losses

    def estimate(self, batch: Batch, position: BatchPosition, averaging: Averaging) -> StepResult:
        """See `GradientSession`."""
        assert self._method is not None
        batches, last = averaging.batches, averaging.last
        return estimate_gradient(
            batch.forward, batch.inputs, self._method, position, None, batches, last=last
        )

    def fall_back(self, error: RowLossError, *, recorded: bool) -> None:
        """See `GradientSession`.

        Raises:
            ObjectiveError: the loss is the user's own, or something is in the way of a change.
        """
        if self.objective is not None:
            raise error
        if self.group.world > 1 or recorded:
            many = f"a run of {self.group.world} processes"
            where = many if self.group.world > 1 else "a step that trajectory_log records"
            raise ObjectiveError(
                f"Cannot fall back to a batch-level loss during {where}: {error}. Resume from the "
                "last checkpoint, or pass objective=."
            )
        self._whole, self.chosen = loss_of_batch(self.args, error), None

    def discard(self) -> None:
        """See `GradientSession`."""
        self.exchange.discard()

    def parts(self) -> dict[str, Any]:
        """See `GradientSession`."""
        parts = {"allocator": self.allocator, "tuning": self.tuning}
        return parts if self.control is None else {**parts, "control variate": self.control}

    def log(self) -> dict[str, float]:
        """See `GradientSession`."""
        scale = {} if self.tuning.scale is None else {"perturbation_scale": self.tuning.scale}
        return {**self.tuning.found, **scale}
