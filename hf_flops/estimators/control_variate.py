"""Control variates: a prediction of each delta, fitted on past steps, is subtracted and its exact
mean added back. This lowers the variance and introduces no bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..base.state import number, tensor
from ..base.transfer import onto
from ..objectives import RowLosses
from .loadings import Loader, contrasts
from .prediction import Prediction

MOST_LOGITS = 32  # per row; with more, the Jacobian is too large to learn and to keep
_MOST_NUMBERS = 2**27  # of the Jacobian
_RATE = 0.3  # of the least mean squares
_KEPT = 0.95  # decay per step of the statistics behind `trust`
_WIDTH = 16.0  # root mean squares of the errors that fit in one digit of 15 bits


class ControlVariate(Protocol):
    """Predicts deltas from the noise of their rows, using past steps only."""

    def start(
        self,
        clean: RowLosses,
        size: int,
        device: torch.device,
        step: int,
        features: Tensor | None = None,
        reference: Callable[[], Tensor | None] | None = None,
    ) -> Prediction | None:
        """Return the predictions for a batch, or None if there are none.

        Args:
            clean: clean losses of the batch.
            size: d, random numbers in a row's noise, independent and of variance 1.
            device: of the noise.
            step: the optimizer step; all its batches are predicted from earlier steps.
            features: (B, H) what the samples' Jacobians may depend on, from the clean forward;
                None for the logits.
            reference: returns (N, H) the same of many samples, to choose principal components
                from; None for the batch.
        """

    def finish(self, innovation: Tensor, sums: Tensor) -> None:
        """Add the `Prediction.statistics` of a finished batch; they are used from the next step
        on.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state from `state_dict`."""


class LogitJacobian:
    """A Jacobian of the logits by the noise that depends on the sample, tracked by least mean
    squares.

    Every query shows the changes of all logits, not only of the loss: `changes_ik = J_i z_ik`. The
    J_i need no labels and change slowly, while gradients `J_i^T r_i` change sign with the residuals
    r_i. J_i is taken as linear in a few principal components of the sample's features:
    `J_i = sum_e e_ie S_e`, the last e being a constant. A row moves S by a share of its error,
    `S_e += rate min(1, d / n) / d sum e_ie / |e_i|^2 (change - J_i z) z^T` over a step's n rows.
    Predictions are scaled by the factor that would have been best in past steps.

    A softmax ignores a constant added to all logits, so K - 1 directions of K logits are tracked.

    Args:
        components: principal components of the features; 0 for a mean Jacobian, the same for all
            samples.

    Examples:
        >>> import torch
        >>> from hf_flops.estimators import LogitJacobian
        >>> from hf_flops.objectives import RowLosses
        >>> clean = RowLosses(
        ...     torch.ones(2), torch.ones(2), logits=torch.zeros(2, 3), slopes=torch.rand(2, 3)
        ... )
        >>> control = LogitJacobian(components=0)
        >>> prediction = control.start(clean, 50, torch.device("cpu"), 0)
        >>> prediction.jacobian.shape
        torch.Size([3, 50])
    """

    def __init__(self, components: int = 8) -> None:
        self.components = components
        self.jacobian: Tensor | None = None
        self._basis = torch.zeros(0, 0)
        self._loader = Loader(torch.zeros(0), torch.zeros(0, 0), varied=True)
        # mean over the last step's rows of the squared error of the changes, a sum over the logits
        self._error = 0.0
        self._use = torch.zeros(2, dtype=torch.float64)  # delta x prediction, squared predictions
        self._pending: tuple[Tensor, Tensor] | None = None  # statistics of this step's batches
        self._step = -1

    def start(
        self,
        clean: RowLosses,
        size: int,
        device: torch.device,
        step: int,
        features: Tensor | None = None,
        reference: Callable[[], Tensor | None] | None = None,
    ) -> Prediction | None:
        """See `ControlVariate.start`."""
        if step != self._step:
            self._update()
            self._step = step
        if clean.slopes is None or clean.logits is None or not size:
            return None
        slopes = onto(clean.slopes, device).float().nan_to_num(0.0, 0.0, 0.0)
        logits = onto(clean.logits, device).float()
        classes, blocks = slopes.shape[1], self.components + 1
        if classes > MOST_LOGITS or classes * size * blocks > _MOST_NUMBERS:
            return None
        values = logits if features is None else onto(features, device).float()
        values = values.nan_to_num(0.0, 0.0, 0.0)
        if self.jacobian is None or self.jacobian.shape[1] != size or len(self._basis) != classes:
            self._begin(slopes, size)
        assert self.jacobian is not None
        if not self._loader.fits(values):
            many = None if features is None or reference is None else reference()
            loader = Loader.of((values if many is None else many).cpu(), self.components)
            if len(loader.centre) != len(self._loader.centre) or loader.varied:
                self._loader, self.jacobian = loader, torch.zeros_like(self.jacobian)
        self.jacobian, self._basis = onto(self.jacobian, device), onto(self._basis, device)
        self._loader = self._loader.onto(device)
        trust = float(self._use[0] / self._use[1]) if self._use[1] > 0 else 0.0
        spread = (self._error / self._basis.shape[1]) ** 0.5
        unit = 2.0 ** math.ceil(math.log2(_WIDTH * spread)) if spread > 0 else 1.0
        return Prediction(
            self.jacobian,
            slopes @ self._basis,
            logits,
            max(trust, 0.0),
            self._basis,
            unit,
            self._loader.loadings(values),
        )

    def _begin(self, slopes: Tensor, size: int) -> None:
        classes = slopes.shape[1]
        self._basis = torch.eye(classes)
        slopes = slopes.cpu()
        if classes > 1 and bool((slopes.sum(1).abs() <= 1e-4 * slopes.abs().sum(1) + 1e-12).all()):
            self._basis = contrasts(classes)
        self.jacobian = torch.zeros((self.components + 1) * self._basis.shape[1], size)
        self._error, self._use = 0.0, torch.zeros(2, dtype=torch.float64)

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
        self._error = errors / rows
        share = _RATE * min(1.0, self.jacobian.shape[1] / rows) / self.jacobian.shape[1]
        self.jacobian = self.jacobian + (share * innovation).to(self.jacobian)
        self._use = _KEPT * self._use + torch.tensor([used, squares], dtype=torch.float64)

    def state_dict(self) -> dict[str, Tensor]:
        """See `ControlVariate.state_dict`; to be called between steps."""
        self._update()
        if self.jacobian is None:
            return {}
        facts = torch.tensor([self._error, *self._use.tolist()], dtype=torch.float64)
        loader = {"centre": self._loader.centre, "axes": self._loader.axes}
        return {"jacobian": self.jacobian, "basis": self._basis, "facts": facts, **loader}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `ControlVariate.load_state_dict`."""
        self.__init__(self.components)  # type: ignore[misc]
        if state:
            basis, centre = tensor(state["basis"], -1, -1), tensor(state["centre"], -1)
            axes, facts = tensor(state["axes"], len(centre), -1), tensor(state["facts"], 3)
            rows = (1 + self.components) * basis.shape[1]
            self.jacobian, self._basis = tensor(state["jacobian"], rows, -1), basis
            self._loader = Loader(centre, axes, Loader.varies(axes))
            self._error, self._use = number(float(facts[0]), 0), facts[1:].clone()


CONTROL_VARIATES = {
    "none": lambda: None,
    "logit_jacobian": lambda: LogitJacobian(components=0),
    "feature_jacobian": LogitJacobian,
}
"""The control variates by their names; each value returns a new one, or None."""


def control_variate(name: str) -> LogitJacobian | None:
    """Return a new control variate by its name."""
    return CONTROL_VARIATES[name]()
