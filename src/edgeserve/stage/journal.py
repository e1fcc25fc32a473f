"""The sink's journal: which message is in its function's hands, and which are done, in a memory-mapped file that outlives kill -9.

A broker may bring acknowledged messages back, and a sink may die between its function's return and the acknowledgement. The journal is
on the host where the function had its effect, so on that host a done message is never handed over again, and only the one in hand is.

File: a 64-byte head (magic, version, slot count, checksum of these, two copies of the counter of done ids), then a ring of slots: a
16-byte id and its 8-byte checksum, because an id with a flipped bit may well be the id of the next message. The id of message number n
goes to slot n % slots before the function runs; both counters become n + 1 after it. Whoever takes over a journal writes the id that was in
hand to the file `doubts` beside it, before its slot is used again: a broker may take its time to bring that message back.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import mmap
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import xxhash

from edgeserve.core.errors import ConfigurationError, StoreDamagedWarning, StoreVersion
from edgeserve.core.settings import state_directory
from edgeserve.stage.duplicates import GENERATION
from edgeserve.transport import Transport

VERSION = 1
_MAGIC = b"ESJRNL\r\n"
_HEAD = struct.Struct("<8sIIQ")
_COUNTER_AT = 32
_RING_AT = 64
_ID_BYTES = 16
_SLOT_BYTES = 24
_NO_ID = bytes(_SLOT_BYTES)
_MOST_DOUBTS = 4_096


def journal_directory(transport: Transport, url: str, topic: str, group: str) -> Path:
    """The directory of the journals of one group's members on this host.

    It belongs to the store, not to its URL: in another store that took the place of a deleted one, nothing is done yet. What a store in
    memory has done is forgotten with its process.
    """
    place = transport.identity or url
    base = state_directory() if transport.capabilities.durable else _passing_directory()
    return base / "sinks" / xxhash.xxh3_64_hexdigest("\0".join((place, topic, group)).encode())


@cache
def _passing_directory() -> Path:
    """A directory that goes with this process."""
    directory, owner = tempfile.mkdtemp(prefix="edgeserve-"), os.getpid()
    atexit.register(lambda: shutil.rmtree(directory, ignore_errors=True) if os.getpid() == owner else None)
    return Path(directory)


class Journal:
    """One member's journal, and what the journals of all members on this host say.

    Attributes:
        done: ids whose function has returned, oldest first within each journal.
        in_hand: ids whose function had been called and was not known to have returned.
        fresh: whether this host had no journal of the group before.
    """

    def __init__(self, directory: Path, *, slots: int = GENERATION) -> None:
        self._directory = directory
        self._slots = slots
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.fresh = not any(directory.glob("*.journal"))
            self._path, self._fd = self._claim()
        except OSError as exc:
            raise ConfigurationError(
                f"a sink cannot keep its journal in {directory} ({exc.strerror or exc}): make it writable, or set EDGESERVE_STATE_DIR to a "
                "directory that is; it is apart from the store"
            ) from exc
        try:
            self._map = self._open()
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)
        self._counters = self._view[_COUNTER_AT : _COUNTER_AT + 16].cast("Q")
        self._count = self._counters[0]  # ahead of the other after a kill between the two
        self.done: list[bytes] = []
        self.in_hand: set[bytes] = set()
        self.refresh()
        self._keep_doubt()

    @property
    def path(self) -> Path:
        """This member's file."""
        return self._path

    def writer(self) -> tuple[Callable[[bytes], None], Callable[[], None]]:
        """(`begin(id)`, `end()`), to be called around the function. An error in between leaves the slot to the next `begin`."""
        view, counters, slots, check = self._view, self._counters, self._slots, xxhash.xxh3_64_digest

        def begin(id_: bytes) -> None:
            at = _RING_AT + self._count % slots * 24
            view[at : at + 24] = id_ + check(id_)

        def end() -> None:
            self._count = count = self._count + 1
            counters[0] = count
            counters[1] = count

        return begin, end

    def abandon(self) -> None:
        """Takes the id in hand out again: its function has raised and the message was given up."""
        at = _RING_AT + self._count % self._slots * _SLOT_BYTES
        self._view[at : at + _SLOT_BYTES] = _NO_ID

    def refresh(self) -> None:
        """Reads all members' journals, as they are now, into `done` and `in_hand`."""
        self.done.clear()
        self.in_hand.clear()
        for path in sorted(self._directory.glob("*.journal")):
            try:
                raw = path.read_bytes()
            except FileNotFoundError:
                continue
            if self._fault(raw, path) is None:
                done, hand = _read(raw)
                self.done += done
                if hand is not None:
                    self.in_hand.add(hand)
        self.in_hand.update(self._doubts())
        self.in_hand.difference_update(self.done)

    def _doubts(self) -> list[bytes]:
        """The ids that were in hand when a member died, newest last."""
        try:
            raw = (self._directory / "doubts").read_bytes()
        except FileNotFoundError:
            return []
        found = [raw[at : at + _SLOT_BYTES] for at in range(len(raw) // _SLOT_BYTES * _SLOT_BYTES - _SLOT_BYTES, -1, -_SLOT_BYTES)]
        return [s[:_ID_BYTES] for s in found[:_MOST_DOUBTS][::-1] if xxhash.xxh3_64_digest(s[:_ID_BYTES]) == s[_ID_BYTES:]]

    def _keep_doubt(self) -> None:
        """Writes down what the one before had in hand, unless it is known to be done."""
        at = _RING_AT + self._count % self._slots * _SLOT_BYTES
        slot = bytes(self._view[at : at + _SLOT_BYTES])
        if slot[:_ID_BYTES] in self.in_hand and slot[:_ID_BYTES] not in self._doubts():
            fd = os.open(self._directory / "doubts", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, slot)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Lets go of the file and its slot. Idempotent."""
        if self._fd >= 0:
            self._counters.release()
            self._view.release()
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def _claim(self) -> tuple[Path, int]:
        """The first slot that no live member holds. The lock goes with the process."""
        number = 0
        while True:
            path = self._directory / f"{number}.journal"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                number += 1
                continue
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    return path, fd
            os.close(fd)

    def _open(self) -> mmap.mmap:
        raw = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        fault = self._fault(raw, self._path) if raw else "new"
        if fault is not None:
            if raw:
                kept = self._path.with_suffix(".damaged")
                kept.write_bytes(raw)
                warnings.warn(
                    f"{self._path}: {fault}; it was begun anew and the old one kept as {kept.name}: "
                    "messages done just before may be handed to the sink again",
                    StoreDamagedWarning,
                    stacklevel=2,
                )
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, _RING_AT + self._slots * _SLOT_BYTES)
            os.posix_fallocate(self._fd, 0, _RING_AT + self._slots * _SLOT_BYTES)
            os.pwrite(self._fd, _head(self._slots), 0)
        else:
            self._slots = _HEAD.unpack_from(raw)[2]
        return mmap.mmap(self._fd, _RING_AT + self._slots * _SLOT_BYTES)

    @staticmethod
    def _fault(raw: bytes, path: Path) -> str | None:
        """What is wrong with a journal's content; None when nothing is. A newer version is no damage: it is left alone."""
        if len(raw) < _RING_AT or raw[:8] != _MAGIC:
            return "it is not a journal or was cut off"
        _, version, slots, check = _HEAD.unpack_from(raw)
        if check != xxhash.xxh3_64_intdigest(raw[:16]):
            return "its head is damaged"
        if version > VERSION:
            raise StoreVersion(
                f"{path} was written in journal format {version}, this edgeserve reads up to {VERSION}: upgrade edgeserve on this host"
            )
        if slots < 1 or len(raw) != _RING_AT + slots * _SLOT_BYTES:
            return "its length does not fit its head"
        first, second = struct.unpack_from("<QQ", raw, _COUNTER_AT)
        if first not in (second, second + 1):
            return "its counters disagree"
        return None


def _head(slots: int) -> bytes:
    start = _MAGIC + struct.pack("<II", VERSION, slots)
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start))


def _read(raw: bytes) -> tuple[list[bytes], bytes | None]:
    """(done ids, oldest first; the id in hand). The slot after the newest done id is in hand, or the oldest of the ring's last turn."""
    slots = (len(raw) - _RING_AT) // _SLOT_BYTES
    count = struct.unpack_from("<Q", raw, _COUNTER_AT)[0]

    def slot(number: int) -> bytes | None:
        at = _RING_AT + number % slots * _SLOT_BYTES
        id_ = raw[at : at + _ID_BYTES]
        return id_ if xxhash.xxh3_64_digest(id_) == raw[at + _ID_BYTES : at + _SLOT_BYTES] else None

    done = [slot(n) for n in range(max(0, count - slots + 1), count)]
    return [id_ for id_ in done if id_ is not None], slot(count)


__all__ = ("VERSION", "Journal", "journal_directory")
