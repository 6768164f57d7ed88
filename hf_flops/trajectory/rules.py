"""Perturbations that can be replayed: their description, and their noise without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ..errors import ConfigurationError
from ..perturbations import (
    DISTRIBUTIONS,
    CombinedNoise,
    ParameterVector,
    Perturbation,
    RowwiseNoise,
    SharedNoise,
)
from ..perturbations.noise import draw
from .start import digest

Description: TypeAlias = list[list[Any]]
"""[rule, distribution, names of the tensors] of each part of a perturbation."""
_RULES: dict[type, str] = {RowwiseNoise: "rowwise", SharedNoise: "shared"}


class Unwatched(RowwiseNoise):
    """The noise of `RowwiseNoise` without a model: it can be summed, but not applied."""

    def __init__(self, vector: ParameterVector, distribution: str) -> None:
        self.vector, self.distribution, self.rowwise_size = vector, distribution, vector.size


def describe(perturbation: Perturbation) -> Description:
    """Return [rule, distribution, names] for each part of a perturbation.

    Raises:
        ConfigurationError: summing its noise needs a forward pass, or its type is unknown.
    """
    parts: Sequence[Any] = perturbation.parts
    for part in parts:
        if type(part) not in _RULES:
            raise ConfigurationError(
                f"trajectory_log cannot replay {type(part).__name__}, whose noise is not known "
                'without a forward pass: use perturbation="rowwise" or "shared".'
            )
    return [[_RULES[type(part)], part.distribution, list(part.vector.names)] for part in parts]


def build(description: Description, parameters: Mapping[str, nn.Parameter]) -> Perturbation:
    """Return a perturbation that draws the noise of a `describe`d one, for parameters by name."""
    parts: list[Perturbation] = []
    for rule, distribution, names in description:
        if rule not in _RULES.values() or distribution not in DISTRIBUTIONS:
            raise ValueError(f"{rule!r:.50} noise of {distribution!r:.50} is unknown")
        vector = ParameterVector([(name, parameters[name]) for name in names])
        parts.append(
            Unwatched(vector, distribution)
            if rule == "rowwise"
            else SharedNoise(vector, distribution)
        )
    return parts[0] if len(parts) == 1 else CombinedNoise(parts)


def noise_print() -> str:
    """Return a digest of a fixed seed's noise, to detect versions with different noise."""
    shapes, row = [torch.Size([13, 9])], np.ones(1, dtype=np.uint64)
    return digest(
        torch.cat([draw(distribution, row, shapes)[0] for distribution in sorted(DISTRIBUTIONS)])
    )
