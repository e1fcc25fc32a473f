"""A file of payloads: slots of one size in shared memory, written by one process, mapped by many.

Layout, little endian::

    4096        magic b"edgePAY\x01", slot bytes, count of slots, length of the topic's name, the name
    64 x count  the table, up to a multiple of 4096: of each slot its generation (0: nothing in it), size, xxh3_64, and its message
                (0: not known; else its position + 1, with the highest bit set: all up to there). In words of the machine's own
                order, so that each is written at once
    .           the slots

A slot is published by the commit of the message that refers to it and never by a word in here, so that no reader depends on the order in
which a processor writes to memory. The file is locked for as long as its writer has it.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from struct import Struct

import msgspec
from xxhash import xxh3_64_hexdigest

from edgeserve.core.codec import Buffer
from edgeserve.core.errors import CorruptMessage
from edgeserve.payload.locks import let_go, make_locked

PAGE = 4096
SUFFIX = ".payloads"
_MAGIC = b"edgePAY\x01"
_HEAD = Struct("<8sQQQ")
_WORD_BYTES, _ENTRY_BYTES = 8, 64
_ENTRY_WORDS = _ENTRY_BYTES // _WORD_BYTES
_GENERATION, _SIZE, _CHECKSUM, _MESSAGE = range(4)
_ALL = 1 << 63
# The pages are there; without it each is found anew by its first touch, which at 1 MB takes longer than to copy it.
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
_NAME = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{16}\.payloads")


class Entry(msgspec.Struct, array_like=True):
    """What the table says of a slot. `position`: of its message; -1: not known; `whole`: of one of the messages up to there."""

    generation: int
    size: int
    checksum: int
    position: int = -1
    whole: bool = False


def prefix_of(topic: str) -> str:
    """What the names of a topic's segments begin with."""
    return xxh3_64_hexdigest(topic.encode())


def is_name(name: str) -> bool:
    """Whether a file could be a segment."""
    return _NAME.fullmatch(name) is not None


def _up(n: int) -> int:
    return (n + PAGE - 1) // PAGE * PAGE


class Segment:
    """One segment, mapped.

    Attributes:
        path, topic, slot_bytes, count: as made.
        bytes: of the file.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, fd: int = -1) -> None:
        self.path, self._fd = path, fd
        self.bytes = len(mapped)
        try:
            magic, self.slot_bytes, self.count, length = _HEAD.unpack_from(mapped)
            self.topic = mapped[_HEAD.size : _HEAD.size + length].decode()
        except Exception as exc:
            raise CorruptMessage(f"{path} cannot be read as a file of payloads: {exc}") from exc
        self._data_at = PAGE + _up(self.count * _ENTRY_BYTES)
        if magic != _MAGIC or not self.count or self.slot_bytes % PAGE or self._data_at + self.count * self.slot_bytes != self.bytes:
            raise CorruptMessage(f"{path} is no file of payloads of this version of edgeserve")
        self._view = memoryview(mapped)
        self._table = self._view[PAGE : PAGE + self.count * _ENTRY_BYTES].cast("Q")

    @classmethod
    def create(cls, directory: Path, topic: str, slot_bytes: int, count: int) -> Segment:
        """Makes one with its memory reserved, locked until `close`. Raises `OSError` (ENOSPC) where there is not so much."""
        name = topic.encode()
        size = PAGE + _up(count * _ENTRY_BYTES) + count * slot_bytes
        path = directory / f"{prefix_of(topic)}.{os.urandom(8).hex()}{SUFFIX}"
        fd, mapped = make_locked(path, size, mmap.MAP_SHARED | _POPULATE)
        _HEAD.pack_into(mapped, 0, _MAGIC, slot_bytes, count, len(name))
        mapped[_HEAD.size : _HEAD.size + len(name)] = name
        return cls(path, mapped, fd)

    @classmethod
    def open(cls, path: Path, *, table_only: bool = False) -> Segment:
        """Maps one to be read. Raises `FileNotFoundError`, or `CorruptMessage` when it is none. `table_only`: that is what will be read."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            if size < PAGE:
                raise CorruptMessage(f"{path} is too short for a file of payloads")
            flags = mmap.MAP_SHARED if table_only else mmap.MAP_SHARED | _POPULATE
            return cls(path, mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ))
        finally:
            os.close(fd)

    def entry(self, slot: int) -> Entry:
        """What the table says of a slot."""
        at = slot * _ENTRY_WORDS
        generation, size, checksum, message = self._table[at : at + 4].tolist()
        return Entry(generation, size, checksum, (message & ~_ALL) - 1, bool(message & _ALL))

    def slot(self, slot: int, size: int) -> memoryview:
        """The first `size` bytes of a slot."""
        at = self._data_at + slot * self.slot_bytes
        return self._view[at : at + size]

    # --- the writer's -------------------------------------------------------------------------------------------

    def write(self, slot: int, buffers: Sequence[Buffer]) -> None:
        """Copies a payload into a slot."""
        at = self._data_at + slot * self.slot_bytes
        for buffer in buffers:
            part = memoryview(buffer).cast("B")
            self._view[at : at + part.nbytes] = part
            at += part.nbytes

    def enter(self, slot: int, entry: Entry) -> None:
        """Says in the table what is in a slot."""
        at = slot * _ENTRY_WORDS
        self._table[at + _SIZE], self._table[at + _CHECKSUM], self._table[at + _MESSAGE] = entry.size, entry.checksum, 0
        self._table[at + _GENERATION] = entry.generation

    def place(self, slot: int, position: int, *, whole: bool) -> None:
        """Says in the table of which message a slot is."""
        self._table[slot * _ENTRY_WORDS + _MESSAGE] = position + 1 | (_ALL if whole else 0)

    def name(self, slot: int, generation: int) -> None:
        """Says in the table which generation is in a slot; 0: nothing, so that it may be written to."""
        self._table[slot * _ENTRY_WORDS + _GENERATION] = generation

    def close(self) -> None:
        """The writer is done with it: from now on it is anybody's to remove."""
        let_go(self._fd)
        self._fd = -1


__all__ = ("PAGE", "SUFFIX", "Entry", "Segment", "is_name", "prefix_of")
