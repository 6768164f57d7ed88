"""Rebuilds an adapter from the log of its run, bit for bit, without data or forward passes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.state import State, number
from ..errors import TrajectoryError
from ..perturbations import Perturbation
from ..perturbations.replay import regenerate
from . import LOG_FILE, limits, optimizers, rules
from .framing import Record, read
from .records import StepRecord, fingerprint, unpack

TRAINABLE_FILE = "trainable.safetensors"


class Replay:
    """Replays the log of a run step by step.

    Args:
        path: the log, or the output folder that contains it.

    Attributes:
        says: metadata of the run, from the log's first record.
        parameters: the trainable tensors by name, after `step`.
        step: optimizer steps done.

    Raises:
        TrajectoryError: the log does not exist or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path, LOG_FILE) if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise TrajectoryError(
                f"There is no trajectory log at {path}: train with trajectory_log=True to write "
                "one."
            )
        self.path, self.step = path, 0
        self._records = read(path)
        first = next(self._records, None)
        if first is None:
            raise TrajectoryError(f"{path} is empty: the run was stopped before it began.")
        with limits.refused(path, "its first record"):
            _, self.says, self._stored = unpack(first.payload)
            limits.check_tensors(self.says["tensors"])
            self.parameters = {
                str(name): nn.Parameter(self._first(name)) for name in self.says["trainable"]
            }
            _ = self.says["adapter"] and self.says["adapter"]["config"]
            for key, name in self._files().items():
                _ = self.parameters[name] if name else self._first(f"file:{key}")
        self._optimizer: Optimizer | None = None
        self._session: State = {}
        self._groups: list[State] = []
        self._perturbation: Perturbation | None = None

    def _first(self, name: str) -> Tensor:
        """Return the initial value of a tensor."""
        shape, kind = self.says["tensors"][name]
        if name in self.says["zero"]:
            return torch.zeros(shape, dtype=limits.dtype(kind))
        return self._stored[name].clone()

    def _files(self) -> dict[str, str]:
        """Return the parameter of each tensor of the adapter's file, or ""."""
        adapter = self.says["adapter"]
        return {} if adapter is None else dict(adapter["files"])

    def run(self, until: int | None = None) -> Iterator[StepRecord]:
        """Replay the steps in order, up to and including step `until`, and yield their records.

        Raises:
            TrajectoryError: the log is damaged, or has no such step.
        """
        if until is not None and until < 0:
            raise TrajectoryError(
                f"{self.path} has no step {until}: steps count from 0, the adapter before any "
                "training."
            )
        while until is None or self.step < until:
            record = next(self._records, None)
            if record is None:
                break
            with limits.refused(self.path, f"record {record.number}, of step {record.step}"):
                step = self._read(record)
            if step is not None:
                self.step = record.step
                yield step
        if until is not None and self.step < until:
            raise TrajectoryError(
                f"{self.path} ends after step {self.step}: step {until} is not in it."
            )

    def _read(self, record: Record) -> StepRecord | None:
        """Replay a record; return it if it is of a step."""
        kind, says, tensors = unpack(record.payload)
        if kind == "session":
            self._begin(says)
            return None
        size = sum(parameter.numel() for parameter in self.parameters.values())
        step = StepRecord.unpack(says, tensors, size)
        if len(step.fingerprints) != len(self.parameters):
            raise ValueError(f"{len(step.fingerprints)} fingerprints")
        with _threads(limits.threads(self._session["threads"])):
            self._take(step)
        return step

    def departed(self, record: StepRecord) -> list[str]:
        """Return the names of the tensors that differ from those of training after a step."""
        return [
            name
            for (name, tensor), wanted in zip(
                self.parameters.items(), record.fingerprints, strict=True
            )
            if fingerprint(tensor) != wanted
        ]

    def surroundings(self) -> str:
        """Describe the environment of the training session, for a replay that differs from it."""
        return (
            f"it was trained with torch {self._session['torch']} on {self._session['device']}, and "
            f"is replayed with torch {torch.__version__}; sums may be rounded in another order on "
            "another processor, or something else changed the adapter in training."
        )

    def _begin(self, session: State) -> None:
        """Start a session of the run."""
        if session.get("noise") != rules.noise_print():
            raise TrajectoryError(
                f"{self.path} was written where the same seed draws other noise (torch "
                f"{session['torch']}, or another version of hf_flops): replay it there."
            )
        limits.threads(session["threads"])
        number(session["max_grad_norm"], 0)
        if (
            limits.device(session["device"]) != "cpu"
            and torch.get_device_module(session["device"]).is_available()
        ):
            for parameter in self.parameters.values():
                parameter.data = parameter.data.to(session["device"])
        if (
            self._optimizer is not None
            and session["optimizer"]["class"] != self._session["optimizer"]["class"]
        ):
            raise TrajectoryError(
                f"{self.path} changes its optimizer after step {self.step}, which cannot be "
                "replayed."
            )
        self._session, self._groups = session, []

    def _take(self, record: StepRecord) -> None:
        """Replay one optimizer step."""
        if record.rules is not None:
            self._perturbation = rules.build(record.rules, self.parameters)
        for trace in record.traces:
            assert self._perturbation is not None
            update = regenerate(
                self._perturbation,
                record.seed,
                record.step,
                trace.rows.owner,
                trace.rows.query,
                trace.coefficients,
                trace.rows.group,
                trace.chunks,
            )
            self._perturbation.vector.add_to_gradients(update * trace.factor / trace.normalizer)
        self._groups = [
            {**old, **new}
            for old, new in zip(
                self._groups or [{}] * len(record.groups), record.groups, strict=True
            )
        ]
        if self._optimizer is None:
            self._optimizer = optimizers.build(
                self._session["optimizer"], self._groups, self.parameters
            )
        for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update({**optimizers.restored(values), "params": group["params"]})
        if self._session["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(
                list(self.parameters.values()), self._session["max_grad_norm"]
            )
        self._optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the adapter's file by their names in it."""
        trained = {name: parameter.detach() for name, parameter in self.parameters.items()}
        if self.says["adapter"] is None:
            return trained
        return {
            key: trained[name] if name else self._first(f"file:{key}")
            for key, name in self._files().items()
        }

    def save(self, folder: str | Path) -> Path:
        """Write the adapter as PEFT does, or the trainable tensors; return the file.

        Raises:
            TrajectoryError: the file cannot be written.
        """
        folder, adapter = Path(folder), self.says["adapter"]
        path = folder / (TRAINABLE_FILE if adapter is None else "adapter_model.safetensors")
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata={"format": "pt"})
            if adapter is not None:
                (folder / "adapter_config.json").write_text(
                    json.dumps(adapter["config"], indent=2, sort_keys=True)
                )
        except (OSError, SafetensorError) as error:
            raise TrajectoryError(f"The adapter cannot be written to {folder}: {error}.") from error
        return path


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Set torch's number of threads inside the context, because parallel sums depend on it."""
    before = torch.get_num_threads()
    if before != number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if before != number:
            torch.set_num_threads(before)


def replay(path: str | Path, folder: str | Path | None = None, step: int | None = None) -> Replay:
    """Rebuild the adapter after a step (by default the last one), and write it to a folder.

    Args:
        path: the log, or the output folder that contains it.
        folder: where the adapter is saved; None to save nothing.
        step: the step.

    Raises:
        TrajectoryError: the log is damaged or has no such step, or the rebuilt adapter differs from
            the trained one (then nothing is written), or it cannot be written.

    Examples:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from transformers import PrinterCallback
        >>> from hf_flops import FlopsTrainer, FlopsTrainingArguments
        >>> from hf_flops.trajectory.replay import replay
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(1, 2)
        ...     def forward(self, x, labels):
        ...         logits = self.layer(x)
        ...         return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        >>> model, data = Model(), [{"x": [i - 3.5], "labels": i // 4} for i in range(8)]
        >>> options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
        >>> with TemporaryDirectory() as folder:
        ...     args = FlopsTrainingArguments(folder, max_steps=2, trajectory_log=True, **options)
        ...     trainer = FlopsTrainer(model=model, args=args, train_dataset=data)
        ...     trainer.remove_callback(PrinterCallback)
        ...     result = trainer.train()
        ...     rebuilt = replay(folder)
        >>> torch.equal(rebuilt.parameters["layer.weight"], model.layer.weight)
        True
    """
    rebuilt = Replay(path)
    for record in rebuilt.run(step):
        departed = rebuilt.departed(record)
        if departed:
            raise TrajectoryError(
                f"The replay departs from the training at step {rebuilt.step}, in "
                f"{', '.join(departed[:3])}"
                f"{f' and {len(departed) - 3} more' if len(departed) > 3 else ''}: "
                f"{rebuilt.surroundings()}"
            )
    if folder is not None:
        rebuilt.save(folder)
    return rebuilt
