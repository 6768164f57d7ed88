"""A learning rate that is found while training: a multiplier of the schedule, and a way back where it was far off."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from .clean import clean_forward
from .errors import ConfigurationError
from .line_search import MOST_LOOKS, SHORTER, Found, line_search
from .method import Method
from .objectives import Forward
from .padding import Feed
from .perturbations import ParameterVector
from .reuse import Reuse
from .rows import batch_size

logger = logging.getLogger("hf_flops.trainer")
RATE_FILE = "flops_rate.safetensors"
MOST_STEPS = 32  # of a window
_EARLY, _LATE = (1 / 8, 64.0), (1 / 4, 4.0)  # factors that a window of up to 8 steps may have, and a longer one


class RateSearch(TrainerCallback):
    """Multiplies the rates of a schedule for the optimizer step, and adapts the multiplier by line searches.

    A single estimated step says little about its length, so the way of several is judged: parameters are kept, and after a
    window of 1, 2, 4, ... 32 optimizer steps the loss of the next batch, whose samples the window did not see, is compared
    along the line from there to here and beyond. If another length is clearly better, parameters go there, and the
    multiplier takes its factor. What a rate that was far too large has destroyed is thus undone, and so is what the
    optimizer remembers of it.

    Attributes:
        multiplier: what the schedule's rates are multiplied by.
        window: optimizer steps until the next search.
    """

    _line = staticmethod(line_search)

    def __init__(self) -> None:
        self.multiplier, self.window = 1.0, 1
        self._steps, self._rates = 0, 0.0  # since the window began: optimizer steps, sum of the schedule's rates
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
                f"learning_rate_search multiplies the optimizer's learning rates, but {args.optim!s} has none: choose "
                "another optim, or switch the search off."
            )
        for group, rate in zip(groups, self._stock, strict=True):
            group["lr"] = rate * self.multiplier
        self._steps, self._rates = self._steps + 1, self._rates + float(self._stock[0])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the rates to the schedule again."""
        for group, rate in zip(kwargs["optimizer"].param_groups, self._stock, strict=True):
            group["lr"] = rate

    def due(self, step: int, vector: ParameterVector, optimizer: Any) -> bool:
        """Say whether a search is due before an optimizer step, and begin the first window, or one of other parameters."""
        if step == self._seen:
            return False
        self._seen = step
        if self._names != vector.names:
            self._begin(vector, optimizer)
        return self._steps >= self.window and self._rates > 0

    def search(self, losses: Callable[[], Tensor], vector: ParameterVector, optimizer: Any, agree: Any) -> Found:
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
            self.multiplier = max(before, before * factor * mean / max(rate, float(group.get("initial_lr", rate))))
        else:
            self.multiplier = before * factor
        if factor in (least, most):  # far off: the sooner the next look, the better
            self.window = max(1, self.window // 2)
        if best < SHORTER[0]:
            state = getattr(optimizer, "optimizer", optimizer).state
            for parameter, kept in zip(vector.parameters, self._state, strict=True):
                state.pop(parameter, None)
                if kept:  # moments are where their parameter is, also in a run that was resumed; steps are anywhere
                    state[parameter] = {name: _beside(value, parameter) for name, value in kept.items()}
        logger.info("Learning rate x %.3g, after a window of %d steps.", self.multiplier, self._steps)

    def _bounds(self) -> tuple[float, float]:
        """Return the least and the largest factor that the window may give."""
        return _EARLY if self._steps <= 8 else _LATE

    def _begin(self, vector: ParameterVector, optimizer: Any) -> None:
        """Begin a window."""
        self._steps, self._rates, self._names = 0, 0.0, vector.names
        self._start = [parameter.detach().clone() for parameter in vector.parameters]
        state = getattr(optimizer, "optimizer", optimizer).state
        self._state = [copy.deepcopy(state.get(parameter, {})) for parameter in vector.parameters]

    def save(self, folder: str) -> None:
        """Write what a resume needs into a folder."""
        numbers = {"multiplier": self.multiplier, "window": self.window, "steps": self._steps, "rates": self._rates}
        tensors, state = {f"start.{i}": value for i, value in enumerate(self._start)}, []
        for i, kept in enumerate(self._state):
            tensors |= {f"state.{i}.{name}": value for name, value in kept.items() if torch.is_tensor(value)}
            state.append({name: value for name, value in kept.items() if not torch.is_tensor(value)})
        about = {"numbers": json.dumps({**numbers, "names": self._names, "state": state})}
        save_file({name: value.contiguous() for name, value in tensors.items()}, Path(folder, RATE_FILE), about)

    def load(self, folder: str | None) -> None:
        """Take up what `save` wrote, if it did."""
        if folder is None or not (path := Path(folder, RATE_FILE)).is_file():
            return
        with safe_open(path, "pt") as file:
            found = json.loads(file.metadata()["numbers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        self.multiplier, self.window = found["multiplier"], found["window"]
        self._steps, self._rates, self._state = found["steps"], found["rates"], found["state"]
        self._names = found.get("names", [])  # an older version did not keep them
        self._start = [tensors[f"start.{i}"] for i in range(len(self._state))]
        for name, value in tensors.items():
            kind, i, *rest = name.split(".", 2)
            if kind == "state":
                self._state[int(i)][rest[0]] = value


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


class SearchesRate:
    """The part of a trainer that searches for its learning rate; to be put before a class derived from `Trainer`."""

    _rate: RateSearch | None = None
    _judges: Sequence[Any] = ()  # batches that a search looks at; where there are none, it is the next one

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train with a new search, if one is wanted."""
        self.remove_callback(RateSearch)
        self._rate = self._new_search() if self.args.learning_rate_search else None
        if self._rate is not None:
            self.add_callback(self._rate)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _new_search(self) -> RateSearch:
        return RateSearch()

    def _search_rate(self: Any, forward: Forward, inputs: Any, method: Method) -> None:
        """Search before an optimizer step, where that is due and the budget allows it; every row is charged."""
        if self._rate is None:
            return
        if method is None:
            raise ConfigurationError(
                "learning_rate_search needs a loss per batch, not queries of single images and texts: give learning_rate a "
                'number, or use perturbation="shared".'
            )
        step, samples, vector = self.state.global_step, batch_size(inputs), ParameterVector.of(self.model)
        if not self._rate.due(step, vector, self.optimizer):
            return
        planned = samples * self.args.gradient_accumulation_steps * self._queries_at(step)
        if planned + MOST_LOOKS * samples > self._budget.left:
            return
        before, ids = (self.ledger.all_rows, self.ledger.tokens), None if self._ids is None else tuple(self._ids)
        if self._judges:  # what is known of the next batch says nothing of these
            method, ids = replace(method, reuse=Reuse()), None
        feeds = [Feed(batch, method.trimmed) for batch in self._judges or [inputs]]
        sizes = [batch_size(feed.whole) for feed in feeds]

        def losses() -> Tensor:
            found = [
                clean_forward(forward, method, size, feed, method.rows_per_forward)  # type: ignore[arg-type]
                for size, feed in zip(sizes, feeds, strict=True)
            ]
            return torch.cat([clean.losses.sums for clean in found])

        with method.reuse.installed():
            method.reuse.prepare(forward, feeds[0].whole, ids)
            found = self._rate.search(losses, vector, self.optimizer, self._share.first)
        self.ledger.rows += found.looks * sum(sizes)
        self._count_together(before, found.looks * sum(sizes))

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the stock trainer does: the rate with the multiplier in it, and the multiplier."""
        if self._rate is not None and "learning_rate" in logs:
            factor = self._rate.multiplier
            logs = {**logs, "learning_rate": logs["learning_rate"] * factor, "learning_rate_multiplier": factor}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._rate is not None and self.args.should_save:
            self._rate.save(output_dir)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self._rate is not None:
            self._rate.load(checkpoint)
