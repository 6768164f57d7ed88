"""How rows are cut into forward passes changes neither the estimate nor what is charged, whatever
memory does.
"""

import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_flops.core.chunking
from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.allocators import ALLOCATORS
from hf_flops.base.memory import free_memory
from hf_flops.core.chunking import ChunkPlanner, even, in_chunks, out_of_memory
from hf_flops.estimators import ESTIMATORS
from hf_flops.trainer import PRESETS
from tests.helpers.padded import Cramped, adapted, estimate, padded
from tests.helpers.quadratic import Quadratic, one_estimate, quadratic_batch
from tests.helpers.runs import flat, short, short_run
from tests.helpers.tiny import as_dataset, double, model_forward, tiny_batch

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 9 bytes."
    ),
]


@pytest.fixture
def machine(monkeypatch):
    """A machine whose clock and memory are numbers: `machine.cost(rows)` seconds and
    `machine.need(rows)` megabytes.
    """

    class Machine:
        now, peak = 0.0, 0.0
        cost, need = staticmethod(lambda rows: rows), staticmethod(lambda rows: rows)

        def __init__(self, device=None):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.megabytes = Machine.peak

        def work(self, chunk):
            rows = chunk.stop - chunk.start
            Machine.now += Machine.cost(rows)
            Machine.peak = Machine.need(rows)
            return 1

    monkeypatch.setattr(hf_flops.core.chunking, "PeakMemory", Machine)
    monkeypatch.setattr(hf_flops.core.chunking.time, "perf_counter", lambda: Machine.now)
    return Machine


def settle(planner, machine, rows=4000, steps=3):
    seen = []

    def work(chunk):
        seen.append(chunk)
        return machine().work(chunk)

    for _ in range(steps):
        seen.clear()
        in_chunks([rows], work, planner)
        assert [row for chunk in seen for row in range(chunk.start, chunk.stop)] == list(
            range(rows)
        )
    return planner.size


def test_the_fastest_size_is_found(machine):
    for overhead, best in ((0.0, 8), (100.0, 512)):
        machine.cost = staticmethod(
            lambda rows, overhead=overhead: overhead + rows + rows**2 / 2000
        )
        planner = ChunkPlanner(limit=1e12)
        size = settle(planner, machine, steps=6)
        assert planner.settled
        assert best / 4 <= size <= best
        assert machine.cost(size) / size <= 1.05 * min(
            machine.cost(2**k) / 2**k for k in range(3, 12)
        )


def test_memory_limits_the_size_before_it_is_used_up(machine):
    machine.cost = staticmethod(lambda rows: 1000.0)  # the more at once, the better
    used = []
    machine.need = staticmethod(lambda rows: used.append(rows) or 2.0 * rows)
    assert settle(ChunkPlanner(limit=300 * 2**20), machine) == 128  # 256 rows would need 512 MB
    assert max(used) == 128


def test_noise_limits_the_size_before_the_first_forward():
    planner = ChunkPlanner(limit=1e9)
    planner.prepare(torch.device("cpu"), row_bytes=10**8)
    assert planner.size == planner.ceiling == 3


def test_where_memory_is_unknown_sizes_stay_small(machine):
    machine.cost, machine.need = (
        staticmethod(lambda rows: 1000.0),
        staticmethod(lambda rows: math.nan),
    )
    assert settle(ChunkPlanner(limit=math.nan), machine) == 32


def test_small_steps_are_not_timed(machine):
    machine.cost = staticmethod(lambda rows: float(rows) ** 3)  # large chunks are slow
    planner = ChunkPlanner(limit=1e12)
    assert settle(planner, machine, rows=32, steps=9) == 32
    assert planner.settled
    assert planner.costs == {}


def test_nothing_is_timed_where_torch_is_deterministic(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    planner = ChunkPlanner()
    planner.prepare(torch.device("cpu"), 4)
    assert (planner.size, planner.settled) == (32, True)


def test_a_resumed_planner_goes_on_where_it_stood(machine):
    machine.cost = staticmethod(lambda rows: 100 + rows)
    planner, again, fixed = ChunkPlanner(limit=1e12), ChunkPlanner(limit=1e12), ChunkPlanner(7)
    settle(planner, machine, steps=6)
    again.load_state_dict(planner.state_dict())
    fixed.load_state_dict(planner.state_dict())
    assert planner.settled
    assert (again.size, again.settled, again.costs) == (planner.size, True, planner.costs)
    assert fixed.size == 7


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    size=st.integers(1, 50),
    fits=st.integers(1, 50),
    whole=st.booleans(),
    error=st.sampled_from(SHORTAGES),
)
def test_a_shortage_of_memory_halves_the_chunk_and_every_row_is_done_once(
    lengths, size, fits, whole, error
):
    planner, done = ChunkPlanner(size), []

    def work(chunk):
        if chunk.stop - chunk.start > fits:
            raise error
        done.extend(range(chunk.start, chunk.stop))
        return 1

    in_chunks(lengths, work, planner, whole=whole)
    assert done == list(range(sum(lengths)))
    assert planner.size <= size


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 6))
def test_chunks_are_even_and_a_share_of_them_is_cut_into_the_same(number, most, world):
    def cut(rows):
        sizes = []
        in_chunks([rows], lambda chunk: sizes.append(chunk.stop - chunk.start), ChunkPlanner(most))
        return sizes

    sizes = [len(chunk) for chunk in torch.arange(number).tensor_split(-(-number // most))]
    assert cut(number) == sizes
    assert even(number, most) == sizes[0] == max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    for own in (sizes[rank::world] for rank in range(world)):
        assert cut(sum(own)) == own


def test_other_errors_and_a_single_row_that_does_not_fit_are_raised():
    assert [out_of_memory(error) for error in SHORTAGES] == [True] * 3
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("you tried to allocate")):
        assert not out_of_memory(error)
        with pytest.raises(type(error)):
            ChunkPlanner(8).run(lambda error=error: (_ for _ in ()).throw(error), 8, 8)
    with pytest.raises(MemoryError):
        ChunkPlanner(8).run(lambda: (_ for _ in ()).throw(MemoryError()), 1, 8)


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="the system does not tell")
def test_free_memory_is_told():
    assert 1e7 < free_memory(torch.device("cpu")) < 1e14


def test_free_memory_of_a_gpu_includes_what_torch_keeps_for_later(monkeypatch):
    for name, number in (("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 100))
    assert free_memory(torch.device("cuda", 0)) == 7 + 50 - 20


def test_free_memory_of_a_device_that_tells_nothing_is_unknown():
    assert math.isnan(free_memory(torch.device("meta")))


@pytest.mark.parametrize("kind", ["rowwise", "shared"])
@pytest.mark.parametrize(("rows", "fits"), [(16, 1), (16, 4), (None, 3), (None, 9)])
def test_a_step_that_runs_out_of_memory_gives_the_same_estimate(kind, fits, rows, caplog):
    model, inputs = adapted("vit"), double(tiny_batch("vit", samples=6))
    expected, whole = estimate(model, inputs, kind)
    cramped = Cramped(model, fits)
    planner = ChunkPlanner(rows, limit=1e12)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            cramped.seen.clear()
            found, result = estimate(
                model, inputs, kind, forward=model_forward(cramped), rows_per_forward=planner
            )
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
            assert (
                result.rows == whole.rows == sum(len(inputs["labels"]) for inputs in cramped.seen)
            )
            assert result.counts.equal(whole.counts)
    assert max(len(inputs["labels"]) for inputs in cramped.seen) <= fits
    assert len(caplog.records) == (
        1 if fits < 6 or (rows == 16 and kind == "rowwise") else caplog.text.count("did not fit")
    )
    assert not any(module._forward_hooks for module in model.modules())


# --- the trainer ---


def trained(tmp_path, model, dataset, **options):
    arguments = {
        "queries_per_sample": 12,
        "per_device_train_batch_size": 8,
        "optim": "sgd",
        "learning_rate": 0.01,
    }
    args = FlopsTrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to="none",
        use_cpu=True,
        perturbation_scale=1e-2,
        **{**arguments, **options},
    )
    trainer = FlopsTrainer(model, args, train_dataset=dataset)
    trainer.train()
    return trainer, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_default_run_is_that_of_a_fixed_size(kind, tmp_path):
    dataset = as_dataset(padded(kind, samples=16))
    one, found = trained(tmp_path, adapted(kind), dataset, save_strategy="steps", save_steps=1)
    two, expected = trained(
        tmp_path, adapted(kind), dataset, rows_per_forward=8, save_strategy="no"
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert one.ledger.rows == two.ledger.rows
    assert one.session.tuning.idle == two.session.tuning.idle == {"right": True}
    assert one.session.tuning.planner.costs
    assert not two.session.tuning.planner.costs
    again = FlopsTrainer(adapted(kind), one.args, train_dataset=dataset)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed = torch.cat([p.detach().flatten() for p in again.model.parameters() if p.requires_grad])
    torch.testing.assert_close(resumed, found, rtol=0, atol=1e-5)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 60),
    estimator=st.sampled_from(sorted(ESTIMATORS)),
    allocator=st.sampled_from(sorted(ALLOCATORS)),
    kind=st.sampled_from(["rowwise", "shared"]),
)
def test_the_estimate_does_not_depend_on_how_rows_are_cut(rows, estimator, allocator, kind):
    model, inputs = Quadratic(), quadratic_batch()

    def at(rows_per_forward):
        options = {
            "estimator": ESTIMATORS[estimator](),
            "allocator": ALLOCATORS[allocator](),
            "queries_per_sample": 8,
        }
        return one_estimate(model, inputs, kind=kind, rows_per_forward=rows_per_forward, **options)[
            0
        ]

    torch.testing.assert_close(at(rows), at(1000), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_size_of_forwards_does_not_change_the_run(preset, tmp_path):
    options = {"preset": preset, "optim": "sgd", "learning_rate": 0.01, "perturbation_scale": 0.01}
    # In float64: counts are whole numbers, which may follow the last bit of what an allocator saw.
    runs = [
        flat(short_run(short(tmp_path, rows_per_forward=size, **options), dtype=torch.float64))
        for size in (1, 8, 1000)
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(runs[0], runs[2], rtol=0, atol=1e-5)
