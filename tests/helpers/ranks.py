"""Processes of a run played by threads: each has a model of its own, and what they tell each other
goes through memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_flops.distributed.collectives import ProcessGroup


class Meeting:
    """Where threads exchange values, round by round."""

    def __init__(self, world: int) -> None:
        self.world, self.values = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class ThreadShare(ProcessGroup):
    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__()
        self.meeting, self.rank, self.world = meeting, rank, meeting.world

    def _count(self, own: Tensor) -> Tensor:
        self.sent += own.numel() * own.element_size()
        return own.clone()

    def all_gather(self, own, sizes):
        assert len(own) == sizes[self.rank]
        return torch.cat(self.meeting.exchange(self.rank, self._count(own)))

    def all_reduce(self, own):
        return torch.stack(self.meeting.exchange(self.rank, self._count(own))).sum(0)

    def broadcast(self, value):
        return self.meeting.exchange(self.rank, value)[0]

    def all_gather_object(self, value):
        return self.meeting.exchange(self.rank, value)


def played(world: int, act: Callable[[ProcessGroup], Any]) -> list[Any]:
    """Let so many ranks act at the same time; returns what each found, or raises what the first of
    them raised.
    """
    meeting, found, errors = Meeting(world), [None] * world, []

    def run(rank: int) -> None:
        try:
            found[rank] = act(ThreadShare(meeting, rank))
        except Exception as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return found
