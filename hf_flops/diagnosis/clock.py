"""The time that a trial may take, and a bar that shows it."""

from __future__ import annotations

import math
import time

from tqdm.auto import tqdm


class Clock:
    """Counts the seconds of a trial.

    Args:
        minutes: that it may take, None for no limit.
        bar: whether to show a bar, on stderr.

    Attributes:
        limit: seconds in all.

    Examples:
        >>> Clock(minutes=1).left <= 60
        True
    """

    def __init__(self, minutes: float | None = None, *, bar: bool = False) -> None:
        self.limit = math.inf if minutes is None else 60 * minutes
        self._start = time.monotonic()
        self._bar = tqdm(unit=" steps", disable=not bar, leave=False, desc="trial")

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.limit - (time.monotonic() - self._start)

    def show(self, steps: int, note: str) -> None:
        """Show how many steps are done, and the time left where that is limited."""
        time_left = f", {max(self.left, 0):.0f} s left" if self.left < math.inf else ""
        self._bar.set_postfix_str(note + time_left, refresh=False)
        self._bar.update(steps - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
