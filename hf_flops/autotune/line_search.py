"""A line search along recent updates: would a shorter or a longer step have been better?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

LONGER, SHORTER = (2.0, 8.0, 64.0), (1 / 2, 1 / 8, 1 / 64, 0.0)
MOST_LOOKS = 6  # lengths that a search looks at, at most
LEAST, MOST = 1e-4, 1e6  # lengths that a thorough search looks at
_CLEAR, _SURE = 1.0, 2.0  # standard errors of a paired difference
_BLIND = 0.01  # of the loss: what counts as its error where it is one number for the whole batch


@dataclass(frozen=True)
class Found:
    """The result of a line search.

    Attributes:
        best: the length with the least loss; the updates that were taken have length 1.
        clear: whether its loss is less than that of 1 by more than the choice of samples explains.
        looks: number of lengths tried.
    """

    best: float
    clear: bool
    looks: int


def line_search(losses: Callable[[float], Tensor]) -> Found:
    """Try lengths from 1 on in the direction in which the loss falls, for as long as it does.

    Args:
        losses: returns the losses (B,) of the same B samples at a length; 0 is where the updates
            began.
    """
    best, at = 1.0, {1.0: losses(1.0)}
    for lengths in (LONGER, SHORTER):
        for length in lengths:
            at[length] = losses(length)
            if _mean(at[length]) < _mean(at[best]):
                best = length
            elif lengths is LONGER or _mean(at[best]) < math.inf:
                break
        if best != 1.0:
            break
    return Found(best, best != 1.0 and _clear(at[best], at[1.0]), len(at))


def thorough_search(losses: Callable[[float], Tensor]) -> Found:
    """Find the best power of 2: by factors of 8 while the loss falls, then by factors of 2.

    It is clear if the line leads down, or if the updates did harm, by over two standard errors.

    Args:
        losses: as for `line_search`, but of many samples, as their least mean is trusted.
    """
    start, at = losses(0.0), {1.0: losses(1.0)}
    for factor in (8.0, 2.0):
        before = None
        while before != (best := min(at, key=lambda length: _mean(at[length]))):
            before = best
            for length in (best * factor, best / factor):
                if length not in at and LEAST < length < MOST:
                    at[length] = losses(length)
                    if _mean(at[length]) < _mean(at[best]):
                        break
    down = any(_clear(moved, start, _SURE) for moved in at.values())
    return Found(best, down or _clear(start, at[1.0], _SURE), 1 + len(at))


def _mean(losses: Tensor) -> float:
    """Return the mean of losses (B,), infinite if it is not a number."""
    mean = float(losses.double().mean())
    return mean if math.isfinite(mean) else math.inf


def _clear(one: Tensor, two: Tensor, errors: float = _CLEAR) -> bool:
    """Return whether losses (B,) are less than others (B,) by so many standard errors."""
    if not bool(two.isfinite().all()):
        return True
    gain = (two - one).double()
    error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else _BLIND * two.abs()
    return bool(gain.mean() > errors * error)
