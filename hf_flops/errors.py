"""What can go wrong, as a tree: every error of the library is a `FlopsError`.

```text
FlopsError
├── ConfigurationError (a ValueError): arguments cannot work, or not together
├── ObjectiveError (a ValueError): the loss cannot be computed the way the arguments want it
├── NonFiniteError (an ArithmeticError): no perturbed row of a step has a finite loss
├── EngineError (a RuntimeError): a black box refused, failed, or returned invalid outputs
├── ProcessError (a RuntimeError): another process of the run has ended or does not answer
├── StorageError (an OSError): a file of the run cannot be written
└── TrajectoryError (a RuntimeError): a trajectory log is damaged, or its replay ends elsewhere
```
"""

import textwrap


class FlopsError(Exception):
    """Base class of all errors that hf_flops raises itself."""


class ConfigurationError(FlopsError, ValueError):
    """An argument, or a combination of arguments, cannot work."""


class ObjectiveError(FlopsError, ValueError):
    """The loss cannot be computed the way that the arguments want it."""


class NonFiniteError(FlopsError, ArithmeticError):
    """Not one perturbed row of a step has a finite loss."""


class EngineError(FlopsError, RuntimeError):
    """A black box refused, failed, or returned invalid outputs."""


class ProcessError(FlopsError, RuntimeError):
    """Another process of the run has ended or does not answer."""


class StorageError(FlopsError, OSError):
    """A file of the run cannot be written; what was saved before is whole."""


class TrajectoryError(FlopsError, RuntimeError):
    """A trajectory log is damaged, or its replay ends elsewhere than the run."""


def in_one_line(error: BaseException) -> str:
    """Return what an error says, on one line of a bearable length, without a full stop."""
    return (
        textwrap.shorten(str(error), 500, placeholder=" ...").rstrip(" .!") or type(error).__name__
    )
