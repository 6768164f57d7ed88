"""The rate that a trial suggests: thorough searches, and a trial that goes on while none is
clear.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_flops.autotune.line_search import thorough_search
from hf_flops.diagnosis import doctor
from hf_flops.diagnosis.clock import Clock
from hf_flops.diagnosis.trial import JUDGES, LONGEST, PlannedSearch, Trial, some_of
from hf_flops.perturbations import ParameterVector
from tests.helpers.tiny import as_dataset, generator, tiny_batch, tiny_model, training_arguments


@given(st.floats(-9, 9), st.integers(2, 40))
def test_of_a_bowl_the_best_power_of_two_is_found(exponent, samples):
    asked = []

    def losses(length):
        asked.append(length)
        return (length / 2**exponent - 1) ** 2 + torch.arange(samples)

    found = thorough_search(losses)
    assert found.best == min(
        (2.0**k for k in range(-13, 14)), key=lambda length: (length / 2**exponent - 1) ** 2
    )
    assert found.clear
    assert found.looks == len(asked) == len(set(asked)) <= 12


@pytest.mark.parametrize(
    ("slope", "clear"), [(-3.0, True), (-1.0, False), (1.0, False), (3.0, True)]
)
def test_it_is_clear_beyond_two_standard_errors(slope, clear):
    noise = torch.randn(64, generator=generator())
    # by so many standard errors the way leads up
    slopes = slope * noise.std() / 8 + noise - noise.mean()
    found = thorough_search(lambda length: length * slopes)
    assert (found.best > 1) == (slope < 0)
    assert found.clear == clear


def windows_of(steps, slope):
    """Return the windows of a trial on a line that leads up or down, or nowhere in particular."""
    search, weight = PlannedSearch(steps), nn.Parameter(torch.zeros(1))
    vector, optimizer = ParameterVector([("weight", weight)]), torch.optim.SGD([weight], lr=1.0)
    windows = []
    for step in itertools.count():
        if search.due(step, vector, optimizer):
            windows.append(search.window_steps)
            search.search(lambda: weight.detach() * slope, vector, optimizer, lambda found: found)
        if search.settled:
            return windows
        search.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        search.on_optimizer_step(None, None, None, optimizer=optimizer)
        weight.data.add_(1.0)


@pytest.mark.parametrize(
    ("steps", "windows"), [(32, [8, 8, 16]), (7, [1, 1, 5]), (3, [3]), (2, [2])]
)
def test_a_trial_goes_on_while_nothing_is_clear(steps, windows):
    down, nowhere = torch.tensor([-1.0, -1.1]), torch.tensor([1.0, -1.0])
    assert windows_of(steps, down) == windows
    longest = windows_of(steps, nowhere)
    assert longest == [*windows, steps, 2 * steps]
    assert sum(longest) == LONGEST * steps == 4 * steps


def test_what_it_judges_by_is_drawn_without_a_trace():
    state = torch.get_rng_state()
    chosen = list(some_of(range(1000), JUDGES))
    assert len(set(chosen)) == JUDGES
    assert max(chosen) > 900
    assert sorted(some_of(range(5), JUDGES)) == list(range(5))
    assert some_of((i for i in range(1000)), 3) == [0, 1, 2]  # what has no length
    assert torch.get_rng_state().equal(state)


def test_the_data_may_be_a_stream(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(as_dataset(tiny_batch("vit", 12)) * 4)

    few = {"per_device_train_batch_size": 4, "queries_per_sample": 2, "rows_per_forward": 16}
    found = doctor(tiny_model("vit"), Stream(), args=training_arguments(tmp_path, **few), steps=2)
    assert found["learning_rate"] > 0


def test_from_starts_far_apart_it_suggests_rates_that_are_near(tmp_path):
    batch = tiny_batch("vit", 64)
    data = as_dataset({**batch, "labels": (batch["pixel_values"].mean((1, 2, 3)) > 0).long()})
    few = {"per_device_train_batch_size": 8, "queries_per_sample": 4, "rows_per_forward": 32}
    args = [training_arguments(tmp_path, **few, learning_rate=rate) for rate in (1e-5, 1e-3, 1.0)]
    rates = [
        doctor(tiny_model("vit", num_hidden_layers=1), data, args=own, steps=12)["learning_rate"]
        for own in args
    ]
    assert max(rates) < 16 * min(rates)


def data_of_two_classes():
    batch = tiny_batch("vit", 64)
    return as_dataset({**batch, "labels": (batch["pixel_values"].mean((1, 2, 3)) > 0).long()})


FEW = {"per_device_train_batch_size": 8, "queries_per_sample": 4, "rows_per_forward": 32}


def test_with_little_time_it_plans_less_and_says_what_it_did_not_measure(tmp_path, monkeypatch):
    seconds = itertools.count(0, 1)
    monkeypatch.setattr(Clock, "left", property(lambda clock: clock.limit - next(seconds)))
    args, model = training_arguments(tmp_path, **FEW), tiny_model("vit", num_hidden_layers=1)
    found = doctor(model, data_of_two_classes(), args=args, steps=32, minutes=0.1)
    assert 0 < found["epsilon"] <= 1e-3
    assert "no time to measure" in found.facts["epsilon"].reason
    assert found["learning_rate"] > 0
    assert any(note.startswith("the time ended after ") for note in found.notes)
    assert "nan" not in str(found)


def test_an_interrupt_ends_with_what_is_known(tmp_path, monkeypatch):
    step = Trial.training_step

    def interrupted(trial, *args, **options):
        if trial.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trial, *args, **options)

    monkeypatch.setattr(Trial, "training_step", interrupted)
    args, model = training_arguments(tmp_path, **FEW), tiny_model("vit", num_hidden_layers=1)
    found = doctor(model, data_of_two_classes(), args=args, steps=32)
    assert found.notes[0] == "interrupted after 3 steps: more would tell more"
    assert found["signal to noise of a step"] >= 0
    assert found["learning_rate"] > 0
    assert found["peak memory (MB)"] is None
    assert "nan" not in str(found)


def test_a_plan_for_less_time_has_shorter_windows():
    search = PlannedSearch(32)
    search.plan(8)
    assert (search.steps, search.window) == (8, 2)
