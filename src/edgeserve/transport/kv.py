"""The ordered key-value store under the log engine: transactions over a few spaces of sorted keys, in memory here."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum
from typing import Protocol


class Space(IntEnum):
    """STATE is small and rewritten all the time, LOG is large and appended, IDS are the groups' settled ids."""

    STATE = 0
    LOG = 1
    IDS = 2


class Txn(Protocol):
    """What can be done inside a transaction. Values are valid until it ends."""

    def get(self, space: Space, key: bytes) -> bytes | memoryview | None: ...
    def put(self, space: Space, key: bytes, value: bytes | bytearray | memoryview) -> None: ...
    def delete(self, space: Space, key: bytes) -> None: ...
    def scan(self, space: Space, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes | memoryview]]: ...


class KV(ABC):
    """Transactions, one writer at a time. `write` commits at the end of the block, or not at all if it raises."""

    @abstractmethod
    def write(self, undo: Callable[[], None] | None = None) -> AbstractContextManager[Txn]:
        """`undo` is called when the transaction was not committed."""

    @abstractmethod
    def read(self) -> AbstractContextManager[Txn]: ...

    @abstractmethod
    def close(self) -> None: ...


class MemoryKV(KV):
    """Dictionaries with sorted keys and an undo list."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._data: tuple[dict[bytes, bytes], ...] = tuple({} for _ in Space)
        self._keys: tuple[list[bytes], ...] = tuple([] for _ in Space)
        self._undo: list[tuple[Space, bytes, bytes | None]] = []

    @contextmanager
    def write(self, undo: Callable[[], None] | None = None) -> Iterator[Txn]:
        with self._lock:
            self._undo = []
            try:
                yield self
            except BaseException:
                changes, self._undo = self._undo, []
                for space, key, old in reversed(changes):
                    if old is None:
                        self.delete(space, key)
                    else:
                        self.put(space, key, old)
                if undo is not None:
                    undo()
                raise

    @contextmanager
    def read(self) -> Iterator[Txn]:
        with self._lock:
            yield self

    def get(self, space: Space, key: bytes) -> bytes | None:
        return self._data[space].get(key)

    def put(self, space: Space, key: bytes, value: bytes | bytearray | memoryview) -> None:
        old = self._data[space].get(key)
        self._undo.append((space, key, old))
        if old is None:
            keys = self._keys[space]
            if keys and key < keys[-1]:
                insort(keys, key)
            else:
                keys.append(key)
        self._data[space][key] = bytes(value)

    def delete(self, space: Space, key: bytes) -> None:
        old = self._data[space].pop(key, None)
        if old is not None:
            self._undo.append((space, key, old))
            keys = self._keys[space]
            del keys[bisect_left(keys, key)]

    def scan(self, space: Space, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        keys = self._keys[space]
        at = bisect_left(keys, start)
        while at < len(keys) and keys[at] < stop:
            yield keys[at], self._data[space][keys[at]]
            at += 1

    def close(self) -> None:
        """The data lives as long as the process: a later connection to the same URL finds it."""


__all__ = ("KV", "MemoryKV", "Space", "Txn")
