"""The same noise for all rows of a forward, by replacing parameters: for every module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..base.transfer import onto
from .base import ParameterVector, Perturbation
from .exact_sums import accumulator, rounded
from .noise import draw
from .streams import NoiseKeys


@contextmanager
def displaced(vector: ParameterVector, flat: Tensor) -> Iterator[None]:
    """Set the parameters to `theta + flat` (d,) inside the context.

    The original storage is never written to: it is restored bit for bit, also after an exception.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.perturbations import ParameterVector, displaced
        >>> model = nn.Linear(1, 1, bias=False)
        >>> before = model.weight.item()
        >>> with displaced(ParameterVector.of(model), torch.ones(1)):
        ...     moved = model.weight.item()
        >>> round(moved - before, 4), model.weight.item() == before
        (1.0, True)
    """
    originals = [parameter.data for parameter in vector.parameters]
    try:
        for parameter, shift in zip(vector.parameters, vector.views(flat), strict=True):
            parameter.data = (parameter.data + shift.to(parameter.device)).to(parameter.dtype)
        torch.clear_autocast_cache()  # it may contain casts of the old values
        yield
    finally:
        for parameter, original in zip(vector.parameters, originals, strict=True):
            parameter.data = original
        torch.clear_autocast_cache()


def moved(model: nn.Module, seed: np.ndarray) -> AbstractContextManager[None]:
    """Move all trainable tensors inside the context: zeros (`lora_B`) hide effects of others."""
    everything = ParameterVector.of(model)
    offset = draw("gaussian", seed, everything.shapes, everything.device)[0]
    return displaced(everything, offset.mul_(0.05))


class SharedNoise(Perturbation):
    """Simultaneous perturbation of a whole chunk (SPSA, MeZO): see `Perturbation`.

    Args:
        vector: the perturbed parameters.
        distribution: a name in `DISTRIBUTIONS`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.perturbations import NoiseKeys, ParameterVector, SharedNoise
        >>> model = nn.Linear(3, 2)
        >>> vector = ParameterVector.of(model)
        >>> perturbation = SharedNoise(vector, "gaussian")
        >>> keys = NoiseKeys.of(0, 0, torch.tensor([0, 1]), torch.tensor([0, 0]), 0)
        >>> noise = perturbation.draw(keys)  # of two rows
        >>> x = torch.ones(2, 3)
        >>> with perturbation.applied(noise, 0.5):
        ...     outputs = model(x)
        >>> torch.allclose(outputs[0], outputs[1])  # all rows share the noise
        True
    """

    shares_noise = True

    def __init__(self, vector: ParameterVector, distribution: str) -> None:
        self.vector = vector
        self.distribution = distribution

    def draw(self, keys: NoiseKeys) -> Tensor:
        """Draw (d,) from the group's seed."""
        return draw(
            self.distribution,
            np.array([keys.group], dtype=np.uint64),
            self.vector.shapes,
            self.vector.device,
        )[0]

    def applied(self, noise: Tensor, scale: float) -> AbstractContextManager[None]:
        """See `Perturbation.applied`."""
        return displaced(self.vector, noise * scale)

    def weighted_noise(self, noise: Tensor, coefficients: Tensor) -> Tensor:
        """See `Perturbation.weighted_noise`."""
        total = rounded(onto(coefficients, noise.device)).sum()
        return noise.to(accumulator(noise.device)) * total
