"""What a trainer and the session that estimates its gradients know of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..base.batch import ROW, Inputs, batch_size
from ..base.rows import BatchPosition
from ..base.state import State
from ..core.method import FinishedBatch, Method, StepResult
from ..objectives import Forward, RowLossError


class RunArguments(Protocol):
    """The training arguments that a session reads: see `FlopsArgumentsMixin` and
    `transformers.TrainingArguments`.
    """

    allocator: str
    bf16: bool
    closed_form_head: str
    control_variate: str
    delta_clip: float | None
    estimator: str
    late_expansion: bool
    learning_rate_search: bool
    lora_parts: str
    memory_limit_gb: float | None
    noise: str
    noise_seed: int | None
    output_dir: str
    perturbation: str
    perturbation_scale: float | str | None
    prefix_cache: str | None
    prefix_cache_gb: float
    queries_per_sample: int | str
    reduce: str
    rows_per_forward: int | str
    seed: int
    trajectory_log: bool
    world_size: int


def seed_of(args: RunArguments) -> int:
    """Return the seed of a run's noise."""
    return args.seed if args.noise_seed is None else args.noise_seed


class Stateful(Protocol):
    """A part of a run that a checkpoint holds."""

    def state_dict(self) -> State:
        """Return what a resume needs."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        ...


class Observer(Protocol):
    """Learns from finished batches."""

    def observe(self, finished: FinishedBatch) -> None:
        """Learn from a finished batch."""
        ...


@dataclass(frozen=True)
class Batch:
    """A batch of an optimizer step.

    Attributes:
        inputs: of the model: B samples.
        forward: runs the model.
        step: optimizer steps done.
        progress: steps done over the steps of the run.
        ids: (B,) numbers of the samples, if they have any.
        checks: runs the model for the checks of the first batch, where `forward` generates text.
        steps: optimizer steps of the run; 0 if unknown.
        loss: does what `forward` does without counting rows, where that is the model's own loss.
    """

    inputs: Inputs
    forward: Forward
    step: int = 0
    progress: float = 0.0
    ids: tuple[int, ...] | None = None
    checks: Forward | None = None
    steps: int = 0
    loss: Forward | None = None

    @property
    def samples(self) -> int:
        """Number of samples, B."""
        return batch_size(self.inputs)

    def numbered_for(self, method: Method) -> Batch:
        """Return the batch with its rows numbered, if the objective needs that."""
        if not method.objective.numbered:
            return self
        return replace(self, inputs={**self.inputs, ROW: torch.arange(self.samples)})


@dataclass(frozen=True)
class Averaging:
    """How a batch weighs in the gradient of its optimizer step.

    Attributes:
        batches: how many batches like this one the optimizer step has.
        elements: the number of loss elements to divide by, in place of `batches` times the batch's
            own.
        last: whether the batch is the last of its optimizer step.
    """

    batches: float = 1.0
    elements: float | None = None
    last: bool = True


class HandOver(Exception):
    """Another session must estimate gradients, from this batch on."""


class GradientSession(Protocol):
    """Owns what a run learns about its gradient: self-checks, tuned numbers, what is reused, state.

    Attributes:
        check_rows: rows that the search for epsilon took and the ledger does not count yet.
    """

    check_rows: int

    @property
    def counts_labels(self) -> bool:
        """Whether batches weigh by the stock trainer's count of labels."""
        ...

    @property
    def counts_elements(self) -> bool:
        """Whether batches weigh by the number of loss elements that an objective of the user's
        counts; they weigh alike if by neither.
        """
        ...

    @property
    def needs_clean(self) -> bool:
        """Whether every batch also runs unperturbed."""
        ...

    @property
    def method(self) -> Method | None:
        """How the gradient of the batch that `prepare` saw last is estimated, if there is one
        method.
        """
        ...

    @property
    def observers(self) -> Sequence[Observer]:
        """The parts that learn from finished batches."""
        ...

    def prepare(self, batch: Batch) -> None:
        """Run the checks that are still due: with the first batch, or when other tensors have
        become trainable.

        Raises:
            HandOver: this session cannot estimate the gradient of this loss.
            ObjectiveError: the loss does not work, or not the way that the arguments want it.
        """
        ...

    def rows(self, samples: int, step: int) -> int:
        """Return how many rows a batch of so many samples takes at an optimizer step."""
        ...

    def unperturbed(self, batches: Sequence[Batch]) -> AbstractContextManager[Callable[[], Tensor]]:
        """Return a context that yields a function: it returns the losses (B,) of the batches with
        the parameters of the moment.
        """
        ...

    def estimate(self, batch: Batch, position: BatchPosition, averaging: Averaging) -> StepResult:
        """Add an estimate of the batch's gradient to `.grad`; call `prepare` first.

        Raises:
            NonFiniteError: not one perturbed row has a finite loss.
        """
        ...

    def finish_step(self, epoch: float) -> None:
        """Solve what needs no gradient, after an optimizer step.

        Args:
            epoch: epochs that are done, with fraction.
        """
        ...

    def fall_back(self, error: RowLossError, *, recorded: bool) -> None:
        """Continue with losses that are computed for each row, or with the loss of whole batches.

        Args:
            error: why there are no losses per row any more.
            recorded: whether a trajectory log holds earlier batches of the optimizer step.
        """
        ...

    def discard(self) -> None:
        """Drop the batches of an optimizer step that is not taken."""
        ...

    def parts(self) -> Mapping[str, Stateful]:
        """Return the parts that a checkpoint holds, by name."""
        ...

    def log(self) -> dict[str, float]:
        """Return numbers for the training log."""
        ...
