"""What can go wrong, as a tree: every error of the library is a `FlopsError`.

FlopsError ├── ConfigurationError an argument, or a combination of arguments, that cannot work (also
a ValueError) ├── ObjectiveError the model's loss cannot be taken the way that was asked for (also a
ValueError) ├── NonFiniteError no perturbed row of a step has a finite loss (also an
ArithmeticError) ├── EngineError a black box refused, failed, or answered with nonsense (also a
RuntimeError) ├── ProcessError another process of the run has ended or does not answer (also a
RuntimeError) └── TrajectoryError a trajectory log is damaged, or does not lead where it should
(also a RuntimeError)
"""

import textwrap


class FlopsError(Exception):
    """Base class of all errors that hf_flops raises on its own account."""


class ConfigurationError(FlopsError, ValueError):
    """An argument, or a combination of arguments, cannot work."""


class ObjectiveError(FlopsError, ValueError):
    """The model's loss cannot be taken the way that was asked for."""


class NonFiniteError(FlopsError, ArithmeticError):
    """Not one perturbed row of a step has a finite loss."""


class EngineError(FlopsError, RuntimeError):
    """A black box refused, failed, or answered with nonsense."""


class ProcessError(FlopsError, RuntimeError):
    """Another process of the run has ended or does not answer."""


class TrajectoryError(FlopsError, RuntimeError):
    """A trajectory log is damaged, or does not lead where it should."""


def in_one_line(error: BaseException) -> str:
    """Return what an error says, on one line of a bearable length, without a full stop."""
    return (
        textwrap.shorten(str(error), 500, placeholder=" ...").rstrip(" .!") or type(error).__name__
    )
