"""Compares a checkpoint with the replay of its log, step by step and tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import TrajectoryError
from .records import fingerprint
from .replay import Replay

_FILES = ("adapter_model.safetensors", "model.safetensors", "trainable.safetensors")

T = TypeVar("T")


@dataclass
class Departure:
    """A tensor of a checkpoint that differs from the replay.

    Attributes:
        name: of the tensor, in the checkpoint's file.
        numbers: number of differing entries.
        size: number of entries.
        most: largest difference; NaN if the tensor is missing or has another shape.
        step: the last step of the log after which the tensor equals that of the checkpoint; None if
            there is none.
    """

    name: str
    numbers: int
    size: int
    most: float
    step: int | None = None

    def __str__(self) -> str:
        if self.most != self.most:
            return f"{self.name}: missing, or of another shape"
        instead = (
            "no step of the log has it so"
            if self.step is None
            else f"it is that of step {self.step}"
        )
        return (
            f"{self.name}: {self.numbers:,} of {self.size:,} numbers differ, by {self.most:.3g} "
            f"at most; {instead}"
        )


@dataclass
class Verdict:
    """The result of a comparison.

    Attributes:
        step: the step of the comparison.
        departures: the tensors of the checkpoint that differ.
        first: the first step after which the replay itself differs from training, and the tensors;
            None if there is none.
        surroundings: environment that may explain a difference.
    """

    step: int
    departures: list[Departure] = field(default_factory=list)
    first: tuple[int, list[str]] | None = None
    surroundings: str = ""

    @property
    def right(self) -> bool:
        """Whether the checkpoint equals the replay bit for bit."""
        return not self.departures and self.first is None

    def __str__(self) -> str:
        if self.right:
            return f"The checkpoint is what the log leads to after step {self.step}, bit for bit."
        lines = []
        if self.first is not None:
            step, names = self.first
            lines.append(
                f"The replay departs from the training at step {step}, in {', '.join(names)}: "
                f"{self.surroundings}"
            )
        if self.departures:
            lines.append(f"The checkpoint departs from the log at step {self.step}:")
        return "\n".join([*lines, *(f"  {departure}" for departure in self.departures)])


def verify(path: str | Path, checkpoint: str | Path, step: int | None = None) -> Verdict:
    """Replay a log up to the step of a checkpoint and compare the two.

    Args:
        path: the log, or the output folder that contains it.
        checkpoint: a folder with the weights; its trainer_state.json says after which step it was
            saved.
        step: the step, if the folder does not contain it; by default the log's last one.

    Raises:
        TrajectoryError: the log is damaged or does not reach the step, or the folder holds no
            weights or a damaged file.
    """
    folder = Path(checkpoint)
    state = folder / "trainer_state.json"
    if step is None and state.is_file():
        step = _read(state, lambda path: index(json.loads(path.read_text())["global_step"]))
    weights = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if weights is None:
        raise TrajectoryError(f"{folder} holds none of {', '.join(_FILES)}.")
    saved, log = _read(weights, load_file), Replay(path)
    names = list(log.says["trainable"])
    files = (log.says["adapter"] or {"files": {name: name for name in names}})["files"]
    prints = {name: fingerprint(saved[key]) for key, name in files.items() if name and key in saved}
    last_alike: dict[str, int] = {
        n: 0 for n in prints if fingerprint(log.parameters[n]) == prints[n]
    }
    first = None
    for record in log.run(step):
        for name, after in zip(names, record.fingerprints, strict=True):
            if prints.get(name) == after:
                last_alike[name] = log.step
        if first is None and (departed := log.departed(record)):
            first = log.step, departed
    departures = [
        departure
        for key, wanted in log.tensors().items()
        if (departure := _compare(key, saved.get(key), wanted, last_alike.get(files[key])))
    ]
    return Verdict(log.step, departures, first, log.surroundings() if log.step else "")


def _read(path: Path, how: Callable[[Path], T]) -> T:
    try:
        return how(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrajectoryError(f"{path} is damaged: {type(error).__name__}: {error}.") from error


def _compare(name: str, saved: Tensor | None, wanted: Tensor, step: int | None) -> Departure | None:
    wanted = wanted.cpu()
    if saved is None or saved.shape != wanted.shape or saved.dtype != wanted.dtype:
        return Departure(name, wanted.numel(), wanted.numel(), torch.nan, step)
    if fingerprint(saved) == fingerprint(wanted):
        return None
    most = float((saved.double() - wanted.double()).abs().max())
    return Departure(name, int((saved != wanted).sum()), wanted.numel(), most, step)
