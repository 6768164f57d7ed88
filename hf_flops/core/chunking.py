"""How many rows go through the model at a time: measured during the first steps, and halved when
memory runs out.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ..base.memory import PeakMemory, free_memory
from ..base.state import State, flag, number, whole
from ..base.transfer import synchronise

logger = logging.getLogger(__name__)
Work = Callable[[slice], int]
"""Processes the rows of a slice, keeps the result only if all of it succeeded, and returns the
number of columns of a row.
"""

# rows: the first size tried, steps too small for timing to matter, the last size tried
FIRST, SMALL, MOST = 8, 32, 4096
_TIMED_ROWS = 64  # a size is timed on at least this many rows
_SHARE = 0.8  # of free memory
_TOLERANCE = 1.03  # sizes within this factor of the fastest count as equal; the smallest is used


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)  # torch has no class of its own for the CPU's allocator
    return isinstance(error, RuntimeError) and (
        "you tried to allocate" in text or "out of memory" in text
    )


class ChunkPlanner:
    """Chooses how many rows go through the model at a time (the chunk size).

    A given size is used as it is. Otherwise the planner tries sizes on the chunks of the first
    steps, at no extra cost: starting from 8 rows it doubles the size as long as the previous peak
    predicts that memory suffices and the time per row falls. It then uses the smallest size that is
    about as fast as the fastest. Steps of 32 rows or fewer are not timed, and nothing is timed when
    torch must be deterministic. In both cases a chunk that does not fit in memory is halved and
    repeated. Where weights are fetched for each forward, every forward has a fixed cost, and the
    planner uses as many rows as memory holds, judged by the first forward's peak.

    Args:
        size: rows per chunk; None to measure.
        limit: bytes that a chunk may use in addition to the model, noise included; None for 80 % of
            the free memory.

    Attributes:
        given: the requested size; None if it is measured.
        size: largest number of rows of the next chunk.
        settled: whether the size is final, unless memory runs out.
        costs: size → least seconds per row and column.
        ceiling: largest number of rows that is known, or assumed, to fit.
    """

    def __init__(self, size: int | None = None, limit: float | None = None) -> None:
        self.given = size
        self.size, self.settled = FIRST if size is None else size, size is not None
        self.costs: dict[int, float] = {}
        self.ceiling = MOST if size is None else 2**62
        self.limit, self.device, self._prepared = limit, torch.device("cpu"), False
        self._fetches = False
        # rows timed at this size; -1 before the first run
        self._peak, self._timed, self._warned = math.nan, -1, False

    @classmethod
    def of(cls, rows: int | ChunkPlanner) -> ChunkPlanner:
        """Return a planner with a fixed number of rows, or the planner itself."""
        return rows if isinstance(rows, ChunkPlanner) else cls(rows)

    def prepare(self, device: torch.device, row_bytes: float, *, fetches: bool = False) -> None:
        """Set the device, the bytes of a row's noise, and whether every forward fetches weights;
        only the first call has an effect.
        """
        if self._prepared:
            return
        self._fetches = fetches
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
        """Process a chunk; return False, with the size halved, if memory ran out.

        Args:
            work: processes it and returns the number of columns of a row.
            rows: rows of the chunk.
            most: rows that a chunk would have here without a limit.
        """
        try:
            if self._fetches and not self.settled:
                self._fill(work, rows)
            elif self.settled or rows != min(self.size, most):
                work()
            else:
                self._try(work, rows, most)
            return True
        except Exception as error:
            if rows == 1 or not out_of_memory(error):
                raise
        self._halve(rows)  # not in the handler: the traceback would keep the chunk's tensors alive
        return False

    def _fill(self, work: Callable[[], int], rows: int) -> None:
        """Process the first chunk, and settle for as many rows as memory holds."""
        with PeakMemory(self.device) as memory:
            work()
        known = self.limit is not None and self.limit > 0 and memory.megabytes > 0
        held = int(self.limit / (1.1 * memory.megabytes * 2**20)) * rows if known else SMALL  # type: ignore[operator]
        self.size = self.ceiling = max(1, min(self.ceiling, held))
        self._settle()

    def _try(self, work: Callable[[], int], rows: int, most: int) -> None:
        """Process a chunk of the size under test: the first measures memory, the following ones
        time.
        """
        if self._timed < 0:
            with PeakMemory(self.device) as memory:
                work()
            self._peak, self._timed = memory.megabytes * 2**20, 0
            if most <= SMALL:
                self._next(most)
            return
        synchronise(self.device)
        start = time.perf_counter()
        columns = work()
        synchronise(self.device)
        cost = (time.perf_counter() - start) / (rows * columns)
        self.costs[self.size] = min(cost, self.costs.get(self.size, math.inf))
        self._timed += rows
        if self._timed >= _TIMED_ROWS:
            self._next(most)

    def _next(self, most: int) -> None:
        """Try the next size, or settle."""
        grown = 2 * self.size
        known = not math.isnan(self._peak) and self.limit is not None and not math.isnan(self.limit)
        fits = 2.2 * self._peak <= self.limit if known else grown <= SMALL  # type: ignore[operator]
        if self.size < most and grown <= self.ceiling and fits and not self._slower():
            self.size, self._timed = grown, -1
            return
        self._settle()

    def _slower(self) -> bool:
        """Return whether a larger size no longer pays: clearly, or twice in a row."""
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
        """Return the state that a resumed run needs to continue with the same size."""
        return {
            "size": self.size,
            "settled": self.settled,
            "ceiling": self.ceiling,
            "costs": list(self.costs.items()),
        }

    def load_state_dict(self, state: State) -> None:
        """Load a state from `state_dict`; a size that the user chose is kept."""
        if self.given is None:
            self.size, self.settled = whole(state["size"], 1), flag(state["settled"])
            self.ceiling = whole(state["ceiling"], 1)
            self.costs = {whole(size, 1): number(cost, 0) for size, cost in state["costs"]}


def even(number: int, most: int) -> int:
    """Return the size of the first chunk when `number` rows are split into the fewest near-equal
    chunks of at most `most` rows.

    The other chunks have the same size or one row less, as with `torch.tensor_split`. So there is
    no short remainder, and a process that gets some of the chunks splits its rows in the same way.
    """
    return -(-number // -(-number // most))


def in_chunks(
    lengths: Iterable[int], work: Work, planner: ChunkPlanner, *, whole: bool = False
) -> None:
    """Process consecutive stretches of rows chunk by chunk; no chunk spans two stretches.

    Args:
        lengths: rows of each stretch.
        work: processes the rows of a slice.
        planner: chooses the chunk size.
        whole: use all rows of a stretch as one chunk, as long as they fit.
    """
    start = 0
    for length in lengths:
        end = start + length
        while start < end:
            stop = min(start + (planner.ceiling if whole else planner.size), end)
            if planner.settled:
                stop = start + even(end - start, stop - start)
            elif end - stop == 1 and stop - start > 2:
                stop -= 1  # a single row uses another matrix kernel, which rounds differently
            chunk = slice(start, stop)
            most = 0 if whole else length  # a whole stretch is not part of the measurement
            if planner.run(partial(work, chunk), stop - start, most):
                start = stop
