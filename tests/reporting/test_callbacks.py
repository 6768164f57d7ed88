"""What a run says of itself: the log, the progress bar, pictures."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hf_flops.core.method import StepResult
from hf_flops.reporting import callbacks
from hf_flops.reporting import figures as pictures
from hf_flops.reporting.callbacks import RowProgress, add_reports
from hf_flops.reporting.comparison_plots import draw_learning_curves, pyplot
from hf_flops.reporting.figures import PICTURES, draw_pictures, draw_seeds
from hf_flops.reporting.ledger import Ledger
from hf_flops.reporting.run_plots import curve_of
from tests.reporting.test_model_card import trainer_of

LOGGED = {
    "loss",
    "rows",
    "signal_to_noise",
    "predicted_gain",
    "allocation_gain",
    "effective_queries",
    "perturbation_scale",
    "seconds",
}


class Heard(TrainerCallback):
    """Keeps what callbacks, as those of `report_to`, are told."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_callbacks_hear_the_numbers_of_the_estimator(tmp_path):
    trainer = trainer_of(tmp_path)
    heard = Heard()
    trainer.add_callback(heard)
    trainer.train()
    for logs in heard.logs[:2]:
        assert set(logs) >= LOGGED
        assert all(isinstance(logs[name], (int, float)) for name in LOGGED)
        assert logs["perturbation_scale"] == 1e-3
        assert logs["predicted_gain"] >= 1
        # 4 rows per sample, one of which is clean
        assert logs["effective_queries"] == pytest.approx(3 * logs["allocation_gain"], rel=1e-4)


def test_tensorboard_gets_the_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_of(tmp_path, report_to="tensorboard")
    trainer.train()
    events = next((tmp_path / "adapter").rglob("events.out.tfevents*"))
    read = accumulator.EventAccumulator(str(events.parent)).Reload()
    assert {f"train/{name}" for name in LOGGED} <= set(read.Tags()["scalars"])
    assert read.Scalars("train/rows")[-1].value == trainer.ledger.rows


@pytest.mark.filterwarnings("ignore")  # of what is not ours
def test_wandb_gets_the_numbers_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    trainer = trainer_of(tmp_path, report_to="wandb")
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert {f"train/{name}" for name in LOGGED} <= set(summary)
    assert summary["train/rows"] == trainer.ledger.rows


@pytest.mark.filterwarnings("ignore")  # of what is not ours
def test_trackio_gets_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    told, log = {}, trackio.log
    monkeypatch.setattr(
        trackio, "log", lambda metrics, **options: (told.update(metrics), log(metrics, **options))
    )
    trainer = trainer_of(tmp_path, report_to="trackio", project="flops")
    trainer.train()
    assert {f"train/{name}" for name in LOGGED} <= set(told)
    assert told["train/rows"] == trainer.ledger.rows
    assert (tmp_path / "trackio" / "flops.db").is_file()


def test_the_progress_bar_counts_rows(tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("hf_flops.reporting.callbacks.tqdm", _bar_to(shown))
    trainer = trainer_of(tmp_path, max_steps=3)
    assert ProgressCallback not in map(type, trainer.callback_handler.callbacks)  # disable_tqdm
    trainer.args.disable_tqdm = False
    bar = RowProgress(lambda: trainer.ledger)
    trainer.add_callback(bar)
    trainer.train()
    rows = trainer.ledger.all_rows
    last = shown.getvalue().split("\r")[-1]
    assert f"{rows}/{rows}" in last
    assert "rows/s" in last
    assert "step 3/3" in last


def _bar_to(stream):
    from tqdm import tqdm

    def build(**options):
        return tqdm(
            **{**options, "unit_scale": False, "dynamic_ncols": False},
            file=stream,
            ncols=120,
            mininterval=0,
        )

    return build


def test_the_stock_bar_gives_way(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.add_callback(ProgressCallback)
    add_reports(trainer, lambda: trainer.ledger)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert RowProgress in kinds
    assert ProgressCallback not in kinds


def test_a_bar_of_the_users_own_stays(tmp_path):
    class Mine(ProgressCallback):
        pass

    trainer = trainer_of(tmp_path)
    trainer.add_callback(Mine)
    trainer.add_callback(ProgressCallback)
    add_reports(trainer, lambda: trainer.ledger)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert Mine in kinds
    assert RowProgress in kinds
    assert ProgressCallback not in kinds


@given(
    used=st.integers(1, 1000),
    checks=st.integers(0, 50),
    step=st.integers(1, 9),
    most=st.none() | st.integers(1, 10**4),
)
def test_expected_rows_are_exact_at_the_end(used, checks, step, most):
    ledger = Ledger()
    ledger.rows, ledger.all_rows = used * step, used * step + checks
    bar = RowProgress(lambda: ledger, most)
    assert bar.expected(9, 9) == min(ledger.all_rows, most or ledger.all_rows)
    assert bar.expected(step, 9) == min(used * 9 + checks, most or 10**9)


def test_early_stopping_at_the_best_model_with_everything_on(tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
    }
    trainer = trainer_of(tmp_path, load_best_model_at_end=True, **options)
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert len(losses) in (4, losses.index(min(losses)) + 3)  # the end, or two without a better one
    assert {path.name for path in (tmp_path / "adapter").glob("*.png")} == set(PICTURES)


# --- pictures ---


def history(seed=0, points=5):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(1, points + 1):
        numbers = {
            "rows": 100 * i,
            "seconds": 2.0 * i,
            "signal_to_noise": 1 / i,
            "allocation_gain": 1 + i / 10,
        }
        found += [
            {"step": i, "loss": 3.0 / i, **numbers},
            {"step": i, "eval_accuracy": 0.5 + i / 20 + rng.normal() / 50},
        ]
    return found


def ledger_of(windows=5, classes=3):
    ledger = Ledger()
    ledger.sample_queries = {i: [2, 4 + i] for i in range(6)}
    ledger.class_windows = [
        (100 * (i + 1), {c: [2, 4 + c * i] for c in range(classes)}) for i in range(windows)
    ]
    return ledger


def test_a_curve_is_accuracy_at_the_rows_before_it():
    measure, points = curve_of(history())
    assert measure == "validation accuracy"
    assert [rows for rows, _, _ in points] == [100, 200, 300, 400, 500]
    entries = [
        {"rows": 10, "loss": 2.0},
        {"rows": 20, "loss": float("nan")},
        {"train_runtime": 3.0},
    ]
    assert curve_of(entries) == ("training loss", [(10, 0.0, 2.0)])


def test_pictures_are_drawn_where_there_is_something_to_draw(tmp_path, monkeypatch, drawn):
    assert draw_pictures(tmp_path, history(), ledger_of()) == list(PICTURES)
    assert all(imread(tmp_path / name).std() > 0.01 for name in PICTURES)
    rows, seconds = drawn["learning_curve.png"].axes
    values = [entry["eval_accuracy"] for entry in history() if "eval_accuracy" in entry]
    assert rows.lines[0].get_xydata().tolist() == [
        [100.0 * (i + 1), value] for i, value in enumerate(values)
    ]
    assert seconds.lines[0].get_xydata().tolist() == [
        [2.0 * (i + 1), value] for i, value in enumerate(values)
    ]
    samples, classes, over_time, _ = drawn["queries.png"].axes
    assert samples.get_title() == "Where the queries went"
    # per sample, on average over the windows
    assert [bar.get_height() for bar in classes.patches] == [2, 3, 4]
    assert over_time.collections[0].get_array().shape == (3, 5)
    signal, gain = drawn["signal.png"].axes
    assert signal.lines[0].get_xydata().tolist() == [[100 * i, 1 / i] for i in range(1, 6)]
    assert gain.lines[0].get_xydata().tolist() == [[100 * i, 1 + i / 10] for i in range(1, 6)]
    assert draw_pictures(tmp_path, history(points=2), ledger_of()) == []
    for name in ("save_learning_curve", "save_signal"):
        monkeypatch.setattr(pictures, name, lambda *arguments: None)
    assert "queries.png" not in draw_pictures(tmp_path, history(), Ledger())


def test_seeds_have_a_mean_and_an_interval(tmp_path, drawn):
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history(seed)}))
    draw_seeds(tmp_path / "seeds.png", [tmp_path / str(seed) for seed in range(3)])
    values = np.array(
        [[e["eval_accuracy"] for e in history(seed) if "eval_accuracy" in e] for seed in range(3)]
    )
    for axes in drawn["seeds.png"].axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "mean of 3 seeds",
            "± standard deviation",
        ]
        assert axes.lines[0].get_ydata()[[0, -1]] == pytest.approx(values.mean(0)[[0, -1]])
        band = axes.collections[0].get_datalim(axes.transData)
        assert band.ymin == pytest.approx((values.mean(0) - values.std(0, ddof=1)).min(), abs=1e-2)
    assert imread(tmp_path / "seeds.png").std() > 0.01


def test_a_picture_that_fails_does_not_cost_the_run(tmp_path, monkeypatch, caplog):
    def broken(*arguments):
        raise ValueError("no ink")

    monkeypatch.setattr(callbacks, "draw_pictures", broken)
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path).train()
    assert "could not be drawn (ValueError: no ink)" in caplog.text


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=4), max_size=200)
)
def test_class_windows_keep_every_query_however_many_there_are(batches):
    ledger = Ledger()
    metrics = dict.fromkeys(
        ["gradient_signal", "gradient_variance", "sample_signal", "head_signal", "dropped_rows"],
        1.0,
    )
    for batch in batches:
        counts = torch.tensor([count for _, count in batch], dtype=torch.long)
        result = StepResult(torch.zeros(()), int(counts.sum()), counts, counts.float(), metrics)
        ledger.record(result, None, [label for label, _ in batch])
        ledger.summary()
    again = Ledger()
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again.class_windows == ledger.class_windows
    assert len(ledger.class_windows) <= 64
    rows = [rows for rows, _ in ledger.class_windows]
    assert rows == sorted(rows)
    kept = [
        (label, *seen) for _, classes in ledger.class_windows for label, seen in classes.items()
    ]
    for label in range(4):
        given = [count for batch in batches for own, count in batch if own == label]
        assert sum(s for own, s, _ in kept if own == label) == len(given)
        assert sum(q for own, _, q in kept if own == label) == sum(given)


@pytest.mark.parametrize(("last", "scale"), [(2_000, "linear"), (20_000, "symlog")])
def test_rows_are_on_a_logarithmic_axis_where_there_is_room_for_its_labels(last, scale):
    figure = pyplot().figure()
    axes = figure.subplots()
    draw_learning_curves(axes, {"flops": [(1_000, 0.2), (last, 0.8)], "mezo": [(1_500, 0.3)]}, 0.1)
    assert axes.get_xscale() == scale
    assert ("log scale" in axes.get_xlabel()) == (scale == "symlog")
    pyplot().close(figure)
