"""Where and how noise enters a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .base import ParameterVector, Perturbation
from .combined import CombinedNoise
from .noise import DISTRIBUTIONS, NoiseKeys, bytes_per_row
from .rowwise import RowwiseNoise
from .rules import RowMismatch
from .shared import SharedNoise, displaced

PERTURBATIONS = ("auto", "rowwise", "shared")


def perturb(
    model: nn.Module, *, rowwise: Sequence[str] = (), shared: Sequence[str] = (), distribution: str = "rademacher"
) -> Perturbation:
    """Build the perturbation that moves the named parameters, some row-wise and some with shared noise."""
    parts: list[Perturbation] = []
    if rowwise:
        parts.append(RowwiseNoise(model, ParameterVector.of(model, set(rowwise)), distribution))
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
    "bytes_per_row",
    "displaced",
    "perturb",
]
