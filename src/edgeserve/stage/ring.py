"""How a journal's file is laid out, and what is read from it while its owner goes on writing.

File: a 64-byte head (magic, version, slot count, checksum of these, two copies of the counter of done ids), then a ring of slots: a
16-byte id and its 8-byte checksum, because an id with a flipped bit may well be the id of the next message. The id of message number n
goes to slot n % slots before the function runs; both counters become n + 1 after it.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import xxhash

from edgeserve.core.errors import StoreVersion

VERSION = 1
COUNTER_AT = 32
RING_AT = 64
ID_BYTES = 16
SLOT_BYTES = 24
_MAGIC = b"ESJRNL\r\n"
_HEAD = struct.Struct("<8sIIQ")
_COUNTERS = struct.Struct("<QQ")
_READS = 3


def head(slots: int) -> bytes:
    """The head of a new journal, without its counters."""
    start = _MAGIC + struct.pack("<II", VERSION, slots)
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start))


def size_of(slots: int) -> int:
    """Of the whole file, in bytes."""
    return RING_AT + slots * SLOT_BYTES


def slot_of(id_: bytes) -> bytes:
    """What stands in an id's slot."""
    return id_ + xxhash.xxh3_64_digest(id_)


def id_in(slot: bytes) -> bytes | None:
    """The id in a slot; None where there is none that can be believed."""
    id_ = slot[:ID_BYTES]
    return id_ if xxhash.xxh3_64_digest(id_) == slot[ID_BYTES:] else None


def slots_in(fd: int, path: Path) -> int | str:
    """How many slots a journal has, or what is wrong with it. A newer version is no damage: it is left alone.

    Raises:
        StoreVersion: a newer edgeserve wrote it.
    """
    raw = os.pread(fd, RING_AT, 0)
    if len(raw) < RING_AT or raw[:8] != _MAGIC:
        return "it is not a journal or was cut off"
    _, version, slots, check = _HEAD.unpack_from(raw)
    if check != xxhash.xxh3_64_intdigest(raw[:16]):
        return "its head is damaged"
    if version > VERSION:
        raise StoreVersion(
            f"{path} was written in journal format {version}, this edgeserve reads up to {VERSION}: upgrade edgeserve on this host"
        )
    if slots < 1 or os.fstat(fd).st_size != size_of(slots):
        return "its length does not fit its head"
    for _ in range(_READS):
        # An owner that goes on may write between the two.
        first, second = _COUNTERS.unpack(os.pread(fd, _COUNTERS.size, COUNTER_AT))
        if first in (second, second + 1):
            return int(slots)
    return "its counters disagree"


class Ring:
    """A journal as it is read, by its owner or by others while the owner writes.

    Attributes:
        seen: so many done ids have been read.
    """

    def __init__(self, view: memoryview, slots: int) -> None:
        self._view, self._slots = view, slots
        self._counters = view[COUNTER_AT : COUNTER_AT + 8].cast("Q")
        self.seen = 0

    def news(self) -> list[bytes]:
        """The ids that are done and were not read yet, oldest first."""
        count = self._counters[0]
        if count == self.seen:
            return []
        since = self.seen if self.seen < count else 0
        numbers = range(max(since, count - self._slots + 1), count)
        raw = [self._slot(n) for n in numbers]
        # The owner went on meanwhile: what it has in hand took the place of the oldest.
        oldest = self._counters[0] - self._slots + 1
        self.seen = count
        return [id_ for n, slot in zip(numbers, raw, strict=True) if n >= oldest and (id_ := id_in(slot)) is not None]

    def in_hand(self) -> bytes | None:
        """The slot after the newest done id: that in hand, or the oldest of the ring's last turn."""
        return id_in(self._slot(self._counters[0]))

    def holds(self, id_: bytes) -> bool:
        """Whether this id is in hand."""
        at = RING_AT + self._counters[0] % self._slots * SLOT_BYTES
        return self._view[at : at + ID_BYTES] == id_

    def _slot(self, number: int) -> bytes:
        at = RING_AT + number % self._slots * SLOT_BYTES
        return bytes(self._view[at : at + SLOT_BYTES])

    def close(self) -> None:
        """Lets go of the view that it was given."""
        self._counters.release()


class Peer:
    """Another member's journal, kept mapped."""

    def __init__(self, fd: int, slots: int) -> None:
        self.inode = os.fstat(fd).st_ino
        self._map = mmap.mmap(fd, size_of(slots), prot=mmap.PROT_READ)
        self._view = memoryview(self._map)
        self.ring = Ring(self._view, slots)

    @classmethod
    def open(cls, path: Path) -> Peer | None:
        """None: it is gone, or nothing to believe, and its owner will begin it anew."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            slots = slots_in(fd, path)
            return None if isinstance(slots, str) else cls(fd, slots)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Lets go of the file."""
        self.ring.close()
        self._view.release()
        self._map.close()


__all__ = ("COUNTER_AT", "RING_AT", "SLOT_BYTES", "VERSION", "Peer", "Ring", "head", "id_in", "size_of", "slot_of", "slots_in")
