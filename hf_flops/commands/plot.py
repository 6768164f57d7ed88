"""`hf-flops plot`: one picture of a run, from its output folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError

STEP_FILE = "trainer_state.json"


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments."""
    own = argparse.ArgumentParser(
        prog="hf-flops plot",
        description="Draw a run from its output folder: the learning curve against rows and against seconds, the signal to "
        "noise of the estimates, and where the queries went (for data with a column sample_id).",
    )
    own.add_argument("run", help="output folder, or a checkpoint in it")
    own.add_argument("--output", metavar="FILE", help="the picture; default: run.png in the folder")
    return own


def newest(folder: Path) -> Path:
    """Return where a run's latest state lies: the folder itself, or its newest checkpoint.

    Raises:
        ConfigurationError: there is none.
    """
    steps = {int(path.parent.name.rpartition("-")[2]): path.parent for path in folder.glob(f"checkpoint-*/{STEP_FILE}")}
    if (folder / STEP_FILE).is_file():
        return folder
    if not steps:
        raise ConfigurationError(
            f"{folder} holds no {STEP_FILE}: save checkpoints (save_strategy), or call trainer.save_state() after training."
        )
    return steps[max(steps)]


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return what there is to draw of a run.

    Returns:
        "curve": (rows, seconds, value) of each evaluation, or of each log where there was none; "measure": what the value
        is; "signal": (rows, signal to noise) of each log; "queries": queries per step of each sample.
    """
    from ..state import STATE_FILE

    place = newest(Path(folder))
    history = json.loads((place / STEP_FILE).read_text())["log_history"]
    logs = [entry for entry in history if "rows" in entry]
    if not logs:
        raise ConfigurationError(
            f"{place} has no log of rows: it is not of a FlopsTrainer, or logging_steps was never reached."
        )
    evaluated = next((name for name in ("eval_accuracy", "eval_loss") if any(name in entry for entry in history)), None)
    at = {entry["step"]: (entry["rows"], entry.get("seconds", 0.0)) for entry in logs}
    curve = [(*at[step], entry[evaluated or "loss"]) for entry, step in _places(history, at, evaluated or "loss")]
    samples = []
    if (place / STATE_FILE).is_file():
        samples = json.loads((place / STATE_FILE).read_text())["ledger"]["samples"]
    return {
        "curve": curve,
        "measure": (evaluated or "training loss").replace("eval_", "validation "),
        "signal": [(entry["rows"], entry["signal_to_noise"]) for entry in logs if "signal_to_noise" in entry],
        "queries": [queries / steps for _, steps, queries in samples],
    }


def _places(history: list[dict[str, Any]], at: dict[int, Any], name: str) -> list[tuple[dict[str, Any], int]]:
    """Return the entries that hold a value, each with the last logged step that is not after it."""
    found = []
    for entry in history:
        before = [step for step in at if step <= entry["step"]]
        if name in entry and before:
            found.append((entry, max(before)))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Draw the run and say where the picture is."""
    given = parser().parse_args(arguments)
    from ..plots import save_run

    run, path = read_run(given.run), Path(given.output or Path(given.run, "run.png"))
    save_run(path, **run)
    print(f"Picture: {path}")
    return 0
