"""The store under `local://`: an LMDB environment, its errors in our words.

The map is not writable memory (no MDB_WRITEMAP): a stray pointer cannot reach the data, and a full disk is an error of `commit` with the
transaction undone, not a signal.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from edgeserve.core.errors import DiskFull, StoreDamaged, StoreFull, TransportError
from edgeserve.transport.kv import KV, Space, Txn

DATA = "data"
MARK = "mark"
_MARK = struct.Struct("<Q")


def open_environment(path: Path, map_bytes: int, *, durable: bool, readonly: bool = False) -> tuple[Any, list[Any]]:
    """An LMDB environment and its spaces. The map is address space, not memory or disk."""
    env = lmdb.open(
        str(path),
        map_size=map_bytes,
        max_dbs=len(Space),
        max_readers=1024,
        sync=durable,
        metasync=durable,
        meminit=False,
        max_spare_txns=4,
        readonly=readonly,
        lock=not readonly,
        create=not readonly,
        readahead=False,
    )
    return env, [env.open_db(space.name.lower().encode(), create=not readonly) for space in Space]


class LmdbTxn:
    """A `Txn` on LMDB."""

    __slots__ = ("_dbs", "_txn")

    def __init__(self, txn: Any, dbs: list[Any]) -> None:
        self._txn, self._dbs = txn, dbs

    def get(self, space: Space, key: bytes) -> memoryview | None:
        value: memoryview | None = self._txn.get(key, db=self._dbs[space])
        return value

    def put(self, space: Space, key: bytes, value: bytes | bytearray | memoryview) -> None:
        self._txn.put(key, value, db=self._dbs[space])

    def delete(self, space: Space, key: bytes) -> None:
        self._txn.delete(key, db=self._dbs[space])

    def scan(self, space: Space, start: bytes, stop: bytes) -> Iterator[tuple[bytes, memoryview]]:
        with self._txn.cursor(db=self._dbs[space]) as cursor:
            if cursor.set_range(start):
                for key, value in cursor:
                    if bytes(key) >= stop:
                        return
                    yield bytes(key), value


class LmdbKV(KV):
    """Transactions on LMDB. `mark` keeps the number of the last commit beside the data, so that a later start can tell when the newest
    commits are missing."""

    def __init__(self, root: Path, map_bytes: int, *, durable: bool) -> None:
        self._root, self._map_bytes, self._durable = root, map_bytes, durable
        self._env: Any = None
        self._dbs: list[Any] = []
        self._writes = 0
        self._open()
        with open(root / MARK, "a+b") as file:
            file.truncate(_MARK.size)
            self._mark = mmap.mmap(file.fileno(), _MARK.size)

    def _open(self) -> None:
        try:
            self._env, self._dbs = open_environment(self._root / DATA, self._map_bytes, durable=self._durable)
            self._env.reader_check()
        except lmdb.Error as exc:
            raise self._named(exc) from exc

    @contextmanager
    def write(self) -> Iterator[Txn]:
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                yield LmdbTxn(txn, self._dbs)
                number = txn.id()
        except lmdb.Error as exc:
            raise self._named(exc) from exc
        _MARK.pack_into(self._mark, 0, number)
        self._writes += 1
        if self._writes & 0xFFFF == 0:
            self._env.reader_check()

    @contextmanager
    def read(self) -> Iterator[Txn]:
        try:
            with self._env.begin(buffers=True) as txn:
                yield LmdbTxn(txn, self._dbs)
        except lmdb.Error as exc:
            raise self._named(exc) from exc

    def _named(self, exc: lmdb.Error) -> TransportError:
        """The error in our words; what LMDB cannot go on after is repaired on the way."""
        where = f"the store in {self._root}"
        if isinstance(exc, lmdb.MapFullError):
            freed = self._env.reader_check()
            return StoreFull(
                f"{where} reached its map of {self._map_bytes >> 20} MiB ({freed} dead readers cleared); nothing of this was written"
            )
        if isinstance(exc, lmdb.DiskError) or _no_space(exc) or (self._env is not None and _low(self._root)):
            if isinstance(exc, lmdb.PanicError):
                self._env.close()
                self._open()
            return DiskFull(f"no space left on the filesystem of {self._root}; nothing of this was written: free some and go on ({exc})")
        if isinstance(exc, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.InvalidError | lmdb.PanicError):
            return StoreDamaged(f"{where} is damaged ({exc}): stop every process that uses it, the next start repairs what can be repaired")
        return TransportError(f"{where}: {exc}")

    def close(self) -> None:
        self._mark.close()
        self._env.close()


def _no_space(exc: lmdb.Error) -> bool:
    return os.strerror(errno.ENOSPC) in str(exc) or os.strerror(errno.EDQUOT) in str(exc)


def _low(root: Path) -> bool:
    """Whether the filesystem is as good as full: a short write is then told as such."""
    stat = os.statvfs(root)
    return stat.f_bavail * stat.f_frsize < 1 << 20


__all__ = ("DATA", "MARK", "LmdbKV", "LmdbTxn", "open_environment")
