"""Several processes: the same estimate whatever their number, even shares, and bytes that do not
grow with the adapter.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flops import BatchPosition, ConfigurationError, Method, estimate_gradient
from hf_flops.allocators import ALLOCATORS
from hf_flops.base.padding import TrimmedBatch
from hf_flops.base.rows import expand
from hf_flops.distributed.collectives import ProcessGroup
from hf_flops.distributed.exchange import (
    EXCHANGES,
    REDUCE,
    GradientAllReduce,
    ScalarExchange,
    SingleProcess,
    gradient_exchange,
)
from hf_flops.estimators import ESTIMATORS, LogitJacobian, find_head
from hf_flops.objectives import BatchLoss, TappedLoss
from hf_flops.perturbations import NoiseKeys, ParameterVector, perturb
from hf_flops.perturbations.noise import draw
from hf_flops.perturbations.replay import regenerate
from hf_flops.reuse import choose_reuse
from hf_flops.trainer.multiprocess import fingerprint
from tests.helpers.ranks import played
from tests.helpers.tiny import generator, model_forward, tiny_batch, tiny_model

WORLD = 3
# not in a thread: the generator is global
MODELS = {kind: tiny_model(kind).double() for kind in ("vit", "llama")}
TRAINED = ("classifier", "layers.1.attention", "layers.1.self_attn")


class Spoiled(TappedLoss):
    """A loss that is not finite for some of the rows under noise: all of sample 1, and one query of
    sample 0.
    """

    def __call__(self, forward, inputs, *, features=False):
        found = super().__call__(forward, inputs, features=features)
        if not features:
            exact = found.sums.clone()
            first = (inputs["labels"] == inputs["labels"][0]) & (exact * 1e6 % 1 < 0.4)
            found.sums[first] = float("nan")
        return found


@torch.no_grad()
def estimates(
    group,
    reduce,
    *,
    kind="vit",
    samples=6,
    steps=2,
    noise="rowwise",
    batches=1,
    head=False,
    **options,
):
    """Run some steps on a model of its own; returns their gradients (S, d), results, and the bytes
    sent.
    """
    model = copy.deepcopy(MODELS[kind]).requires_grad_(False)
    names = [name for name, _ in model.named_parameters() if any(part in name for part in TRAINED)]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    batch = {
        k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(kind, samples).items()
    }
    forward, objective = model_forward(model), options.pop("objective", TappedLoss)()
    objective.logits = True
    head = find_head(model, objective, forward, batch) if head else None
    moved = [name for name in names if head is None or name not in head.vector.names]
    perturbation = perturb(model, **{noise: moved})
    reuse, _ = choose_reuse(model, objective, forward, batch, perturbation)
    method = Method(
        objective=objective,
        perturbation=perturbation,
        estimator=ESTIMATORS[options.pop("estimator", "one_sided")](),
        allocator=ALLOCATORS[options.pop("allocator", "optimal")](),
        queries_per_sample=options.pop("queries", 5),
        scale=1e-3,
        rows_per_forward=4,
        reuse=reuse,
        head=head,
        exchange=EXCHANGES[reduce](group),
        **{name: make() for name, make in options.items()},
    )
    found, results = [], []
    for step in range(steps):
        model.zero_grad()
        for number in range(batches):
            place = BatchPosition(seed=3, step=step, position=number * samples)
            results.append(
                estimate_gradient(forward, batch, method, place, 1.0, last=number == batches - 1)
            )
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    return torch.stack(found), results, group.sent


def compare(reduce, **options):
    """Compare what every one of three processes finds with what one alone does."""
    alone = estimates(ProcessGroup(), reduce, **options)
    for gradients, results, _ in played(WORLD, lambda group: estimates(group, reduce, **options)):
        torch.testing.assert_close(gradients, alone[0], rtol=1e-5, atol=1e-5)
        for own, other in zip(results, alone[1], strict=True):
            assert own.counts.equal(other.counts)
            assert own.rows == other.rows
            torch.testing.assert_close(own.loss, other.loss, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(own.mean_squares, other.mean_squares, equal_nan=True)
            for name, value in own.metrics.items():
                assert value == pytest.approx(other.metrics[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("estimator", "noise", "reduce"),
    [
        ("one_sided", "rowwise", "gradient"),
        ("antithetic", "shared", "gradient"),
        ("one_sided", "shared", "scalars"),
    ],
)
def test_the_estimate_does_not_depend_on_the_number_of_processes(estimator, noise, reduce):
    compare(reduce, estimator=estimator, noise=noise)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize(
    "allocator",
    [
        a if a in ("two_stage", "optimal_with_zeros") else pytest.param(a, marks=pytest.mark.slow)
        for a in ALLOCATORS
    ],
)
def test_allocators_decide_alike_in_all_processes(allocator, reduce):
    compare(reduce, allocator=allocator, steps=3)


WITH_ZEROS = {"allocator": "optimal_with_zeros", "estimator": "antithetic", "queries": 2}


@pytest.mark.parametrize(
    ("reduce", "options"),
    [
        ("scalars", {"kind": "llama"}),  # padding, and no clean forward
        ("scalars", {"head": True}),
        ("gradient", {"head": True, "control": LogitJacobian, "steps": 3}),
        ("gradient", {"samples": 1, "head": True}),  # fewer samples than processes
        (
            "scalars",
            {"samples": 2, "allocator": "uniform", "estimator": "antithetic", "queries": 2},
        ),
        # three pairs for six samples, and one pair for two
        ("gradient", {**WITH_ZEROS, "head": True, "control": LogitJacobian, "steps": 3}),
        ("scalars", {**WITH_ZEROS, "samples": 2}),
        ("gradient", {"delta_clip": lambda: 1.0}),
        ("scalars", {"delta_clip": lambda: 1.0}),
        ("gradient", {"noise": "activation"}),
        ("gradient", {"objective": Spoiled}),
        ("scalars", {"objective": Spoiled}),
        ("scalars", {"objective": BatchLoss, "noise": "shared", "allocator": "uniform"}),
        ("gradient", {"objective": BatchLoss, "noise": "shared", "allocator": "uniform"}),
    ],
)
def test_whatever_is_estimated_is_shared(reduce, options):
    compare(reduce, **options)


def test_gradients_are_summed_once_per_optimizer_step():
    _, results, one = played(2, lambda group: estimates(group, "gradient", head=True))[0]
    assert "gradient_signal" in results[-1].metrics
    gradients, results, four = played(
        2, lambda group: estimates(group, "gradient", head=True, batches=4)
    )[0]
    assert "gradient_signal" not in results[-1].metrics
    torch.testing.assert_close(
        gradients,
        estimates(ProcessGroup(), "gradient", head=True, batches=4)[0],
        rtol=1e-5,
        atol=1e-5,
    )
    numbers = 8 * gradients.shape[1] * 2
    assert one > numbers
    assert four - numbers == 4 * (one - numbers)


@pytest.mark.parametrize(
    ("world", "reduce", "kind"),
    [(1, "gradient", SingleProcess), (3, "gradient", GradientAllReduce)],
)
def test_the_exchange_follows_from_the_number_of_processes(world, reduce, kind):
    group = ProcessGroup()
    group.world = world
    assert type(EXCHANGES[reduce](group)) is kind
    assert type(EXCHANGES["scalars"](group)) is ScalarExchange


def test_a_sum_of_gradients_waits_for_the_last_batch_unless_each_one_counts():
    def sums(group, every_batch):
        exchange = EXCHANGES["gradient"](group, every_batch=every_batch)
        parts = [
            exchange.reduce([torch.ones(2) * number], last=number == 3) for number in (1, 2, 3)
        ]
        exchange.reduce([torch.ones(2)], last=False)
        exchange.discard()
        assert not exchange.pending
        return [part if part is None else part[0].tolist() for part in parts]

    assert played(2, lambda group: sums(group, False)) == [[None, None, [12.0, 12.0]]] * 2
    assert played(2, lambda group: sums(group, True)) == [[[2.0, 2.0], [4.0, 4.0], [6.0, 6.0]]] * 2


def test_scalars_do_not_grow_with_the_adapter():
    def sent(queries, **options):
        gradients, results, found = played(
            2, lambda group: estimates(group, "scalars", queries=queries, **options)
        )[1]
        return found / (sum(int(result.counts.sum()) for result in results) / 2), gradients.shape[1]

    small, large = sent(8, head=True), sent(8)
    assert small[0] <= large[0] <= 16
    options = {"estimator": "antithetic", "allocator": "uniform"}
    # where there is no clean forward, rows tell losses and elements too
    assert sent(8, **options)[0] == 12


@given(number=st.integers(0, 60), world=st.integers(1, 9), least=st.integers(1, 3))
def test_cuts_are_even_and_complete(number, world, least):
    group = ProcessGroup()
    group.world = world
    pieces = group.partition(number, least)
    sizes = [piece.stop - piece.start for piece in pieces]
    busy = [size for size in sizes if size]
    assert len(pieces) == world
    assert sum(sizes) == number
    assert [n for piece in pieces for n in range(piece.start, piece.stop)] == list(range(number))
    assert len(busy) < 2 or (max(busy) - min(busy) <= 1 and min(busy) >= least)
    assert least > 1 or max(sizes) - min(sizes) <= 1


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    world=st.integers(1, 4),
    chunk=st.none() | st.integers(1, 5),
)
def test_rows_are_dealt_evenly_to_within_a_chunk(counts, world, chunk):
    group, rows = ProcessGroup(), expand(torch.tensor(counts), 1.0)
    group.world = world
    feed = TrimmedBatch(tiny_batch("llama", len(counts)), frozenset({"right"}))
    parts = gradient_exchange(group).parts(rows, feed, shares_noise=False, chunk=chunk)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= (chunk or 1)
    found = sorted(
        pair
        for part in parts
        for pair in zip(part.owner.tolist(), part.query.tolist(), strict=True)
    )
    assert found == sorted(zip(rows.owner.tolist(), rows.query.tolist(), strict=True))


@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 7),
    kind=st.sampled_from(["rowwise", "shared"]),
    seed=st.integers(0, 99),
)
def test_an_update_is_regenerated_bit_for_bit_in_any_order(rows, size, kind, seed):
    model = torch.nn.Linear(5, 3)
    perturbation = perturb(model, **{kind: ["weight", "bias"]})
    rng = generator(seed)
    positions, queries = (
        torch.randint(9, (rows,), generator=rng),
        torch.randint(4, (rows,), generator=rng),
    )
    coefficients = 10 * torch.randn(rows, generator=rng)
    given = (positions, queries, coefficients, queries)
    found = regenerate(perturbation, 1, 2, *given, size)
    order = torch.randperm(rows, generator=rng)
    assert regenerate(perturbation, 1, 2, *(values[order] for values in given), rows).equal(found)
    wanted = torch.zeros_like(found)
    for row in range(rows):
        keys = NoiseKeys.of(
            1, 2, positions[row : row + 1], queries[row : row + 1], int(queries[row])
        )
        noise = perturbation.draw(keys)
        wanted += float(coefficients[row]) * (noise[0] if kind == "rowwise" else noise).double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=rows * 2.0**-30)


@given(rows=st.integers(1, 1200), columns=st.integers(1, 3), size=st.sampled_from([1e-6, 1.0, 1e4]))
def test_sums_of_signs_are_exact(rows, columns, size):
    seeds = torch.arange(rows).numpy().astype("uint64")
    noise = draw("rademacher", seeds, ParameterVector.of(torch.nn.Linear(3, 2)).shapes)
    coefficients = size * torch.randn(rows, columns, generator=generator(rows))
    dense = torch.stack([noise[row] for row in range(rows)]).double()
    rounded = (coefficients.double() * 2**30).round() / 2**30
    assert noise.exact_sum(coefficients).equal(rounded.T @ dense)


def test_processes_that_differ_are_named():
    def meet(group):
        group.assert_same({"seed": group.rank // 2, "batch": 4}, "at the start")

    with pytest.raises(
        ConfigurationError, match="differ at the start: seed is 0 in process 0 and 1 in process 2"
    ):
        played(3, meet)


def test_scalars_refuse_what_needs_more():
    for options, message in (
        ({"control": LogitJacobian}, "control variate"),
        ({"noise": "activation"}, "noise on outputs"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            estimates(ProcessGroup(), "scalars", **options)


def test_a_fingerprint_sees_samples_and_their_order():
    batch = tiny_batch("bert")
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][2, 1] += 1
    swapped = {name: value[[1, 0, 2, 3]] for name, value in batch.items()}
    assert fingerprint(batch) == fingerprint({name: value.clone() for name, value in batch.items()})
    assert (
        len({fingerprint(inputs) for inputs in (batch, other, swapped, {**batch, "extra": [1]})})
        == 4
    )
