"""A learning rate that is found while training: a multiplier of the schedule, and a way back where
it was far off.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..autotune.line_search import MOST_LOOKS, SHORTER, Found, line_search
from ..autotune.protocol import Batch, GradientSession
from ..distributed.collectives import ProcessGroup
from ..errors import ConfigurationError
from ..perturbations import ParameterVector

logger = logging.getLogger("hf_flops.trainer")
MOST_STEPS = 32  # of a window
# factors that a window of up to 8 steps may have, and a longer one
_EARLY, _LATE = (1 / 8, 64.0), (1 / 4, 4.0)


class RateSearch(TrainerCallback):
    """Multiplies the rates of a schedule for the optimizer step, and adapts the multiplier by line
    searches.

    A single estimated step says little about its length, so the way of several is judged:
    parameters are kept, and after a window of 1, 2, 4, ... 32 optimizer steps the loss of the next
    batch, whose samples the window did not see, is compared along the line from there to here and
    beyond. If another length is clearly better, parameters go there, and the multiplier takes its
    factor. What a rate that was far too large has destroyed is thus undone, and so is what the
    optimizer remembers of it.

    Attributes:
        multiplier: what the schedule's rates are multiplied by.
        window: optimizer steps until the next search.
        judges: batches that a search looks at; where there are none, it is the next one.
    """

    _line = staticmethod(line_search)
    judges: Sequence[Batch] = ()

    def __init__(self) -> None:
        self.multiplier, self.window = 1.0, 1
        # since the window began: optimizer steps, sum of the schedule's rates
        self._steps, self._rates = 0, 0.0
        self._names: list[str] = []  # of the parameters
        self._start: list[Tensor] = []  # parameters where it began
        self._state: list[Any] = []  # what the optimizer remembered of each of them there
        self._seen = -1  # the optimizer step that was last asked about
        self._stock: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Multiply the rates."""
        groups = kwargs["optimizer"].param_groups
        self._stock = [group["lr"] for group in groups]
        if any(rate is None for rate in self._stock):
            raise ConfigurationError(
                "learning_rate_search multiplies the optimizer's learning rates, but "
                f"{args.optim!s} has none: choose another optim, or switch the search off."
            )
        for group, rate in zip(groups, self._stock, strict=True):
            group["lr"] = rate * self.multiplier
        self._steps, self._rates = self._steps + 1, self._rates + float(self._stock[0])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the rates to the schedule again."""
        for group, rate in zip(kwargs["optimizer"].param_groups, self._stock, strict=True):
            group["lr"] = rate

    def due(self, step: int, vector: ParameterVector, optimizer: Any) -> bool:
        """Say whether a search is due before an optimizer step, and begin the first window, or one
        of other parameters.
        """
        if step == self._seen:
            return False
        self._seen = step
        if self._names != vector.names:
            self._begin(vector, optimizer)
        return self._steps >= self.window and self._rates > 0

    def step(
        self,
        session: GradientSession,
        batch: Batch,
        vector: ParameterVector,
        optimizer: Any,
        group: ProcessGroup,
        *,
        planned: int,
        left: float,
    ) -> int:
        """Search before an optimizer step, where that is due and the budget allows it; returns the
        rows that it took.

        Args:
            session: gives the losses.
            batch: the next one.
            vector: the trained parameters.
            optimizer: the optimizer.
            group: the processes; all do what the first of them finds.
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
            found = self.search(losses, vector, optimizer, group.broadcast)
        return found.looks * sum(judge.samples for judge in judges)

    def search(
        self, losses: Callable[[], Tensor], vector: ParameterVector, optimizer: Any, agree: Any
    ) -> Found:
        """Search along the window's way, and go where it is best.

        Args:
            losses: returns those of the same samples (B,) with the parameters as they are.
            vector: the trained parameters; they are bit for bit what they were if `losses` raises.
            optimizer: the optimizer.
            agree: returns what process 0 found.
        """
        now = [parameter.detach().clone() for parameter in vector.parameters]

        def at(length: float) -> Tensor:
            self._go(vector, now, length)
            return losses()

        with _kept(vector, now):
            found = agree(self._line(at))
        if found.clear:
            self._go(vector, now, found.best)
            self._learn(found.best, vector, optimizer)
        else:
            self.window = min(2 * self.window, MOST_STEPS)
        self._begin(vector, optimizer)
        return found

    def _go(self, vector: ParameterVector, now: list[Tensor], length: float) -> None:
        """Put the parameters at a length of the window's way, which is 1 where they are `now`."""
        for parameter, old, new in zip(vector.parameters, self._start, now, strict=True):
            old = old.to(new.device)
            parameter.data.copy_(new if length == 1 else old + length * (new - old))

    def _learn(self, best: float, vector: ParameterVector, optimizer: Any) -> None:
        """Take up the factor of a length that is clearly better than 1."""
        group, mean = optimizer.param_groups[0], self._rates / self._steps
        rate, before = float(group["lr"]), self.multiplier
        least, most = self._bounds()
        factor = min(max(best, least), most)
        if factor > 1 and rate > 1.001 * mean:  # a warmup, which will multiply the rate itself
            self.multiplier = max(
                before, before * factor * mean / max(rate, float(group.get("initial_lr", rate)))
            )
        else:
            self.multiplier = before * factor
        if factor in (least, most):  # far off: the sooner the next look, the better
            self.window = max(1, self.window // 2)
        if best < SHORTER[0]:
            state = getattr(optimizer, "optimizer", optimizer).state
            for parameter, kept in zip(vector.parameters, self._state, strict=True):
                state.pop(parameter, None)
                # moments are where their parameter is, also in a run that was resumed; steps are
                # anywhere
                if kept:
                    state[parameter] = {
                        name: _beside(value, parameter) for name, value in kept.items()
                    }
        logger.info(
            "Learning rate x %.3g, after a window of %d steps.", self.multiplier, self._steps
        )

    def _bounds(self) -> tuple[float, float]:
        """Return the least and the largest factor that the window may give."""
        return _EARLY if self._steps <= 8 else _LATE

    def _begin(self, vector: ParameterVector, optimizer: Any) -> None:
        """Begin a window."""
        self._steps, self._rates, self._names = 0, 0.0, vector.names
        self._start = [parameter.detach().clone() for parameter in vector.parameters]
        state = getattr(optimizer, "optimizer", optimizer).state
        self._state = [copy.deepcopy(state.get(parameter, {})) for parameter in vector.parameters]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs."""
        numbers = {
            "multiplier": self.multiplier,
            "window": self.window,
            "steps": self._steps,
            "rates": self._rates,
        }
        return {**numbers, "names": self._names, "start": self._start, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        self.multiplier, self.window = state["multiplier"], state["window"]
        self._steps, self._rates, self._names = state["steps"], state["rates"], state["names"]
        self._start, self._state = state["start"], state["state"]


def _beside(value: Any, parameter: Tensor) -> Any:
    return value.to(parameter.device) if torch.is_tensor(value) and value.dim() else value


@contextmanager
def _kept(vector: ParameterVector, now: list[Tensor]) -> Iterator[None]:
    """Bring the parameters back to `now`, whatever happens."""
    try:
        yield
    finally:
        for parameter, value in zip(vector.parameters, now, strict=True):
            parameter.data.copy_(value)
