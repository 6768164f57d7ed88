"""A search for the learning rate while training, which undoes steps that were far too long."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..autotune.line_search import MOST_LOOKS, SHORTER, Found, line_search
from ..autotune.protocol import Batch, GradientSession
from ..base.state import State, finite, number, whole
from ..distributed.collectives import ProcessGroup
from ..errors import ConfigurationError
from ..perturbations import ParameterVector
from .rate_multiplier import RateMultiplier

logger = logging.getLogger("hf_flops.trainer")
# name in a checkpoint → attribute
_STATE = {
    "multiplier": "multiplier",
    "window": "window",
    "steps": "window_steps",
    "rates": "window_rates",
    "names": "_names",
    "start": "_start",
    "state": "_state",
}
_CHECKS: dict[str, Callable[[Any], object]] = {
    "multiplier": partial(number, least=0),
    "window": partial(whole, least=1),
    "steps": whole,
    "rates": partial(number, least=0),
    "names": lambda names: [str(name) for name in names],
    "start": lambda start: [finite(value) for value in start],
    "state": lambda states: [dict(state) for state in states],
}
Agree: TypeAlias = Callable[[Found], Found]  # returns what process 0 found
MOST_STEPS = 32  # of a window
# least and largest factor of a window of up to 8 steps, and of a longer one
_EARLY, _LATE = (1 / 8, 64.0), (1 / 4, 4.0)


class RateSearch(RateMultiplier):
    """Multiplies the rates of a schedule, and adapts the multiplier by line searches.

    One estimated step says little about its length, so a search judges several at once. It keeps
    the parameters, and after a window of 1, 2, 4, ... 32 optimizer steps compares the loss of the
    next batch, whose samples the window did not use, along the line from the kept parameters
    through the current ones and beyond. If another length is clearly better, the parameters move
    there and the multiplier takes its factor. This undoes the damage of a rate that was far too
    large; the optimizer's state of those steps is dropped too.

    Attributes:
        multiplier: factor of the schedule's rates.
        window: optimizer steps until the next search.
        window_steps: optimizer steps since the window began.
        window_rates: sum of the schedule's rates in these.
        judges: batches whose losses a search compares; the next one where there are none.
    """

    _line = staticmethod(line_search)
    judges: Sequence[Batch] = ()

    def __init__(self) -> None:
        super().__init__()
        self.window = 1
        self.window_steps, self.window_rates = 0, 0.0
        self._names: list[str] = []  # of the parameters
        self._start: list[Tensor] = []  # the parameters when the window began
        self._state: list[State] = []  # the optimizer's state of each of them then
        self._last_step = -1  # that `due` was asked about

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Multiply the rates, and count them."""
        rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        if any(rate is None for rate in rates):
            raise ConfigurationError(
                "learning_rate_search multiplies the optimizer's learning rates, but "
                f"{args.optim!s} has none: choose another optim, or switch the search off."
            )
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.window_steps += 1
        self.window_rates += float(rates[0])

    def due(self, step: int, vector: ParameterVector, optimizer: Optimizer) -> bool:
        """Return whether a search is due before a step; new parameters begin a new window."""
        if step == self._last_step:
            return False
        self._last_step = step
        if self._names != vector.names:
            self.begin(vector, optimizer)
        return self.window_steps >= self.window and self.window_rates > 0

    def step(
        self,
        session: GradientSession,
        batch: Batch,
        vector: ParameterVector,
        optimizer: Optimizer,
        group: ProcessGroup,
        *,
        planned: int,
        left: float,
    ) -> int:
        """Search before an optimizer step, if due and affordable; return the rows that it took.

        Args:
            session: computes the losses.
            batch: the next one.
            vector: the trained parameters.
            optimizer: the optimizer.
            group: the processes; all follow the result of the first.
            planned: rows of the coming optimizer step.
            left: rows that may still go through the model.
        """
        if (
            not self.due(batch.step, vector, optimizer)
            or planned + MOST_LOOKS * batch.samples > left
        ):
            return 0
        judges = self.judges or [batch]
        with session.unperturbed(judges) as losses:
            result = self.search(losses, vector, optimizer, group.broadcast)
        return result.looks * sum(judge.samples for judge in judges)

    def search(
        self,
        losses: Callable[[], Tensor],
        vector: ParameterVector,
        optimizer: Optimizer,
        agree: Agree,
    ) -> Found:
        """Search along the line of the window, and move the parameters to the best length.

        Args:
            losses: returns the losses (B,) of the same samples with the parameters of the moment.
            vector: the trained parameters; they are restored bit for bit if `losses` raises.
            optimizer: the optimizer.
            agree: returns the result of process 0.
        """
        now = [parameter.detach().clone() for parameter in vector.parameters]

        def at(length: float) -> Tensor:
            self._go(vector, now, length)
            return losses()

        try:
            result = agree(self._line(at))
        finally:
            self._go(vector, now, 1.0)
        if result.clear:
            self._go(vector, now, result.best)
            self.take_up(result.best, vector, optimizer)
        else:
            self.window = min(2 * self.window, MOST_STEPS)
        self.begin(vector, optimizer)
        return result

    def _go(self, vector: ParameterVector, now: list[Tensor], length: float) -> None:
        """Move the parameters to a length of the window's line: 0 at its start, 1 at `now`."""
        for parameter, old, new in zip(vector.parameters, self._start, now, strict=True):
            old = old.to(new.device)
            parameter.data.copy_(new if length == 1 else old + length * (new - old))

    def take_up(self, best: float, vector: ParameterVector, optimizer: Optimizer) -> None:
        """Adapt the multiplier to a length that is clearly better than 1."""
        group, mean = optimizer.param_groups[0], self.window_rates / self.window_steps
        rate, before = float(group["lr"]), self.multiplier
        least, most = self._bounds()
        factor = min(max(best, least), most)
        if factor > 1 and rate > 1.001 * mean:  # in a warmup, which raises the rate itself
            self.multiplier = max(
                before, before * factor * mean / max(rate, float(group.get("initial_lr", rate)))
            )
        else:
            self.multiplier = before * factor
        if factor in (least, most):  # far off: search again soon
            self.window = max(1, self.window // 2)
        if best < SHORTER[0]:
            state = getattr(optimizer, "optimizer", optimizer).state
            for parameter, moments in zip(vector.parameters, self._state, strict=True):
                state.pop(parameter, None)
                # moments are on the parameter's device, also in a resumed run; steps on any
                if moments:
                    state[parameter] = {
                        name: _beside(value, parameter) for name, value in moments.items()
                    }
        logger.info(
            "Learning rate x %.3g, after a window of %d steps.", self.multiplier, self.window_steps
        )

    def _bounds(self) -> tuple[float, float]:
        """Return the least and the largest factor of the window."""
        return _EARLY if self.window_steps <= 8 else _LATE

    def begin(self, vector: ParameterVector, optimizer: Optimizer) -> None:
        """Begin a window."""
        self.window_steps, self.window_rates = 0, 0.0
        self._names = vector.names
        self._start = [parameter.detach().clone() for parameter in vector.parameters]
        state = getattr(optimizer, "optimizer", optimizer).state
        self._state = [copy.deepcopy(state.get(parameter, {})) for parameter in vector.parameters]

    def state_dict(self) -> State:
        """Return what a resume needs."""
        return {name: getattr(self, attribute) for name, attribute in _STATE.items()}

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        for name, check in _CHECKS.items():
            check(state[name])
        if len({len(state[name]) for name in ("names", "start", "state")}) > 1:
            raise ValueError("names, start and state are not of the same tensors")
        for name, attribute in _STATE.items():
            setattr(self, attribute, state[name])


def _beside(value: object, parameter: Tensor) -> object:
    """Return the value on the parameter's device, if it is a tensor with dimensions."""
    return value.to(parameter.device) if torch.is_tensor(value) and value.dim() else value
