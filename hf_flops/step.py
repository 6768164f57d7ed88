"""One training step without a backward pass: the function to read first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .allocators import Allocator, equal_counts
from .counters import seeds
from .errors import ConfigurationError, NonFiniteError
from .estimators import Estimator
from .metrics import mean_squares, summarise
from .objectives import Forward, Objective, RowLosses
from .perturbations import NoiseKeys, Perturbation
from .rows import Features, Rows, batch_size, expand, take


@dataclass(frozen=True)
class Place:
    """Where a batch lies in the run; together with the seed it fixes all noise.

    Attributes:
        seed: the run's seed.
        step: optimizer steps done before this one.
        position: index of the batch's first sample in the global batch of this optimizer step.
        epoch: epochs done, with fraction.
        ids: the samples' places in the data set, where they are known; they say nothing about the noise.
    """

    seed: int = 0
    step: int = 0
    position: int = 0
    epoch: float = 0.0
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Method:
    """How a gradient is estimated.

    Attributes:
        objective: what is minimised, row by row.
        perturbation: where noise enters the model.
        estimator: the finite difference.
        allocator: how queries are shared out.
        queries_per_sample: rows of forward passes per sample and step, the clean one included.
        scale: the step of the difference, epsilon.
        rows_per_forward: rows that go through the model at a time.
    """

    objective: Objective
    perturbation: Perturbation
    estimator: Estimator
    allocator: Allocator
    queries_per_sample: int
    scale: float
    rows_per_forward: int

    @property
    def needs_clean(self) -> bool:
        """Whether the clean forward is run (and charged)."""
        return self.estimator.baseline or (self.allocator.needs_clean and self.objective.per_row)

    def budget(self, samples: int) -> int:
        """Return how many queries `samples` samples can afford in all, after the clean rows are paid for."""
        rows = samples * (self.queries_per_sample - self.needs_clean)
        budget = rows // len(self.estimator.signs)
        if budget < samples:
            least = len(self.estimator.signs) + self.needs_clean
            raise ConfigurationError(
                f"queries_per_sample={self.queries_per_sample} leaves no query for every sample: "
                f"{type(self.estimator).__name__} with {type(self.allocator).__name__} needs at least {least} rows per "
                "sample, the clean one included."
            )
        return budget


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
        loss: sum of the batch's clean losses divided by the normalizer (without a clean forward, of the perturbed ones).
        rows: rows that went through the model, all included.
        counts: (B,) int64, queries per sample; one entry where the loss belongs to the batch as a whole.
        mean_squares: (B,) mean squared delta per sample, an estimate of `||grad s_i||^2`; NaN where none is finite.
        metrics: numbers for the log.
    """

    loss: Tensor
    rows: int
    counts: Tensor
    mean_squares: Tensor
    metrics: dict[str, float]


def estimate_gradient(
    forward: Forward,
    inputs: Mapping[str, Any],
    method: Method,
    place: Place,
    elements: float | None = None,
    batches: int = 1,
) -> StepResult:
    """Add an estimate of the loss's gradient to the `.grad` of the perturbed parameters.

    The loss is `(1/N) sum_i s_i`, s_i a sample's loss sum; the estimate is
    `(1/N) sum_i (1/n_i) sum_k delta_ik z_ik`, unbiased for any counts n_i that are fixed before the noise.

    Args:
        forward: runs the model, in evaluation mode, and returns its loss and outputs.
        inputs: a batch of B samples.
        method: how the gradient is estimated.
        place: where the batch lies in the run.
        elements: N, the number of loss elements that the optimizer step averages over.
        batches: where `elements` is None, over how many batches the step averages: N is then this many times the batch's
            own number of loss elements.

    Raises:
        ConfigurationError: `queries_per_sample` does not pay for one query per sample.
        NonFiniteError: not one perturbed row has a finite loss; gradients are left as they were.

    References:
        Ren et al. (2025), FLOPS, arXiv 2410.05966, section 3.
    """
    with torch.no_grad():
        return _Step(forward, inputs, method, place).run(elements, batches)


class _Step:
    """The intermediate results of one call of `estimate_gradient`."""

    def __init__(self, forward: Forward, inputs: Mapping[str, Any], method: Method, place: Place) -> None:
        self.forward, self.inputs, self.method, self.place = forward, inputs, method, place
        self.samples = batch_size(inputs)
        self.units = self.samples if method.objective.per_row else 1  # what counts are given to
        self.budget = method.budget(self.samples) // (self.samples // self.units)
        self.clean: RowLosses | None = None
        if method.needs_clean:
            self.clean = method.objective(forward, inputs, features=method.allocator.needs_clean)
        self.replayed = 0  # rows that went through the model again
        self.elements = torch.zeros(self.units)  # loss elements of each sample, known after the first forward

    def run(self, elements: float | None, batches: int) -> StepResult:
        features = self._features()
        counts = self._counts(features)
        # N is only known once a forward has shown how many elements each sample has: rows are laid out with N = 1.
        rows = self._layout(counts)
        deltas, perturbed = torch.empty(len(rows)), torch.zeros(self.units, dtype=torch.float64)
        vector, done = self.method.perturbation.vector, 0
        update = torch.zeros(vector.size, device=vector.device)
        for chunk in self._chunks(rows):
            noise = self._noise(chunk)
            own, losses = self._evaluate(chunk, noise)
            deltas[done : done + len(chunk)] = own
            perturbed.index_add_(0, chunk.owner, losses.mean(0).double())
            coefficients = torch.where(own.isfinite(), own * chunk.weight, 0.0)
            update += self.method.perturbation.pull_back(noise, coefficients)
            done += len(chunk)
        noise_facts = self.method.perturbation.grouped, self.method.perturbation.dimension(noise)
        update = self._without_non_finite(rows, deltas, counts, update)
        # Where no element counts (every label is ignored) there is nothing to average, and the update is zero.
        normalizer = (float(self.elements.sum()) * batches if elements is None else elements) or 1.0
        vector.add_to_gradients(update / normalizer)
        squares = mean_squares(rows, deltas, self.units)
        self.method.allocator.update(features, counts, squares)
        loss = self.clean.sums if self.clean is not None else perturbed / counts
        metrics = summarise(update / normalizer, squares / normalizer**2, counts, rows, deltas / normalizer, *noise_facts)
        used = (len(rows) + self.replayed) * len(self.method.estimator.signs) * (self.samples // self.units)
        used += self.samples * self.method.needs_clean
        total = loss[loss.isfinite()].sum() / normalizer
        return StepResult(total.float(), used, counts, squares, metrics)

    def _features(self) -> Features:
        losses = torch.zeros(self.units) if self.clean is None else self.clean.sums.cpu()
        residuals = None if self.clean is None or self.clean.residuals is None else self.clean.residuals.cpu()
        place, lengths = self.place, None
        if self.clean is not None:
            self.elements = lengths = self.clean.counts.cpu().float()
        ids = place.ids if place.ids is not None and len(place.ids) == self.units else None
        return Features(losses, residuals, place.step, place.position, place.epoch, place.seed, lengths, ids)

    def _counts(self, features: Features) -> Tensor:
        if not self.method.objective.per_row:
            return equal_counts(self.units, self.budget)
        return self.method.allocator.counts(features, self.budget)

    def _layout(self, counts: Tensor) -> Rows:
        rows = expand(counts, 1.0, weighted=self.method.allocator.weighted)
        if not self.method.allocator.shuffled:
            return rows
        order = torch.from_numpy(seeds(self.place.seed, self.place.step, rows.owner.numpy(), rows.query.numpy()).argsort())
        return replace(rows[order], group=torch.arange(len(rows)) // self.units)

    def _chunks(self, rows: Rows) -> Iterator[Rows]:
        size = self.method.rows_per_forward if self.method.objective.per_row else 1
        return rows.chunks(size, within_groups=self.method.perturbation.grouped)

    def _noise(self, chunk: Rows) -> Any:
        place = self.place
        positions = chunk.owner + place.position
        keys = NoiseKeys.of(place.seed, place.step, positions, chunk.query, int(chunk.group[0]))
        return self.method.perturbation.draw(keys)

    def _evaluate(self, chunk: Rows, noise: Any) -> tuple[Tensor, Tensor]:
        """Run a chunk at every sign; returns deltas (R,) and losses (S, R)."""
        method = self.method
        inputs = take(self.inputs, chunk.owner) if method.objective.per_row else self.inputs
        losses = []
        for sign in method.estimator.signs:
            with method.perturbation.applied(noise, sign * method.scale):
                found = method.objective(self.forward, inputs)
            losses.append(found.sums.cpu())
        self.elements[chunk.owner] = found.counts.cpu().float()
        clean = None if self.clean is None else self.clean.sums.cpu()[chunk.owner]
        stacked = torch.stack(losses)
        return method.estimator.deltas(stacked, clean, method.scale).float(), stacked

    def _without_non_finite(self, rows: Rows, deltas: Tensor, counts: Tensor, update: Tensor) -> Tensor:
        """Re-spread the weight of rows that were dropped for a non-finite loss; returns the update (d,)."""
        finite = deltas.isfinite()
        if bool(finite.all()):
            return update
        kept = torch.bincount(rows.owner[finite], minlength=self.units)
        if not bool(finite.any()):
            raise NonFiniteError(
                f"All {len(rows)} perturbed rows of optimizer step {self.place.step} have a non-finite loss: lower "
                f"perturbation_scale (now {self.method.scale:g}) or the learning rate, and look at the batch for NaN."
            )
        # First among the rows of the same sample: what they lack is added, from noise that is drawn again.
        lacking = torch.where(kept > 0, counts / kept.clamp(min=1) - 1, 0.0)[rows.owner] * finite
        index = torch.nonzero(lacking).flatten()
        for chunk, extra in zip(
            self._chunks(rows[index]), self._pieces(rows[index], (deltas * rows.weight * lacking)[index]), strict=True
        ):
            noise = self._noise(chunk)
            if self.method.perturbation.replays:
                self._evaluate(chunk, noise)
                self.replayed += len(chunk)
            update = update + self.method.perturbation.pull_back(noise, extra)
        # Then, for samples without any finite row, among the loss elements of the other samples.
        return update * float(self.elements.sum() / (self.elements[kept > 0].sum() or 1.0))

    def _pieces(self, rows: Rows, values: Tensor) -> list[Tensor]:
        """Cut values (R,) as `_chunks` cuts rows."""
        return list(values.split([len(chunk) for chunk in self._chunks(rows)]))
