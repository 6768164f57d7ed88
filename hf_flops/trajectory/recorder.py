"""Writes the trajectory log while a run trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.state import State
from ..core.method import FinishedBatch
from ..errors import ConfigurationError
from ..perturbations import Perturbation
from ..perturbations.replay import UpdateRecord
from . import LOG_FILE, limits, optimizers, rules, start
from .framing import Appender, Record, read
from .records import StepRecord, changes, fingerprint, pack, unpack

logger = logging.getLogger(__name__)


class TrajectoryRecorder(TrainerCallback):
    """Records every optimizer step of a run in its output folder; see docs/trajectory.md."""

    def __init__(self) -> None:
        self._file: Appender | None = None
        self._trained: State = {}
        self._traces: list[UpdateRecord] = []
        self._seed = 0
        self._perturbation: Perturbation | None = None
        self._rules: rules.Description | None = None
        self._logged_rules: rules.Description | None = None  # the rules in the log
        self._groups: list[State] = []
        self._now: list[State] = []

    def observe(self, finished: FinishedBatch) -> None:
        """Record the contribution of a batch to the gradient of the next step."""
        assert finished.method is not None
        perturbation, trace = finished.method.perturbation, finished.result.trace
        if perturbation is not self._perturbation:
            self._rules, self._perturbation = rules.describe(perturbation), perturbation
        self._seed = finished.position.seed
        if trace is not None:
            self._traces.append(trace)

    @property
    def begun(self) -> bool:
        """Whether batches of the next step have been recorded."""
        return bool(self._traces)

    def discard(self) -> None:
        """Forget the batches of a step that is not taken."""
        self._traces = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the log, or continue it after the step of the checkpoint."""
        model, path = kwargs["model"], Path(str(args.output_dir), LOG_FILE)
        self.__init__()  # type: ignore[misc]
        self._trained = start.trainable(model)
        session = {
            "optimizer": optimizers.describe(
                kwargs["optimizer"], {id(p): name for name, p in self._trained.items()}
            ),
            "max_grad_norm": args.max_grad_norm,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "noise": rules.noise_print(),
            "device": next(iter(self._trained.values())).device.type,
        }
        if state.global_step == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = Appender(path)
            self._file.append(0, pack("start", *start.describe(model)))
        else:
            self._file = Appender(path, self._last(path, state.global_step))
        self._file.append(state.global_step, pack("session", session, {}))

    def _last(self, path: Path, step: int) -> Record:
        """Return the record of the checkpoint's step, and check that it matches the checkpoint."""
        last = None
        for record in read(path) if path.is_file() else ():
            if record.step > step:
                break
            last = record
        if last is None or last.step < step:
            reached = f"ends after step {last.step}" if last is not None else "is not there"
            raise ConfigurationError(
                f"trajectory_log cannot go on after step {step}, because {path} {reached}: put "
                "the log of the interrupted run there, or resume without trajectory_log."
            )
        with limits.refused(path, f"record {last.number}"):
            kind, says, tensors = unpack(last.payload)
            prints = StepRecord.unpack(says, tensors).fingerprints if kind == "step" else None
        if prints is not None and prints != self._prints():
            raise ConfigurationError(
                f"trajectory_log cannot go on after step {step}, because the checkpoint is not "
                f"what {path} led to: see hf-flops replay --verify."
            )
        logger.info("The trajectory log goes on after step %d.", step)
        return last

    def _prints(self) -> list[int]:
        return [fingerprint(parameter) for parameter in self._trained.values()]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the optimizer's arguments, as set by the scheduler."""
        self._now = optimizers.arguments(kwargs["optimizer"])
        if all(parameter.grad is None for parameter in self._trained.values()):
            self.discard()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Write the step's record."""
        if self._file is None:
            return
        record = StepRecord(
            self._seed,
            state.global_step,
            self._traces,
            None if self._rules == self._logged_rules else self._rules,
            changes(self._groups, self._now),
            self._prints(),
            self._perturbation is not None and self._perturbation.shares_noise,
        )
        self._file.append(state.global_step + 1, record.pack())
        self._traces, self._logged_rules, self._groups = [], self._rules, self._now

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Write the log to the disk before a checkpoint is saved."""
        if self._file is not None and (control.should_save or control.should_training_stop):
            self._file.sync()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Close the log."""
        if self._file is not None:
            self._file.close()
            self._file = None
