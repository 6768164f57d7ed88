"""Which sample's Jacobian resembles which: coordinates of samples along principal components."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base.transfer import onto

_CONSTANT_SHARE = 0.25  # of a sample's mean squared loading: that of the constant


@dataclass(frozen=True)
class Loader:
    """Maps features (B, H) to loadings (B, E + 1): coordinates along principal components, and 1.

    Attributes:
        centre: (H,) mean of the features.
        axes: (H, E) scaled so that the constant is a quarter of a mean squared loading.
        varied: whether the map is not of features that were all the same.
    """

    centre: Tensor
    axes: Tensor
    varied: bool

    @classmethod
    def of(cls, features: Tensor, components: int) -> Loader:
        """Return the map to the first principal components of features (N, H)."""
        values = features.double()
        centre = values.mean(0)
        axes = torch.zeros(values.shape[1], components, dtype=torch.float64)
        _, sizes, directions = torch.linalg.svd(values - centre, full_matrices=False)
        kept = directions[:components].T
        variance = float(sizes[:components].square().sum()) / len(values)
        if variance > 0:
            scale = ((1 - _CONSTANT_SHARE) / _CONSTANT_SHARE / variance) ** 0.5
            axes[:, : kept.shape[1]] = scale * kept
        return cls(centre.float(), axes.float().contiguous(), cls.varies(axes))

    @staticmethod
    def varies(axes: Tensor) -> bool:
        """Return what `varied` is for these axes."""
        return axes.shape[1] == 0 or bool(axes.any())

    def onto(self, device: torch.device) -> Loader:
        """Return the map on a device."""
        return replace(self, centre=onto(self.centre, device), axes=onto(self.axes, device))

    def fits(self, features: Tensor) -> bool:
        """Return whether the map is for features of this width, and not of features that were all
        the same.
        """
        return len(self.centre) == features.shape[1] and self.varied

    def loadings(self, features: Tensor) -> Tensor:
        """Return (B, E + 1)."""
        return torch.cat(
            [(features - self.centre) @ self.axes, features.new_ones(len(features), 1)], dim=1
        )


def contrasts(classes: int) -> Tensor:
    """Return (K, K - 1) orthonormal columns that sum to zero; contiguous, as after loading a state,
    because products round differently in other layouts.
    """
    return torch.linalg.qr(torch.eye(classes)[:, :-1] - 1 / classes)[0].contiguous()
