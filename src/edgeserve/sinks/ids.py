"""The ids of what was written last, in a file of a fixed size beside it.

File, little endian: a 64-byte head (magic, version, slot count, checksum of these), then a ring of slots of 32 bytes: a 16-byte id, its
mark and the checksum of both. Marks grow from entry to entry and say up to where something has to be written for the entry to hold: the
entry of a line is its end in the file, and is written before the line. So the oldest is overwritten by the newest, whatever was killed in
between is told by its mark or its checksum, and reading it all takes as long as ever.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import deque
from pathlib import Path
from struct import Struct

import numpy as np
from xxhash import xxh3_64_intdigest

from edgeserve.core.errors import StoreDamagedWarning, StoreVersion
from edgeserve.sinks.append import lock, sync_directory

SLOTS = 131_072
"""So many ids a new file has room for: as many as a group remembers at least."""

VERSION = 1
_MAGIC = b"ESSINK\r\n"
_HEAD = Struct("<8sIIQ")
_HEAD_BYTES = 64
_ENTRY = Struct("<16sQ")
_CHECK = Struct("<Q")
_SLOT = Struct("<16sQQ")


class KnownIds:
    """The newest ids, in memory and in a file that this process has locked.

    Args:
        path: made if it is not there.
        of: what it belongs to, for errors.
        upto: what has a greater mark is forgotten: it was never written, or is gone. None: all marks hold.
        fsync: whether an id is on the disk when `put` returns.

    Attributes:
        newest: the mark that was put last; 0 when there is none.

    Raises:
        FileBusy: another process has it.
        StoreVersion: a newer edgeserve wrote it.
        OSError: there is no room for it, for example.
    """

    def __init__(self, path: Path, *, of: Path, upto: int | None = None, fsync: bool = False) -> None:
        self._path, self._fsync, self._slots = path, fsync, SLOTS
        self._ids: set[bytes] = set()
        self._order: deque[bytes] = deque()
        self._next = self._before = self.newest = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock(self._fd, of)
            self._prepare()
            self._load(upto)
        except BaseException:
            os.close(self._fd)
            raise

    def __contains__(self, id_: bytes) -> bool:
        return id_ in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def put(self, id_: bytes, mark: int) -> None:
        """Enters an id in place of the oldest one. An error leaves it to be taken back.

        Raises:
            OSError: it could not be written.
        """
        self._before = self._next
        self._write(self._next, _entry(id_, mark))
        if self._fsync:
            os.fdatasync(self._fd)
        if len(self._order) == self._slots:
            self._ids.discard(self._order.popleft())
        self._order.append(id_)
        self._ids.add(id_)
        self._next = (self._next + 1) % self._slots
        self.newest = mark

    def take_back(self, id_: bytes) -> None:
        """Undoes the last `put`, or what of it was done."""
        self._next = self._before
        if self._order and self._order[-1] == id_:
            self._order.pop()
        self._ids.discard(id_)
        with contextlib.suppress(OSError):  # its mark tells, too
            self._write(self._next, bytes(_SLOT.size))

    def sync(self) -> None:
        """Returns when all of them are on the disk."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Lets go of the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, slot: int, entry: bytes) -> None:
        os.pwrite(self._fd, entry, _HEAD_BYTES + slot * _SLOT.size)

    def _prepare(self) -> None:
        head = os.pread(self._fd, _HEAD_BYTES, 0)
        wrong = self._what_is_wrong(head)
        if not wrong:
            return
        found = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        if any(found[_HEAD_BYTES:]):
            kept = self._path.with_name(self._path.name + ".damaged")
            kept.write_bytes(found)
            warnings.warn(
                f"{self._path}: {wrong}; it was begun anew and the old one kept as {kept.name}: results that were written just before may "
                "be written again",
                StoreDamagedWarning,
                stacklevel=2,
            )
        os.ftruncate(self._fd, 0)
        try:
            # Now, so that no id ever finds the disk full.
            os.posix_fallocate(self._fd, 0, _HEAD_BYTES + self._slots * _SLOT.size)
        except OSError:
            os.ftruncate(self._fd, 0)
            raise
        start = _HEAD.pack(_MAGIC, VERSION, self._slots, 0)[:16]
        os.pwrite(self._fd, start + _CHECK.pack(xxh3_64_intdigest(start)), 0)
        if self._fsync:
            os.fsync(self._fd)
            sync_directory(self._path.parent)

    def _what_is_wrong(self, head: bytes) -> str:
        if len(head) < _HEAD_BYTES or head[:8] != _MAGIC:
            return "it holds no ids or was cut off"
        _, version, slots, check = _HEAD.unpack_from(head)
        if check != xxh3_64_intdigest(head[:16]):
            return "its head is damaged"
        if version > VERSION:
            raise StoreVersion(
                f"{self._path} was written in format {version}, this edgeserve reads up to {VERSION}: upgrade edgeserve-streams on this "
                "host"
            )
        if slots < 1 or os.fstat(self._fd).st_size != _HEAD_BYTES + slots * _SLOT.size:
            return "its length does not fit its head"
        self._slots = slots
        return ""

    def _load(self, upto: int | None) -> None:
        raw = os.pread(self._fd, self._slots * _SLOT.size, _HEAD_BYTES)
        marks = np.frombuffer(raw, "<u8")[2::4]
        found = []
        for slot in np.flatnonzero(marks).tolist():
            id_, mark, check = _SLOT.unpack_from(raw, slot * _SLOT.size)
            if check == xxh3_64_intdigest(_ENTRY.pack(id_, mark)):
                if upto is None or mark <= upto:
                    found.append((mark, slot, id_))
                else:
                    self._write(slot, bytes(_SLOT.size))
        found.sort()
        self._order.extend(id_ for _, _, id_ in found)
        self._ids.update(self._order)
        if found:
            self.newest, slot, _ = found[-1]
            self._next = (slot + 1) % self._slots


def _entry(id_: bytes, mark: int) -> bytes:
    entry = _ENTRY.pack(id_, mark)
    return entry + _CHECK.pack(xxh3_64_intdigest(entry))


__all__ = ("SLOTS", "VERSION", "KnownIds")
