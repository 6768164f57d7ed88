"""A softmax head solved to convergence, the same function for every method and for the measure J.

J is the mean cross-entropy of all training samples under a head that is solved for the adapter of
the moment: what training the adapter has left to gain, whoever trained the head and however well.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3  # times |W|^2 / 2, bias included; J is without this term
TOLERANCE = 1e-7  # of the gradient's largest element


class SolvedHead:
    """Softmax regression in float64 by Newton's method; the factored Hessian is kept while it
    serves.

    Adding one vector to the weights of all classes changes no loss, and the ridge wants their sum
    to be zero: what is solved for are the C - 1 combinations that are left.
    """

    def __init__(self, classes: int, width: int) -> None:
        one = torch.ones(classes, 1, dtype=torch.float64)
        full, _ = torch.linalg.qr(torch.cat([one, torch.eye(classes, dtype=torch.float64)], 1))
        self._basis = full[:, 1:].T  # (C - 1, C), orthonormal, each row's sum is 0
        self._solution = torch.zeros(classes - 1, width + 1, dtype=torch.float64)
        self._factor: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """(C, H + 1) float64; the last column is the bias."""
        return self._basis.T @ self._solution

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (..., C) float64 of features (..., H)."""
        weight = self.weight
        return features.double() @ weight[:, :-1].T + weight[:, -1]

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy (..., B) float64 of features (..., B, H)."""
        logits = self.logits(features).log_softmax(-1)
        return -logits.gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]

    @torch.no_grad()
    def solve(self, features: Tensor, labels: Tensor, hessians: int = 50) -> None:
        """Fit features (N, H) and labels (N,) int64 from the weights that it has.

        Args:
            features: non-finite ones count as zero.
            labels: classes.
            hessians: how many to compute at most; steps with one that is kept are cheap.
        """
        x = torch.nn.functional.pad(features.double().nan_to_num(0.0, 0.0, 0.0), (0, 1), value=1.0)
        onehot = torch.nn.functional.one_hot(labels, self._basis.shape[1]).double()
        loss, gradient, chances = self._evaluate(self._solution, x, onehot)
        kept = self._factor is not None
        while gradient.abs().max() > TOLERANCE:
            if not kept:
                if not hessians:
                    return
                self._factor, hessians, kept = self._hessian_factor(x, chances), hessians - 1, True
            before, found = gradient.norm(), loss
            direction = torch.cholesky_solve(gradient.reshape(-1, 1), self._factor)
            direction = direction.view_as(gradient)
            for share in (1.0, 0.5, 0.25, 0.1, 0.01):
                solution = self._solution - share * direction
                found, there, chances_there = self._evaluate(solution, x, onehot)
                if found < loss:
                    self._solution, gradient, chances = solution, there, chances_there
                    break
            if found >= loss and hessians == 0:
                return
            kept, loss = found < loss and bool(gradient.norm() < 0.3 * before), min(loss, found)

    def _evaluate(
        self, solution: Tensor, x: Tensor, onehot: Tensor
    ) -> tuple[float, Tensor, Tensor]:
        """Return the loss with its ridge, its gradient (C - 1, H + 1), and chances (N, C)."""
        logs = (x @ (self._basis.T @ solution).T).log_softmax(-1)
        chances = logs.exp()
        loss = -(logs * onehot).sum() / len(x) + RIDGE / 2 * solution.square().sum()
        slopes = (chances - onehot) @ self._basis.T
        return float(loss), slopes.T @ x / len(x) + RIDGE * solution, chances

    def _hessian_factor(self, x: Tensor, chances: Tensor) -> Tensor:
        """Return the Cholesky factor of the Hessian ((C - 1) (H + 1), (C - 1) (H + 1))."""
        number, width = len(self._basis), x.shape[1]
        means = chances @ self._basis.T
        hessian = torch.empty(number, width, number, width, dtype=x.dtype)
        for a in range(number):
            for b in range(a, number):
                both = chances @ (self._basis[a] * self._basis[b])
                block = x.T @ ((both - means[:, a] * means[:, b])[:, None] * x) / len(x)
                hessian[a, :, b], hessian[b, :, a] = block, block
        hessian = hessian.view(number * width, -1)
        hessian.diagonal().add_(RIDGE)
        return torch.linalg.cholesky(hessian)
