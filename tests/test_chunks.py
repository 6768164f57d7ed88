"""How rows are cut into forward passes changes neither the estimate nor what is charged, whatever memory does."""

import gc
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import hf_flops.chunks
from hf_flops import CallableObjective, FlopsTrainer, FlopsTrainingArguments, Method, Place, estimate_gradient
from hf_flops.allocators import Optimal, Uniform
from hf_flops.chunks import ChunkPlanner, in_chunks, out_of_memory
from hf_flops.estimators import Antithetic, OneSided
from hf_flops.memory import free_memory
from hf_flops.objectives import BatchLoss, TappedLoss
from hf_flops.padding import Feed, real_tokens, trim, window
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.rows import expand, take
from hf_flops.selfcheck import padding_is_idle
from tests.tiny import TASKS, as_dataset, generator, model_forward, tiny_batch, tiny_model

SIDES = frozenset(["left", "right"])
SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
]


@pytest.fixture(autouse=True, scope="module")
def _collect_young_objects_only():
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def machine(monkeypatch):
    """A machine whose clock and memory are numbers: `machine.cost(rows)` seconds and `machine.need(rows)` megabytes."""

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

    monkeypatch.setattr(hf_flops.chunks, "PeakMemory", Machine)
    monkeypatch.setattr(hf_flops.chunks.time, "perf_counter", lambda: Machine.now)
    return Machine


def settle(planner, machine, rows=4000, steps=3):
    seen = []

    def work(chunk):
        seen.append(chunk)
        return machine().work(chunk)

    for _ in range(steps):
        seen.clear()
        in_chunks([rows], work, planner)
        assert [row for chunk in seen for row in range(chunk.start, chunk.stop)] == list(range(rows))
    return planner.size


def test_the_fastest_size_is_found(machine):
    for overhead, best in ((0.0, 8), (100.0, 512)):
        machine.cost = staticmethod(lambda rows, overhead=overhead: overhead + rows + rows**2 / 2000)
        planner = ChunkPlanner(limit=1e12)
        size = settle(planner, machine, steps=6)
        assert planner.settled
        assert best / 4 <= size <= best
        assert machine.cost(size) / size <= 1.05 * min(machine.cost(2**k) / 2**k for k in range(3, 12))


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
    machine.cost, machine.need = staticmethod(lambda rows: 1000.0), staticmethod(lambda rows: math.nan)
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
def test_a_shortage_of_memory_halves_the_chunk_and_every_row_is_done_once(lengths, size, fits, whole, error):
    planner, done = ChunkPlanner(size), []

    def work(chunk):
        if chunk.stop - chunk.start > fits:
            raise error
        done.extend(range(chunk.start, chunk.stop))
        return 1

    in_chunks(lengths, work, planner, whole=whole)
    assert done == list(range(sum(lengths)))
    assert planner.size <= size


def test_other_errors_and_a_single_row_that_does_not_fit_are_raised():
    assert [out_of_memory(error) for error in SHORTAGES] == [True] * 3
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("you tried to allocate")):
        assert not out_of_memory(error)
        with pytest.raises(type(error)):
            ChunkPlanner(8).run(lambda error=error: (_ for _ in ()).throw(error), 8, 8)
    with pytest.raises(MemoryError):
        ChunkPlanner(8).run(lambda: (_ for _ in ()).throw(MemoryError()), 1, 8)


def test_free_memory_is_told():
    free = free_memory(torch.device("cpu"))
    assert free != free or 1e7 < free < 1e14
    assert math.isnan(free_memory(torch.device("meta")))


class Cramped(nn.Module):
    """Runs a model, and out of memory above so many rows; refuses with a part of the work done."""

    def __init__(self, model, fits=10**9):
        super().__init__()
        self.model, self.fits, self.seen = model, fits, []

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        if len(inputs["labels"]) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.seen.append(inputs)
        return outputs


def estimate(model, inputs, kind="rowwise", forward=None, **options):
    vector = ParameterVector.of(model)
    defaults = {
        "objective": TappedLoss(),
        "perturbation": perturb(model, **{kind: vector.names}),
        "estimator": OneSided(),
        "allocator": Optimal(),
        "queries_per_sample": 6,
        "scale": 1e-2,
        "rows_per_forward": 1000,
    }
    model.zero_grad()
    result = estimate_gradient(forward or model_forward(model), inputs, Method(**{**defaults, **options}), Place())
    return torch.cat([p.grad.flatten() for p in vector.parameters]), result


def adapted(kind, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", task_type=TASKS[kind])
        model = get_peft_model(tiny_model(kind, **options), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", ["rowwise", "shared"])
@pytest.mark.parametrize(("rows", "fits"), [(16, 1), (16, 4), (None, 3), (None, 9)])
def test_a_step_that_runs_out_of_memory_gives_the_same_estimate(kind, fits, rows, caplog):
    model, inputs = adapted("vit"), tiny_batch("vit", samples=6)
    expected, whole = estimate(model, inputs, kind)
    cramped = Cramped(model, fits)
    planner = ChunkPlanner(rows, limit=1e12)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            cramped.seen.clear()
            found, result = estimate(model, inputs, kind, forward=model_forward(cramped), rows_per_forward=planner)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
            assert result.rows == whole.rows == sum(len(inputs["labels"]) for inputs in cramped.seen)
            assert result.counts.equal(whole.counts)
    assert max(len(inputs["labels"]) for inputs in cramped.seen) <= fits
    assert len(caplog.records) == (1 if fits < 6 or (rows == 16 and kind == "rowwise") else caplog.text.count("did not fit"))
    assert not any(module._forward_hooks for module in model.modules())


# --- padding ---


def left(batch):
    """Move the padding of a batch to the left."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    batch = {name: value.gather(1, order) if value.shape == order.shape else value for name, value in batch.items()}
    if batch["labels"].shape == order.shape:  # what is predicted from padding must not count
        batch["labels"][:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    return batch


def padded(kind, samples=4, extra=3, side="right"):
    """A batch with columns of padding that no sample needs."""
    batch = tiny_batch(kind, samples)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wide = batch["attention_mask"].shape
    batch = {
        name: nn.functional.pad(value, (0, extra), value=fill[name]) if value.shape == wide else value
        for name, value in batch.items()
    }
    return left(batch) if side == "left" else batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "opt", "t5"])
@torch.no_grad()
def test_the_check_tells_whether_padding_may_be_cut(kind, side):
    model, inputs = tiny_model(kind), padded(kind, side=side)
    found = padding_is_idle(TappedLoss(), model_forward(model), inputs)
    # BERT and GPT-2 number positions by column; OPT from its mask; Llama's and T5's are relative.
    assert found == {side: side == "right" or kind in ("llama", "opt", "t5")}
    assert padding_is_idle(TappedLoss(), model_forward(model), inputs, known={side}) == {}
    assert padding_is_idle(TappedLoss(), model_forward(model), trim(inputs, slice(0, 0))) == {}


@torch.no_grad()
def test_the_check_sees_an_objective_that_reads_a_certain_column():
    model, inputs = tiny_model("llama"), padded("llama")
    last = CallableObjective(lambda outputs, inputs: outputs.logits[:, -1].logsumexp(-1))
    assert padding_is_idle(last, model_forward(model), inputs) == {"right": False}
    fixed = CallableObjective(lambda outputs, _: (outputs.logits * inputs["attention_mask"][:1, :, None]).sum((1, 2)))
    assert padding_is_idle(fixed, model_forward(model), inputs) == {"right": False}


@pytest.mark.parametrize("kind", ["rowwise", "shared"])
@pytest.mark.parametrize(("name", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left"), ("gpt2", "right")])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_estimate_does_not_depend_on_padding_that_is_cut(kind, name, side, size):
    model, inputs = Cramped(adapted(name)), padded(name, samples=6, side=side)
    options = {"forward": model_forward(model), "estimator": Antithetic(), "allocator": Uniform(), "scale": 1e-2}
    expected, whole = estimate(model.model, inputs, kind, **options)
    model.seen.clear()
    found, result = estimate(model.model, inputs, kind, trimmed=SIDES, rows_per_forward=size, **options)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    assert result.loss == pytest.approx(float(whole.loss), rel=1e-5)
    assert result.rows == whole.rows
    widths = {inputs["input_ids"].shape[1] for inputs in model.seen}
    assert max(widths) <= inputs["input_ids"].shape[1] - 3
    assert len(widths) > 1 or size > 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**20), st.sampled_from([{"left"}, {"right"}, SIDES]))
def test_cutting_keeps_every_column_that_a_row_needs(rows, columns, bits, sides):
    mask = torch.tensor([bits >> i & 1 for i in range(36)])[: rows * columns].view(rows, columns)
    inputs = {
        "input_ids": torch.arange(rows * columns).view(rows, columns),
        "attention_mask": mask,
        "labels": torch.ones(rows),
    }
    kept = window(real_tokens(inputs), frozenset(sides))
    short = trim(inputs, kept)
    assert short["attention_mask"].sum() == mask.sum()
    assert short["input_ids"].equal(inputs["input_ids"][:, kept])
    assert short["labels"].equal(inputs["labels"])
    ends = [short["attention_mask"][:, column].any() for side, column in (("left", 0), ("right", -1)) if side in sides]
    assert all(ends) or not mask.any()


def test_labels_and_inputs_that_are_not_understood_keep_their_columns():
    inputs = padded("llama")
    wide = inputs["input_ids"].shape[1]
    assert window(real_tokens({**inputs, "labels": torch.zeros(4, wide)}), SIDES) == slice(0, wide)
    counted = torch.where(torch.arange(wide) == 5, 1, -100).expand(4, -1)  # predicted from padding
    late = {"attention_mask": (torch.arange(wide) > 4).long().expand(4, -1), "labels": counted}
    assert window(real_tokens(late), SIDES) == slice(0, wide)
    assert real_tokens({**inputs, "bbox": torch.zeros(4, wide, 4)}) is None
    assert real_tokens({**inputs, "attention_mask": torch.ones(4, 1, wide, wide)}) is None
    assert real_tokens(tiny_batch("vit")) is None


@pytest.mark.parametrize("within_groups", [True, False])
def test_rows_of_like_width_go_together(within_groups):
    inputs = tiny_batch("bert", samples=6)
    rows = expand(torch.tensor([3, 1, 2, 5, 1, 2]), 1.0)
    ordered = Feed(inputs, SIDES).ordered(rows, within_groups=within_groups)
    width = inputs["attention_mask"].sum(1)[ordered.owner]
    assert sorted(zip(ordered.owner.tolist(), ordered.query.tolist(), strict=True)) == sorted(
        zip(rows.owner.tolist(), rows.query.tolist(), strict=True)
    )
    pieces = width.split(ordered.stretches(within_groups=within_groups))
    assert all(piece.diff().le(0).all() for piece in pieces)
    assert len(pieces) == (5 if within_groups else 1)


# --- the trainer ---


def trained(tmp_path, model, dataset, **options):
    arguments = {"queries_per_sample": 12, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.01}
    args = FlopsTrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, perturbation_scale=1e-2, **{**arguments, **options}
    )
    trainer = FlopsTrainer(model, args, train_dataset=dataset)
    trainer.train()
    return trainer, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_default_run_is_that_of_a_fixed_size(kind, tmp_path):
    dataset = as_dataset(padded(kind, samples=16))
    one, found = trained(tmp_path, adapted(kind), dataset, save_strategy="steps", save_steps=1)
    two, expected = trained(tmp_path, adapted(kind), dataset, rows_per_forward=8, save_strategy="no")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert one.ledger.rows == two.ledger.rows
    assert one._tuning.idle == two._tuning.idle == {"right": True}
    assert one._tuning.planner.costs
    assert not two._tuning.planner.costs
    again = FlopsTrainer(adapted(kind), one.args, train_dataset=dataset)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed = torch.cat([p.detach().flatten() for p in again.model.parameters() if p.requires_grad])
    torch.testing.assert_close(resumed, found, rtol=0, atol=1e-5)


def test_take_and_trim_agree():
    inputs = padded("llama", samples=3)
    owner = torch.randint(3, (5,), generator=generator())
    fed, columns = Feed(inputs, SIDES).of(owner)
    assert columns == fed["input_ids"].shape[1]
    assert fed["input_ids"].equal(take(inputs, owner)["input_ids"][:, :columns])
    assert Feed(inputs, frozenset()).of(owner)[0]["labels"].equal(take(inputs, owner)["labels"])


def test_the_loss_of_a_whole_batch_is_never_cut():
    model, inputs = Cramped(adapted("bert")), padded("bert")
    options = {"objective": BatchLoss(), "forward": model_forward(model), "trimmed": SIDES, "rows_per_forward": 3}
    estimate(model.model, inputs, "shared", **options)
    assert {seen["input_ids"].shape for seen in model.seen} == {inputs["input_ids"].shape}
