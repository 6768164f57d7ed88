"""A lock on the folder of a run, so that no two runs delete each other's files."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..distributed.collectives import ProcessGroup
from ..errors import ConfigurationError, FlopsError, ProcessError, StorageError, in_one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("hf_flops.trainer")
LOCK = "_flops.lock"  # the underscore keeps it from being pushed to the Hub


@contextmanager
def undisturbed(folder: str, group: ProcessGroup) -> Iterator[None]:
    """Keep other runs out of a run's folder inside the context, and name a process that dies.

    Raises:
        ConfigurationError: another run has the folder.
        ProcessError: another process of the run, or a worker of a data loader, has ended.
        StorageError: the folder cannot be written.
    """
    with group.watched(), locked(folder, group):
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, FlopsError) or not str(error).startswith("DataLoader worker"):
                raise
            raise ProcessError(
                f"The run stops because a process that loads its data has ended: "
                f"{in_one_line(error)}. If it was killed, memory may have run out: lower "
                "dataloader_num_workers. Go on with resume_from_checkpoint=True."
            ) from error


@contextmanager
def locked(folder: str, group: ProcessGroup) -> Iterator[None]:
    """Hold the lock of a run's folder inside the context; all processes of the run share it.

    The operating system drops a lock when its process ends, however it ends, so that the file that
    a killed run leaves behind blocks nobody. A file system without locks gets a warning.

    Raises:
        ConfigurationError: another run has it; the message names its process.
        StorageError: the folder cannot be written.
    """
    handle, error = None, None
    path = Path(folder, LOCK)
    if group.rank == 0:
        try:
            handle = _acquire(path)
        except (ConfigurationError, StorageError) as caught:
            error = caught
    error = group.broadcast(error)
    if error is not None:
        raise error
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)


def _acquire(path: Path) -> int | None:
    """Return the handle of the locked file, None where locks do not exist."""
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _lock(handle, path):
                return None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                break
            os.close(handle)  # its holder has removed it in the meantime
        name = f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}"
        os.ftruncate(handle, 0)
        os.pwrite(handle, name.encode(), 0)
    except OSError as error:
        raise StorageError(
            f"{path.parent} cannot be written ({in_one_line(error)}), so the run has not begun: "
            "nothing was changed. Make room or the folder writable, or choose another output_dir."
        ) from error
    return handle


def _lock(handle: int, path: Path) -> bool:
    """Lock a file; return False where the file system has no locks."""
    try:
        # of the process, not of the open file, which a data loader's workers inherit
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(handle, 500, 0).decode(errors="replace") or "another process"
        os.close(handle)
        raise ConfigurationError(
            f"Another run writes to {path.parent}: {holder}. Wait for its end, or choose another "
            "output_dir."
        ) from None
    except OSError as error:
        os.close(handle)
        logger.warning("%s cannot be locked (%s): start no other run there.", path.parent, error)
        return False
    return True
