"""One training step without a backward pass: the function to read first."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .allocators import Piloted, equal_counts
from .chunks import ChunkPlanner, Work, in_chunks
from .control_variates import Prediction
from .counters import seeds
from .errors import NonFiniteError
from .method import Method, StepResult
from .metrics import mean_squares, summarise
from .objectives import Forward, RowLosses
from .padding import Feed
from .perturbations import NoiseKeys
from .regenerate import Trace
from .rows import Features, Place, Rows, batch_size, expand


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
    with torch.no_grad(), method.reuse.installed():
        return Step(forward, inputs, method, place).run(elements, batches)


class Step:
    """The intermediate results of one call of `estimate_gradient`; once it is made, the clean forward has run."""

    def __init__(self, forward: Forward, inputs: Mapping[str, Any], method: Method, place: Place) -> None:
        self.forward, self.method, self.place = forward, method, place
        self.samples = batch_size(inputs)
        self.units = self.samples if method.objective.per_row else 1  # what counts are given to
        self.budget = method.budget(self.samples) // (self.samples // self.units)
        self.planner = ChunkPlanner.of(method.rows_per_forward)
        self.feed = Feed(inputs, method.trimmed if method.objective.per_row else frozenset())
        method.reuse.prepare(forward, self.feed.whole, place.ids)
        self.clean: RowLosses | None = None
        self.head_inputs: list[Tensor] = []  # what the closed-form head was given by the clean forward
        if method.needs_clean:
            self.clean = self._clean()
        else:
            method.reuse.record(forward, self.feed.whole)
        self.replayed = self.dimension = 0  # rows that went through again; random numbers in the noise of a row
        self.elements = torch.zeros(self.units)  # loss elements of each sample, known after the first forward
        self.perturbed = torch.zeros(self.units, dtype=torch.float64)  # summed losses of each sample's perturbed rows
        self.prediction: Prediction | None = None
        vector = method.perturbation.vector
        self.update = torch.zeros(vector.size, device=vector.device)  # the estimate, with N = 1
        self.pulled: list[tuple[Rows, Tensor]] = []  # the chunks that it is the sum of, and their coefficients
        self.factor = 1.0  # what that sum has to be multiplied by

    def _clean(self) -> RowLosses:
        """Run the batch as it is: all at once, unless it does not fit in memory."""
        features, head, found = self.method.needs_features, self.method.head, list[RowLosses]()
        objective, reuse, whole = self.method.objective, self.method.reuse, self.feed.whole
        if not objective.per_row:
            return objective(reuse.through(self.forward, whole), whole, features=features)

        def work(chunk: slice) -> int:
            owner, inputs, columns, cut = torch.arange(self.samples)[chunk], whole, self.feed.columns, None
            if len(owner) < self.samples:
                inputs, columns, cut = self.feed.of(owner)
            forward = reuse.through(self.forward, inputs, None if inputs is whole else owner, cut)
            watched: AbstractContextManager[list[Tensor]] = nullcontext([]) if head is None else head.watched()
            with watched as seen:
                losses = objective(forward, inputs, features=features)
            found.append(losses)
            self.head_inputs += [x.reshape(len(owner), -1) for x in seen]
            return columns

        in_chunks([self.samples], work, self.planner, whole=True)
        return RowLosses.joined(found)

    def run(self, elements: float | None, batches: int) -> StepResult:
        """Run the queries, and add what they say to the gradients; for the arguments see `estimate_gradient`."""
        features, method = self._features(), self.method
        if method.control is not None and self.clean is not None and method.allocator.weighted:
            size = getattr(method.perturbation, "rowwise_size", 0)
            self.prediction = method.control.start(self.clean, size, self.update.device, self.place.step)
        rows, deltas = self._rounds(features)
        counts = torch.bincount(rows.owner, minlength=self.units)
        update = self._without_non_finite(rows, deltas)
        # Where no element counts (every label is ignored) there is nothing to average, and the update is zero.
        normalizer = (float(self.elements.sum()) * batches if elements is None else elements) or 1.0
        self.method.perturbation.vector.add_to_gradients(update / normalizer)
        exact = torch.zeros(1)  # what needs no estimate
        if method.head is not None and self.clean is not None:
            exact = method.head.gradient(torch.cat(self.head_inputs), self.clean) / normalizer
            method.head.vector.add_to_gradients(exact)
        squares = mean_squares(rows, deltas, self.units)
        self.method.allocator.update(features, counts, squares)
        if self.prediction is not None and method.control is not None:
            method.control.finish(self.prediction)
        loss = self.clean.sums if self.clean is not None else self.perturbed / counts
        facts = method.perturbation.grouped, self.dimension
        metrics = summarise(update / normalizer, squares / normalizer**2, counts, rows, deltas / normalizer, *facts)
        metrics["head_signal"] = float(exact.square().sum())
        used = (len(rows) + self.replayed) * len(self.method.estimator.signs) * (self.samples // self.units)
        used += self.samples * self.method.needs_clean
        total = loss[loss.isfinite()].sum() / normalizer
        trace = Trace.of(self.pulled, self.place.position, self.factor, normalizer)
        return StepResult(total.float(), used, counts, squares, metrics, trace)

    def _features(self) -> Features:
        losses = torch.zeros(self.units) if self.clean is None else self.clean.sums.cpu()
        residuals = None if self.clean is None or self.clean.residuals is None else self.clean.residuals.cpu()
        place, lengths = self.place, None
        if self.clean is not None:
            self.elements = lengths = self.clean.counts.cpu().float()
        ids = place.ids if place.ids is not None and len(place.ids) == self.units else None
        return Features(losses, residuals, place.step, place.position, place.epoch, place.seed, lengths, ids)

    def _rounds(self, features: Features) -> tuple[Rows, Tensor]:
        """Run all queries, in two rounds where the allocator wants a pilot; returns them and their deltas (R,)."""
        allocator: Any = self.method.allocator
        if not self.method.objective.per_row:
            return self._round(equal_counts(self.units, self.budget))
        plan = allocator.pilot(features, self.budget) if isinstance(allocator, Piloted) else None
        if plan is None:
            return self._round(allocator.counts(features, self.budget))
        pilot, shares = plan
        first, seen = self._round(pilot, share=shares)
        squares, left = mean_squares(first, seen, self.units), self.budget - len(first)
        second, later = self._round(
            allocator.second_counts(features, squares, pilot, shares, left), share=1 - shares, after=pilot
        )
        return first.then(second), torch.cat([seen, later])

    def _round(self, counts: Tensor, **options: Any) -> tuple[Rows, Tensor]:
        """Run so many queries of each sample and add what they say to the update; returns them and their deltas (R,)."""
        # N is only known once a forward has shown how many elements each sample has: rows are laid out with N = 1.
        rows = expand(counts, 1.0, weighted=self.method.allocator.weighted, **options)
        if self.method.allocator.shuffled and self.method.objective.per_row:
            order = seeds(self.place.seed, self.place.step, rows.owner.numpy(), rows.query.numpy()).argsort()
            rows = replace(rows[torch.from_numpy(order)], group=torch.arange(len(rows)) // self.units)
        rows = self.feed.ordered(rows, within_groups=self.method.perturbation.grouped)
        deltas = torch.empty(len(rows))

        def work(index: slice) -> int:
            chunk = rows[index]
            noise = self._noise(chunk)
            own, losses, changes, columns = self._evaluate(chunk, noise)
            errors = sums = None
            if self.prediction is not None and changes is not None:
                row_noise: Any = self.method.perturbation.row_noise(noise)
                own, errors, sums = self.prediction.remainder(row_noise, chunk.owner, own, changes)
            coefficients = torch.where(own.isfinite(), own * chunk.weight, 0.0)
            pulled, innovation = self._pull_back(noise, coefficients, errors)
            # Memory may have run out before: from here on nothing large is made.
            deltas[index], self.dimension = own, self.method.perturbation.dimension(noise)
            self.perturbed.index_add_(0, chunk.owner, losses.mean(0).double())
            self.update.add_(pulled)
            self.pulled.append((chunk, coefficients))
            if self.prediction is not None and sums is not None:
                self.prediction.add(innovation, sums)
            return columns

        self._in_chunks(rows, work, self.planner)
        return rows, deltas

    def _pull_back(self, noise: Any, coefficients: Tensor, errors: Tensor | None) -> tuple[Tensor, Any]:
        """Return `sum_r c_r z_r` (d,) for coefficients (R,), and (M, d) for errors (R, M); the noise is unpacked once."""
        perturbation = self.method.perturbation
        own: Any = None if errors is None else perturbation.row_noise(noise)
        if errors is None or perturbation.rowwise_size < perturbation.vector.size:
            return perturbation.pull_back(noise, coefficients), None if own is None else own.weighted_sum(errors)
        both = own.weighted_sum(torch.cat([coefficients[:, None].to(errors), errors], 1))
        return both[0], both[1:]

    def _in_chunks(self, rows: Rows, work: Work, planner: ChunkPlanner) -> None:
        per_row, grouped = self.method.objective.per_row, self.method.perturbation.grouped
        in_chunks(rows.stretches(within_groups=grouped) if per_row else [1] * len(rows), work, planner)

    def _noise(self, chunk: Rows) -> Any:
        seed, step, positions = self.place.seed, self.place.step, chunk.owner + self.place.position
        keys = NoiseKeys.of(seed, step, positions, chunk.query, int(chunk.group[0]))
        return self.method.perturbation.draw(keys)

    def _evaluate(self, chunk: Rows, noise: Any) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Run a chunk at every sign; returns deltas (R,), losses (S, R), changes of logits (R, K) and a row's columns."""
        method = self.method
        owner = chunk.owner if method.objective.per_row else torch.arange(self.samples)
        inputs, columns, cut = self.feed.of(owner) if method.objective.per_row else (self.feed.whole, 1, None)
        forward = method.reuse.through(self.forward, inputs, owner, cut)
        found: list[RowLosses] = []
        for sign in method.estimator.signs:
            with method.perturbation.applied(noise, sign * method.scale):
                found.append(method.objective(forward, inputs))
        self.elements[chunk.owner] = found[0].counts.cpu().float()
        losses, clean = torch.stack([part.sums.cpu() for part in found]), self.clean
        deltas = method.estimator.deltas(losses, None if clean is None else clean.sums.cpu()[chunk.owner], method.scale)
        changes = None
        if self.prediction is not None and all(part.logits is not None for part in found):
            logits = torch.stack([part.logits.cpu().float() for part in found])  # type: ignore[union-attr]
            changes = method.estimator.deltas(logits, self.prediction.logits[chunk.owner], method.scale)
        return deltas.float(), losses, changes, columns

    def _without_non_finite(self, rows: Rows, deltas: Tensor) -> Tensor:
        """Re-spread the weight of rows that were dropped for a non-finite loss; returns the update (d,)."""
        finite = deltas.isfinite()
        kept = torch.bincount(rows.owner[finite], minlength=self.units) > 0
        if self.prediction is not None:
            self.update[: self.prediction.jacobian.shape[1]] += self.prediction.baseline(kept.float())
        if bool(finite.all()):
            return self.update
        if not bool(finite.any()):
            raise NonFiniteError(
                f"All {len(rows)} perturbed rows of optimizer step {self.place.step} have a non-finite loss: lower "
                f"perturbation_scale (now {self.method.scale:g}) or the learning rate, and look at the batch for NaN."
            )
        # First among the rows of the same sample: what they lack is added, from noise that is drawn again.
        again, extra = rows.lacking(deltas, self.units)

        def work(part: slice) -> int:
            noise = self._noise(again[part])
            if self.method.perturbation.replays:
                self._evaluate(again[part], noise)
                self.replayed += part.stop - part.start
            self.update.add_(self.method.perturbation.pull_back(noise, extra[part]))
            self.pulled.append((again[part], extra[part]))
            return 1

        self._in_chunks(again, work, ChunkPlanner(self.planner.size))
        # Then, for samples without any finite row, among the loss elements of the other samples.
        self.factor = float(self.elements.sum() / (self.elements[kept].sum() or 1.0))
        return self.update * self.factor
