"""Whether a checkpoint is what was saved: the size and the SHA-256 of each of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState

from ..errors import in_one_line
from .checkpoint_state import STATE_FILE

MANIFEST, STATE = "flops_files.json", "trainer_state.json"


def seal(folder: Path) -> list[Path]:
    """Write the manifest of a checkpoint; return the paths of all its files."""
    manifest = folder / MANIFEST
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != manifest)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in files
    }
    manifest.write_text(json.dumps(entries))
    return [*files, manifest]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: str | Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None if nothing is.

    A stock trainer writes no manifest: of its checkpoints only the trainer's state is looked at,
    which it writes last.
    """
    folder = Path(folder)
    for reason in (_listed_damage(folder), _state_damage(folder / STATE)):
        if reason is not None:
            return reason
    return None


def _listed_damage(folder: Path) -> str | None:
    """Return what differs from the manifest."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        ours = (folder / STATE_FILE).is_file()
        return f"{MANIFEST} is missing" if ours else None
    try:
        entries = json.loads(manifest.read_text())
        listed = [(name, entry["bytes"], entry["sha256"]) for name, entry in entries.items()]
        return next(filter(None, (_file_damage(folder, *entry) for entry in listed)), None)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is damaged: {type(error).__name__}: {in_one_line(error)}"


def _file_damage(folder: Path, name: str, size: int, sha256: str) -> str | None:
    """Return what is wrong with a file."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
    if digest(path) != sha256:
        return f"{name} does not have the SHA-256 that it was saved with"
    return None


def _state_damage(path: Path) -> str | None:
    """Return what is wrong with the stock trainer's state."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        state = TrainerState.load_from_json(str(path))
    except Exception as error:  # the file says what the class is called with
        return f"{path.name} is damaged: {type(error).__name__}: {in_one_line(error)}"
    if type(state.global_step) is not int or state.global_step < 0:
        return f"{path.name} is damaged: its global_step is {state.global_step!r}"
    return None


def first_whole(folders: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """Return the first checkpoint that is whole, and what is wrong with those before it."""
    reasons: list[str] = []
    for folder in folders:
        reason = damage(folder)
        if reason is None:
            return folder, reasons
        reasons.append(f"{folder} is not a whole checkpoint: {reason}")
    return None, reasons
