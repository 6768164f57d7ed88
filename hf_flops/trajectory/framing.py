"""An append-only file of checksummed records: a crash can only lose the last one, and a changed byte is named.

    file    mark (8 bytes), then records
    record  head: "FLOP", number, step, length of the payload, CRC-32 of the payload, CRC-32 of the head so far
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

from ..errors import TrajectoryError

MARK = b"FLOPSLG1"
_BEGIN = b"FLOP"
_HEAD = struct.Struct("<4s4I")  # without its own checksum
_HEAD_SIZE = _HEAD.size + 4
# Checksums are linear: how a wrong byte at the very end changes them, by the bits that are wrong.
_LAST = {zlib.crc32(bytes([bits])) ^ zlib.crc32(b"\0"): bits for bits in range(256)}
_ENTRIES = list(_LAST)
_BY_TOP = {entry >> 24: index for index, entry in enumerate(_ENTRIES)}


@dataclass(frozen=True)
class Record:
    """A record of the file.

    Attributes:
        number: its place among the records, from 0.
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


def changed_byte(length: int, difference: int) -> int | None:
    """Return which byte of so many is wrong, if one wrong byte explains the difference of two CRC-32s, else None."""
    for index in range(length - 1, -1, -1):
        if _LAST.get(difference):
            return index
        top = _BY_TOP[difference >> 24]  # undo what one more byte did to the register
        difference = ((difference ^ _ENTRIES[top]) << 8) & 0xFFFFFFFF | top
    return None


def read(path: str | Path) -> Iterator[Record]:
    """Yield the records of a file; one that a crash left unfinished at its end is passed over.

    Raises:
        TrajectoryError: the file is no log, or damaged; the message names record, step and byte.
    """
    with open(path, "rb") as file:
        mark = file.read(len(MARK))
        if mark != MARK[: len(mark)]:
            wrong = next(i for i, (found, wanted) in enumerate(zip(mark, MARK, strict=False)) if found != wanted)
            raise TrajectoryError(
                f"{path} is no trajectory log, or its mark is damaged: byte {wrong} is not as it should be."
            )
        number, step = 0, 0
        while record := _next(file, path, number, step):
            yield record
            number, step = number + 1, record.step


def _next(file: object, path: str | Path, number: int, before: int) -> Record | None:
    offset = file.tell()  # type: ignore[attr-defined]
    head = file.read(_HEAD_SIZE)  # type: ignore[attr-defined]
    if len(head) < _HEAD_SIZE:
        return None
    own = int.from_bytes(head[_HEAD.size :], "little")
    after = f"after the one of step {before}" if number else "the first"
    _check(head[: _HEAD.size], own, offset, f"the head of record {number} ({after})", path)
    begin, found, step, length, checksum = _HEAD.unpack(head[: _HEAD.size])
    if begin != _BEGIN or found != number:
        raise TrajectoryError(
            f"{path} is damaged: at byte {offset}, {after}, record {number} should begin, but record {found} does."
        )
    payload = file.read(length)  # type: ignore[attr-defined]
    if len(payload) < length:
        return None
    _check(payload, checksum, offset + _HEAD_SIZE, f"record {number} of step {step}", path)
    return Record(number, step, offset, payload)


def _check(content: bytes, checksum: int, offset: int, what: str, path: str | Path) -> None:
    """Raise if content that starts at a byte of the file does not have its checksum."""
    difference = zlib.crc32(content) ^ checksum
    if not difference:
        return
    place = changed_byte(len(content), difference)
    if place is None:
        size = (difference.bit_length() + 7) // 8
        lone = "head" in what and not difference & ((1 << 8 * (size - 1)) - 1)  # a head's own checksum follows it
        place = len(content) + size - 1 if lone else None
    where = f"bytes {offset} to {offset + len(content)}" if place is None else f"byte {offset + place}"
    raise TrajectoryError(
        f"{path} is damaged: {what} does not have its checksum; wrong: {where}. Steps before it can be replayed with --step."
    )


class Appender:
    """Appends records to a file, each in one write.

    Args:
        path: the file.
        after: the record that is kept last, everything behind it being cut off; None starts a new file.
    """

    def __init__(self, path: str | Path, after: Record | None = None) -> None:
        self.number = 0 if after is None else after.number + 1
        self._file = open(path, "wb" if after is None else "r+b", buffering=0)  # noqa: SIM115  (open for a whole run)
        weakref.finalize(self, self._file.close)  # where the run ends with an error
        if after is None:
            self._file.write(MARK)
        else:
            self._file.truncate(after.end)
            self._file.seek(after.end)

    def append(self, step: int, payload: bytes) -> None:
        """Write a record.

        Raises:
            OSError: it could not be written whole, so that nothing of it was kept.
        """
        head = _HEAD.pack(_BEGIN, self.number, step, len(payload), zlib.crc32(payload))
        record = head + zlib.crc32(head).to_bytes(4, "little") + payload
        start = self._file.tell()
        written = self._file.write(record)
        if written != len(record):
            self._file.truncate(start)
            self._file.seek(start)
            raise OSError(f"only {written} of {len(record)} bytes could be written to {self._file.name}: is the disk full?")
        self.number += 1

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()
