"""One training step without a backward pass: the function to read first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .allocators import Piloted, equal_counts
from .baselines import against_others
from .chunks import ChunkPlanner
from .clean import Clean, clean_forward
from .control_variates import Prediction
from .counters import seeds
from .errors import NonFiniteError
from .method import Method, StepResult
from .metrics import mean_squares, summarise
from .objectives import Forward, RowLosses
from .padding import Feed
from .perturbations import accumulator
from .queries import Queries
from .regenerate import Trace
from .rows import Features, Place, Rows, batch_size, expand


def estimate_gradient(
    forward: Forward,
    inputs: Mapping[str, Any],
    method: Method,
    place: Place,
    elements: float | None = None,
    batches: float = 1,
    *,
    last: bool = True,
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
        last: whether the batch is the last of its optimizer step. Several processes that sum gradients wait for it: until
            then `.grad` stays as it is, and the metrics lack what only the sum can tell.

    Raises:
        ConfigurationError: `queries_per_sample` does not pay for one query per sample.
        NonFiniteError: not one perturbed row has a finite loss; gradients are left as they were.

    References:
        Ren et al. (2025), FLOPS, arXiv 2410.05966, section 3.
    """
    with torch.no_grad(), method.reuse.installed():
        return Step(forward, inputs, method, place).run(elements, batches, last)


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
        self.exchange = method.exchange
        self.found: Clean | None = None  # by the clean forward
        self.clean: RowLosses | None = None
        if method.needs_clean:
            self.found = clean_forward(forward, method, self.samples, self.feed, self.planner)
            self.clean = self.found.losses
            method = self.method = replace(method, objective=self.found.objective)
        elif self.exchange.alone:
            method.reuse.record(forward, self.feed.whole)
        self.replayed = self.dimension = 0  # rows that went through again; random numbers in the noise of a row
        self.elements = torch.zeros(self.units)  # loss elements of each sample, known after the first forward
        self.perturbed = torch.zeros(self.units, dtype=torch.float64)  # summed losses of each sample's perturbed rows
        self.prediction: Prediction | None = None
        self.queries = Queries(forward, method, place, self.feed, self.samples, self.clean)
        vector = method.perturbation.vector
        self.update = torch.zeros(vector.size, dtype=accumulator(vector.device), device=vector.device)  # with N = 1
        self.pulled: list[tuple[Rows, Tensor]] = []  # the chunks that it is the sum of, and their coefficients
        self.corrections: list[Tensor] = []  # of the rows' coefficients, once all losses are known; for each round
        self.factor = 1.0  # what that sum has to be multiplied by

    def told(self, clean: RowLosses) -> None:
        """Go on with other clean losses than the objective found, where it took the other tower to know them."""
        assert self.found is not None
        self.found = replace(self.found, losses=clean, own=clean)
        self.clean = self.queries.clean = clean

    def run(self, elements: float | None, batches: float, last: bool = True) -> StepResult:
        """Run the queries, and add what they say to the gradients; for the arguments see `estimate_gradient`."""
        features, method = self._features(), self.method
        if method.control is not None and self.clean is not None and method.allocator.weighted:
            size = getattr(method.perturbation, "rowwise_size", 0)
            self.prediction = method.control.start(self.clean, size, self.update.device, self.place.step)
            self.queries.prediction = self.prediction
        rows, deltas, mine = self._rounds(features)
        counts = torch.bincount(rows.owner, minlength=self.units)
        update = self._without_non_finite(rows, deltas, mine)
        # Where no element counts (every label is ignored) there is nothing to average, and the update is zero.
        normalizer = (float(self.elements.sum()) * batches if elements is None else elements) or 1.0
        known = not self.exchange.waiting
        settled = self._settle(update / normalizer, normalizer, last)
        squares = mean_squares(rows, deltas, self.units)
        method.allocator.update(features, counts, squares)
        loss = self.clean.sums if self.clean is not None else self.perturbed / counts
        gradient, exact = settled or (torch.zeros(1), torch.zeros(1))
        facts = method.perturbation.grouped, self.dimension
        metrics = summarise(gradient, squares / normalizer**2, counts, rows, deltas / normalizer, *facts)
        metrics["head_signal"] = float(exact.square().sum())
        if settled is None or not known:
            del metrics["gradient_signal"], metrics["head_signal"]  # only the sum over all batches is known
        used = (len(rows) + self.replayed) * len(method.estimator.signs) * (self.samples // self.units)
        used += self.samples * method.needs_clean
        total = loss[loss.isfinite()].sum() / normalizer
        whole = self.exchange.alone or self.exchange.scalars  # of several processes that sum, none has all chunks
        trace = Trace.of(self.pulled, self.place.position, self.factor, normalizer) if whole else None
        return StepResult(total.float(), used, counts, squares, metrics, trace)

    def _settle(self, update: Tensor, normalizer: float, last: bool) -> tuple[Tensor, Tensor] | None:
        """Add the update (d,) to the gradients, and the head's; returns both, or None where processes put it off."""
        method, exact, prediction = self.method, torch.zeros(1), self.prediction
        if method.head is not None and self.found is not None:
            exact = method.head.gradient(self.found.head_inputs, self.found.own, self.found.losses) / normalizer
        taught = [] if prediction is None else prediction.taught()
        settled = self.exchange.settle([update, exact, *taught], last=last)
        if settled is None:
            return None
        update, exact, *taught = settled
        method.perturbation.vector.add_to_gradients(update)
        if method.head is not None:
            method.head.vector.add_to_gradients(exact)
        if prediction is not None and method.control is not None:
            method.control.finish(*taught)
        return update, exact

    def _features(self) -> Features:
        losses = torch.zeros(self.units) if self.clean is None else self.clean.sums.cpu()
        residuals = None if self.clean is None or self.clean.residuals is None else self.clean.residuals.cpu()
        place, lengths = self.place, None
        if self.clean is not None:
            self.elements = lengths = self.clean.counts.cpu().float()
        ids = place.ids if place.ids is not None and len(place.ids) == self.units else None
        return Features(losses, residuals, place.step, place.position, place.epoch, place.seed, lengths, ids)

    def _rounds(self, features: Features) -> tuple[Rows, Tensor, Tensor]:
        """Run all queries, in two rounds where the allocator wants a pilot; returns what `_round` does."""
        allocator: Any = self.method.allocator
        if not self.method.objective.per_row:
            return self._round(equal_counts(self.units, self.budget))
        plan = allocator.pilot(features, self.budget) if isinstance(allocator, Piloted) else None
        if plan is None:
            return self._round(allocator.counts(features, self.budget))
        pilot, shares = plan
        first, seen, mine = self._round(pilot, share=shares)
        squares, left = mean_squares(first, seen, self.units), self.budget - len(first)
        second, later, own = self._round(
            allocator.second_counts(features, squares, pilot, shares, left), share=1 - shares, after=pilot
        )
        return first.then(second), torch.cat([seen, later]), torch.cat([mine, own])

    def _round(self, counts: Tensor, **options: Any) -> tuple[Rows, Tensor, Tensor]:
        """Run so many queries of each sample and add what they say to the update.

        Returns:
            All rows, their deltas (R,), and (R,) whether this process ran them.
        """
        # N is only known once a forward has shown how many elements each sample has: rows are laid out with N = 1.
        # The arithmetic behind counts may round differently on another machine: those of process 0 are everyone's.
        counts = self.exchange.share.first(counts.int()).long()
        rows = expand(counts, 1.0, weighted=self.method.allocator.weighted, **options)
        if self.method.allocator.shuffled and self.method.objective.per_row:
            order = seeds(self.place.seed, self.place.step, rows.owner.numpy(), rows.query.numpy()).argsort()
            rows = replace(rows[torch.from_numpy(order)], group=torch.arange(len(rows)) // self.units)
        grouped, size = self.method.perturbation.grouped, self.planner.given
        parts = self.exchange.parts(rows, self.feed, grouped=grouped, chunk=size)
        own = parts[self.exchange.share.rank]
        if not self.exchange.alone and (self.clean is None or self.method.reuse.complete):
            self.method.reuse.extend(self.forward, self.feed.whole, own.owner)
        found = torch.empty(len(own), 3)  # deltas; losses; elements

        def work(index: slice) -> int:
            chunk = own[index]
            noise = self.queries.noise(chunk)
            deltas, losses, elements, changes, columns = self.queries.evaluate(chunk, noise)
            errors = sums = None
            if self.prediction is not None and changes is not None:
                row_noise: Any = self.method.perturbation.row_noise(noise)
                deltas, errors, sums = self.prediction.remainder(row_noise, chunk.owner, deltas, changes)
            if not self.exchange.scalars:
                coefficients = torch.where(deltas.isfinite(), deltas * chunk.weight, 0.0)
                pulled, innovation = self.queries.pull_back(noise, coefficients, errors)
            # Memory may have run out before: from here on nothing large is made.
            found[index] = torch.stack([deltas, losses.mean(0).float(), elements], 1)
            self.dimension = self.method.perturbation.dimension(noise)
            if not self.exchange.scalars:
                self.update.add_(pulled)
                self.pulled.append((chunk, coefficients))
            if self.prediction is not None and errors is not None and sums is not None:
                self.prediction.add(innovation, errors, sums)
            return columns

        self.queries.in_chunks(own, work, self.planner)
        # Where there was no clean forward, losses and elements of the rows stand for it.
        rows, found, mine = self.exchange.gathered(parts, found[:, :1] if self.clean is not None else found)
        if self.clean is None:
            self.perturbed.index_add_(0, rows.owner, found[:, 1].double())
            self.elements[rows.owner] = found[:, 2]
        deltas = found[:, 0]
        if self.method.centred:
            raw, deltas = deltas, against_others(deltas, rows, self.units)
            self.corrections.append(torch.where(deltas.isfinite(), (deltas - raw) * rows.weight, 0.0))
        return rows, deltas, mine

    def _without_non_finite(self, rows: Rows, deltas: Tensor, mine: Tensor) -> Tensor:
        """Re-spread the weight of rows that were dropped for a non-finite loss; returns the update (d,).

        It is that of this process's rows, `mine` (R,), where processes sum, and of all rows where they share scalars.
        """
        finite = deltas.isfinite()
        kept = torch.bincount(rows.owner[finite], minlength=self.units) > 0
        if not bool(finite.any()):
            raise NonFiniteError(
                f"All {len(rows)} perturbed rows of optimizer step {self.place.step} have a non-finite loss: lower "
                f"perturbation_scale (now {self.method.scale:g}) or the learning rate, and look at the batch for NaN."
            )
        if self.prediction is not None and self.exchange.share.rank == 0:
            self.update[: self.prediction.jacobian.shape[1]] += self.prediction.baseline(kept.float())
        # First among the rows of the same sample: what they lack is added, from noise that is drawn again.
        lacking = torch.zeros(len(rows)) if bool(finite.all()) else rows.lacking(deltas, self.units)
        if self.exchange.scalars:
            coefficients = torch.where(finite, deltas * rows.weight, 0.0) + lacking
            self.update, self.pulled = self.exchange.regenerated(self.method.perturbation, self.place, rows, coefficients)
        else:
            extra = lacking + torch.cat(self.corrections) if self.corrections else lacking
            self._pull_back_again(rows, torch.where(mine, extra, 0.0))
        self._share_facts()
        if not bool(finite.all()):  # then, for samples without any finite row, among the loss elements of the others
            self.factor = float(self.elements.sum() / (self.elements[kept].sum() or 1.0))
        return self.update * self.factor

    def _pull_back_again(self, rows: Rows, lacking: Tensor) -> None:
        """Add the noise of rows once more, with coefficients (R,)."""
        index = torch.nonzero(lacking).flatten()
        if self.method.perturbation.grouped:
            index = index[rows.group[index].argsort(stable=True)]
        again, extra = rows[index], lacking[index]

        def work(part: slice) -> int:
            noise = self.queries.noise(again[part])
            if self.method.perturbation.replays:
                self.queries.evaluate(again[part], noise)
                self.replayed += part.stop - part.start
            self.update.add_(self.method.perturbation.pull_back(noise, extra[part]))
            self.pulled.append((again[part], extra[part]))
            return 1

        self.queries.in_chunks(again, work, ChunkPlanner(self.planner.size))

    def _share_facts(self) -> None:
        """Let every process know how many rows were replayed, and of how many numbers noise is made."""
        if not self.method.perturbation.replays:
            self.dimension = self.method.perturbation.vector.size
        elif not self.exchange.alone:
            world, own = self.exchange.share.world, torch.tensor([[self.replayed, self.dimension]])
            facts = self.exchange.share.gather(own, [1] * world)
            self.replayed, self.dimension = int(facts[:, 0].sum()), int(facts[:, 1].max())
