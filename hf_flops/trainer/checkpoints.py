"""Checkpoints that appear whole or not at all, and which of them a run resumes from."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments

from ..distributed.collectives import ProcessGroup
from ..errors import ConfigurationError, FlopsError, StorageError, in_one_line
from .integrity import MANIFEST, STATE, damage, first_whole, seal

logger = logging.getLogger("hf_flops.trainer")
UNFINISHED = ".unfinished"


def is_whole(folder: str | Path) -> bool:
    """Return whether a checkpoint has all files that it was saved with, unchanged."""
    return damage(folder) is None


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the whole checkpoint of the latest step in a folder, or None if there are none at all.

    Raises:
        ConfigurationError: there are checkpoints, but not one is whole.
    """
    for old in Path(folder, UNFINISHED).glob("*.old"):  # its replacement was interrupted
        if not Path(folder, old.stem).exists():
            old.rename(Path(folder, old.stem))
    steps = {
        int(path.name.split("-")[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    }
    whole, reasons = first_whole([path for _, path in sorted(steps.items(), reverse=True)])
    if whole is None and reasons:
        raise ConfigurationError(
            f"{str(folder)!r} holds no whole checkpoint to resume from: {'; '.join(reasons)}. "
            "Remove them to start anew."
        )
    for reason in reasons:
        logger.warning("%s; it is skipped.", reason)
    return None if whole is None else str(whole)


def publish(unfinished: Path, folder: Path) -> None:
    """Move a finished checkpoint to its name, in place of an older one if there is one."""
    for path in [*seal(unfinished), unfinished]:
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
            with saved_or_named(folder):
                yield folder
        finally:
            self.saving = False
        # "./out" is spelled otherwise as a path
        if Path(state.best_model_checkpoint or "") == unfinished:
            state.best_model_checkpoint = str(folder)
            if args.should_save:
                with saved_or_named(folder):
                    state.save_to_json(str(unfinished / STATE))
        group.all_gather_object(None)
        if args.process_index == 0:
            with saved_or_named(folder):
                publish(unfinished, folder)
        group.all_gather_object(None)
        # on a machine that does not share the disk of process 0
        if args.local_process_index == 0 and unfinished.is_dir():
            with saved_or_named(folder):
                publish(unfinished, folder)


@contextmanager
def saved_or_named(path: Path) -> Iterator[None]:
    """Turn an error inside the context, which writes a file of a run, into one that names it.

    Raises:
        StorageError: it could not be written.
    """
    try:
        yield
    except FlopsError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises the second
        raise StorageError(
            f"{path} could not be written: {in_one_line(error)}. Nothing that was saved before is "
            "lost: make room or the folder writable, and go on with resume_from_checkpoint=True."
        ) from error


def chosen_checkpoint(
    wanted: str | bool | None, output_dir: str, group: ProcessGroup
) -> str | None:
    """Return the folder of the checkpoint to resume from, None to start anew.

    Args:
        wanted: `resume_from_checkpoint`.
        output_dir: where True looks for the latest one.
        group: the processes; all resume from the checkpoint that the first of them finds.

    Raises:
        ConfigurationError: there is none, it is no checkpoint, or its files are missing or damaged.
    """
    if not wanted:
        return None
    if wanted is True:
        wanted = group.broadcast(last_checkpoint(output_dir))
        if wanted is None:
            raise ConfigurationError(
                f"output_dir={output_dir!r} holds no whole checkpoint to resume from."
            )
    elif not any(Path(wanted, name).is_file() for name in (STATE, MANIFEST)):
        raise ConfigurationError(
            f"resume_from_checkpoint={wanted!r} holds no {STATE}: give the folder of a "
            f"checkpoint, such as {output_dir}/checkpoint-100, or True for the latest one there."
        )
    elif (reason := damage(wanted)) is not None:
        raise ConfigurationError(
            f"{wanted!r} is not a whole checkpoint: {reason}. Resume from an earlier one."
        )
    return str(wanted)


def rerooted(best: str | None, checkpoint: str, run: str) -> str | None:
    """Return where the best checkpoint of a resumed run lies now, None if it is gone.

    The folder that a state names is that of then; the run may have been moved since.

    Args:
        best: the path in the state.
        checkpoint: that the run resumes from; the best one lay beside it.
        run: the run's output folder.
    """
    if best is None:
        return None
    beside = Path(checkpoint).resolve().parent
    home = run if Path(run).resolve() == beside else str(beside)
    for path in (os.path.join(home, Path(best).name), best):
        if os.path.isdir(path):
            return path
    return None


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
