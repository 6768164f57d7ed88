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

    Attributes:
        weight: (C, H + 1) float64; the last column is the bias.
    """

    def __init__(self, classes: int, width: int) -> None:
        self.weight = torch.zeros(classes, width + 1, dtype=torch.float64)
        self._factor: Tensor | None = None

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (..., C) float64 of features (..., H)."""
        return features.double() @ self.weight[:, :-1].T + self.weight[:, -1]

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy (..., B) float64 of features (..., B, H)."""
        logits = self.logits(features).log_softmax(-1)
        return -logits.gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]

    @torch.no_grad()
    def solve(self, features: Tensor, labels: Tensor, iterations: int = 300) -> None:
        """Fit features (N, H) and labels (N,) int64 from the weights that it has.

        Args:
            features: non-finite ones count as zero.
            labels: classes.
            iterations: at most; a step with a Hessian that was kept is cheap.
        """
        x = torch.nn.functional.pad(features.double().nan_to_num(0.0, 0.0, 0.0), (0, 1), value=1.0)
        onehot = torch.nn.functional.one_hot(labels, len(self.weight)).double()
        loss, gradient, chances = self._evaluate(self.weight, x, onehot)
        fresh = False
        for _ in range(iterations):
            if gradient.abs().max() < TOLERANCE:
                return
            if self._factor is None:
                self._factor, fresh = self._hessian_factor(x, chances), True
            direction = torch.cholesky_solve(gradient.reshape(-1, 1), self._factor)
            share, slope = 1.0, float(gradient.flatten() @ direction[:, 0])
            before = gradient.norm()
            while True:
                weight = self.weight - share * direction.view_as(self.weight)
                found, gradient_there, chances_there = self._evaluate(weight, x, onehot)
                if found <= loss - 1e-4 * share * slope or share < 1e-4:
                    break
                share /= 2
            if found <= loss:
                self.weight, loss, gradient, chances = weight, found, gradient_there, chances_there
            elif fresh:
                return  # rounding is all that is left
            if gradient.norm() > 0.3 * before:
                self._factor, fresh = None, False

    @staticmethod
    def _evaluate(weight: Tensor, x: Tensor, onehot: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the loss with its ridge, its gradient (C, H + 1), and probabilities (N, C)."""
        logs = (x @ weight.T).log_softmax(-1)
        chances = logs.exp()
        loss = -(logs * onehot).sum() / len(x) + RIDGE / 2 * weight.square().sum()
        return float(loss), (chances - onehot).T @ x / len(x) + RIDGE * weight, chances

    @staticmethod
    def _hessian_factor(x: Tensor, chances: Tensor) -> Tensor:
        """Return the Cholesky factor of the Hessian (C (H + 1), C (H + 1))."""
        classes, width = chances.shape[1], x.shape[1]
        hessian = torch.empty(classes, width, classes, width, dtype=x.dtype)
        for a in range(classes):
            for b in range(a, classes):
                share = chances[:, a] * (float(a == b) - chances[:, b])
                block = x.T @ (share[:, None] * x) / len(x)
                hessian[a, :, b], hessian[b, :, a] = block, block
        hessian = hessian.view(classes * width, -1)
        hessian.diagonal().add_(RIDGE)
        return torch.linalg.cholesky(hessian)
