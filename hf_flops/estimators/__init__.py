"""Estimators: from losses to directional derivatives, with less variance."""

from __future__ import annotations

from .clipping import Clipping
from .closed_form_head import ClosedFormHead, find_head
from .control_variate import CONTROL_VARIATES, ControlVariate, LogitJacobian
from .delta_chain import Chain, DeltaTransform, FiniteDifference, LeaveOneOut, Residual
from .differences import Antithetic, Estimator, OneSided
from .head_solver import HeadSolver
from .prediction import Prediction

__all__ = [
    "CONTROL_VARIATES",
    "ESTIMATORS",
    "Antithetic",
    "Chain",
    "Clipping",
    "ClosedFormHead",
    "ControlVariate",
    "DeltaTransform",
    "Estimator",
    "FiniteDifference",
    "HeadSolver",
    "LeaveOneOut",
    "LogitJacobian",
    "OneSided",
    "Prediction",
    "Residual",
    "find_head",
]


ESTIMATORS: dict[str, type[Estimator]] = {"one_sided": OneSided, "antithetic": Antithetic}
