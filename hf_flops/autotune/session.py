"""The gradient session of ordinary losses: all that a run learns about its gradient, and the
estimate of every batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..allocators import ALLOCATORS, Allocator
from ..base.padding import TrimmedBatch
from ..base.rounding_error import precision_of
from ..base.rows import BatchPosition
from ..base.sharding import fetches_weights
from ..core.chunking import ChunkPlanner
from ..core.clean_forward import clean_forward
from ..core.estimate import estimate_gradient
from ..core.method import Method, StepResult
from ..distributed.collectives import ProcessGroup
from ..distributed.exchange import EXCHANGES
from ..errors import ObjectiveError
from ..estimators import ESTIMATORS, Estimator, HeadSolver
from ..estimators.control_variate import control_variate
from ..objectives import CoupledLoss, Objective, RowLossError, RowwiseLoss, TappedLoss
from ..perturbations import ParameterVector, Perturbation
from ..reuse import ReusePlan
from .first_batch import Chosen, held_back, set_up
from .protocol import Averaging, Batch, Observer, RunArguments, Stateful, seed_of
from .row_loss_check import loss_of_batch
from .tuning import Tuning, first_scale
from .visibility import require_visible

logger = logging.getLogger("hf_flops.trainer")


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
        default: returns the objective that the first batch calls for in place of `objective`, or
            None.
    """

    def __init__(
        self,
        args: RunArguments,
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
        self.solver = HeadSolver(group.broadcast)
        self.exchange = EXCHANGES[args.reduce](group, every_batch=args.queries_per_sample == "auto")
        self.tuning = Tuning.of(args, objective)
        self.chosen: Chosen | None = None
        self._method: Method | None = None
        self.frozen: frozenset[str] = frozenset()
        self.check_rows = 0
        self._trainable: list[str] = []
        self._steps = 0
        # what `fall_back` leaves
        self._without = dict[type[Objective], str]()
        self._whole: Objective | None = None

    @property
    def counts_labels(self) -> bool:
        """See `GradientSession`."""
        return self.objective is None

    @property
    def counts_elements(self) -> bool:
        """See `GradientSession`."""
        return self.objective is not None and self.objective.per_row

    @property
    def needs_clean(self) -> bool:
        """See `GradientSession`."""
        return self.estimator.baseline or self.allocator.needs_clean

    @property
    def method(self) -> Method | None:
        """See `GradientSession`."""
        return self._method

    @property
    def observers(self) -> Sequence[Observer]:
        """See `GradientSession`."""
        return [self.tuning]

    def rows(self, samples: int, step: int) -> int:
        """See `GradientSession`."""
        solved = self.chosen is not None and self.chosen.solved
        if solved and self.solver.primes(step, self._steps):
            return samples
        return samples * self.tuning.queries_at(step, self.args)

    def prepare(self, batch: Batch) -> None:
        """See `GradientSession`."""
        self._steps = batch.steps
        frozen = held_back(self.model, self.args.lora_parts, batch.progress)
        trainable = ParameterVector.of(self.model).names
        if (frozen, trainable) != (self.frozen, self._trainable):
            self.frozen, self._trainable, self.chosen = frozen, trainable, None
        new = self.chosen is None
        if new:
            objective = self._whole or self._default(batch) or self.objective
            forward = batch.checks or batch.forward
            self.chosen = set_up(
                self.args,
                self.model,
                forward,
                batch.inputs,
                objective,
                self._given,
                self.frozen,
                batch.loss,
                without=self._without,
            )
        precision = precision_of(self.model, autocast=self.args.bf16)
        method = self._assembled(precision, batch.step)
        method = self.tuning.complete(
            method,
            batch.forward,
            batch.inputs,
            precision=precision,
            seed=seed_of(self.args),
            fetches=fetches_weights(self.model),
        )
        assert self.chosen is not None
        if new and getattr(self.model, "measures_noise", False) and not self.tuning.found:
            forward = batch.checks or batch.forward
            self.tuning.rows += require_visible(forward, batch.inputs, method, seed_of(self.args))
        self.chosen = replace(self.chosen, reuse=method.reuse)  # the tuning may have refined it
        self._method = self._agreed(method) if new else method
        self.check_rows, self.tuning.rows = self.check_rows + self.tuning.rows, 0

    def _assembled(self, precision: float, step: int) -> Method:
        """Put the method together, as far as the arguments fix it."""
        assert self.chosen is not None
        return Method(
            objective=self.chosen.objective,
            perturbation=self.chosen.perturbation,
            estimator=self.estimator,
            allocator=self.allocator,
            queries_per_sample=self.tuning.queries_at(step, self.args),
            scale=first_scale(self.args, precision),
            rows_per_forward=1,
            reuse=self.chosen.reuse,
            head=self.chosen.head,
            solver=self._solver(),
            clean_only=self.chosen.solved and self.solver.primes(step, self._steps),
            control=self.control if self.chosen.objective.predictable else None,
            delta_clip=self.args.delta_clip,
            exchange=self.exchange,
        )

    def _solver(self) -> HeadSolver | None:
        """Return the solver for the head's weights, if they are solved for."""
        assert self.chosen is not None
        if not self.chosen.solved:
            return None
        assert self.chosen.head is not None
        self.solver.bind(self.chosen.head)
        return self.solver

    def _agreed(self, method: Method) -> Method:
        """Require that the first batch led all processes to the same method; return it with the
        first process's epsilon.
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
        batches = [batch.numbered_for(method) for batch in batches]
        # what is recorded of the next batch is not about these
        if len(batches) > 1 or batches[0].step < 0:
            method, ids = replace(method, reuse=ReusePlan()), None
        feeds = [TrimmedBatch(batch.inputs, method.trimmed) for batch in batches]
        planner = ChunkPlanner.of(method.rows_per_forward)

        with ExitStack() as stack:
            recordings = [
                stack.enter_context(method.reuse.recording(batch.forward)) for batch in batches
            ]
            recordings[0].recall(feeds[0].whole, ids)

            def losses() -> Tensor:
                found = [
                    clean_forward(recording, method, batch.samples, feed, planner)
                    for recording, batch, feed in zip(recordings, batches, feeds, strict=True)
                ]
                return torch.cat([clean.losses.sums for clean in found])

            yield losses

    def estimate(self, batch: Batch, position: BatchPosition, averaging: Averaging) -> StepResult:
        """See `GradientSession`."""
        assert self._method is not None
        return estimate_gradient(
            batch.forward,
            batch.numbered_for(self._method).inputs,
            self._method,
            position,
            averaging.elements,
            averaging.batches,
            last=averaging.last,
        )

    def finish_step(self, epoch: float) -> None:
        """See `GradientSession`."""
        if self._method is not None and self._method.solver is not None:
            self._method.solver.finish_step(epoch)

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
        assert self.chosen is not None
        kinds = (TappedLoss, RowwiseLoss, CoupledLoss)
        kind = next(kind for kind in kinds if isinstance(self.chosen.objective, kind))
        self._without[kind] = str(error)
        if isinstance(self.chosen.objective, CoupledLoss):
            held = bool(self.chosen.objective.constant) or self.chosen.objective.holds
            self._whole = loss_of_batch(self.args, error, constants=held)
        else:
            logger.warning("The loss is split into rows in another way from now on: %s.", error)
        self.chosen = None

    def discard(self) -> None:
        """See `GradientSession`."""
        self.exchange.discard()
        self.solver.discard()

    def parts(self) -> Mapping[str, Stateful]:
        """See `GradientSession`."""
        parts: dict[str, Stateful] = {"allocator": self.allocator, "tuning": self.tuning}
        if self.control is not None:
            parts["control variate"] = self.control
        parts["head"] = self.solver
        return parts

    def log(self) -> dict[str, float]:
        """See `GradientSession`."""
        scale = {} if self.tuning.scale is None else {"perturbation_scale": self.tuning.scale}
        solved = self.solver.objective
        objective = {} if solved is None else {"solved_head_loss": solved}
        return {**self.tuning.found, **scale, **objective}
