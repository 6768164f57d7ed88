"""The interface of perturbations, and the flat vector of parameters that they use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .noise import RowNoise
from .streams import NoiseKeys

DrawnNoise: TypeAlias = Any
"""The noise of some rows; only the perturbation that drew it looks inside."""


class ParameterVector:
    """The trainable parameters of a model as slices of one flat vector of d numbers.

    A parameter that several modules share (tied weights) appears once.

    Examples:
        >>> from torch import nn
        >>> from hf_flops.perturbations import ParameterVector
        >>> vector = ParameterVector.of(nn.Linear(3, 2))
        >>> vector.names, vector.size
        (['weight', 'bias'], 8)
    """

    def __init__(self, named_parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.slices: list[slice] = []
        self.size = 0
        for parameter in self.parameters:
            self.slices.append(slice(self.size, self.size + parameter.numel()))
            self.size += parameter.numel()

    @classmethod
    def of(cls, model: nn.Module, names: set[str] | None = None) -> ParameterVector:
        """Return the vector of the trainable parameters of `model`, or of those in `names`."""
        return cls(
            [
                (n, p)
                for n, p in model.named_parameters()
                if p.requires_grad and (names is None or n in names)
            ]
        )

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, where noise is kept."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    def views(self, flat: Tensor) -> list[Tensor]:
        """Split the last dimension of (..., d) into one (..., *shape) view per parameter."""
        return [
            flat[..., piece].view((*flat.shape[:-1], *parameter.shape))
            for piece, parameter in zip(self.slices, self.parameters, strict=True)
        ]

    def add_to_gradients(self, flat: Tensor) -> None:
        """Add (d,) to the parameters' `.grad`, each in its own dtype and on its own device."""
        for parameter, view in zip(self.parameters, self.views(flat), strict=True):
            gradient = view.to(parameter.device, parameter.dtype)
            parameter.grad = (
                gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
            )


class Perturbation:
    """A way for noise to enter a model; a subclass defines `draw`, `applied`, `weighted_noise`.

    Attributes:
        vector: the perturbed parameters.
        shares_noise: whether all rows of a forward share the noise, so that a chunk must lie within
            a group.
        row_bytes: memory of one row's noise, if known beforehand.
        replays: whether `weighted_noise` needs a forward under the same noise before it.
        rowwise_size: number of the vector's first entries that have noise per row; see `row_noise`.
    """

    vector: ParameterVector
    shares_noise: bool = False
    row_bytes: float = 0.0
    replays: bool = False
    rowwise_size: int = 0

    @property
    def parts(self) -> Sequence[Perturbation]:
        """The perturbations that this one combines; by default itself."""
        return [self]

    def draw(self, keys: NoiseKeys) -> DrawnNoise:
        """Draw the noise of a chunk of R rows."""
        raise NotImplementedError

    def applied(self, noise: DrawnNoise, scale: float) -> AbstractContextManager[None]:
        """Return a context with the model at `theta + scale * noise`, and as it was afterwards."""
        raise NotImplementedError

    def dimension(self, noise: DrawnNoise) -> int:
        """Return the number of random numbers of unit variance in a row's noise: by default one
        for each parameter.
        """
        return self.vector.size

    def row_noise(self, noise: DrawnNoise) -> RowNoise | None:
        """Return the noise of the first `rowwise_size` entries, of identity covariance."""
        return None

    def weighted_noise(self, noise: DrawnNoise, coefficients: Tensor) -> Tensor:
        """Return `sum_r coefficients[r] * noise[r]` (d,), float64 if exact; coefficients: (R,)."""
        raise NotImplementedError
