"""Noise along one coordinate after the other: with two rows of each, central differences give the
gradient itself.
"""

import numpy as np

from hf_flops.perturbations import noise
from hf_flops.perturbations.streams import NoiseKeys, Normals


class Coordinates(Normals):
    """Row k is the unit vector k, times the root of the dimension, so that its covariance over all
    rows is the identity.
    """

    def __init__(self, row_seeds, sizes, device="cpu"):
        super().__init__(row_seeds, sizes, device)
        self.values.zero_()
        dimension = sum(sizes)
        for row, query in zip(self.values, row_seeds.tolist(), strict=True):
            row[query % dimension] = dimension**0.5


def keys(seed, step, positions, queries, group):
    """Number rows by their query."""
    del seed, step, positions
    return NoiseKeys(queries.numpy().astype(np.uint64), group)


def use_coordinates(monkeypatch):
    """Draw such noise in place of random signs."""
    monkeypatch.setitem(noise.DISTRIBUTIONS, "rademacher", (Coordinates, False))
    monkeypatch.setattr(NoiseKeys, "of", staticmethod(keys))
