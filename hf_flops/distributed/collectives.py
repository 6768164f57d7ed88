"""What the processes of a run tell each other: tensors gathered and summed, every byte counted, no
waiting for the dead.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import ConfigurationError, ProcessError

# seconds: between looks at a transfer, between looks for trouble, for an answer
_POLL, _LISTEN, _PATIENCE = 1e-4, 1.0, 5.0

T = TypeVar("T")


class ProcessGroup:
    """One process of a run; this one is alone, so nothing has to travel.

    Attributes:
        rank: number of the process.
        world: how many there are.
        sent: bytes that this process has handed to the others, each counted once, however many
            others there are.
    """

    rank, world = 0, 1

    def __init__(self) -> None:
        self.sent = 0

    def partition(self, number: int, least: int = 1) -> list[slice]:
        """Cut so many things into one even piece for each process; none has fewer than `least`,
        unless it has none.
        """
        busy = max(1, min(self.world, number // least))
        edges = [number * min(rank, busy) // busy for rank in range(self.world + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def all_gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """Put the pieces (n, ...) of all processes together, n by process being `sizes`:
        (sum(sizes), ...).
        """
        del sizes
        return own

    def all_reduce(self, own: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes."""
        return own

    def broadcast(self, value: T) -> T:
        """Return what process 0 has."""
        return value

    def all_gather_object(self, value: T) -> list[T]:
        """Return what every process has, by number."""
        return [value]

    def watched(self) -> AbstractContextManager[None]:
        """Return a context in which transfers of others, too, say which process has gone."""
        return nullcontext()

    def assert_same(self, values: Mapping[str, object], when: str) -> None:
        """Refuse to go on with processes that differ.

        Args:
            values: by name, what must be the same everywhere.
            when: what the processes are doing, for the message.

        Raises:
            ConfigurationError: names the first value that differs, and whose.
        """
        for rank, found in enumerate(others := self.all_gather_object(values)):
            for name in values:
                if found[name] != others[0][name]:
                    raise ConfigurationError(
                        f"The processes differ {when}: {name} is {others[0][name]!r} in process 0 "
                        f"and {found[name]!r} in process {rank}; start all of them with the same "
                        "script, arguments, seed and data."
                    )


class TorchProcessGroup(ProcessGroup):
    """A process among those that a launcher started, over torch.distributed's default group.

    A transfer is not waited for blindly: where a process has gone, the others notice, ask around,
    and say which one it was.

    Args:
        device: where tensors have to be for a transfer: a GPU for nccl.

    Raises:
        ProcessError: by every method, where a process does not answer any more.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._troubled = False
        self.rank, self.world, self.device = (
            dist.get_rank(),
            dist.get_world_size(),
            torch.device(device),
        )
        self._store = dist.distributed_c10d._get_default_store()
        self._names: list[str] = []
        atexit.register(self._part)
        self._names = self.all_gather_object(f"pid {os.getpid()} on {socket.gethostname()}")

    def all_gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """See `ProcessGroup.all_gather`."""
        piece = own.detach().to(self.device).contiguous()
        self.sent += piece.numel() * piece.element_size()
        most = max(sizes)
        if len(piece) < most:
            piece = torch.cat([piece, piece.new_zeros(most - len(piece), *piece.shape[1:])])
        pieces = [torch.empty_like(piece) for _ in sizes]
        self._run(lambda: dist.all_gather(pieces, piece, async_op=True))
        return torch.cat([found[:size] for found, size in zip(pieces, sizes, strict=True)]).to(
            own.device
        )

    def all_reduce(self, own: Tensor) -> Tensor:
        """See `ProcessGroup.all_reduce`."""
        summed = own.detach().to(self.device, copy=True).contiguous()
        self.sent += summed.numel() * summed.element_size()
        self._run(lambda: dist.all_reduce(summed, async_op=True))
        return summed.to(own.device)

    def broadcast(self, value: T) -> T:
        """See `ProcessGroup.broadcast`."""
        received: list[Any] = [value]
        if isinstance(value, Tensor):
            self.sent += value.numel() * value.element_size() * (self.rank == 0)
            sent = value.detach().to(self.device, copy=True).contiguous()
            self._run(lambda: dist.broadcast(sent, 0, async_op=True))
            received[0] = sent.to(value.device)
        else:
            self._run(lambda: dist.broadcast_object_list(received, 0, device=self.device))
        return received[0]

    def all_gather_object(self, value: T) -> list[T]:
        """See `ProcessGroup.all_gather_object`."""
        found: list[Any] = [None] * self.world
        self._run(lambda: dist.all_gather_object(found, value))
        return found

    def _run(self, transfer: Callable[[], Any]) -> None:
        try:
            work = transfer()
            if work is None:
                return
            heard = time.monotonic()
            while not work.is_completed():
                time.sleep(_POLL)
                if time.monotonic() - heard > _LISTEN:
                    heard = time.monotonic()
                    if self._store.check(["hf_flops/trouble"]):
                        raise RuntimeError("another process has reported trouble")
            work.wait()
        except RuntimeError as error:
            raise ProcessError(self._blame(error)) from error

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See `ProcessGroup.watched`."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ProcessError) or not (
                isinstance(error, dist.DistError) or "gloo" in str(error)
            ):
                raise
            raise ProcessError(self._blame(error)) from error

    def _part(self) -> None:
        """Close the connections before the interpreter goes: gloo's threads, left alone, may abort
        a process.
        """
        if not self._troubled and dist.is_initialized():
            dist.destroy_process_group()

    def _blame(self, error: Exception) -> str:
        """Ask around who is still there, and say who is not."""
        # from here on nobody waits for the others
        self._troubled, gone = True, list(range(self.world))
        with suppress(RuntimeError):  # the store is gone with the machine that kept it
            self._store.set("hf_flops/trouble", "1")
            self._store.set(f"hf_flops/alive/{self.rank}", "1")
            end = time.monotonic() + _PATIENCE
            while gone and time.monotonic() < end:
                gone = [rank for rank in gone if not self._store.check([f"hf_flops/alive/{rank}"])]
                time.sleep(0.1)
        names = dict(enumerate(self._names))
        lost = ", ".join(
            f"process {rank} ({names.get(rank, 'not yet known')})"
            for rank in gone
            if rank != self.rank
        )
        what = (
            f"{lost} of {self.world} has ended or cannot be reached"
            if lost
            else f"a transfer failed ({error})"
        )
        return (
            f"{what}; process {self.rank} stops. Start again with resume_from_checkpoint=True to "
            "go on from the last."
        )
