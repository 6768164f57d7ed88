"""Several perturbations at once, each of different parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from .base import DrawnNoise, ParameterVector, Perturbation
from .noise import RowNoise
from .streams import NoiseKeys


class CombinedNoise(Perturbation):
    """Several perturbations at once, such as noise per row and shared noise: see `Perturbation`.

    The parts' noises are independent, so a row's delta times a part's noise is an unbiased estimate
    of that part of the gradient.

    Examples:
        >>> from torch import nn
        >>> from hf_flops.perturbations import CombinedNoise, ParameterVector
        >>> from hf_flops.perturbations import RowwiseNoise, SharedNoise
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.PReLU())
        >>> names = {"0.weight", "0.bias"}
        >>> rowwise = RowwiseNoise(model, ParameterVector.of(model, names), "rademacher")
        >>> shared = SharedNoise(ParameterVector.of(model, {"1.weight"}), "rademacher")
        >>> CombinedNoise([rowwise, shared]).vector.names
        ['0.weight', '0.bias', '1.weight']
    """

    def __init__(self, parts: Sequence[Perturbation]) -> None:
        self._parts = list(parts)
        self.shares_noise = any(part.shares_noise for part in parts)
        self.row_bytes = sum(part.row_bytes for part in parts)
        self.replays = any(part.replays for part in parts)
        self.rowwise_size = self._parts[0].rowwise_size
        self.vector = ParameterVector(
            [
                pair
                for part in parts
                for pair in zip(part.vector.names, part.vector.parameters, strict=True)
            ]
        )

    @property
    def parts(self) -> Sequence[Perturbation]:
        """See `Perturbation.parts`."""
        return self._parts

    def draw(self, keys: NoiseKeys) -> list[DrawnNoise]:
        """Draw the noise of each part."""
        return [part.draw(keys) for part in self.parts]

    @contextmanager
    def applied(self, noise: list[DrawnNoise], scale: float) -> Iterator[None]:
        """See `Perturbation.applied`."""
        with ExitStack() as stack:
            for part, drawn in zip(self.parts, noise, strict=True):
                stack.enter_context(part.applied(drawn, scale))
            yield

    def dimension(self, noise: list[DrawnNoise]) -> int:
        """See `Perturbation.dimension`."""
        return sum(part.dimension(drawn) for part, drawn in zip(self.parts, noise, strict=True))

    def row_noise(self, noise: list[DrawnNoise]) -> RowNoise | None:
        """See `Perturbation.row_noise`."""
        return self.parts[0].row_noise(noise[0])

    def weighted_noise(self, noise: list[DrawnNoise], coefficients: Tensor) -> Tensor:
        """See `Perturbation.weighted_noise`."""
        sums = [
            part.weighted_noise(drawn, coefficients)
            for part, drawn in zip(self.parts, noise, strict=True)
        ]
        return torch.cat([part.to(sums[0].device) for part in sums])
