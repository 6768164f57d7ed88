"""`hf-flops plot`: one picture of a run, from its output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .parsers import CommandParser

STEP_FILE = "trainer_state.json"


def parser() -> CommandParser:
    """Return what reads the arguments."""
    command = CommandParser(
        prog="hf-flops plot",
        description="Draw a run from its output folder: the learning curve against rows and "
        "against seconds, the signal to noise of the estimates, and where the queries went (for "
        "data with a column sample_id).",
    )
    command.add_argument("run", help="output folder, or a checkpoint in it")
    command.add_argument(
        "--output",
        metavar="FILE",
        help="the picture, or a folder for run.png; default: run.png in RUN",
    )
    return command


def newest(folder: Path) -> Path:
    """Return where a run's latest state lies: the folder itself, or its newest checkpoint.

    A recipe has a folder for each method: the one that it trained, before those that it compares.

    Raises:
        ConfigurationError: there is none, or there are several to choose from.
    """
    if (folder / STEP_FILE).is_file():
        return folder
    checkpoints = {
        int(number): path.parent
        for path in folder.glob(f"checkpoint-*/{STEP_FILE}")
        if (number := path.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    if not checkpoints and (runs := sorted(folder.glob(f"*/{STEP_FILE}"))):
        return _main_run(folder, [path.parent for path in runs])
    if not checkpoints:
        raise ConfigurationError(
            f"{folder} holds no {STEP_FILE}: save checkpoints (save_strategy), or call "
            "trainer.save_state() after training."
        )
    return checkpoints[max(checkpoints)]


def _main_run(folder: Path, runs: list[Path]) -> Path:
    """Return the run that a recipe was asked for, not one that it was compared with."""
    from ..trainer.checkpoint_state import read_json

    report = folder / "results.json"
    outcomes = read_json(report, "outcomes") if report.is_file() else []
    methods = [outcome["method"] for outcome in outcomes]
    if len(runs) > 1 and not methods:
        raise ConfigurationError(
            f"{folder} holds several runs: name one, {' or '.join(map(str, runs))}."
        )
    return folder / methods[0] if methods else runs[0]


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return what there is to draw of a run.

    Returns:
        "curve": (rows, seconds, value) of each evaluation, or of each log where there was none;
        "measure": what the value is; "signal": (rows, signal to noise) of each log; "queries":
        queries per step of each sample.

    Raises:
        ConfigurationError: it has no state, a damaged one, or one without a log of rows.
    """
    from ..reporting.run_plots import curve_of, series_of
    from ..trainer.checkpoint_state import STATE_FILE, read_json

    latest = newest(Path(folder))
    history = read_json(latest / STEP_FILE, "log_history")
    if not any("rows" in entry for entry in history):
        raise ConfigurationError(
            f"{latest} has no log of rows: it is not of a FlopsTrainer, or logging_steps was never "
            "reached."
        )
    measure, curve = curve_of(history)
    state = latest / STATE_FILE
    samples = read_json(state, "ledger", "samples") if state.is_file() else []
    return {
        "curve": curve,
        "measure": measure,
        "signal": series_of(history, "signal_to_noise"),
        "queries": [queries / steps for _, steps, queries in samples],
    }


def main(arguments: list[str] | None = None) -> int:
    """Draw the run and say where the picture is."""
    options = parser().parse_args(arguments)
    from ..reporting.run_plots import save_run

    run, path = read_run(options.run), Path(options.output or Path(options.run, "run.png"))
    if path.is_dir():
        path /= "run.png"
    elif not path.suffix:
        path = path.with_suffix(".png")
    try:
        save_run(path, **run)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The picture {path} cannot be saved: {error}.") from error
    print(f"Picture: {path}")
    return 0
