"""Collectives that count sent bytes, and report a process that ended instead of waiting."""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import ConfigurationError, ProcessError

_POLL = 1e-4  # seconds between checks whether a transfer is complete
_LISTEN = 1.0  # seconds between checks whether another process has reported an error
_PATIENCE = 5.0  # seconds to wait for the other processes' answers

T = TypeVar("T")


class ProcessGroup:
    """The group of a run with one process: collectives return their arguments.

    Attributes:
        rank: number of the process.
        world: number of processes.
        sent: bytes that this process has sent, each counted once for any number of receivers.
        before: is called before each transfer; None for nothing.
    """

    rank, world = 0, 1

    def __init__(self) -> None:
        self.sent, self.before = 0, cast("Callable[[], None] | None", None)

    def partition(self, number: int, least: int = 1) -> list[slice]:
        """Split `number` items into an even slice per process, of `least` or more, or none."""
        busy = max(1, min(self.world, number // least))
        edges = [number * min(rank, busy) // busy for rank in range(self.world + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def all_gather(self, piece: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the pieces (sizes[rank], ...) of all processes: (sum(sizes), ...)."""
        del sizes
        return piece

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes."""
        return tensor

    def broadcast(self, value: T) -> T:
        """Return the value of process 0."""
        return value

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        return [value]

    def watched(self) -> AbstractContextManager[None]:
        """Return a context in which failed transfers of other code name the process that ended."""
        return nullcontext()

    def assert_same(self, values: Mapping[str, object], when: str) -> None:
        """Check that values are equal in all processes.

        Args:
            values: by name.
            when: what the processes are doing, for the message.

        Raises:
            ConfigurationError: names the first value that differs, and its process.
        """
        for rank, theirs in enumerate(others := self.all_gather_object(values)):
            for name in values:
                if theirs[name] != others[0][name]:
                    raise ConfigurationError(
                        f"The processes differ {when}: {name} is {others[0][name]!r} in process 0 "
                        f"and {theirs[name]!r} in process {rank}; start all of them with the same "
                        "script, arguments, seed and data."
                    )


class TorchProcessGroup(ProcessGroup):
    """The processes of torch.distributed's default group.

    If a process ends, the others stop waiting for its transfers and report which one it was.

    Args:
        device: of tensors in transfers; a GPU for nccl.

    Raises:
        ProcessError: by every method, if a process no longer answers.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._troubled = False
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device)
        self._store = dist.distributed_c10d._get_default_store()
        self._names: list[str] = []
        atexit.register(self._part)
        self._names = self.all_gather_object(f"pid {os.getpid()} on {socket.gethostname()}")

    def all_gather(self, piece: Tensor, sizes: Sequence[int]) -> Tensor:
        """See `ProcessGroup.all_gather`."""
        sent = piece.detach().to(self.device).contiguous()
        self.sent += sent.numel() * sent.element_size()
        # all processes send as much as the one with the most
        sent = torch.cat([sent, sent.new_zeros(max(sizes) - len(sent), *sent.shape[1:])])
        received = [torch.empty_like(sent) for _ in sizes]
        self._run(lambda: dist.all_gather(received, sent, async_op=True))
        pieces = [values[:size] for values, size in zip(received, sizes, strict=True)]
        return torch.cat(pieces).to(piece.device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See `ProcessGroup.all_reduce`."""
        summed = tensor.detach().to(self.device, copy=True).contiguous()
        self.sent += summed.numel() * summed.element_size()
        self._run(lambda: dist.all_reduce(summed, async_op=True))
        return summed.to(tensor.device)

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
        values: list[Any] = [None] * self.world
        self._run(lambda: dist.all_gather_object(values, value))
        return values

    def _run(self, transfer: Callable[[], Any]) -> None:
        if self.before is not None:
            self.before()
        try:
            work = transfer()
            if work is None:
                return
            checked = time.monotonic()
            while not work.is_completed():
                time.sleep(_POLL)
                if time.monotonic() - checked > _LISTEN:
                    checked = time.monotonic()
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
        """Close the connections before the interpreter exits: gloo's threads may abort it."""
        if not self._troubled and dist.is_initialized():
            dist.destroy_process_group()

    def _blame(self, error: Exception) -> str:
        """Return a message that names the processes that no longer answer."""
        # from here on no process waits for the others
        self._troubled, gone = True, list(range(self.world))
        with suppress(RuntimeError):  # the store ends with the process that hosts it
            self._store.set("hf_flops/trouble", "1")
            self._store.set(f"hf_flops/alive/{self.rank}", "1")
            end = time.monotonic() + _PATIENCE
            while gone and time.monotonic() < end:
                gone = [rank for rank in gone if not self._store.check([f"hf_flops/alive/{rank}"])]
                time.sleep(0.1)
        names = dict(enumerate(self._names))
        lost = ", ".join(
            f"process {rank} ({names.get(rank, 'unknown')})" for rank in gone if rank != self.rank
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
