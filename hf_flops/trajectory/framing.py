"""An append-only file of checksummed records: a crash loses the last one at most.

    file    mark (8 bytes), then records
    record  head: "FLOP", number, step, length of the payload, CRC-32 of the payload,
            CRC-32 of the head so far
            payload

All integers are unsigned, 32 bits, little-endian.
"""

from __future__ import annotations

import os
import struct
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import TrajectoryError

MARK = b"FLOPSLG1"
_BEGIN = b"FLOP"
_HEAD = struct.Struct("<4s4I")  # without its own checksum
_HEAD_SIZE = _HEAD.size + 4


@dataclass(frozen=True)
class Record:
    """A record of the file.

    Attributes:
        number: its position among the records, from 0.
        step: optimizer steps that were done when it was written.
        offset: its first byte in the file.
        payload: what it says.
    """

    number: int
    step: int
    offset: int
    payload: bytes

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + _HEAD_SIZE + len(self.payload)


def read(path: str | Path) -> Iterator[Record]:
    """Yield the records of a file; an incomplete one at its end is ignored.

    Raises:
        TrajectoryError: the file is not a log, or is damaged; the message names the record.
    """
    with open(path, "rb") as file:
        mark = file.read(len(MARK))
        if mark != MARK[: len(mark)]:
            raise TrajectoryError(
                f"{path} is no trajectory log, or its mark, the first {len(MARK)} bytes, is "
                "damaged."
            )
        number, step = 0, 0
        while record := _next(file, path, number, step):
            yield record
            number, step = number + 1, record.step


def _next(file: BinaryIO, path: str | Path, number: int, before: int) -> Record | None:
    offset = file.tell()
    head = file.read(_HEAD_SIZE)
    if len(head) < _HEAD_SIZE:
        return None
    after = f"after the one of step {before}" if number else "the first"
    what = (
        f"{path} is damaged: record {number} at byte {offset}, {after}, does not have its checksum."
    )
    _check(head[: _HEAD.size], int.from_bytes(head[_HEAD.size :], "little"), what)
    begin, written, step, length, checksum = _HEAD.unpack(head[: _HEAD.size])
    if begin != _BEGIN or written != number:
        raise TrajectoryError(
            f"{path} is damaged: at byte {offset}, {after}, record {number} should begin, but "
            f"record {written} does."
        )
    if length > os.fstat(file.fileno()).st_size - file.tell():
        return None
    payload = file.read(length)
    _check(payload, checksum, what)
    return Record(number, step, offset, payload)


def _check(content: bytes, checksum: int, what: str) -> None:
    if zlib.crc32(content) != checksum:
        raise TrajectoryError(f"{what} Steps before it can be replayed with --step.")


class Appender:
    """Appends records to a file, each in one write.

    Args:
        path: the file.
        after: the last record to keep; later ones are removed. None starts a new file.
    """

    def __init__(self, path: str | Path, after: Record | None = None) -> None:
        self.number = 0 if after is None else after.number + 1
        # open for a whole run
        self._file = open(path, "wb" if after is None else "r+b", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # where the run ends with an error
        if after is None:
            self._file.write(MARK)
        else:
            self._file.truncate(after.end)
            self._file.seek(after.end)

    def append(self, step: int, payload: bytes) -> None:
        """Write a record.

        Raises:
            OSError: it could not be written completely; then no part of it is kept.
        """
        head = _HEAD.pack(_BEGIN, self.number, step, len(payload), zlib.crc32(payload))
        record = head + zlib.crc32(head).to_bytes(4, "little") + payload
        start = self._file.tell()
        written = self._file.write(record)
        if written != len(record):
            self._file.truncate(start)
            self._file.seek(start)
            raise OSError(
                f"only {written} of {len(record)} bytes could be written to {self._file.name}: is "
                "the disk full?"
            )
        self.number += 1

    def sync(self) -> None:
        """Flush the file to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()
