"""What every allocator must do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..allocators import Allocator, RandomisedAllocator, SampleFeatures
from ..errors import ConfigurationError


class AllocatorContract:
    """Derive a class `Test...` that defines `make`; pytest then runs the contract.

    Counts that follow these rules leave the gradient estimate unbiased, whatever else an allocator
    does.

    Examples:
        >>> from hf_flops.allocators import Uniform
        >>> class TestUniform(AllocatorContract):
        ...     def make(self):
        ...         return Uniform()
        >>> TestUniform().test_counts_spend_the_budget()
    """

    def make(self) -> Allocator:
        """Return a new allocator, always with the same settings."""
        raise NotImplementedError("Define make(self), which returns a new allocator.")

    def batches(self) -> Iterator[tuple[SampleFeatures, int]]:
        """Yield what an allocator may meet: (features of a batch, budget).

        Override it to add cases of your own.
        """
        generator = torch.Generator().manual_seed(0)
        for step, samples in enumerate((8, 1, 3, 8, 8)):
            losses = torch.rand(samples, generator=generator)
            yield self.features(losses, step), samples * (1 + step) + (step > 0)
        odd = torch.tensor([0.0, 1.0, -1.0, 3e38, float("inf"), float("nan")])
        yield self.features(odd, 5), 31
        yield SampleFeatures(torch.ones(4), step=6), 10**6 + 7

    def features(self, losses: Tensor, step: int) -> SampleFeatures:
        """Return the features of a batch with losses (B,), as after a clean forward."""
        ids, lengths = tuple(range(len(losses))), torch.ones(len(losses))
        return SampleFeatures(
            losses, losses.abs().sqrt(), step=step, seed=7, lengths=lengths, ids=ids
        )

    def squares(self, features: SampleFeatures) -> Tensor:
        """Return (B,) mean squared deltas for a batch, as a finished step shows them."""
        return features.losses.nan_to_num(1.0, 1.0, 0.0).clamp(0, 100).square() + 0.1

    def test_counts_spend_the_budget(self) -> None:
        """Counts are (B,) int64 and sum to the budget, whatever the losses are; each is at least 1,
        but 0 for a `RandomisedAllocator`.
        """
        allocator = self.make()
        least = fewest(allocator)
        for features, budget in self.batches():
            counts = allocator.counts(features, budget)
            assert counts.dtype == torch.int64, f"counts are {counts.dtype}, not torch.int64"
            assert counts.shape == features.losses.shape, (
                f"{tuple(counts.shape)} counts for {len(features.losses)} samples"
            )
            assert int(counts.min()) >= least, (
                f"a sample of {features.losses.tolist()} got {int(counts.min())} queries"
            )
            assert int(counts.sum()) == budget, (
                f"{int(counts.sum())} queries of a budget of {budget}"
            )
            allocator.update(features, counts, self.squares(features))

    def test_counts_do_not_depend_on_global_state(self) -> None:
        """Counts are a function of features and past, and the global generator is not used."""
        before = torch.get_rng_state()
        histories: list[list[list[int]]] = []
        for _ in range(2):
            allocator = self.make()
            histories.append([])
            for features, budget in self.batches():
                counts = allocator.counts(features, budget)
                histories[-1].append(counts.tolist())
                allocator.update(features, counts, self.squares(features))
        assert histories[0] == histories[1], "two new allocators differ after the same past"
        assert torch.equal(before, torch.get_rng_state()), "the global generator has moved"

    def test_a_resumed_allocator_goes_on_as_the_old_one(self) -> None:
        """State is JSON, and an allocator that takes it up decides as the old one does."""
        old, new = self.make(), self.make()
        for features, budget in self.batches():
            old.update(features, old.counts(features, budget), self.squares(features))
        new.load_state_dict(json.loads(json.dumps(old.state_dict())))
        for features, budget in self.batches():
            counts = old.counts(features, budget)
            assert counts.equal(new.counts(features, budget)), (
                "the resumed allocator gives other counts"
            )
            for allocator in (old, new):
                allocator.update(features, counts, self.squares(features))

    def test_deltas_that_are_missing_do_no_harm(self) -> None:
        """Samples of which no row was finite have NaN for a mean square."""
        allocator = self.make()
        for features, budget in self.batches():
            counts = allocator.counts(features, budget)
            allocator.update(features, counts, torch.full(features.losses.shape, float("nan")))
        features, budget = next(self.batches())
        assert int(allocator.counts(features, budget).sum()) == budget

    def test_a_budget_below_one_query_per_sample_is_refused(self) -> None:
        """With a ConfigurationError: a sample without a query would make the estimate biased. Of a
        `RandomisedAllocator`, a budget of 0 is.
        """
        allocator = self.make()
        budget = 3 if fewest(allocator) else 0
        try:
            allocator.counts(self.features(torch.rand(4), 0), budget)
        except ConfigurationError:
            return
        raise AssertionError(f"a budget of {budget} queries for 4 samples was accepted")

    def test_the_mean_of_random_counts_is_the_expected_count(self) -> None:
        """So that rows with the inverse expected count as their weight are unbiased."""
        allocator, total = self.make(), torch.zeros(6, dtype=torch.float64)
        if not isinstance(allocator, RandomisedAllocator):
            return
        first = self.features(4.0 ** torch.arange(6), 0)
        expected = allocator.expected_counts(first, 9)
        assert bool((expected > 0).all()), "a sample never gets a query"
        draws = 2000
        for position in range(draws):
            total += allocator.counts(replace(first, position=position), 9)
        # a count is one of two whole numbers, which bounds its standard error
        assert torch.allclose(total / draws, expected, atol=5 * 0.5 / draws**0.5, rtol=0), (
            f"counts average {(total / draws).tolist()}, not {expected.tolist()}"
        )


def fewest(allocator: Allocator) -> int:
    """Return the fewest queries that an allocator may give a sample."""
    return 0 if isinstance(allocator, RandomisedAllocator) else 1
