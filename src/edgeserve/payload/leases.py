"""Leases: which payloads living processes look at. Each process has a table in shared memory: of every payload that it has open, its key.

A reader enters a payload before it looks at it, and a writer reads all tables after it has found the message settled and has said in its
own table that the slot holds nothing any more: so of a reader that comes late, either the writer sees the lease, or the reader sees that
the payload is gone. A table is locked for as long as its process lives.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from edgeserve.payload.locks import is_left, let_go, make_locked

LEASES = "leases"
MOST = 4096
"""How many payloads a process may have open."""

_KEY_BYTES = 8


def key_of(segment: str, slot: int, generation: int) -> int:
    """Names a payload among all; never 0."""
    return xxh3_64_intdigest(b"%b:%d:%d" % (segment.encode(), slot, generation)) | 1


class Table:
    """This process's leases in one directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LEASES / os.urandom(8).hex()
        self._fd, mapped = make_locked(self._path, MOST * _KEY_BYTES)
        self._keys: Any = np.frombuffer(mapped, np.uint64)
        self._free = list(range(MOST))

    @property
    def gone(self) -> bool:
        """Whether somebody has removed it: then nobody sees what is in it."""
        return os.fstat(self._fd).st_nlink == 0

    def enter(self, key: int) -> int | None:
        """Enters a payload: where; None: there is no room."""
        if not self._free:
            return None
        index = self._free.pop()
        self._keys[index] = key
        return index

    def let_go(self, index: int) -> None:
        """Takes one out."""
        self._keys[index] = 0
        self._free.append(index)

    def close(self) -> None:
        """Removes it. Only when nothing is in it."""
        if not self.gone:
            self._path.unlink(missing_ok=True)
        let_go(self._fd)


def leased(directory: Path) -> frozenset[int]:
    """The keys of what living processes look at. Removes the tables of others."""
    found: set[int] = set()
    try:
        names = os.listdir(directory / LEASES)
    except FileNotFoundError:
        return frozenset()
    for name in names:
        path = directory / LEASES / name
        try:
            raw = path.read_bytes()
            if is_left(path):
                path.unlink(missing_ok=True)
                continue
        except FileNotFoundError:
            continue
        keys = np.frombuffer(raw[: len(raw) // _KEY_BYTES * _KEY_BYTES], np.uint64)
        found.update(keys[keys != 0].tolist())
    return frozenset(found)


__all__ = ("LEASES", "MOST", "Table", "key_of", "leased")
