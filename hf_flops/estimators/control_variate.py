"""Control variates: a prediction of each delta, fitted on past steps, is subtracted and its exact
mean added back. This lowers the variance and introduces no bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..objectives import RowLosses
from ..perturbations import accumulator
from ..perturbations.exact_sums import DIGIT, rounded
from ..perturbations.noise import RowNoise

MOST_LOGITS = 32  # per row; with more, the Jacobian is too large to learn and to keep
_MOST_NUMBERS = 2**27  # of the Jacobian
# prior share of the logits' changes that the Jacobian explains
_START = 0.5
_DRIFT = 0.01  # share of them that a training step changes
_KEPT = 0.95  # decay per step of the statistics behind `trust`
_LARGEST = 8.0  # bound on a number of noise
_WIDTH = 16.0  # root mean squares of the errors that fit in one digit of 15 bits


class ControlVariate(Protocol):
    """Predicts deltas from the noise of their rows, using past steps only."""

    def start(
        self, clean: RowLosses, size: int, device: torch.device, step: int
    ) -> Prediction | None:
        """Return the predictions for a batch, or None if there are none.

        Args:
            clean: clean losses of the batch.
            size: d, random numbers in a row's noise, independent and of variance 1.
            device: of the noise.
            step: the optimizer step; all its batches are predicted from earlier steps.
        """
        ...

    def finish(self, innovation: Tensor, sums: Tensor) -> None:
        """Add the `Prediction.statistics` of a finished batch; they are used from the next step
        on.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state from `state_dict`."""
        ...


class Prediction:
    """One step's predictions: `delta_ik ~ weights_i . J z_ik`, with J fixed before the noise.

    Since `E[(h . z) z] = h`, the remainder `delta_ik - h_i . z_ik` with `h_i = J^T weights_i` put
    in the place of delta, and h_i added, has the same expectation for every J.

    Args:
        jacobian: (M, d) J.
        slopes: (B, M) derivative of each sample's loss by its M logits.
        logits: (B, M) of the clean forward.
        trust: factor of the predictions.
        basis: (K, M) the directions of the K logits that are tracked.
        unit: a power of two above nearly all errors, so that one digit holds each.
    """

    def __init__(
        self,
        jacobian: Tensor,
        slopes: Tensor,
        logits: Tensor,
        trust: float,
        basis: Tensor,
        unit: float = 1.0,
    ) -> None:
        self.jacobian, self.slopes, self.logits = jacobian, slopes, logits
        self.trust, self.basis, self.unit = trust, basis, unit
        # The sum over rows of (change - J z) z^T, in digits of units: 32-bit integers while they
        # fit.
        self.innovation, self._most = torch.zeros_like(jacobian, dtype=torch.int32), 0.0
        # rows; squared errors; delta x prediction; squared predictions
        self.sums = torch.zeros(4, dtype=torch.float64)

    def remainder(
        self, noise: RowNoise, owner: Tensor, deltas: Tensor, changes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual deltas (R,), the errors of the changes in units (R, M), and sums for
        `add`.

        Args:
            noise: of the rows.
            owner: (R,) each row's sample.
            deltas: (R,) float32.
            changes: (R, K) changes of the rows' logits, over epsilon.
        """
        wanted = noise.dot(self.jacobian)
        predicted = (self.slopes[owner] * wanted.cpu()).sum(1)
        errors = changes @ self.basis - wanted.cpu()
        fine = errors.isfinite().all(1) & deltas.isfinite()
        errors = rounded(torch.where(fine[:, None], errors, 0.0) / self.unit, DIGIT)
        measured = torch.where(fine, deltas, 0.0).double()
        expected = torch.where(fine, predicted, 0.0).double()
        sums = [
            fine.sum(),
            errors.double().square().sum() * self.unit**2,
            measured @ expected,
            expected @ expected,
        ]
        return (
            deltas - self.trust * predicted,
            errors.to(self.jacobian),
            torch.stack([x.double() for x in sums]),
        )

    def add(self, innovation: Tensor, errors: Tensor, sums: Tensor) -> None:
        """Add the statistics of rows: `sum error z^T` (M, d) in units, and the errors and sums from
        `remainder`.
        """
        self._most += _LARGEST / DIGIT * float(errors.abs().sum(0).max())
        if self._most >= 2**31 - 2**10:
            self.innovation = self.innovation.to(accumulator(self.innovation.device))
        self.innovation += (innovation / DIGIT).round_().to(self.innovation.dtype)
        self.sums += sums

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return `sum error z^T` (M, d) and the sums of all rows that were added."""
        return self.innovation.to(accumulator(self.innovation.device)) * (
            DIGIT * self.unit
        ), self.sums

    def baseline(self, weights: Tensor) -> Tensor:
        """Return `sum_i weights[i] h_i` (d,), the mean of the subtracted predictions for samples of
        total weight (B,).
        """
        return self.trust * (
            (weights[:, None] * self.slopes).sum(0).to(self.jacobian) @ self.jacobian
        )


class LogitJacobian:
    """The mean Jacobian J of the logits by the noise, tracked by least mean squares.

    Every query shows the changes of all logits, not only of the loss: `changes_ik = J_i z_ik`. The
    mean of the J_i needs no labels and changes slowly, while gradients `J_i^T r_i` change sign with
    the residuals r_i. The rows of a step give `(1/R) sum (change - J z) z^T`, an unbiased estimate
    of the error of J, whose own error is `d / R` times the squared error of the predictions; the
    gain of the update is that of a scalar Kalman filter. Predictions are scaled by the factor that
    would have been best in past steps.

    A softmax ignores a constant added to all logits, so K - 1 directions of K logits are tracked.

    Example:
        >>> import torch
        >>> from hf_flops.estimators import LogitJacobian
        >>> from hf_flops.objectives import RowLosses
        >>> clean = RowLosses(
        ...     torch.ones(2), torch.ones(2), logits=torch.zeros(2, 3), slopes=torch.rand(2, 3)
        ... )
        >>> control = LogitJacobian()
        >>> prediction = control.start(clean, 50, torch.device("cpu"), 0)
        >>> prediction.jacobian.shape
        torch.Size([3, 50])
    """

    def __init__(self) -> None:
        self.jacobian: Tensor | None = None
        self._basis = torch.zeros(0, 0)
        # squared error of J, a sum over its numbers; negative before the first step
        self._unknown = -1.0
        # mean over the last step's rows of the squared error of the changes, a sum over the logits
        self._error = 0.0
        self._use = torch.zeros(2, dtype=torch.float64)  # delta x prediction, squared predictions
        self._pending: tuple[Tensor, Tensor] | None = None  # statistics of this step's batches
        self._step = -1

    def start(
        self, clean: RowLosses, size: int, device: torch.device, step: int
    ) -> Prediction | None:
        """See `ControlVariate.start`."""
        if step != self._step:
            self._update()
            self._step = step
        if clean.slopes is None or clean.logits is None or not size:
            return None
        slopes = clean.slopes.cpu().float().nan_to_num(0.0, 0.0, 0.0)
        logits = clean.logits.cpu().float()
        classes = slopes.shape[1]
        if classes > MOST_LOGITS or classes * size > _MOST_NUMBERS:
            return None
        if self.jacobian is None or self.jacobian.shape[1] != size or len(self._basis) != classes:
            self._begin(slopes, size)
        assert self.jacobian is not None
        self.jacobian = self.jacobian.to(device)
        trust = float(self._use[0] / self._use[1]) if self._use[1] > 0 else 0.0
        spread = (self._error / len(self.jacobian)) ** 0.5
        unit = 2.0 ** math.ceil(math.log2(_WIDTH * spread)) if spread > 0 else 1.0
        return Prediction(
            self.jacobian, slopes @ self._basis, logits, max(trust, 0.0), self._basis, unit
        )

    def _begin(self, slopes: Tensor, size: int) -> None:
        classes = slopes.shape[1]
        self._basis = torch.eye(classes)
        if classes > 1 and bool((slopes.sum(1).abs() <= 1e-4 * slopes.abs().sum(1) + 1e-12).all()):
            self._basis = contrasts(classes)
        self.jacobian = torch.zeros(self._basis.shape[1], size)
        self._unknown, self._error, self._use = -1.0, 0.0, torch.zeros(2, dtype=torch.float64)

    def finish(self, innovation: Tensor, sums: Tensor) -> None:
        """See `ControlVariate.finish`."""
        before = self._pending
        self._pending = (
            (innovation, sums) if before is None else (before[0] + innovation, before[1] + sums)
        )

    def _update(self) -> None:
        """Update the Jacobian with the statistics of the last step."""
        if self._pending is None or self.jacobian is None:
            return
        (innovation, sums), self._pending = self._pending, None
        rows, errors, used, squares = sums.tolist()
        if rows == 0 or errors == 0:
            return
        error = self._error = errors / rows
        unknown = _START * error if self._unknown < 0 else self._unknown
        gain = unknown / (unknown + self.jacobian.shape[1] * error / rows)
        self.jacobian = self.jacobian + (gain / rows * innovation).to(self.jacobian)
        self._unknown = min((1 - gain) * unknown + _DRIFT * error, error)
        self._use = _KEPT * self._use + torch.tensor([used, squares], dtype=torch.float64)

    def state_dict(self) -> dict[str, Tensor]:
        """See `ControlVariate.state_dict`; to be called between steps."""
        self._update()
        if self.jacobian is None:
            return {}
        facts = torch.tensor([self._unknown, *self._use.tolist(), self._error], dtype=torch.float64)
        return {"jacobian": self.jacobian, "basis": self._basis, "facts": facts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `ControlVariate.load_state_dict`."""
        self.__init__()  # type: ignore[misc]
        if state:
            self.jacobian, self._basis = state["jacobian"], state["basis"]
            self._unknown, self._use = float(state["facts"][0]), state["facts"][1:3].clone()
            # older states have three facts
            self._error = float(state["facts"][3]) if len(state["facts"]) > 3 else 0.0


def contrasts(classes: int) -> Tensor:
    """Return (K, K - 1) orthonormal columns that sum to zero; contiguous, as after loading a state,
    because products round differently in other layouts.
    """
    return torch.linalg.qr(torch.eye(classes)[:, :-1] - 1 / classes)[0].contiguous()


CONTROL_VARIATES = ("none", "logit_jacobian")


def control_variate(name: str) -> LogitJacobian | None:
    """Return a new control variate by its name."""
    return LogitJacobian() if name == "logit_jacobian" else None
