"""Estimators: from the losses of perturbed rows to directional derivatives."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Estimator(Protocol):
    """A finite difference along the noise of each query.

    Attributes:
        signs: the multiples of the noise at which each query is evaluated; one forward row each.
        baseline: whether the clean forward is part of the difference.
    """

    signs: tuple[int, ...]
    baseline: bool

    def deltas(self, losses: Tensor, clean: Tensor | None, scale: float) -> Tensor:
        """Return the directional derivative that each query saw.

        Args:
            losses: (S, R) float32, loss sums of the rows at each of the S signs.
            clean: (R,) float32, the clean loss sums of the rows' samples, or None.
            scale: the step of the difference, epsilon.

        Returns:
            (R,) float32.
        """
        ...


class OneSided:
    """Forward differences: `(s(theta + eps z) - s(theta)) / eps`, one row per query and one clean
    row per sample.

    The clean row is shared by all queries of its sample, so at equal rows there are almost twice as
    many directions as with antithetic pairs, and the variance halves. The bias is O(eps^2) for
    symmetric noise, like the pair's.
    """

    signs: tuple[int, ...] = (1,)
    baseline: bool = True

    def deltas(self, losses: Tensor, clean: Tensor | None, scale: float) -> Tensor:
        """See `Estimator.deltas`."""
        assert clean is not None
        return (losses[0] - clean) / scale


class Antithetic:
    """Central differences: `(s(theta + eps z) - s(theta - eps z)) / (2 eps)`, two rows per query.

    References:
        Spall (1992), SPSA; Malladi et al. (2023), MeZO, arXiv 2305.17333, definition 1.
    """

    signs: tuple[int, ...] = (1, -1)
    baseline: bool = False

    def deltas(self, losses: Tensor, clean: Tensor | None, scale: float) -> Tensor:
        """See `Estimator.deltas`."""
        del clean
        return (losses[0] - losses[1]) / (2 * scale)


ESTIMATORS: dict[str, type[Estimator]] = {"one_sided": OneSided, "antithetic": Antithetic}
