"""Numbers that a run measures with its first batches: rows per forward, idle padding, epsilon."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..base.batch import Inputs
from ..base.state import flag, number
from ..core.chunking import ChunkPlanner
from ..core.method import FinishedBatch, Method
from ..objectives import Forward, Objective
from .epsilon import STEP_GRID, calibrate, look
from .padding_check import padding_is_idle, with_cropping
from .protocol import RunArguments, State
from .queries_per_sample import AutoQueries

logger = logging.getLogger(__name__)
_CLEAR = 2.0  # signal-to-noise ratio of differences below which rounding is told


def first_scale(args: RunArguments, precision: float) -> float:
    """Return the epsilon that the arguments give, or that a run starts from at this precision."""
    scale = args.perturbation_scale
    if isinstance(scale, (int, float)):
        return scale
    return 1e-3 if precision < 1e-3 else 1e-2


class Tuning:
    """Completes the method of each step with what the run has measured so far.

    Args:
        rows: rows per forward pass, or None to measure them.
        memory: bytes that a forward pass may take on top of the model, or None for most of what is
            free.
        scale: whether to measure epsilon; None for a piecewise constant objective only.
        look: whether to look at the default epsilon, and take a smaller one where curvature shows,
            a larger one where rounding does.
        trim: whether padding may be cut off.
        queries: chooses the queries per sample; None where the arguments fix them.

    Attributes:
        rows: rows that the search for epsilon took and the ledger does not count yet.
        found: epsilon and its signal-to-noise ratio, by name, for the log.
        scale: epsilon of the last method that was completed; None before the first.
        looked: epsilon that a look at the default has led to; None before it.
    """

    def __init__(
        self,
        rows: int | None = None,
        memory: float | None = None,
        *,
        scale: bool | None = False,
        look: bool = False,
        trim: bool = True,
        queries: AutoQueries | None = None,
    ) -> None:
        self.planner = ChunkPlanner(rows, memory)
        self.rows, self.found, self._calibrating = 0, dict[str, float](), scale
        self.scale: float | None = None
        self._looking = look
        self.looked: float | None = None
        self._trim, self.queries = trim, queries
        # side → whether the loss is the same without its padding, for sides that were checked
        self.idle: dict[str, bool] = {}

    @classmethod
    def of(cls, args: RunArguments, objective: Objective | None = None) -> Tuning:
        """Start from a run's arguments, and its objective if that is known."""
        memory = None if args.memory_limit_gb is None else args.memory_limit_gb * 1e9
        rows = args.rows_per_forward
        # Noise on the outputs of many tokens depends on their number.
        trim = args.perturbation != "activation" and not (
            objective is not None and objective.generates
        )
        given = args.perturbation_scale
        return cls(
            rows if isinstance(rows, int) else None,
            memory,
            scale=None if given is None else given == "auto",
            look=given is None,
            trim=trim,
            queries=AutoQueries() if args.queries_per_sample == "auto" else None,
        )

    def complete(
        self,
        method: Method,
        forward: Forward,
        inputs: Inputs,
        *,
        precision: float = 1e-4,
        seed: int = 0,
        fetches: bool = False,
    ) -> Method:
        """Return the method with all numbers filled in; runs the model to measure missing ones.

        Args:
            method: the method as far as the arguments fix it.
            forward: runs the model, in evaluation mode, without gradients.
            inputs: a batch.
            precision: relative error of a loss that rounding alone can cause.
            seed: the run's seed.
            fetches: whether every forward fetches weights.
        """
        perturbation = method.perturbation
        self.planner.prepare(perturbation.vector.device, perturbation.row_bytes, fetches=fetches)
        surrogate = method.objective.surrogate
        # With all rows in one forward there is little padding that all have, and checks fetch too.
        trims = self._trim and not method.objective.numbered and not fetches
        if method.objective.per_row and trims:
            self.idle.update(
                padding_is_idle(surrogate, forward, inputs, precision, known=set(self.idle))
            )
        sides = frozenset(side for side, idle in self.idle.items() if idle)
        method = replace(method, rows_per_forward=self.planner, trimmed=sides)
        if sides and method.reuse.modules and method.reuse.crop_padding is None:
            reuse = with_cropping(method.reuse, surrogate, forward, inputs, sides, precision)
            method = replace(method, reuse=reuse)
        steps = method.objective.piecewise_constant
        if (steps if self._calibrating is None else self._calibrating) and not self.found:
            self._calibrate(method, forward, inputs, seed)
        if self._looking and self.looked is None and not method.objective.piecewise_constant:
            self._look(method, forward, inputs, seed)
        self.scale = self.found.get("perturbation_scale", self.looked or method.scale)
        return replace(method, scale=self.scale)

    def queries_at(self, step: int, args: RunArguments) -> int:
        """Return the rows per sample of an optimizer step, once all steps before it are done."""
        return int(args.queries_per_sample) if self.queries is None else self.queries.at(step)

    def observe(self, finished: FinishedBatch) -> None:
        """Learn from a finished batch how many queries are worth their rows."""
        method = finished.method
        if self.queries is not None and method is not None and not method.clean_only:
            self.queries.update(finished.result, method)

    def agree(self, scale: float) -> None:
        """Take another process's epsilon for the measured one."""
        self.scale = scale
        if "perturbation_scale" in self.found:
            self.found["perturbation_scale"] = scale
        if self.looked is not None:
            self.looked = scale

    def _look(self, method: Method, forward: Forward, inputs: Inputs, seed: int) -> None:
        """Take another epsilon than the default where that is too large or small, and say so."""
        self.looked, bend, ratio = look(forward, inputs, method, seed)
        if self.looked != method.scale:
            logger.warning(
                "perturbation_scale is %.2g: at the default, %.2g, %s changes the differences by "
                "%.0f %%. Give a number to choose it yourself.",
                self.looked,
                method.scale,
                "curvature" if self.looked < method.scale else "rounding of the loss",
                min(100 * bend, 999),
            )
        if ratio < _CLEAR:
            logger.warning(
                "The loss rounds so coarsely that at no perturbation_scale that was tried are the "
                "differences %g times as large as their error (%.2g times at %.2g): the run may "
                "learn nothing. Where the base quantises activations, quantise weights only; "
                'otherwise, estimator="antithetic" with perturbation_scale="auto" bears more.',
                _CLEAR,
                ratio,
                self.looked,
            )

    def _calibrate(self, method: Method, forward: Forward, inputs: Inputs, seed: int) -> None:
        result = calibrate(forward, inputs, method, seed)
        steps = method.objective.piecewise_constant
        scale = method.scale if result.scale is None else result.scale
        self.rows += result.rows
        self.found = {
            "perturbation_scale": scale,
            "changed_queries" if steps else "difference_signal_to_noise": result.signal_to_noise,
        }
        if steps and result.scale is None:
            logger.warning(
                "No query of the first batch changes the objective at any perturbation_scale up "
                "to %.2g; training uses %.2g. There is no gradient to estimate of an objective "
                "that noise does not change: start with a smoother one.",
                STEP_GRID[-1],
                scale,
            )
        if not steps and result.signal_to_noise < 1:
            logger.warning(
                "perturbation_scale='auto' found no step at which differences are larger than "
                "their error (signal to noise %.2g); training uses %.2g. Pass a piecewise constant "
                "loss, such as accuracy, as a Metric.",
                result.signal_to_noise,
                scale,
            )

    def state_dict(self) -> State:
        """Return what a resume needs, as JSON-serialisable values."""
        return {
            "chunks": self.planner.state_dict(),
            "padding": self.idle,
            "found": self.found,
            "looked": self.looked,
            "queries": None if self.queries is None else self.queries.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self.planner.load_state_dict(state["chunks"])
        self.idle = {str(side): flag(idle) for side, idle in state["padding"].items()}
        self.found = {str(name): number(value, 0) for name, value in state["found"].items()}
        if self.found.get("perturbation_scale") == 0:
            raise ValueError("perturbation_scale is 0")
        self.looked = None if state["looked"] is None else number(state["looked"], 1e-300)
        if self.queries is not None and state["queries"] is not None:
            self.queries.load_state_dict(state["queries"])
