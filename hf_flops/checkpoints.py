"""Checkpoints that appear whole or not at all, and a run that saves and leaves when it is told to."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from .errors import ConfigurationError

logger = logging.getLogger("hf_flops.trainer")
UNFINISHED, MANIFEST, STATE = ".unfinished", "flops_files.json", "trainer_state.json"


def is_whole(folder: str | Path) -> bool:
    """Say whether a checkpoint has all files that it was saved with; of a stock trainer's, whether the last one is there."""
    state, manifest = Path(folder, STATE), Path(folder, MANIFEST)
    if not state.is_file():
        return False
    if not manifest.is_file():
        return True
    try:
        files = [(Path(folder, name), size) for name, size in json.loads(manifest.read_text()).items()]
    except (OSError, ValueError, AttributeError):  # the manifest itself was cut off
        return False
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the whole checkpoint of the latest step in a folder, or None; those half written or deleted do not count."""
    for old in Path(folder, UNFINISHED).glob("*.old"):  # its successor was about to take its place
        if not Path(folder, old.stem).exists():
            old.rename(Path(folder, old.stem))
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if is_whole(path):
            return str(path)
        logger.warning("%s is not a whole checkpoint and is passed over.", path)
    return None


def publish(unfinished: Path, folder: Path) -> None:
    """Let a finished checkpoint appear under its name, in the place of an older one if there is one."""
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    manifest = unfinished / MANIFEST
    manifest.write_text(json.dumps({str(path.relative_to(unfinished)): path.stat().st_size for path in files}))
    for path in [*files, manifest, unfinished]:
        _flush(path)
    if folder.exists():
        folder.rename(unfinished.with_name(f"{folder.name}.old"))
    unfinished.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class WholeCheckpoints:
    """The part of a trainer that saves and resumes; to be put before a class derived from `transformers.Trainer`."""

    _saving = False

    def _get_output_dir(self: Any, trial: Any) -> str:
        folder = super()._get_output_dir(trial)  # type: ignore[misc]
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """Let the stock trainer save in a folder beside, and move the checkpoint to its place when all are done."""
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        unfinished, folder = run / UNFINISHED / name, run / name
        if self.args.local_process_index == 0:
            shutil.rmtree(unfinished.parent, ignore_errors=True)  # of a run that was killed
        self._share.everyone(None)
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._saving = False
        if Path(self.state.best_model_checkpoint or "") == unfinished:  # "./out" is spelled otherwise as a path
            self.state.best_model_checkpoint = str(folder)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / STATE))
        self._share.everyone(None)
        if self.args.process_index == 0:
            publish(unfinished, folder)
        self._share.everyone(None)
        if self.args.local_process_index == 0 and unfinished.is_dir():  # on another machine that shares no disk
            publish(unfinished, folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _chosen_checkpoint(self: Any, wanted: str | bool | None) -> str | None:
        """Return the folder of the checkpoint to resume from.

        Raises:
            ConfigurationError: there is none, it is no checkpoint, or it is not whole.
        """
        if not wanted:
            return None
        if wanted is True:
            wanted = self._share.first(last_checkpoint(self.args.output_dir))
            if wanted is None:
                raise ConfigurationError(f"output_dir={self.args.output_dir!r} holds no whole checkpoint to resume from.")
        elif Path(wanted, MANIFEST).is_file() and not is_whole(wanted):
            raise ConfigurationError(
                f"{wanted!r} lacks files that it was saved with, or its {MANIFEST} is damaged: resume from an earlier one."
            )
        elif not Path(wanted, STATE).is_file():
            raise ConfigurationError(
                f"resume_from_checkpoint={wanted!r} holds no {STATE}: give the folder of a checkpoint, such as "
                f"{self.args.output_dir}/checkpoint-100, or True for the latest one there."
            )
        return str(wanted)

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        """Bring generators back as they were, also those of a run with another number of processes: all had the same."""
        wanted = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is None or Path(checkpoint, wanted).is_file():
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
            return
        for name in ("rng_state.pth", "rng_state_0.pth"):
            if (path := Path(checkpoint, name)).is_file():
                with tempfile.TemporaryDirectory() as folder:
                    shutil.copy(path, Path(folder, wanted))
                    super()._load_rng_state(folder)  # type: ignore[misc]
                return


class Leave(TrainerCallback):
    """Saves and ends the run when SIGTERM arrives: after the optimizer step that is under way, in all processes alike.

    Attributes:
        asked: whether this process was told to leave.
        agreed: whether all processes know that one was; None where there is only one.
    """

    def __init__(self) -> None:
        self.asked, self.agreed, self.left = False, False, False
        self.alone = True

    @contextmanager
    def listening(self, *, alone: bool) -> Iterator[None]:
        """Listen for a while.

        Raises:
            SystemExit: the run has left, with the status of a program that SIGTERM ended.
        """
        self.asked = self.agreed = self.left = False
        self.alone = alone
        if threading.current_thread() is not threading.main_thread():  # only there can one listen
            yield
            return
        before = signal.signal(signal.SIGTERM, self._heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.left:
            raise SystemExit(128 + signal.SIGTERM)

    def _heard(self, number: int, frame: Any) -> None:
        del number, frame
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if that is what all know."""
        if self.asked if self.alone else self.agreed:
            logger.warning("SIGTERM: the run saves at step %d and leaves.", state.global_step)
            self.left = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do nothing more in a run that has left."""
        if self.left:
            control.should_save = control.should_evaluate = False
