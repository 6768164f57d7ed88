"""Objectives: from a model and its inputs to a loss for each row."""

from __future__ import annotations

from .base import CallableObjective, Forward, Objective, RowLosses
from .coupled_loss import CoupledLoss
from .generation import GeneratedMetric
from .macro_f1 import MacroF1
from .metrics import Metric
from .model_loss import BatchLoss, RowLossError, TappedLoss
from .named import as_objective
from .row_loss import RowwiseLoss

__all__ = [
    "BatchLoss",
    "CallableObjective",
    "CoupledLoss",
    "Forward",
    "GeneratedMetric",
    "MacroF1",
    "Metric",
    "Objective",
    "RowLossError",
    "RowLosses",
    "RowwiseLoss",
    "TappedLoss",
    "as_objective",
]
