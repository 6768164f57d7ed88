"""The learning rate that is found while training: where it goes from a start far off, what it
costs, what stays exact.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import HfArgumentParser

from hf_flops import ConfigurationError, FlopsTrainingArguments
from hf_flops.autotune.line_search import LONGER, MOST_LOOKS, SHORTER, line_search
from hf_flops.perturbations import ParameterVector
from hf_flops.trainer.learning_rate_search import MOST_STEPS, RateSearch
from tests.helpers.ranks import played
from tests.helpers.tiny import generator
from tests.helpers.worker import build

CONSTANT = {"lr_scheduler_type": "constant"}
OPTIONS = {"samples": 4, "size": 16, "logging_steps": 1, "learning_rate_search": True}


def run(folder, act=None, resume=None, **options):
    trainer = build({**OPTIONS, "output_dir": str(folder), **options}, act)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def flat(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@given(st.floats(-2.5, 2.5), st.floats(0.1, 10), st.integers(2, 40))
def test_of_a_bowl_the_best_of_all_candidates_is_found(exponent, curvature, samples):
    lowest, asked = 10**exponent, []

    def losses(length):
        asked.append(length)
        return curvature * (length - lowest) ** 2 + torch.arange(samples)

    found = line_search(losses)
    assert found.best == min((1.0, *LONGER, *SHORTER), key=lambda length: (length - lowest) ** 2)
    assert found.clear == (found.best != 1)
    assert found.looks == len(asked) == len(set(asked)) <= MOST_LOOKS
    assert asked[0] == 1


@given(st.integers(0, 999), st.integers(2, 40))
def test_what_samples_disagree_about_is_not_clear(seed, samples):
    slopes = torch.randn(samples, generator=generator(seed))
    slopes = slopes - slopes.mean() - 0.5 * slopes.std() / samples**0.5
    found = line_search(lambda length: length * slopes)
    assert found.best == LONGER[-1]
    assert not found.clear


def test_a_loss_that_is_no_number_is_the_worst():
    assert (
        line_search(lambda length: torch.tensor([1.0, math.nan if length > 0.1 else 0.5])).best
        == SHORTER[-2]
    )
    assert line_search(lambda length: torch.full((2,), math.nan if length else 1.0)).best == 0
    nowhere = line_search(lambda length: torch.full((2,), math.nan))
    assert nowhere.best == 1
    assert not nowhere.clear


@pytest.mark.parametrize("start", [1e-5, 30.0])
def test_a_start_far_off_is_left_and_what_it_did_undone(start, tmp_path):
    # With 4 samples and 10 steps a search is luck: 3 or 4 seeds of 12 ended within the bounds, with
    # these 9 or 10.
    more = {"max_steps": 30, "samples": 16, "size": 32, **CONSTANT}
    trainer = build({**OPTIONS, "output_dir": str(tmp_path), "learning_rate": start, **more})
    # Most samples have one label, which can be learned from any of them, but not all: if all had,
    # the loss would fall to 0 along any way, and no length of it would be too long.
    for number, sample in enumerate(trainer.train_dataset):
        sample["labels"] = torch.tensor(min(number % 4, 1))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert all(
        entry["learning_rate"] == pytest.approx(start * entry["learning_rate_multiplier"])
        for entry in logs
    )
    assert 3e-4 < logs[-1]["learning_rate"] < 0.5
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert trainer.optimizer.param_groups[0]["lr"] == start  # the scheduler's own


def test_a_warmup_is_not_mistaken_for_a_rate_that_is_too_small():
    search, weight = RateSearch(), nn.Parameter(torch.zeros(2))
    vector, optimizer = ParameterVector([("weight", weight)]), torch.optim.SGD([weight], lr=1.0)
    cases = [
        (0.1, 0.2, 4.0, 1.0),
        (0.1, 0.2, 16.0, 1.6),
        (1.0, 1.0, 4.0, 4.0),
        (0.1, 0.2, 0.25, 0.25),
    ]
    for mean, now, best, expected in cases:
        search.begin(vector, optimizer)
        search.multiplier, search.window_steps, search.window_rates = 1.0, 5, 5 * mean
        optimizer.param_groups[0].update(lr=now, initial_lr=1.0)
        search.take_up(best, vector, optimizer)
        assert search.multiplier == pytest.approx(expected)


def test_every_row_is_charged_and_a_budget_is_kept(tmp_path):
    seen, before, budget = [], [], 250

    def act(step):
        if step == 1:  # the checks of the first batch, some of which end early, are behind
            seen.clear()
            before.append(trainer.ledger.all_rows)

    trainer = build(
        {**OPTIONS, "output_dir": str(tmp_path), "max_steps": 40, "max_queries": budget}, act
    )
    hook = trainer.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(len(k["labels"])), with_kwargs=True
    )
    trainer.train()
    hook.remove()
    assert trainer.ledger.all_rows - before[0] == sum(seen)
    assert budget - 16 - MOST_LOOKS * 4 < trainer.ledger.all_rows <= budget
    searched = trainer.ledger.rows - 16 * trainer.state.global_step
    assert searched >= 3 * 3 * 4
    assert searched % 4 == 0


@pytest.mark.parametrize("start", [10.0, pytest.param(0.01, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_alike(start, tmp_path):
    # with fewer samples, a search at a rate that is too large is luck
    every = {"learning_rate": start, "max_steps": 9, "gradient_accumulation_steps": 2, **CONSTANT}
    every |= {"samples": 16, "size": 32}
    whole = run(tmp_path, save_strategy="steps", save_steps=5, **every)
    # in the middle of a window
    again = run(tmp_path / "other", None, str(tmp_path / "checkpoint-5"), **every)
    assert flat(again).equal(flat(whole))
    assert again.rate_search.multiplier == whole.rate_search.multiplier
    assert again.ledger.rows == whole.ledger.rows
    assert whole.rate_search.multiplier < 1 or start == 0.01


def test_parameters_are_bit_for_bit_what_they_were_if_a_forward_raises():
    search, weight = RateSearch(), nn.Parameter(torch.randn(50, generator=generator()))
    vector, optimizer = ParameterVector([("weight", weight)]), torch.optim.SGD([weight], lr=1.0)
    assert not search.due(0, vector, optimizer)
    weight.data.add_(torch.randn(50, generator=generator(1)))
    now, calls = weight.detach().clone(), []

    def losses():
        calls.append(weight.detach().clone())
        if len(calls) == 2:
            raise ZeroDivisionError
        return torch.ones(2)

    with pytest.raises(ZeroDivisionError):
        search.search(losses, vector, optimizer, lambda found: found)
    assert not calls[1].equal(now)
    assert weight.equal(now)
    search.search(lambda: torch.ones(2), vector, optimizer, lambda found: found)
    assert weight.equal(now)  # nothing was better
    assert search.window == 2


def test_processes_that_see_other_losses_go_the_way_of_the_first():
    def act(group):
        search, weight = RateSearch(), nn.Parameter(torch.zeros(3))
        vector, optimizer = ParameterVector([("weight", weight)]), torch.optim.SGD([weight], lr=1.0)
        search.due(0, vector, optimizer)
        weight.data.fill_(1.0)
        search.window_steps, search.window_rates = 1, 1.0
        goal = 2.0 if group.rank == 0 else 8.0
        search.search(lambda: (weight.detach() - goal).square(), vector, optimizer, group.broadcast)
        return weight.detach().tolist(), search.multiplier

    assert played(2, act) == [([2.0] * 3, 2.0)] * 2


def test_a_long_window_changes_the_rate_by_less_and_far_off_the_next_is_shorter():
    search, weight = RateSearch(), nn.Parameter(torch.zeros(2))
    vector, optimizer = ParameterVector([("weight", weight)]), torch.optim.SGD([weight], lr=1.0)
    for steps, best, expected, window in [
        (4, 0.0, 1 / 8, 2),
        (4, 64.0, 64.0, 2),
        (32, 0.0, 1 / 4, 16),
        (32, 2.0, 2.0, 32),
    ]:
        search.begin(vector, optimizer)
        search.multiplier, search.window_steps, search.window_rates, search.window = (
            1.0,
            steps,
            float(steps),
            steps,
        )
        search.take_up(best, vector, optimizer)
        assert (search.multiplier, search.window) == (expected, window)


def test_windows_grow_to_their_end():
    search, weight = RateSearch(), nn.Parameter(torch.zeros(3))
    vector, optimizer = ParameterVector([("weight", weight)]), torch.optim.SGD([weight], lr=1.0)
    windows, step = [], 0
    while len(windows) < 8:
        if search.due(step, vector, optimizer):
            windows.append(search.window_steps)
            search.search(lambda: torch.ones(2), vector, optimizer, lambda found: found)
        search.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        search.on_optimizer_step(None, None, None, optimizer=optimizer)
        step += 1
    assert windows == [1, 2, 4, 8, 16, 32, MOST_STEPS, MOST_STEPS]


def test_the_word_is_read_from_the_command_line_too(tmp_path):
    parser = HfArgumentParser(FlopsTrainingArguments)
    line = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--learning_rate"]
    (args,) = parser.parse_args_into_dataclasses([*line, "auto", "--queries_per_sample", "auto"])
    assert (args.learning_rate, args.learning_rate_search, args.queries_per_sample) == (
        1e-3,
        True,
        "auto",
    )
    (args,) = parser.parse_args_into_dataclasses([*line, "3e-3", "--queries_per_sample", "8"])
    assert (args.learning_rate, args.learning_rate_search, args.queries_per_sample) == (
        3e-3,
        False,
        8,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number, or 'auto'"),
        (
            {"learning_rate": "auto", "trajectory_log": True},
            "trajectory_log=True cannot replay a learning rate search",
        ),
        (
            {"learning_rate_search": True, "optim": "schedule_free_adamw"},
            "optim='schedule_free_adamw' does not work",
        ),
    ],
)
def test_what_cannot_work_is_refused(options, words, tmp_path):
    with pytest.raises(ConfigurationError, match=words):
        FlopsTrainingArguments(output_dir=str(tmp_path), **options)
