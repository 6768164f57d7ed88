"""Everything that trains runs on an accelerator: no operation gets tensors of two devices, and the
host seldom waits. The accelerator is pretended; see `tests/helpers/pretend.py`.
"""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from transformers import TrainerCallback

from hf_flops import FlopsTrainer, Metric, SuffixPromptModel
from hf_flops.diagnosis import doctor
from hf_flops.objectives import MacroF1
from hf_flops.trainer.presets import CHOICES
from hf_flops.trajectory import limits
from hf_flops.trajectory.replay import Replay
from tests.contrastive.test_contrastive import adapted as adapted_pairs
from tests.helpers import pretend
from tests.helpers.pairs import as_pairs, collate, pair_batch
from tests.helpers.runs import adapted, data, flat, logged, parameters, short
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.slow

BUDGET = 12  # waits per optimizer step, five of them the stock trainer's
# a model that is masked asks at every forward whether the mask is empty, also in plain inference
MODELS_OWN = "transformers/masking_utils.py"
FAMILIES = ("vit", "bert", "llama", "suffix", "clip")


@pytest.fixture
def device():
    with pretend.Shown() as device:
        yield device


class Steps(TrainerCallback):
    """Counts the waits of each optimizer step: all since the end of the step before."""

    def __init__(self, waits):
        self.waits, self.steps, self.lines, self.before = waits, [], [], {}

    def on_step_end(self, args, state, control, **kwargs):
        new = self.waits.lines - pretend.Counter(self.before)
        self.before = dict(self.waits.lines)
        self.lines.append({line: count for line, count in new.items() if MODELS_OWN not in line})
        self.steps.append(sum(self.lines[-1].values()))


def model_and_data(family):
    if family == "clip":
        return adapted_pairs("clip"), as_pairs(pair_batch(16)), {"data_collator": collate}
    if family == "suffix":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = SuffixPromptModel(tiny_model("llama"), 3)
        rows = data("llama", 16)
        for row in rows:
            row["labels"][:2] = -100
        return model, rows, {}
    return adapted(family), data(family, 16), {}


def run(folder, family="vit", *, options=None, callbacks=(), resume=None, **more):
    model, samples, extra = model_and_data(family)
    args = short(folder, **{**pretend.OPTIONS, "max_steps": 3, **(options or {})})
    given = {"train_dataset": samples, **extra, **more}
    trainer = FlopsTrainer(model, args, callbacks=list(callbacks), **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_that_of_the_cpu(family, tmp_path, device):
    options = {"rows_per_forward": 8, "learning_rate": 1e-3}
    away = run(tmp_path / "away", family, options=options)
    assert {value.device.type for value in parameters(away).values()} == {pretend.NAME}
    device.hide()
    here = run(tmp_path / "here", family, options={**options, "use_cpu": True})
    assert {value.device.type for value in parameters(here).values()} == {"cpu"}
    assert logged(away, "loss") == pytest.approx(logged(here, "loss"), rel=1e-3)
    torch.testing.assert_close(flat(away).cpu(), flat(here), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"),
    [
        (option, value)
        for option in ("preset", "perturbation", "estimator", "allocator", "noise", "lora_parts")
        for value in CHOICES[option]
    ]
    + [(name, value) for name in ("closed_form_head",) for value in CHOICES[name]]
    + [("control_variate", value) for value in CHOICES["control_variate"]]
    + [("prefix_cache", "memory"), ("reduce", "scalars"), ("perturbation_scale", "auto")]
    + [("queries_per_sample", "auto"), ("learning_rate", "auto"), ("delta_clip", 2.0)],
)
def test_every_choice_trains(option, value, tmp_path, device):
    options = {option: value, "rows_per_forward": 64}
    if (option, value) == ("reduce", "scalars"):
        options |= {"control_variate": "none"}
    rows = [{**row, "sample_id": i} for i, row in enumerate(data("vit", 16))]
    trainer = run(tmp_path, options=options, train_dataset=rows)
    assert trainer.state.global_step == 3
    assert flat(trainer).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
def test_the_host_waits_a_few_times_a_step_whatever_the_chunks(family, estimator, tmp_path, device):
    counts = {}
    for rows in (16, 3):
        with pretend.waits() as waits:
            steps = Steps(waits)
            options = {"rows_per_forward": rows, "max_steps": 3, "logging_steps": 100}
            options |= {"estimator": estimator, "queries_per_sample": 7}
            run(tmp_path / str(rows), family, options=options, callbacks=[steps])
        assert max(steps.steps[1:]) <= BUDGET, steps.lines[-1]
        counts[rows] = steps.steps[1:]
    assert counts[3] == counts[16]


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_checkpoints_and_resume(family, tmp_path, device):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    extra = {"eval_dataset": model_and_data(family)[1]}
    whole = run(tmp_path / "run", family, options=options, **extra)
    assert len(logged(whole, "eval_loss")) == 3
    again = run(
        tmp_path / "again",
        family,
        options=options,
        resume=str(tmp_path / "run" / "checkpoint-2"),
        **extra,
    )
    assert flat(again).equal(flat(whole))


class Full(TrainerCallback):
    """Leaves less memory to all steps but the first."""

    def __init__(self, largest, stack):
        self.largest, self.stack = largest, stack

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.stack.enter_context(pretend.limited(self.largest))


def test_chunks_that_do_not_fit_are_halved(tmp_path, device, caplog):
    options = {"control_variate": "none", "max_steps": 2, "learning_rate": 1e-3}
    wanted = run(tmp_path, options={**options, "rows_per_forward": 3})
    with ExitStack() as stack:
        # 12 rows of 5 tokens are 1,200 numbers in the layer that is 20 wide
        full = Full(1000, stack)
        found = run(tmp_path, options={**options, "rows_per_forward": 12}, callbacks=[full])
    assert "rows_per_forward is halved until it does, to 6 now" in caplog.text
    assert logged(found, "rows") == logged(wanted, "rows")
    torch.testing.assert_close(flat(found), flat(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metric", [partial(Metric, "accuracy"), MacroF1])
def test_metrics_are_trained_on(metric, tmp_path, device):
    trainer = run(tmp_path, "bert", objective=metric(), options={"perturbation_scale": 0.1})
    assert flat(trainer).isfinite().all()


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_a_log_written_there_replays_on_the_cpu(family, tmp_path, device, monkeypatch):
    monkeypatch.setattr(limits, "DEVICES", (*limits.DEVICES, pretend.NAME))
    trainer = run(tmp_path, family, options={"trajectory_log": True, "learning_rate": 1e-3})
    wanted = {name: value.cpu() for name, value in parameters(trainer).items()}
    device.hide()
    log = Replay(tmp_path)
    assert len(list(log.run())) == log.step == 3
    found = {name: value.detach() for name, value in log.parameters.items()}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_doctor_runs_there(family, tmp_path, device):
    model, samples, _ = model_and_data(family)
    args = short(tmp_path, **pretend.OPTIONS, rows_per_forward=16)
    found = doctor(model, samples, args=args, steps=2)
    assert "per row" in {rule.way for rule in found.rules}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
