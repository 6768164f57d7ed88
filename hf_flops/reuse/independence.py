"""Finds modules whose output no perturbed parameter changes, by comparing their outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..base.batch import Inputs, batch_size, take
from ..base.patching import Call, replaced_forward
from ..base.prng import seeds
from ..base.probe import Attempt, Probe
from ..base.sharding import is_sharded
from ..base.state import raw_bytes
from ..objectives import Forward, Objective, RowLosses
from ..perturbations import NoiseKeys, Perturbation, displaced, moved
from ..perturbations.noise import draw
from .late_expansion import ReusePlan

_CHECK_SEED = 20411  # arbitrary; separates the check's noise from that of training
_SCALE = 0.1  # far above rounding errors


@dataclass
class Visit:
    """A call of a module in a traced forward: the innermost enclosing call, the calls whose outputs
    are among the arguments, and the output.
    """

    parent: Visit | None
    sources: list[Visit] = field(default_factory=list)
    leaves: tuple[object, ...] = ()

    @property
    def shapes(self) -> list[tuple[int, ...] | None]:
        """The shapes of the output's tensors; None for other leaves."""
        return [tuple(leaf[0]) if isinstance(leaf, tuple) else None for leaf in self.leaves]


Visits = dict[nn.Module, list[Visit]]  # in the order of first calls


def _fingerprint(leaf: object) -> object:
    """Return a value that is equal only for equal leaves: (shape, hash) of a tensor."""
    if torch.is_tensor(leaf):
        return leaf.shape, blake2b(raw_bytes(leaf), digest_size=16).digest()
    # a new object is equal to nothing else
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else object()


def _fingerprints(output: object) -> tuple[object, ...]:
    return tuple(_fingerprint(leaf) for leaf in tree_leaves(output))


def trace(model: nn.Module, forward: Forward, inputs: Inputs) -> Visits:
    """Run the model and return the calls of each module, in order."""
    visits: Visits = defaultdict(list)
    active, made = list[Visit](), dict[int, Visit]()

    def watched(module: nn.Module, original: Call) -> Call:
        def run(*args: object, **kwargs: object) -> object:
            given = [made[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in made]
            visit = Visit(active[-1] if active else None, given)
            visits[module].append(visit)
            active.append(visit)
            output = original(*args, **kwargs)
            active.pop()
            visit.leaves = _fingerprints(output)
            made.update({id(leaf): visit for leaf in tree_leaves(output) if torch.is_tensor(leaf)})
            return output

        return run

    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(replaced_forward(module, partial(watched, module)))
        forward(inputs)
    return visits


def row_leaves(two: Visit, three: Visit) -> tuple[bool, ...] | None:
    """Return which leaves grow from two rows to three; None if one does anything else."""
    pairs = list(zip(two.shapes, three.shapes, strict=True))
    if all(a == b or (a and b and a[1:] == b[1:] and 3 * a[0] == 2 * b[0]) for a, b in pairs):
        return tuple(a != b for a, b in pairs)
    return None


def independent_modules(
    model: nn.Module,
    forward: Forward,
    inputs: Inputs,
    perturbation: Perturbation,
    *,
    per_row: bool,
) -> dict[nn.Module, tuple[bool, ...]]:
    """Return the outermost modules whose output no value of the perturbed parameters changes.

    Modules without parameters and buffers are left out because they cost little, and so are those
    that a forward calls more than once or that return anything but tensors and plain values.

    Returns:
        For each module, in the order of calls, which leaves of its output hold rows; see
        `ReusePlan`.
    """
    last = min(1, batch_size(inputs) - 1)
    two, three = (
        take(inputs, torch.tensor(index)) if per_row else inputs
        for index in ([0, last], [0, last, 0])
    )
    vector = perturbation.vector
    shift = draw("gaussian", seeds(_CHECK_SEED, 0), vector.shapes, vector.device)[0]
    here = trace(model, forward, two)
    with displaced(vector, _SCALE * shift):
        moved = trace(model, forward, two)
    return _outermost(here, moved, trace(model, forward, three))


def _outermost(here: Visits, moved: Visits, wider: Visits) -> dict[nn.Module, tuple[bool, ...]]:
    independent: dict[nn.Module, tuple[bool, ...]] = {}
    inside: set[int] = set()  # calls that are part of an independent one
    for module, visits in here.items():
        if id(visits[0].parent) in inside:
            inside.update(map(id, visits))
        elif holds_numbers(module) and all(
            len(visited.get(module, ())) == 1 for visited in (here, moved, wider)
        ):
            flags = row_leaves(visits[0], wider[module][0])
            if (
                flags is not None
                and any(visits[0].shapes)
                and visits[0].leaves == moved[module][0].leaves
            ):
                independent[module] = flags
                inside.add(id(visits[0]))
    return independent


def holds_numbers(module: nn.Module) -> bool:
    """Return whether a module has parameters or buffers."""
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def choose_reuse(
    model: nn.Module,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    perturbation: Perturbation,
    precision: float = 1e-4,
    *,
    cached: bool = False,
) -> tuple[ReusePlan, str | None]:
    """Return the plan of what runs once per sample, and the reason if a plan was refused.

    Args:
        model: the model, in evaluation mode, gradients off.
        objective: what is minimised.
        forward: runs the model.
        inputs: a batch.
        perturbation: of the parameters.
        precision: see `precision_of`.
        cached: whether to find modules that a cache can leave out.
    """
    with Attempt(None, (Exception,)) as attempt:
        # A NaN loss would hide dependencies.
        finite = objective(forward, inputs).sums.isfinite().cpu()
        if not bool(finite.any()):
            return ReusePlan(), "not one loss of the first batch is finite"
        if objective.per_row:
            inputs = take(inputs, torch.nonzero(finite).flatten())
        with moved(model, seeds(_CHECK_SEED, 2)):
            modules = independent_modules(
                model, forward, inputs, perturbation, per_row=objective.per_row
            )
            if not modules:
                return ReusePlan(), None
            # processes that shard a model run all of each forward together
            plain = ReusePlan(modules, stops_early=not any(map(is_sharded, model.modules())))
            few = (
                take(inputs, torch.arange(min(2, batch_size(inputs))))
                if objective.per_row
                else inputs
            )
            # The simplified plan may fail if the objective reads outputs inside the model.
            for plan in (_simplified(plain, forward, few, cached), plain):
                unread, reason = _checked(plan, objective, forward, inputs, perturbation, precision)
                if reason is None:
                    return replace(plan, unread_inputs=unread), None
                attempt.refuse(reason)
    return ReusePlan(), attempt.reason


def _simplified(plan: ReusePlan, forward: Forward, inputs: Inputs, cached: bool) -> ReusePlan:
    """Find outputs that need not be kept during a step, or over epochs."""
    owner = torch.arange(batch_size(inputs))

    def outputs() -> list[object]:
        leaves = _fingerprints(recording.rows(inputs, owner)(inputs))
        return [leaf for leaf in leaves if isinstance(leaf, tuple)]

    def unnoticed() -> bool:
        with Attempt(None, (Exception,)):
            return outputs() == reference
        return False

    with plan.recording(forward) as recording:
        recording.record(inputs)
        reference = outputs()
        if not reference:
            return plan
        idle = frozenset(
            m for m in plan.modules if recording.works_without(m, unnoticed, hollow=True)
        )
        size = {
            module: sum(parameter.numel() for parameter in module.parameters())
            for module in plan.modules
        }
        again = frozenset(
            m
            for m in plan.modules
            if cached
            and m not in idle
            and 10 * size[m] < sum(size.values())
            and recording.works_without(m, unnoticed, hollow=False)
        )
    return replace(plan, pass_through=idle, recomputed=again)


def _checked(
    plan: ReusePlan,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    perturbation: Perturbation,
    precision: float,
) -> tuple[frozenset[str], str | None]:
    """Compare losses of three rows (or the batch) under noise with those of the plain forward.

    Returns:
        Floating-point inputs that can be NaN without changing the losses (all, one, or none), and
        the reason if losses differ.
    """
    samples = batch_size(inputs)
    owner = (
        torch.tensor([samples - 1, 0, samples - 1]) if objective.per_row else torch.arange(samples)
    )
    units = torch.arange(3 if objective.per_row else 1)
    noise = perturbation.draw(NoiseKeys.of(_CHECK_SEED, 1, units, units, 0))
    tolerance = precision if precision > 1e-3 else 0.1 * precision

    def noisy(run: Forward, rows: Inputs) -> RowLosses:
        with perturbation.applied(noise, _SCALE):
            losses = objective(run, rows)
        # the counts of a user's objective may depend on outputs, and so on rounding
        return replace(losses, counts=torch.ones_like(losses.sums))

    def difference(unread: Collection[str] = ()) -> str | None:
        rows = take(inputs, owner, unread) if objective.per_row else inputs
        otherwise = f"Rows are given {', '.join(sorted(unread))}" if unread else None
        return probe.difference(otherwise, forward=recording.rows(rows, owner), inputs=rows)

    probe = Probe(
        noisy, forward, take(inputs, owner) if objective.per_row else inputs, tolerance, size=None
    )
    wanted = probe.losses.sums
    choices: list[frozenset[str]] = []
    # a NaN loss would not show whether an input is read
    if objective.per_row and bool(wanted.isfinite().all()):
        real = frozenset(
            name
            for name, value in inputs.items()
            if torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1
        )
        singles = [frozenset([name]) for name in sorted(real) if len(real) > 1]
        choices = [real, *singles] if real else []
    with plan.recording(forward) as recording:
        recording.record(inputs)
        for unread in choices:
            if difference(unread) is None:
                return unread, None
        return frozenset(), difference()
