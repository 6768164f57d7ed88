"""Where and how noise enters a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from .base import ParameterVector, Perturbation
from .combined import CombinedNoise
from .noise import DISTRIBUTIONS, NoiseKeys
from .rowwise import RowwiseNoise
from .rules import RowMismatch
from .shared import SharedNoise, displaced

PERTURBATIONS = ("auto", "rowwise", "shared")


def perturb(
    model: nn.Module,
    *,
    rowwise: Sequence[str] = (),
    shared: Sequence[str] = (),
    looping: Collection[str] = (),
    distribution: str = "rademacher",
) -> Perturbation:
    """Build the perturbation that moves the named parameters, some row-wise and some with shared noise.

    Args:
        model: the model.
        rowwise: names of the tensors that have noise per row.
        shared: names of the tensors whose noise all rows of a forward share.
        looping: names of those among `rowwise` whose layers are run row by row.
        distribution: "gaussian" or "rademacher".
    """
    parts: list[Perturbation] = []
    if rowwise:
        parts.append(RowwiseNoise(model, ParameterVector.of(model, set(rowwise)), distribution, looping))
    if shared or not rowwise:
        parts.append(SharedNoise(ParameterVector.of(model, set(shared)), distribution))
    return parts[0] if len(parts) == 1 else CombinedNoise(parts)


__all__ = [
    "DISTRIBUTIONS",
    "PERTURBATIONS",
    "CombinedNoise",
    "NoiseKeys",
    "ParameterVector",
    "Perturbation",
    "RowMismatch",
    "RowwiseNoise",
    "SharedNoise",
    "displaced",
    "perturb",
]
