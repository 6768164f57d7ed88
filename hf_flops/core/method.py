"""How a gradient is estimated, and the result of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..allocators import Allocator, RandomisedAllocator
from ..base.batch import Inputs
from ..base.rows import BatchPosition
from ..distributed.exchange import Exchange, SingleProcess
from ..errors import ConfigurationError
from ..estimators import ClosedFormHead, ControlVariate, Estimator, HeadSolver
from ..objectives import Objective
from ..perturbations import Perturbation
from ..perturbations.replay import UpdateRecord
from ..reuse import ReusePlan
from .chunking import ChunkPlanner


@dataclass(frozen=True)
class Method:
    """How a gradient is estimated.

    Attributes:
        objective: what is minimised, row by row.
        perturbation: where noise enters the model.
        estimator: the finite difference.
        allocator: divides the queries among the samples.
        queries_per_sample: rows of forward passes per sample and step, the clean one included.
        scale: the step of the difference, epsilon.
        rows_per_forward: rows that go through the model at a time, or the planner that chooses it.
        trimmed: sides ("left", "right") where padding that no row of a forward needs is cut off.
        reuse: modules that run once per sample because no noise reaches them; see `choose_reuse`.
        head: the layer whose exact gradient the clean forward gives; it is not perturbed.
        solver: solves for the head's weights at the end of optimizer steps; None for its exact
            gradient instead.
        clean_only: whether batches run without queries, to know more samples of the solver first.
        control: the control variate, which predicts deltas from past steps; None for none.
        exchange: how the processes of the run share results.
        delta_clip: bound of a delta in robust standard deviations of the batch's, which biases the
            estimate; None for none.

    Raises:
        ConfigurationError: processes exchange scalars only, and another argument needs more; or
            `delta_clip` would run rows again.

    Examples:
        >>> from torch import nn
        >>> from hf_flops import BatchPosition, Method
        >>> from hf_flops.allocators import Uniform
        >>> from hf_flops.estimators import Antithetic
        >>> from hf_flops.objectives import CallableObjective
        >>> from hf_flops.perturbations import perturb
        >>> model = nn.Linear(3, 1)
        >>> objective = CallableObjective(lambda outputs, inputs: outputs.squeeze(1))
        >>> perturbation = perturb(model, rowwise=["weight", "bias"])
        >>> method = Method(
        ...     objective, perturbation, Antithetic(), Uniform(), 8, 0.01, rows_per_forward=64
        ... )
        >>> method.needs_clean, method.budget(samples=4)
        (False, 16)
    """

    objective: Objective
    perturbation: Perturbation
    estimator: Estimator
    allocator: Allocator
    queries_per_sample: int
    scale: float
    rows_per_forward: int | ChunkPlanner
    trimmed: frozenset[str] = frozenset()
    reuse: ReusePlan = field(default_factory=ReusePlan)
    head: ClosedFormHead | None = None
    solver: HeadSolver | None = None
    clean_only: bool = False
    control: ControlVariate | None = None
    exchange: Exchange = field(default_factory=SingleProcess)
    delta_clip: float | None = None

    def __post_init__(self) -> None:
        self.exchange.check(control=self.control is not None, replays=self.perturbation.replays)
        if self.delta_clip is not None and self.perturbation.replays:
            raise ConfigurationError(
                f"delta_clip={self.delta_clip:g} changes rows that have run, and noise on outputs "
                'would have to run them again: use perturbation="rowwise" or "shared", or '
                "delta_clip=None."
            )

    @property
    def needs_clean(self) -> bool:
        """Whether the clean forward is run (and charged)."""
        return self.estimator.baseline or self.needs_features or self.objective.needs_clean

    @property
    def needs_features(self) -> bool:
        """Whether the clean forward must return more than losses."""
        predicted = self.control is not None and self.objective.logits
        return self.objective.per_row and (
            self.allocator.needs_clean or self.head is not None or predicted
        )

    @property
    def centred(self) -> bool:
        """Whether the mean of the sample's other deltas is subtracted (leave-one-out); not if that
        requires running rows again.
        """
        return (
            self.estimator.baseline
            and self.objective.piecewise_constant
            and not self.perturbation.replays
        )

    def budget(self, samples: int) -> int:
        """Return the number of queries of `samples` samples, after their clean rows are paid."""
        rows = samples * (self.queries_per_sample - self.needs_clean)
        signs = len(self.estimator.signs)
        budget = rows // signs
        zeros = isinstance(self.allocator, RandomisedAllocator) and self.objective.per_row
        fewest = 1 if zeros else samples
        if budget < fewest:
            least = self.needs_clean - (-signs * fewest // samples)
            raise ConfigurationError(
                f"queries_per_sample={self.queries_per_sample} leaves too few queries: "
                f"{type(self.estimator).__name__} with {type(self.allocator).__name__} needs at "
                f"least {least} rows per sample, the clean one included."
            )
        return budget


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Attributes:
        loss: sum of the batch's clean losses divided by the normalizer (without a clean forward, of
            the perturbed ones).
        rows: all rows that went through the model.
        counts: (B,) int64, queries per sample; one entry if the loss belongs to the batch as a
            whole.
        mean_squares: (B,) mean squared delta per sample, an estimate of `||grad s_i||^2`; NaN if
            none is finite.
        metrics: numbers for the log.
        trace: rows and coefficients of the estimate, without the closed-form head and the control
            variate.
        elements: the batch's own number of loss elements.

    Examples:
        >>> import torch
        >>> counts = torch.tensor([3, 1])
        >>> result = StepResult(torch.tensor(0.7), 6, counts, torch.tensor([2.0, 0.5]), {})
        >>> result.rows - int(result.counts.sum())  # clean rows
        2
    """

    loss: Tensor
    rows: int
    counts: Tensor
    mean_squares: Tensor
    metrics: dict[str, float]
    trace: UpdateRecord | None = None
    elements: float = 0.0


@dataclass(frozen=True)
class FinishedBatch:
    """A batch whose gradient has been estimated, as the observers of a run get it.

    Attributes:
        result: of the estimate.
        inputs: the batch.
        position: of the batch in the run.
        method: how its gradient was estimated; None if images and texts had a method each.
    """

    result: StepResult
    inputs: Inputs
    position: BatchPosition
    method: Method | None
