"""How many rows go through the model at a time: found out while the work is done, and halved where
memory is short.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

import torch

from ..base.memory import PeakMemory, free_memory
from ..base.state import State

logger = logging.getLogger(__name__)
Work = Callable[[slice], int]
"""Does the work of some rows and keeps the result only if all of it succeeded; returns how many
columns a row had.
"""

# rows: the first size tried, steps too small for timing to matter, the last size tried
FIRST, SMALL, MOST = 8, 32, 4096
_TIMED_ROWS = 64  # a size is timed on at least this many rows
_SHARE = 0.8  # of free memory
_TOLERANCE = 1.03  # sizes that are slower by less are as good: the smallest of them is taken


def out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that memory did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)  # torch has no class of its own for the CPU's allocator
    return isinstance(error, RuntimeError) and (
        "you tried to allocate" in text or "out of memory" in text
    )


class ChunkPlanner:
    """Knows how many rows go through the model at a time.

    With a size it keeps to that size. Without one it tries sizes on the chunks of the first steps,
    so that nothing is computed for the trial alone: from 8 rows it doubles as long as memory will
    suffice, by the peak of the size before, and time per row falls; then it settles on the smallest
    size that is as fast as the fastest. Steps of 32 rows or fewer are not timed, nor is anything
    where torch is told to be deterministic. Either way a chunk that does not fit in memory is
    halved and done again.

    Args:
        size: rows at a time, or None to find out.
        limit: bytes that a chunk may take on top of the model, noise included; None for 80 % of
            what is free.

    Attributes:
        given: the size that was asked for, None where it is found out.
        size: rows that the next chunk may have.
        settled: whether the size is final, but for a shortage of memory.
        costs: size → least seconds per row and column that it took.
        ceiling: rows that a chunk may have at most, because more did not fit.
    """

    def __init__(self, size: int | None = None, limit: float | None = None) -> None:
        self.given = size
        self.size, self.settled = FIRST if size is None else size, size is not None
        self.costs: dict[int, float] = {}
        self.ceiling = MOST if size is None else 2**62
        self.limit, self.device, self._prepared = limit, torch.device("cpu"), False
        # rows timed at this size; -1: not even run
        self._peak, self._timed, self._warned = math.nan, -1, False

    @classmethod
    def of(cls, rows: int | ChunkPlanner) -> ChunkPlanner:
        """Return a planner that keeps to so many rows, or the planner itself."""
        return rows if isinstance(rows, ChunkPlanner) else cls(rows)

    def prepare(self, device: torch.device, row_bytes: float) -> None:
        """Learn where the model runs, and how many bytes the noise of a row has, with the first
        batch.
        """
        if self._prepared:
            return
        self.device, self._prepared = device, True
        if self.given is not None:
            return
        if self.limit is None:
            self.limit = _SHARE * free_memory(device)
        if row_bytes and not math.isnan(self.limit):
            self.ceiling = min(self.ceiling, max(1, int(self.limit / (3 * row_bytes))))
        if torch.are_deterministic_algorithms_enabled() and not self.settled:
            self.size, self.settled = SMALL, True
        self.size = min(self.size, self.ceiling)

    def run(self, work: Callable[[], int], rows: int, most: int) -> bool:
        """Do the work of a chunk; returns False, with the size halved, if memory did not suffice.

        Args:
            work: does it, and returns how many columns a row had.
            rows: rows of the chunk.
            most: rows that a chunk could have here, were there no limit.
        """
        try:
            if self.settled or rows != min(self.size, most):
                work()
            else:
                self._try(work, rows, most)
            return True
        except Exception as error:
            if rows == 1 or not out_of_memory(error):
                raise
        self._halve(rows)  # not in the handler: the traceback would keep the chunk's tensors alive
        return False

    def _try(self, work: Callable[[], int], rows: int, most: int) -> None:
        """Do the work of a chunk of a size on trial: the first shows its memory, the next ones its
        time.
        """
        if self._timed < 0:
            with PeakMemory(self.device) as memory:
                work()
            self._peak, self._timed = memory.megabytes * 2**20, 0
            if most <= SMALL:
                self._next(most)
            return
        start = time.perf_counter()
        columns = work()
        cost = (time.perf_counter() - start) / (rows * columns)
        self.costs[self.size] = min(cost, self.costs.get(self.size, math.inf))
        self._timed += rows
        if self._timed >= _TIMED_ROWS:
            self._next(most)

    def _next(self, most: int) -> None:
        """Go on to the next size, or settle."""
        grown = 2 * self.size
        known = not math.isnan(self._peak) and self.limit is not None and not math.isnan(self.limit)
        fits = 2.2 * self._peak <= self.limit if known else grown <= SMALL  # type: ignore[operator]
        if self.size < most and grown <= self.ceiling and fits and not self._slower():
            self.size, self._timed = grown, -1
            return
        self._settle()

    def _slower(self) -> bool:
        """Say whether growth has stopped to pay: clearly, or twice in a row."""
        if self.size not in self.costs:
            return False
        earlier = {size: cost for size, cost in self.costs.items() if size <= self.size // 4}
        flat = bool(earlier) and min(self.costs.values()) * _TOLERANCE > min(earlier.values())
        return flat or self.costs[self.size] > 1.2 * min(self.costs.values())

    def _settle(self) -> None:
        self.settled = True
        costs = {size: cost for size, cost in self.costs.items() if size <= self.ceiling}
        if costs:
            self.size = min(
                size for size, cost in costs.items() if cost <= _TOLERANCE * min(costs.values())
            )
        logger.info("Rows per forward: %d.", self.size)

    def _halve(self, rows: int) -> None:
        self.ceiling = rows // 2
        if not self.settled and self.costs:
            self._settle()
        self.size = min(self.size, self.ceiling)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._warned:
            logger.warning(
                "A forward pass of %d rows did not fit in memory: rows_per_forward is halved "
                "until it does, to %d now. The estimate stays the same.",
                rows,
                self.ceiling,
            )
        self._warned = True

    def state_dict(self) -> State:
        """Return what a resume needs to go on with the same size, as JSON-serialisable values."""
        return {
            "size": self.size,
            "settled": self.settled,
            "ceiling": self.ceiling,
            "costs": list(self.costs.items()),
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`; a size that the user gave stays."""
        if self.given is None:
            self.size, self.settled, self.ceiling = (
                state["size"],
                state["settled"],
                state["ceiling"],
            )
            self.costs = {int(size): cost for size, cost in state["costs"]}


def even(number: int, most: int) -> int:
    """Return how many of so many rows go first, where they are cut into as few chunks as `most`
    rows at a time allow.

    All chunks are as long as the first or shorter by one, as `torch.tensor_split` cuts. So no short
    one is left over, and a process that gets some of them cuts its rows into the same ones.
    """
    return -(-number // -(-number // most))


def in_chunks(
    lengths: Iterable[int], work: Work, planner: ChunkPlanner, *, whole: bool = False
) -> None:
    """Do the work of consecutive stretches of rows, a chunk at a time and never two stretches
    together.

    Args:
        lengths: rows of each stretch.
        work: does the work of the rows of a slice.
        planner: says how many rows a chunk has.
        whole: take all rows of a stretch at a time, as long as they fit.
    """
    start = 0
    for length in lengths:
        end = start + length
        while start < end:
            stop = min(start + (planner.ceiling if whole else planner.size), end)
            if planner.settled:
                stop = start + even(end - start, stop - start)
            elif end - stop == 1 and stop - start > 2:
                stop -= 1  # a row alone is multiplied in another way, and rounded otherwise
            chunk = slice(start, stop)
            most = 0 if whole else length  # a whole stretch is no trial
            if planner.run(lambda chunk=chunk: work(chunk), stop - start, most):  # type: ignore[misc]
                start = stop
