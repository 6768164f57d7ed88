"""The numbers of a trial, measured and suggested, each with a reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..autotune.first_batch import held_back
from ..base.rounding_error import precision_of
from ..perturbations import ParameterVector
from .trial import Trial

_OF_A_RUN = 2.0  # the best rate of a run over that of a few steps
# rates to begin with, by a part of tensors' names: see docs/choosing.md
_USUAL = {"lora_A": 1e-3, "lora_B": 1e-2, "prompt": 5e-3}


@dataclass(frozen=True)
class Fact:
    """A measured or suggested number, and where it comes from."""

    name: str
    value: float | None
    reason: str


def facts_of(trainer: Trial, target: float) -> Iterator[Fact]:
    """Yield the measured and the suggested numbers."""
    method, search, steps = trainer.session.method, trainer.search, trainer.state.global_step
    assert method is not None
    calibration = search.calibration
    precision = precision_of(trainer.model, autocast=trainer.args.bf16)
    frozen = held_back(trainer.model, trainer.args.lora_parts, progress=0.0)
    names = {*ParameterVector.of(trainer.model).names} - frozen
    trained = ParameterVector.of(trainer.model, names).size
    yield Fact("trained numbers", trained, "in the tensors above that are not held back")
    yield Fact(
        "precision",
        precision,
        f"relative rounding of a loss in {'16' if precision > 1e-3 else '32'} bits",
    )
    signal_to_noise = calibration.signal_to_noise
    if calibration.rows == 0:
        reason = "what training takes; there was no time to measure it"
    elif calibration.scale is None:
        reason = "no epsilon shows any signal"
    elif method.objective.piecewise_constant:
        reason = f"the least at which enough queries change the objective: {signal_to_noise:.0%}"
    else:
        reason = f"differences have the least error: signal to noise {signal_to_noise:.3g}"
    scale = method.scale if calibration.scale is None else calibration.scale
    yield Fact("epsilon", scale, reason)
    speeds = trainer.speeds[1:] or trainer.speeds
    yield Fact("rows per second", float(np.median(speeds)), f"median of {len(speeds)} steps")
    memory = trainer.megabytes if math.isfinite(trainer.megabytes) else None
    held = "of one step, above what the process held before"
    yield Fact("peak memory (MB)", memory, held if memory is not None else "not measured in time")
    signal, variance = np.array(trainer.signals or [(0.0, 1.0)]).mean(0).tolist()
    ratio = max(signal, 0.0) / max(variance, 1e-30)
    yield Fact(
        "signal to noise of a step",
        ratio,
        "squared gradient over variance, an exact head left out, "
        f"{method.queries_per_sample} rows for each of {trainer.args.train_batch_size} samples",
    )
    yield Fact(
        f"steps to signal to noise {target:g}",
        math.ceil(target / ratio) if ratio > 0 else None,
        "until their mean has it" if ratio > 0 else f"no signal in {steps} steps",
    )
    yield _learning_rate(trainer, names)
    yield Fact(
        "queries_per_sample",
        trainer.auto.at(steps),
        "most progress per row at this signal and noise, the exact head's included"
        if ratio > 0
        else "as many as help against noise, where no signal was seen; a larger batch or a smaller "
        "adapter may help more",
    )


def _learning_rate(trainer: Trial, names: set[str]) -> Fact:
    """Return the rate that line searches found, or the usual one if they may have seen noise."""
    search, steps = trainer.search, trainer.state.global_step
    usual = next((rate for part, rate in _USUAL.items() if any(part in n for n in names)), None)
    signals = np.array([signal for signal, _ in trainer.signals or [(0.0, 1.0)]])
    error = signals.std() / len(signals) ** 0.5 if len(signals) > 1 else math.inf
    if usual is not None and not signals.mean() > 2 * error:
        reason = "to begin with: no line search can be trusted where noise hides the signal"
        return Fact("learning_rate", usual, reason)
    rate = _OF_A_RUN * trainer.args.learning_rate * search.multiplier
    reason = (
        f"{_OF_A_RUN:g} times the result of {search.searches} line searches in {steps} steps: the "
        "best rate for few steps is too small for a run"
    )
    if not search.searches:
        reason = f"{_OF_A_RUN:g} times the rate of the trial, which was too short for a search"
    return Fact("learning_rate", float(f"{rate:.2g}"), reason)
