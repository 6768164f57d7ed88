"""What a control variate predicts of one step's deltas, and what the step's rows say about it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.transfer import onto
from ..perturbations import accumulator
from ..perturbations.exact_sums import DIGIT, rounded
from ..perturbations.noise import RowNoise

_LARGEST = 8.0  # bound on a number of noise


class Prediction:
    """One step's predictions: `delta_ik ~ weights_i . J_i z_ik`, with J_i fixed before the noise.

    A sample's Jacobian is `J_i = sum_e e_ie S_e`, with its loadings e_i. Since `E[(h . z) z] = h`,
    the remainder `delta_ik - h_i . z_ik` with `h_i = J_i^T weights_i` put in the place of delta,
    and h_i added, has the same expectation for every S.

    Args:
        jacobian: (E M, d) S, one block of M rows for each loading.
        slopes: (B, M) derivative of each sample's loss by its M logits.
        logits: (B, M) of the clean forward.
        trust: factor of the predictions.
        basis: (K, M) the directions of the K logits that are tracked.
        unit: a power of two above nearly all errors, so that one digit holds each.
        loadings: (B, E) e of each sample; None for E = 1 and ones.
    """

    def __init__(
        self,
        jacobian: Tensor,
        slopes: Tensor,
        logits: Tensor,
        trust: float,
        basis: Tensor,
        unit: float = 1.0,
        loadings: Tensor | None = None,
    ) -> None:
        self.jacobian, self.slopes, self.logits = jacobian, slopes, logits
        self.trust, self.basis, self.unit = trust, basis, unit
        self.loadings = slopes.new_ones(len(slopes), 1) if loadings is None else loadings
        # The sum over rows of (change - J z) z^T, in digits of units: on the CPU 32-bit integers
        # while they fit, which elsewhere the host would have to wait for the device to know.
        self._wide, self._most = accumulator(jacobian.device), 0.0
        exact = torch.int32 if jacobian.device.type == "cpu" else self._wide
        self.innovation = torch.zeros_like(jacobian, dtype=exact)
        # rows; squared errors; delta x prediction; squared predictions
        self.sums = jacobian.new_zeros(4, dtype=self._wide)

    def remainder(
        self, noise: RowNoise, owner: Tensor, deltas: Tensor, changes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual deltas (R,), coefficients (R, E M) in units with which `add` gets the
        noise, and sums for it.

        Args:
            noise: of the rows.
            owner: (R,) each row's sample.
            deltas: (R,) float32.
            changes: (R, K) changes of the rows' logits, over epsilon.
        """
        loadings = self.loadings[owner]
        blocks = noise.dot(self.jacobian).unflatten(1, (loadings.shape[1], -1))
        wanted = (loadings[:, :, None] * blocks).sum(1)
        predicted = (self.slopes[owner] * wanted).sum(1)
        errors = changes @ self.basis - wanted
        fine = errors.isfinite().all(1) & deltas.isfinite()
        errors = rounded(torch.where(fine[:, None], errors, 0.0) / self.unit, DIGIT)
        measured = torch.where(fine, deltas, 0.0).to(self._wide)
        expected = torch.where(fine, predicted, 0.0).to(self._wide)
        sums = [
            fine.sum(),
            errors.to(self._wide).square().sum() * self.unit**2,
            measured @ expected,
            expected @ expected,
        ]
        directions = loadings / loadings.square().sum(1, keepdim=True)
        coefficients = rounded((directions[:, :, None] * errors[:, None]).flatten(1), DIGIT)
        return (
            deltas - self.trust * predicted,
            coefficients.to(self.jacobian),
            torch.stack([x.to(self._wide) for x in sums]),
        )

    def add(self, innovation: Tensor, errors: Tensor, sums: Tensor) -> None:
        """Add the statistics of rows: their noise summed with coefficients (E M, d), in units, and
        the coefficients and sums from `remainder`.
        """
        if self.innovation.dtype == torch.int32:
            self._most += _LARGEST / DIGIT * float(errors.abs().sum(0).max())
            if self._most >= 2**31 - 2**10:
                self.innovation = self.innovation.to(self._wide)
        self.innovation += (innovation / DIGIT).round_().to(self.innovation.dtype)
        self.sums += sums

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return the sums of noise (E M, d) and the other sums of all rows that were added."""
        return self.innovation.to(self._wide) * (DIGIT * self.unit), self.sums

    def baseline(self, weights: Tensor) -> Tensor:
        """Return `sum_i weights[i] h_i` (d,), the mean of the subtracted predictions for samples of
        total weight (B,).
        """
        weights = onto(weights, self.loadings.device)
        slopes = (weights[:, None] * self.loadings).T @ self.slopes
        return self.trust * (slopes.flatten().to(self.jacobian) @ self.jacobian)
