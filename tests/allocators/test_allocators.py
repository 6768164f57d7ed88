"""What holds for every allocator."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flops import ConfigurationError
from hf_flops.allocators import (
    ALLOCATORS,
    AuthorsBernoulli,
    LossProportional,
    LossRank,
    SampleFeatures,
    equal_counts,
    optimal_counts,
    proxy,
)
from hf_flops.testing.allocators import fewest

LOSS = st.one_of(
    st.floats(0, 100, width=32),
    st.sampled_from([0.0, 1.0, 1.0, 3e38, float("inf"), float("nan"), -1.0]),
)
EXTRA = st.one_of(st.integers(0, 60), st.sampled_from([10**6, 10**6 + 7]))


def features_of(losses, step, *, known=True, **options):
    """Everything that a step may know."""
    lengths, ids = (
        (torch.arange(len(losses)) + 1.0, tuple(range(len(losses)))) if known else (None, None)
    )
    return SampleFeatures(
        losses,
        losses.abs().sqrt() if known else None,
        step=step,
        lengths=lengths,
        ids=ids,
        **options,
    )


def following(name):
    """An allocator that follows its predictions however small their gain."""
    return ALLOCATORS[name](least_gain=1.0) if name.startswith("optimal") else ALLOCATORS[name]()


def trained(name, generator, samples=8, steps=40):
    """An allocator that has seen some steps, in which harder samples had larger deltas."""
    allocator = following(name)
    for step in range(steps):
        losses = torch.rand(samples, generator=generator)
        features = features_of(losses, step)
        counts = allocator.counts(features, samples * 8)
        allocator.update(
            features, counts, losses.square() * torch.rand(samples, generator=generator)
        )
    return allocator


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(ALLOCATORS)),
    st.lists(LOSS, min_size=1, max_size=9),
    EXTRA,
    st.booleans(),
    st.data(),
)
def test_every_allocator_spends_its_budget_whatever_it_sees(name, losses, extra, known, data):
    allocator, losses = ALLOCATORS[name](), torch.tensor(losses)
    for step in range(4):
        features = features_of(losses, step, known=known, epoch=step / 2)
        counts = allocator.counts(features, len(losses) + extra)
        assert counts.dtype == torch.int64
        assert counts.shape == losses.shape
        assert counts.min() >= fewest(allocator)
        assert counts.sum() == len(losses) + extra
        seen = data.draw(st.lists(LOSS, min_size=len(losses), max_size=len(losses)))
        allocator.update(features, counts, torch.tensor(seen).abs())


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"authors_bernoulli", "bernoulli"}))
def test_samples_that_are_all_alike_get_equal_counts(name):
    losses = torch.full((6,), 0.1)
    for allocator in (
        ALLOCATORS[name](),
        trained(name, torch.Generator().manual_seed(0), samples=12),
    ):
        features = SampleFeatures(losses, losses, step=1000, lengths=losses)
        assert allocator.counts(features, 24).tolist() == [4] * 6


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_a_budget_below_one_query_per_sample_is_refused(name):
    allocator = ALLOCATORS[name]()
    budget = 3 * fewest(allocator)
    refusal = "cannot give each of 4 samples at least one" if budget else "cannot be divided"
    with pytest.raises(ConfigurationError, match=f"budget of {budget} queries {refusal}"):
        allocator.counts(SampleFeatures(torch.rand(4)), budget)


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_a_resumed_allocator_decides_as_the_old_one(name):
    generator = torch.Generator().manual_seed(0)
    old, new = trained(name, generator), following(name)
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    for step in range(50, 54):
        features = features_of(torch.rand(8, generator=generator), step)
        counts = old.counts(features, 80)
        assert counts.equal(new.counts(features, 80))
        for allocator in (old, new):
            allocator.update(features, counts, features.losses)
    assert old.state_dict() == new.state_dict()


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_counts_are_the_same_whatever_the_other_micro_batches_of_the_step_showed(name):
    """Micro-batches may share their noise: what one shows may not decide the counts of the next."""
    found = []
    for power in (2, -4):
        generator = torch.Generator().manual_seed(0)
        allocator = trained(name, generator)
        losses = torch.rand(8, generator=generator)
        for position in (0, 8, 16):
            features = features_of(losses, 40, position=position, seed=3)
            counts = allocator.counts(features, 64)
            allocator.update(features, counts, losses**power)
        found.append(counts.tolist())
    assert found[0] == found[1]
    if name in ("optimal", "gaussian"):  # in the next step it does decide
        assert not torch.equal(
            allocator.counts(features_of(losses, 41), 64), torch.tensor(found[0])
        )


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_samples_without_a_finite_row_teach_nothing(name):
    generator = torch.Generator().manual_seed(0)
    whole, cut = trained(name, generator), trained(name, torch.Generator().manual_seed(0))
    losses, counts = torch.rand(6, generator=generator), torch.tensor([3, 4, 5, 6, 7, 8])
    whole.update(
        features_of(losses, 40),
        counts,
        torch.tensor([1.0, 2.0, 3.0, 4.0, float("nan"), float("nan")]),
    )
    cut.update(features_of(losses[:4], 40), counts[:4], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert of_deltas(whole) == of_deltas(cut)
    whole.update(features_of(losses, 41), counts, torch.full((6,), float("nan")))
    assert of_deltas(whole) == of_deltas(cut)


def of_deltas(allocator):
    """The state that deltas have taught; the gain is that of clean features."""
    return {name: part for name, part in allocator.state_dict().items() if name != "gain"}


def test_the_authors_heuristic_halves_easy_samples_and_favours_no_other():
    losses = torch.cat([torch.zeros(500), torch.ones(500)])
    counts = AuthorsBernoulli().counts(SampleFeatures(losses, seed=1), 8000)
    halved = counts[:500] == 4
    assert 0.2 < halved.float().mean() < 0.4
    assert counts[500:].min() >= 8
    assert counts[500:].max() - counts[:500][~halved].min() <= 1
    later = AuthorsBernoulli().counts(SampleFeatures(losses, seed=1, epoch=1.0), 8000)
    assert (later == 4).float().mean() < 0.03


def test_counts_proportional_to_the_loss():
    assert LossProportional().counts(
        SampleFeatures(torch.tensor([1.0, 2.0, 7.0])), 100
    ).tolist() == [
        10,
        20,
        70,
    ]
    assert LossProportional().counts(
        SampleFeatures(torch.tensor([-1.0, 2.0, 2.0])), 21
    ).tolist() == [
        1,
        10,
        10,
    ]


def test_counts_by_the_rank_of_the_loss():
    losses = torch.tensor([5.0, 0.1, 100.0, 5.0])
    assert LossRank().counts(SampleFeatures(losses), 100).tolist() == [25, 10, 40, 25]
    assert LossRank(top=0.25).counts(SampleFeatures(losses), 100).tolist() == [1, 1, 97, 1]
    with pytest.raises(ConfigurationError, match="top=0 must be a fraction"):
        LossRank(top=0)


# The variance of the estimate over that of equal counts, where sigma is the loss; the integer
# optimum is at 0.7375.
REACHED = {
    "optimal": 0.738,
    "optimal_with_zeros": 0.75,
    "two_stage": 0.738,
    "gaussian": 0.95,
    "bernoulli": 0.95,
    "loss_proportional": 0.738,
    "loss_rank": 0.74,
    "uniform": 1.0,
    "authors_bernoulli": 0.97,
}


@pytest.mark.parametrize("name", ALLOCATORS)
def test_after_five_steps_the_counts_of_a_large_batch_follow_its_deltas(name):
    losses, budget = torch.rand(256, generator=torch.Generator().manual_seed(0)), 256 * 64
    allocator = following(name)
    for step in range(6):
        features = features_of(losses, step)
        counts = allocator.counts(features, budget)
        allocator.update(features, counts, losses.square())
    squares = losses.double().square()
    equal = proxy(squares, equal_counts(256, budget))
    best = proxy(squares, optimal_counts(losses.double(), budget)) / equal
    assert best <= proxy(squares, counts) / equal <= REACHED[name]
