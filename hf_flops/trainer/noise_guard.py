"""A guard against a learning rate at which noise undoes more than the signal achieves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..autotune.protocol import GradientSession
from ..base.state import State, finite, number, whole
from ..estimators import HeadSolver
from ..perturbations import ParameterVector
from .rate_multiplier import RateMultiplier

logger = logging.getLogger("hf_flops.trainer")
# A loss above the lowest one by these factors is too much: in the first round, and later.
_FIRST, _LATER = 1.25, 1.1


class NoiseGuard(RateMultiplier):
    """Goes back to the best parameters, and halves the learning rates, where training raises the
    loss of the training samples under a solved head.

    That loss needs no forward pass: see `HeadSolver.objective`. It is compared once per round of
    all samples, which must have ids, so that the same samples are compared. The first value is that
    of the untrained adapter.

    Args:
        session: returns the session of the run.

    Attributes:
        multiplier: factor of the schedule's rates.
        lowest: the lowest mean loss of a round, None before the first.
    """

    def __init__(self, session: Callable[[], GradientSession]) -> None:
        super().__init__()
        self.session = session
        self.lowest: float | None = None
        self._best: dict[str, Tensor] = {}
        self._rounds = 0
        self._samples = self._start = self._steps = 0  # of the round
        self._sum = 0.0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Compare the loss with the lowest one, if a round is complete."""
        method = self.session().method
        if method is None or method.solver is None or method.solver.objective is None:
            return
        self.observe(method.solver, method.perturbation.vector, clean=method.clean_only)

    def observe(self, solver: HeadSolver, vector: ParameterVector, *, clean: bool) -> None:
        """Enter the solution after an optimizer step.

        Args:
            solver: has the loss.
            vector: the parameters that get noise.
            clean: whether the step was one of clean rows only.
        """
        assert solver.objective is not None
        parameters = dict(zip(vector.names, vector.parameters, strict=True))
        if clean or solver.samples != self._samples or self._best.keys() != parameters.keys():
            self._keep(solver.objective, parameters)
            self._begin(solver)
            self._rounds = 0
            return
        self._sum, self._steps = self._sum + solver.objective, self._steps + 1
        if solver.seen - self._start < solver.samples:
            return
        mean, self._rounds = self._sum / self._steps, self._rounds + 1
        self._begin(solver)
        assert self.lowest is not None
        if mean <= self.lowest:
            self._keep(mean, parameters)
        elif mean > self.lowest * (_FIRST if self._rounds == 1 else _LATER):
            self.multiplier /= 2
            logger.warning(
                "Training has raised the loss of the training samples from %.4g to %.4g: the "
                "parameters go back, and the learning rate becomes %g times the schedule's.",
                self.lowest,
                mean,
                self.multiplier,
            )
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(self._best[name])

    def scaled(self, logs: dict[str, float]) -> dict[str, float]:
        """See `RateMultiplier`; a run that needs no guard has the stock log."""
        return logs if self.multiplier == 1 else super().scaled(logs)

    def _keep(self, loss: float, parameters: Mapping[str, Tensor]) -> None:
        self.lowest = loss
        self._best = {name: value.detach().clone() for name, value in parameters.items()}

    def _begin(self, solver: HeadSolver) -> None:
        self._samples, self._start, self._steps, self._sum = solver.samples, solver.seen, 0, 0.0

    def state_dict(self) -> State:
        """Return what a resume needs."""
        numbers = [self._rounds, self._samples, self._start, self._steps, self._sum]
        loss = {"multiplier": self.multiplier, "lowest": self.lowest}
        return {**loss, "numbers": numbers, "best": self._best}

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self.multiplier, lowest = number(state["multiplier"], 0, 1), state["lowest"]
        self.lowest = None if lowest is None else number(lowest)
        *counts, total = state["numbers"]
        self._rounds, self._samples, self._start, self._steps = map(whole, counts)
        self._sum = number(total)
        self._best = {name: finite(value) for name, value in state["best"].items()}
