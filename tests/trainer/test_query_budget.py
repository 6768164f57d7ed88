"""A budget of queries is never exceeded, and a run that it ends is a whole one."""

import json
from collections import Counter
from functools import cache

import pytest
import torch
from peft import PeftModel

from hf_flops import ConfigurationError, FlopsTrainer
from tests.helpers.runs import adapted, data, flat, logged
from tests.helpers.tiny import tiny_model, training_arguments


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "queries_per_sample": 4,
        "max_steps": 50,
        "logging_steps": 1,
        "rows_per_forward": 8,
    }
    if options.get("preset") != "mezo":
        defaults["closed_form_head"] = "gradient"  # all steps take the same number of rows
    return training_arguments(folder, **{**defaults, **options})


def counted(model):
    """Count the rows and tokens that reach a model's forward, whoever asks."""
    seen = Counter()

    def count(module, args, inputs, outputs):
        main = inputs["input_ids"] if "input_ids" in inputs else inputs["pixel_values"]
        seen.update(rows=len(main), tokens=main.numel() if main.dim() == 2 else 0)

    model.register_forward_hook(count, with_kwargs=True)
    return seen


def trainer(folder, kind="vit", samples=8, **options):
    model = adapted(kind)
    seen = counted(model)
    built = FlopsTrainer(
        model, arguments(folder, late_expansion=False, **options), train_dataset=data(kind, samples)
    )
    return built, seen


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Return how many rows the checks of the first batch take, by preset."""

    @cache
    def rows(preset):
        run, _ = trainer(tmp_path_factory.mktemp("checks"), preset=preset, max_steps=1)
        run.train()
        return run.ledger.all_rows - run.ledger.rows

    return rows


@pytest.mark.parametrize(
    ("preset", "accumulation", "extra"), [("flops", 1, 15), ("flops", 2, 32), ("mezo", 1, 0)]
)
def test_no_row_beyond_the_budget_and_no_step_too_few(
    extra, preset, accumulation, checks, tmp_path_factory
):
    options = {"gradient_accumulation_steps": accumulation}
    checked, step = checks(preset), 16 * accumulation
    budget = checked + step + extra
    run, seen = trainer(
        tmp_path_factory.mktemp("run"), preset=preset, max_queries=budget, **options
    )
    run.train()
    assert seen["rows"] == run.ledger.all_rows <= budget
    assert run.state.global_step == 1 + extra // step
    assert run.ledger.rows == run.state.global_step * step
    assert logged(run, "rows")[-1] == run.ledger.rows
    assert logged(run, "check_rows")[-1] == checked


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_tokens_are_counted_where_there_are_any(kind, tmp_path):
    run, seen = trainer(tmp_path, kind, max_steps=3)
    run.train()
    assert run.ledger.tokens == seen["tokens"] == logged(run, "tokens")[-1]
    assert (run.ledger.tokens > 0) == (kind == "llama")


def test_a_budget_changes_nothing_before_it_is_used_up(tmp_path):
    options = {"lr_scheduler_type": "constant"}
    short, _ = trainer(tmp_path, max_queries=200, **options)
    short.train()
    assert 1 < short.state.global_step < 50
    plain, _ = trainer(tmp_path, max_steps=short.state.global_step, **options)
    plain.train()
    assert flat(short).equal(flat(plain))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_adapter_is_saved_when_the_budget_ends(strategy, tmp_path):
    run, _ = trainer(tmp_path, max_queries=200, save_strategy=strategy, save_steps=1000)
    run.train()
    last = tmp_path / f"checkpoint-{run.state.global_step}"
    saved = PeftModel.from_pretrained(tiny_model("vit"), last)
    kept = {
        name: value
        for name, value in saved.named_parameters()
        if "lora" in name or "modules_to_save" in name
    }
    now = dict(run.model.named_parameters())
    assert kept
    assert all(now[name].equal(value) for name, value in kept.items())
    assert (
        json.loads((last / "flops_state.json").read_text())["ledger"]["all_rows"]
        == run.ledger.all_rows
    )


def test_a_resumed_run_goes_on_counting(tmp_path):
    run, _ = trainer(tmp_path, max_queries=200, save_strategy="steps", save_steps=2)
    run.train()
    again, seen = trainer(tmp_path, max_queries=300)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{run.state.global_step}"))
    ran = again.ledger.all_rows - run.ledger.all_rows + again.ledger.repeated_rows
    assert seen["rows"] == ran
    assert again.ledger.all_rows <= 300
    assert again.state.global_step > run.state.global_step
    spent, seen = trainer(tmp_path, max_queries=200)
    with pytest.raises(ConfigurationError, match="the checkpoint's run has used"):
        spent.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{run.state.global_step}"))
    assert seen["rows"] == 0


def test_checks_are_charged_once_however_often_a_run_is_resumed(tmp_path, checks):
    budget, every = checks("flops") + 9 * 16, {"save_strategy": "steps", "save_steps": 1}
    whole, _ = trainer(tmp_path / "whole", max_queries=budget)
    whole.train()
    again, _ = trainer(tmp_path / "lives", max_queries=checks("flops") + 2 * 16, **every)
    again.train()
    for resumed, life in enumerate((4, 9), 1):
        limit = checks("flops") + life * 16
        again, seen = trainer(tmp_path / "lives", max_queries=limit, **every)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == life
        assert again.ledger.repeated_rows == resumed * checks("flops") > 0
        assert seen["rows"] > checks("flops")
    assert whole.state.global_step == 9
    assert again.ledger.all_rows == whole.ledger.all_rows
    assert flat(again).equal(flat(whole))


def test_other_checks_after_a_resume_may_take_what_is_left_and_nothing_moves(tmp_path, checks):
    first = checks("flops") + 2 * 16
    run, _ = trainer(tmp_path, max_queries=first, save_strategy="steps", save_steps=2)
    run.train()
    before = flat(run)
    options = {"save_strategy": "steps", "save_steps": 1, "lora_parts": "B"}
    again, _ = trainer(tmp_path, max_queries=first + 20, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert flat(again).equal(before)
    assert again.ledger.rows == run.ledger.rows


def test_of_a_step_that_is_refused_nothing_is_taken_though_a_smaller_batch_would_fit(
    tmp_path, checks
):
    # after the checks a batch of one sample fits, but not one of four
    queries = checks("flops") // 6
    options = {
        "gradient_accumulation_steps": 3,
        "samples": 9,
        "queries_per_sample": queries,
        "save_strategy": "steps",
    }
    run, _ = trainer(tmp_path, max_steps=1, save_steps=1, **options)
    run.train()
    before = flat(run)
    left = run.ledger.all_rows + 9 * queries
    again, _ = trainer(tmp_path, max_queries=left, lora_parts="B", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert queries <= again.query_budget.left < 4 * queries
    assert flat(again).equal(before)


def test_a_budget_smaller_than_a_step_is_an_error_before_training(tmp_path):
    run, seen = trainer(tmp_path, max_queries=31, gradient_accumulation_steps=2)
    with pytest.raises(ConfigurationError, match="max_queries=31 is less than one step of 32 rows"):
        run.train()
    assert seen["rows"] == 0
    # a step cannot have more samples than there are
    few, _ = trainer(tmp_path, max_queries=31, samples=2)
    with pytest.raises(
        ConfigurationError, match=r"leaves -?\d+ rows after the checks of the first batch"
    ):
        few.train()
    assert flat(few).equal(flat(trainer(tmp_path)[0]))


@pytest.mark.parametrize("budget", [0, -3, 2.5])
def test_a_budget_is_a_whole_number(budget, tmp_path):
    with pytest.raises(ConfigurationError, match=f"max_queries={budget}"):
        arguments(tmp_path, max_queries=budget)


def test_the_meter_counts_answers_only(tmp_path):
    run, _ = trainer(tmp_path)

    def fail(inputs):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run.ledger.metered(fail)({"labels": torch.zeros(3)})
    assert run.ledger.all_rows == 0
