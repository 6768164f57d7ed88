"""The first batch's decisions in few forwards of few rows, where the usual answers are right.

Two explicit forwards, with the parameters at two points, and one with noise per row between them,
which also uses everything that saves work, prove at once that the loss moves, that it splits into
rows, that every rule is right, where logits are needed and what runs once per sample. Where
anything disagrees, the checks that go one by one decide.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..base.batch import Inputs, batch_size, misaligned, take
from ..base.calls import constants_of
from ..base.constants import Constants, Value, same_values
from ..base.prng import seeds
from ..base.probe import FAILURES, Attempt
from ..errors import in_one_line
from ..estimators.control_variate import MOST_LOGITS
from ..objectives import Forward, RowLossError, RowLosses, TappedLoss
from ..perturbations import NoiseKeys, ParameterVector, RowwiseNoise, displaced
from ..perturbations.activation import is_linear
from ..perturbations.sites import Site
from ..reuse import ReusePlan
from ..reuse.independence import Visits, trace
from ..reuse.labelled_logits import last_logits
from ..reuse.quick_plan import recordings
from .protocol import RunArguments
from .row_loss_check import (
    CHECK_SEED,
    TAPPED,
    most_different,
    moved_parameters,
    warn_of_equal_samples,
    with_fewer_labels,
)

logger = logging.getLogger(__name__)
_SCALES = (1.0, 3.0)  # tried in turn until the losses at both points differ clearly
# samples a and b, each at both points: no other order of the noise gives the same losses
_OWNER = torch.tensor([0, 1, 0, 1, 1])
_POINT = torch.tensor([0, 1, 1, 0, 1])


@dataclass(frozen=True)
class Proven:
    """What the forwards have proven right.

    Attributes:
        objective: the model's own loss.
        perturbation: of all tensors, per row.
        reuse: what runs once per sample.
    """

    objective: TappedLoss
    perturbation: RowwiseNoise
    reuse: ReusePlan


@dataclass
class _Explicit:
    """A forward of the rows a, b, b' without rules: their losses, the calls of modules, after which
    of them the loss is computed, and the values that it holds constant.
    """

    losses: list[RowLosses]
    visits: Visits
    late: TappedLoss
    constants: list[Value]


def prove(
    args: RunArguments,
    model: nn.Module,
    forward: Forward,
    inputs: Inputs,
    frozen: Collection[str],
    precision: float,
) -> Proven | None:
    """Return what is right for a model's own loss with noise per row, or None if that needs checks
    one by one.

    Args:
        args: the run's arguments.
        model: the model, in evaluation mode, gradients off.
        forward: runs the model and computes its loss.
        inputs: a batch.
        frozen: names of trainable tensors that stay as they are for now.
        precision: see `precision_of`.
    """
    names = set(ParameterVector.of(model).names) - set(frozen)
    usual = args.perturbation in ("auto", "rowwise") and args.prefix_cache is None
    if not names or not usual or misaligned(inputs):
        return None
    with Attempt("Checks go one by one"), moved_parameters(model):
        perturbation = RowwiseNoise(model, ParameterVector.of(model, names), args.noise)
        proof = _Proof(args, model, forward, inputs, perturbation, precision)
        proven = proof.run()
        if proven is not None:
            warn_of_equal_samples(proof.pair, inputs)
            logger.info(TAPPED)
        return proven
    return None


class _Proof:
    """The forwards, and their comparison."""

    def __init__(
        self,
        args: RunArguments,
        model: nn.Module,
        forward: Forward,
        inputs: Inputs,
        perturbation: RowwiseNoise,
        precision: float,
    ) -> None:
        self.args, self.model, self.forward, self.precision = args, model, forward, precision
        self.perturbation = perturbation
        index = most_different(inputs, torch.arange(batch_size(inputs)))
        self.pair = take(inputs, index)
        self.scale, self.losses = 0.0, list[RowLosses]()
        draws = seeds(CHECK_SEED, 3, _POINT.numpy())
        self.noise = perturbation.draw(NoiseKeys(draws, 0))

    def run(self) -> Proven | None:
        """Run the forwards and return what they prove."""
        points = self._at_two_points()
        if points is None or self._calls_for_more(points[0]):
            return None
        if not same_values(*(point.constants for point in points)):
            return None
        here, there = (point.visits for point in points)
        rows = take(self.pair, _OWNER)
        if not self.args.late_expansion or hasattr(self.model, "cached_texts"):
            return self._with_noise(ReusePlan(), self.forward, rows, points[0].late.after)
        for recording in recordings(self.model, self.forward, self.pair, here, there):
            rows = take(self.pair, _OWNER, recording.unread_inputs)
            run = recording.rows(rows, _OWNER)
            if proven := self._with_noise(recording.plan, run, rows, points[0].late.after):
                return proven
        return None

    def _at_two_points(self) -> list[_Explicit] | None:
        """Run the rows a, b, b' at two points between which the losses differ clearly; b' is b with
        fewer labels, if the model takes that.
        """
        for other in (with_fewer_labels(self.pair), self.pair):
            if other is None or any(isinstance(v, (list, tuple)) for v in other.values()):
                continue
            three = {
                name: torch.cat([value, other[name][1:]])
                if torch.is_tensor(value) and value.dim() > 0
                else value
                for name, value in self.pair.items()
            }
            try:
                found = map(partial(self._explicit, three), _SCALES)
                return next(filter(self._differ, found), None)
            except RowLossError:  # which may hold for fewer labels only
                return None
            except FAILURES as error:  # the model may know no such label
                logger.info("The quick checks failed: %s.", in_one_line(error))
        return None

    def _explicit(self, inputs: Inputs, scale: float) -> list[_Explicit]:
        """Run three rows with the parameters at two points."""
        points = []
        for point in range(2):
            losses, late = list[RowLosses](), TappedLoss()
            with displaced(self.perturbation.vector, scale * self.noise[point]):
                visits = list[Visits]()
                run = partial(self._traced, inputs, losses, visits, late)
                outputs, values = constants_of(self.model, run)
                points.append(_Explicit(losses, visits[0], late, [*outputs, *values]))
        self.scale, self.losses = scale, [point.losses[0] for point in points]
        return points

    def _traced(
        self,
        inputs: Inputs,
        losses: list[RowLosses],
        visits: list[Visits],
        late: TappedLoss,
        constants: Constants,
    ) -> None:
        """Run rows with the tap and note their losses and the calls of modules."""

        def forward(inputs: Inputs) -> tuple[Tensor | None, object]:
            with constants:
                return self.forward(inputs)

        def tapped(inputs: Inputs) -> tuple[None, None]:
            losses.append(TappedLoss(logits=True)(forward, inputs))
            return None, None

        listen = cast(Forward, partial(late.listen_late, self.model, tapped))
        visits.append(trace(self.model, listen, inputs))

    def _differ(self, points: list[_Explicit]) -> bool:
        """Return whether losses at both points differ by far more than rounding errors."""
        del points
        sums = torch.stack([losses.sums[:2] for losses in self.losses])
        change = float((sums[0] - sums[1]).abs().min())
        return change > 10 * self.precision * float(sums.abs().max())

    def _calls_for_more(self, explicit: _Explicit) -> bool:
        """Return whether a layer may be a head in closed form, or have less noise on its output."""
        args, logits = self.args, explicit.losses[0].logits
        shapes = {
            module: [shape for visit in visits for shape in visit.shapes if shape]
            for module, visits in explicit.visits.items()
        }
        pins = args.perturbation == "auto" and args.reduce != "scalars" and not args.trajectory_log
        if pins and any(_sees_one_token(site, shapes) for site in self.perturbation.sites):
            return True
        assert logits is not None
        heads = [
            module
            for module in shapes
            if type(module) is nn.Linear and any(p.requires_grad for p in module.parameters())
        ]
        sizes = {math.prod(shape) for head in heads for shape in shapes[head]}
        return args.closed_form_head != "none" and logits.numel() in sizes

    def _with_noise(
        self, plan: ReusePlan, forward: Forward, rows: Inputs, after: nn.Module | None
    ) -> Proven | None:
        """Run five rows under noise of their own, and compare them with the explicit forwards."""
        short = last_logits(self.model, self.pair)
        objective = TappedLoss() if short is None else short
        objective.after = after
        ran: Counter[int] = Counter()
        with (
            Attempt("A plan is not right") as attempt,
            self.perturbation.applied(self.noise, self.scale, ran),
        ):
            noisy = objective(forward, rows)
        if attempt.reason is not None or not self._agrees(noisy, ran):
            return None
        if short is not None and not short.used:
            objective = TappedLoss()
            objective.after = after
        if type(objective) is TappedLoss and self.args.control_variate != "none":
            objective.logits = objective.predictable = self._has_few_logits()
        return Proven(objective, self.perturbation, plan)

    def _agrees(self, noisy: RowLosses, ran: Counter[int]) -> bool:
        """Return whether rows have the losses of the explicit forwards, and these tell enough."""
        sums, counts = (
            torch.stack([getattr(losses, name)[:2] for losses in self.losses])
            for name in ("sums", "counts")
        )
        wanted, size = sums[_POINT, _OWNER], self.precision * float(sums.abs().max())
        change = float((sums[0] - sums[1]).abs().min())
        exact = self.precision < 1e-3
        repeated = any(times > 1 for times in ran.values())
        error = float((noisy.sums - wanted).abs().max())
        return (
            bool(sums.isfinite().all())
            and len(ran) == len(self.perturbation.vector.names)
            and (exact or not repeated)
            and torch.equal(noisy.counts, counts[_POINT, _OWNER])
            and error <= (0.05 * size + 1e-3 * change if exact else size + 0.1 * change)
        )

    def _has_few_logits(self) -> bool:
        """Return whether a sample's loss has few enough logits for a control variate."""
        labels, logits = self.pair.get("labels"), self.losses[0].logits
        texts = torch.is_tensor(labels) and labels.dim() > 1 and not labels.is_floating_point()
        return not texts and logits is not None and logits.shape[1] <= MOST_LOGITS


def _sees_one_token(site: Site, shapes: Mapping[nn.Module, Sequence[tuple[int, ...]]]) -> bool:
    """Return whether noise on a linear layer's output may take fewer numbers than on its weights:
    see `PinCheck`.
    """
    shape = next(iter(shapes.get(site.module, ())), ())
    return is_linear(site) and math.prod(shape) == 3 * math.prod(shape[-1:])
