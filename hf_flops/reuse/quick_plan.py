"""What runs once per sample, from two forwards of three rows that run anyway."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ..base.batch import Inputs
from ..base.sharding import is_sharded
from ..objectives import Forward
from .independence import Visits, holds_numbers
from .late_expansion import Recording, ReusePlan


def unchanged_modules(here: Visits, moved: Visits) -> dict[nn.Module, bool]:
    """Return the outermost modules with equal outputs in both forwards, each with whether only
    others of them get its output as an argument.

    Args:
        here: the calls of a forward.
        moved: those of the same rows with other values of the perturbed parameters.
    """
    found: dict[nn.Module, None] = {}
    inside: dict[int, nn.Module] = {}  # call → the module that it belongs to
    for module, visits in here.items():
        outer = inside.get(id(visits[0].parent))
        if outer is not None:
            inside.update({id(visit): outer for visit in visits})
        elif (
            holds_numbers(module)
            and len(visits) == len(moved.get(module, ())) == 1
            and any(visits[0].shapes)
            and visits[0].leaves == moved[module][0].leaves
        ):
            found[module] = None
            inside[id(visits[0])] = module
    readers: dict[nn.Module, list[bool]] = {module: [] for module in found}
    for visits in here.values():
        for visit in visits:
            for source in visit.sources:
                owner = inside.get(id(source))
                if owner is not None and inside.get(id(visit)) is not owner:
                    readers[owner].append(id(visit) in inside)
    return {module: bool(inner) and all(inner) for module, inner in readers.items()}


def recordings(
    model: nn.Module, forward: Forward, pair: Inputs, here: Visits, moved: Visits
) -> Iterator[Recording]:
    """Yield recordings of two rows by plans that may be right: first the one that keeps least.

    Args:
        model: the model.
        forward: runs the model.
        pair: the two rows.
        here: see `unchanged_modules`; of three rows.
        moved: see `unchanged_modules`.
    """
    modules = unchanged_modules(here, moved)
    early = not any(map(is_sharded, model.modules()))
    every = {module: (True,) * len(here[module][0].leaves) for module in modules}
    idle = frozenset(module for module, inner in modules.items() if inner)
    real = frozenset(
        name
        for name, value in pair.items()
        if modules and torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1
    )
    plain = ReusePlan(every, stops_early=early)
    least = replace(plain, pass_through=idle, unread_inputs=real)
    for plan in (least, plain) if idle or real else (plain,):
        with plan.recording(forward) as recording:
            recording.record(pair)
            found = {module: growing_leaves(recording, here, module) for module in modules}
            grows = {module: flags for module, flags in found.items() if flags is not None}
            if len(grows) < len(found):
                return
            recording.adopt(replace(plan, modules=grows))
            yield recording


def growing_leaves(
    recording: Recording, here: Visits, module: nn.Module
) -> tuple[bool, ...] | None:
    """Return which leaves of a module's output grow from the two rows of a recording to the three
    of a forward; None if one does anything else.
    """
    found = list[bool]()
    leaves, _ = recording.outputs[module]
    for leaf, shape in zip(leaves, here[module][0].shapes, strict=True):
        two = tuple(leaf.shape) if torch.is_tensor(leaf) else None
        grows = bool(two and shape and two[1:] == shape[1:] and 3 * two[0] == 2 * shape[0])
        if not grows and two != shape:
            return None
        found.append(grows)
    return tuple(found)
