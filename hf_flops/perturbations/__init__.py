"""Perturbations: where and how noise enters a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from .activation import ActivationNoise
from .activation_check import PinCheck
from .base import ParameterVector, Perturbation
from .combined import CombinedNoise
from .exact_sums import accumulator
from .noise import DISTRIBUTIONS, bytes_per_row
from .rowwise import RowwiseNoise
from .rules import RowMismatch
from .shared import SharedNoise, displaced, moved
from .streams import NoiseKeys

PERTURBATIONS = ("auto", "activation", "rowwise", "shared")


def perturb(
    model: nn.Module,
    *,
    rowwise: Sequence[str] = (),
    shared: Sequence[str] = (),
    activation: Sequence[str] = (),
    row_by_row: Collection[str] = (),
    distribution: str = "rademacher",
) -> Perturbation:
    """Return the perturbation of the named parameters, each perturbed in one of three ways.

    Args:
        model: the model.
        rowwise: names of the tensors with noise per row.
        shared: names of the tensors whose noise is shared by all rows of a forward.
        activation: names of the tensors of linear layers with noise on their outputs.
        row_by_row: names in `rowwise` whose layers run row by row.
        distribution: "gaussian" or "rademacher".

    Examples:
        >>> from torch import nn
        >>> from hf_flops.perturbations import perturb
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.PReLU())
        >>> perturbation = perturb(model, rowwise=["0.weight", "0.bias"], shared=["1.weight"])
        >>> [type(part).__name__ for part in perturbation.parts]
        ['RowwiseNoise', 'SharedNoise']
    """
    parts: list[Perturbation] = []
    if rowwise:
        parts.append(
            RowwiseNoise(model, ParameterVector.of(model, set(rowwise)), distribution, row_by_row)
        )
    if activation:
        parts.append(
            ActivationNoise(model, ParameterVector.of(model, set(activation)), distribution)
        )
    if shared or not parts:
        parts.append(SharedNoise(ParameterVector.of(model, set(shared)), distribution))
    return parts[0] if len(parts) == 1 else CombinedNoise(parts)


__all__ = [
    "DISTRIBUTIONS",
    "PERTURBATIONS",
    "ActivationNoise",
    "CombinedNoise",
    "NoiseKeys",
    "ParameterVector",
    "Perturbation",
    "PinCheck",
    "RowMismatch",
    "RowwiseNoise",
    "SharedNoise",
    "accumulator",
    "bytes_per_row",
    "displaced",
    "moved",
    "perturb",
]
