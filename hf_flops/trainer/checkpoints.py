"""Checkpoints that appear whole or not at all, and a run that saves and ends on SIGTERM."""

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

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed.collectives import ProcessGroup
from ..errors import ConfigurationError

logger = logging.getLogger("hf_flops.trainer")
UNFINISHED, MANIFEST, STATE = ".unfinished", "flops_files.json", "trainer_state.json"


def is_whole(folder: str | Path) -> bool:
    """Return whether a checkpoint has all files that it was saved with."""
    manifest = Path(folder, MANIFEST)
    try:  # a stock trainer writes no manifest, and its state last
        sizes = json.loads(manifest.read_text()) if manifest.is_file() else {}
        files = {Path(folder, name): size for name, size in sizes.items()}
    except (OSError, ValueError, AttributeError):  # the manifest itself was cut off
        return False
    return Path(folder, STATE).is_file() and all(
        path.is_file() and path.stat().st_size == size for path, size in files.items()
    )


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the whole checkpoint of the latest step in a folder, or None."""
    for old in Path(folder, UNFINISHED).glob("*.old"):  # its replacement was interrupted
        if not Path(folder, old.stem).exists():
            old.rename(Path(folder, old.stem))
    checkpoints = {
        int(path.name.split("-")[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    }
    for _, path in sorted(checkpoints.items(), reverse=True):
        if is_whole(path):
            return str(path)
        logger.warning("%s is not a whole checkpoint and is skipped.", path)
    return None


def publish(unfinished: Path, folder: Path) -> None:
    """Move a finished checkpoint to its name, in place of an older one if there is one."""
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    manifest = unfinished / MANIFEST
    manifest.write_text(
        json.dumps({str(path.relative_to(unfinished)): path.stat().st_size for path in files})
    )
    for path in [*files, manifest, unfinished]:
        _flush(path)
    if folder.exists():
        folder.rename(unfinished.with_name(f"{folder.name}.old"))
    unfinished.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointWriter:
    """Lets the stock trainer save elsewhere, and moves a complete checkpoint to its place.

    Attributes:
        saving: whether a checkpoint is being saved.
    """

    saving = False

    def folder(self, run: str) -> str:
        """Return the folder in which the stock trainer saves, for a run's output folder."""
        return os.path.join(run, UNFINISHED) if self.saving else run

    @contextmanager
    def whole(
        self, run: Path, args: TrainingArguments, state: TrainerState, group: ProcessGroup
    ) -> Iterator[Path]:
        """Publish what is saved inside.

        Args:
            run: the run's output folder.
            args: the run's arguments.
            state: the trainer's state.
            group: the processes, which wait for each other.

        Yields:
            The folder that the checkpoint will have.
        """
        name = f"checkpoint-{state.global_step}"
        unfinished, folder = run / UNFINISHED / name, run / name
        if args.local_process_index == 0:
            shutil.rmtree(unfinished.parent, ignore_errors=True)  # of a run that was killed
        group.all_gather_object(None)
        self.saving = True
        try:
            yield folder
        finally:
            self.saving = False
        # "./out" is spelled otherwise as a path
        if Path(state.best_model_checkpoint or "") == unfinished:
            state.best_model_checkpoint = str(folder)
            if args.should_save:
                state.save_to_json(str(unfinished / STATE))
        group.all_gather_object(None)
        if args.process_index == 0:
            publish(unfinished, folder)
        group.all_gather_object(None)
        # on a machine that does not share the disk of process 0
        if args.local_process_index == 0 and unfinished.is_dir():
            publish(unfinished, folder)


def chosen_checkpoint(
    wanted: str | bool | None, output_dir: str, group: ProcessGroup
) -> str | None:
    """Return the folder of the checkpoint to resume from, None to start anew.

    Args:
        wanted: `resume_from_checkpoint`.
        output_dir: where True looks for the latest one.
        group: the processes; all resume from the checkpoint that the first of them finds.

    Raises:
        ConfigurationError: there is none, it is no checkpoint, or files are missing.
    """
    if not wanted:
        return None
    if wanted is True:
        wanted = group.broadcast(last_checkpoint(output_dir))
        if wanted is None:
            raise ConfigurationError(
                f"output_dir={output_dir!r} holds no whole checkpoint to resume from."
            )
    elif Path(wanted, MANIFEST).is_file() and not is_whole(wanted):
        raise ConfigurationError(
            f"{wanted!r} lacks files that it was saved with, or its {MANIFEST} is damaged: resume "
            "from an earlier one."
        )
    elif not Path(wanted, STATE).is_file():
        raise ConfigurationError(
            f"resume_from_checkpoint={wanted!r} holds no {STATE}: give the folder of a "
            f"checkpoint, such as {output_dir}/checkpoint-100, or True for the latest one there."
        )
    return str(wanted)


@contextmanager
def generator_states(checkpoint: str | None, args: TrainingArguments) -> Iterator[str | None]:
    """Yield a folder with the states of this process's generators: all processes have the same."""
    wanted = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    paths = [Path(checkpoint or "", name) for name in ("rng_state.pth", "rng_state_0.pth")]
    others = [path for path in paths if path.is_file()]
    if checkpoint is None or Path(checkpoint, wanted).is_file():
        yield checkpoint
    elif others:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(others[0], Path(folder, wanted))
            yield folder
    else:
        yield None


class SaveOnSigterm(TrainerCallback):
    """Saves and ends the run on SIGTERM, after the current optimizer step, in all processes.

    Attributes:
        asked: whether this process got SIGTERM.
        agreed: whether all processes know that one of them did.
        left: whether the run has saved and ends.
    """

    asked = agreed = left = False
    alone = True

    @contextmanager
    def listening(self, *, alone: bool) -> Iterator[None]:
        """Handle SIGTERM inside the context.

        Args:
            alone: whether this is the only process.

        Raises:
            SystemExit: the run has saved; the status is that of a program that SIGTERM ended.
        """
        self.asked = self.agreed = self.left = False
        self.alone = alone
        if threading.current_thread() is not threading.main_thread():  # others get no signals
            yield
            return
        before = signal.signal(signal.SIGTERM, self._heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.left:
            raise SystemExit(128 + signal.SIGTERM)

    def _heard(self, *_: object) -> None:
        self.asked = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Save and stop, if all processes know of the signal."""
        if self.asked if self.alone else self.agreed:
            logger.warning("SIGTERM: the run saves at step %d and ends.", state.global_step)
            self.left = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Neither save nor evaluate again in a run that ends."""
        if self.left:
            control.should_save = control.should_evaluate = False
