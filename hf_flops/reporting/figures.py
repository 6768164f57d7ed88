"""The pictures of a run: learning curve, queries of samples and classes, signal to noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .ledger import Ledger
from .run_plots import Log, curve_of, save_learning_curve, save_queries, save_signal, series_of

PICTURES = {
    "learning_curve.png": "Learning curve against rows through the model, and against seconds",
    "queries.png": "Where the queries went: to which samples and classes, and when",
    "signal.png": "Signal to noise of a step, and what the allocation gained over equal counts",
}
_FEWEST = 3  # points that make a curve


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
    """Draw one learning curve of runs that differ in their seed: mean and standard deviation.

    Args:
        path: where to; the ending decides the format.
        folders: each holds `trainer_state.json`: a checkpoint, or an output folder after
            `trainer.save_state()`.
    """
    states = [json.loads(Path(folder, "trainer_state.json").read_text()) for folder in folders]
    curves = [curve_of(state["log_history"]) for state in states]
    save_learning_curve(path, [points for _, points in curves], curves[0][0])
