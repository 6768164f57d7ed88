"""What `FlopsTrainer(objective=...)` takes: an objective, a function or a name."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigurationError
from .base import CallableObjective, Objective
from .macro_f1 import MacroF1
from .metrics import Metric

NAMES: dict[str, Callable[[], Objective]] = {
    "accuracy": lambda: Metric("accuracy"),
    "macro_f1": MacroF1,
}


def as_objective(given: object) -> Objective | None:
    """Return the objective that a user means; None for the model's own loss.

    Raises:
        ConfigurationError: it is none.

    Examples:
        >>> type(as_objective("macro_f1")).__name__
        'MacroF1'
    """
    if given is None or isinstance(given, Objective):
        return given
    if isinstance(given, str) and given in NAMES:
        return NAMES[given]()
    if isinstance(given, str) or not callable(given):
        raise ConfigurationError(
            f"objective={given!r} is unknown: use {', '.join(map(repr, NAMES))}, a function of "
            "(outputs, inputs), or an Objective."
        )
    return CallableObjective(given)
