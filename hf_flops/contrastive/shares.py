"""The division of a step's rows between the two towers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..base.state import number
from ..core.method import StepResult
from ..errors import ConfigurationError
from .estimate import KEPT, Tower
from .loss import SIDES


class TowerShares:
    """Divides a step's rows between the towers.

    The variance is `sum over towers of d sum_i ||g_i||^2 / n_i`, g_i the gradient through one
    embedding and d the tower's number of noisy parameters. It is least for rows in proportion to
    `sqrt(d) sum_i ||g_i||`, estimated from past deltas.

    Attributes:
        weights: that number by side, for towers that had a step.
    """

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}

    def update(self, towers: Mapping[str, Tower], results: Mapping[str, StepResult]) -> None:
        """Learn from a finished batch."""
        for side, result in results.items():
            method = towers[side].method
            assert method is not None
            # deltas are those of U times the loss
            weight = math.sqrt(method.perturbation.vector.size) * float(
                result.mean_squares.nan_to_num(0.0).sqrt().mean()
            )
            self.weights[side] = KEPT * self.weights.get(side, weight) + (1 - KEPT) * weight

    def share(
        self, towers: Mapping[str, Tower], sizes: Mapping[str, int], queries: int
    ) -> dict[str, int]:
        """Return the rows per embedding of each noisy tower, without the clean ones.

        Args:
            towers: by side.
            sizes: number of embeddings of each.
            queries: rows per image, all included.

        Raises:
            ConfigurationError: there are fewer rows than one query per embedding takes.
        """
        noisy = {side: tower.method for side, tower in towers.items() if tower.method is not None}
        least = {side: len(method.estimator.signs) for side, method in noisy.items()}
        clean = sum(sizes.values())
        needed = {side: count * sizes[side] for side, count in least.items()}
        rows = queries * sizes["image"] - clean
        if rows < sum(needed.values()):
            enough = -(-(clean + sum(needed.values())) // sizes["image"])
            raise ConfigurationError(
                f"queries_per_sample={queries} is too few for {sizes['image']} images and "
                f"{sizes['text']} texts: a clean row each, and {max(least.values())} more where "
                f"noise enters its tower: use {enough} or more."
            )
        weights = self.weights if sum(self.weights.get(side, 0.0) for side in noisy) > 0 else {}
        weights = weights if noisy.keys() <= weights.keys() else dict.fromkeys(noisy, 1.0)
        total, shares = sum(weights[side] for side in noisy), {}
        for side in [side for side in SIDES if side in noisy]:
            most = rows - sum(needed.values()) + needed[side]
            wanted = min(max(rows * weights[side] / total, needed[side]), most)
            shares[side] = int(wanted) // sizes[side]
        return shares

    def state_dict(self) -> dict[str, float]:
        """Return what a resume needs."""
        return self.weights

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up a state from `state_dict`."""
        self.weights = {str(side): number(weight, 0) for side, weight in state.items()}
