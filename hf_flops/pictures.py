"""The pictures of a run, drawn from its log when it ends: learning curve, where the queries went, signal to noise."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .ledger import Ledger
from .run_plots import save_learning_curve, save_queries, save_signal

logger = logging.getLogger(__name__)
PICTURES = {
    "learning_curve.png": "Learning curve against rows and seconds",
    "queries.png": "Where the queries went",
    "signal.png": "Signal to noise and what the allocation gained",
}
_FEWEST = 3  # points that make a curve
Log = Sequence[Mapping[str, Any]]


class Pictures(TrainerCallback):
    """Draws the run into its output folder when it ends, unless `pictures=False`.

    Args:
        ledger: returns the ledger of the run.
    """

    def __init__(self, ledger: Callable[[], Ledger]) -> None:
        self.ledger = ledger

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw what there is to draw; a picture that fails must not cost a trained adapter."""
        if not (args.pictures and state.is_world_process_zero):
            return
        try:
            draw_pictures(args.output_dir, state.log_history, self.ledger())
        except ImportError as error:
            logger.info("No pictures of the run: %s", error)
        except Exception as error:
            logger.warning("The pictures of the run could not be drawn (%s: %s).", type(error).__name__, error)


def curve_of(history: Log) -> tuple[str, list[tuple[float, float, float]]]:
    """Return what a learning curve shows, and its (rows, seconds, value) triples.

    The value is accuracy where the log has it, else the validation loss, else the training loss. Evaluations happen at the
    rows of the last log that is not after them.
    """
    names = ("eval_accuracy", "eval_loss", "loss")
    name = next((name for name in names if any(name in entry for entry in history)), "loss")
    points, rows, seconds = list[tuple[float, float, float]](), 0.0, 0.0
    for entry in history:
        rows, seconds = entry.get("rows", rows), entry.get("seconds", seconds)
        if name in entry and rows and math.isfinite(entry[name]):
            points.append((rows, seconds, entry[name]))
    return {"eval_accuracy": "validation accuracy", "eval_loss": "validation loss", "loss": "training loss"}[name], points


def series_of(history: Log, name: str) -> list[tuple[float, float]]:
    """Return (rows, value) of a number in the log, where it is finite."""
    return [
        (entry["rows"], entry[name]) for entry in history if "rows" in entry and math.isfinite(entry.get(name, math.nan))
    ]


def draw_pictures(folder: str | Path, history: Log, ledger: Ledger) -> list[str]:
    """Draw what a run's log has enough points for; returns the names of the files.

    Raises:
        ImportError: there is no matplotlib.
    """
    folder, drawn = Path(folder), list[str]()
    measure, curve = curve_of(history)
    if len(curve) < _FEWEST:
        return drawn
    folder.mkdir(parents=True, exist_ok=True)
    save_learning_curve(folder / "learning_curve.png", [curve], measure)
    drawn.append("learning_curve.png")
    samples = [queries / steps for steps, queries in ledger.sample_queries.values()]
    if samples or ledger.class_windows:
        save_queries(folder / "queries.png", samples, ledger.class_windows)
        drawn.append("queries.png")
    signal, gain = series_of(history, "signal_to_noise"), series_of(history, "allocation_gain")
    if len(signal) >= _FEWEST:
        save_signal(folder / "signal.png", signal, gain)
        drawn.append("signal.png")
    return drawn


def draw_seeds(path: str | Path, folders: Sequence[str | Path]) -> None:
    """Draw one learning curve from the output folders of runs that differ in their seed: mean and standard deviation.

    Args:
        path: where to; the ending decides the format.
        folders: each holds `trainer_state.json`: a checkpoint, or an output folder after `trainer.save_state()`.
    """
    histories = [json.loads(Path(folder, "trainer_state.json").read_text())["log_history"] for folder in folders]
    curves = [curve_of(history) for history in histories]
    save_learning_curve(path, [points for _, points in curves], curves[0][0])
