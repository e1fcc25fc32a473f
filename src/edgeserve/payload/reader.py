"""Reading payloads in place: read-only views into the writer's memory, which stay good for as long as somebody holds them."""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from edgeserve.core.errors import CorruptMessage, PayloadGone
from edgeserve.payload.leases import Table, key_of
from edgeserve.payload.place import BROKER
from edgeserve.payload.reference import Reference
from edgeserve.payload.segment import Segment, is_name

LEASE_BYTES = 128 << 20
"""How much a process may look at in one directory; what comes beyond is copied."""

_MOST_SEGMENTS = 64
_LOOKS, _LOOK_S = 20, 0.002
# Of what this process, or the machine, has too little of now.
_PASSING = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))


class PayloadReader:
    """Opens the payloads of one directory. Thread-safe; one for a process, see `reader_of`.

    Attributes:
        copied: how many payloads were copied, because too much is looked at.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pid = os.getpid()
        # Reentrant: the end of a view may come in the midst of anything.
        self._lock = threading.RLock()
        self._segments: dict[str, Segment] = {}
        self._table: Table | None = None
        # Of what is looked at: the array that all views of it hold on to, where its lease stands, and what it was found by: another
        # reference that names the same slot is looked into anew.
        self._views: dict[Reference, weakref.ref[Any]] = {}
        self._leases: dict[int, tuple[weakref.ref[Any], Table, int, Reference]] = {}
        self._bytes = self._opening = 0
        self.copied = 0

    def open(self, reference: Reference) -> memoryview:
        """The payload, as a read-only view, or a copy of it where too much is looked at, or where there is no room to say that it is.

        Raises:
            PayloadGone: it is not there any more, or not on this host.
            CorruptMessage: it is not what the reference says.
            OSError: it cannot be had now, for want of descriptors or memory.
        """
        with self._lock:
            known = self._views.get(reference)
            viewed = None if known is None else known()
            if viewed is not None:
                return memoryview(viewed)
            segment = self._segment(reference)
            table = self._lasting_table() if self._bytes + reference.size <= LEASE_BYTES else None
            index = None if table is None else table.enter(key_of(reference.segment, reference.slot, reference.generation))
            self._opening += index is not None
        if table is None or index is None:
            self.copied += 1
            return memoryview(self.copy(reference))
        # The lock's release stands between the lease and the look at what is there.
        array: Any = np.frombuffer(segment.slot(reference.slot, reference.size), np.uint8)
        try:
            self._check(reference, segment, array)
        except BaseException:
            with self._lock:
                self._opening -= 1
                table.let_go(index)
            raise
        with self._lock:
            self._opening -= 1
            ref = weakref.ref(array, self._gone_from_sight)
            self._views[reference] = ref
            self._leases[id(ref)] = (ref, table, index, reference)
            self._bytes += reference.size
        return memoryview(array)

    def copy(self, reference: Reference) -> bytes:
        """The payload, copied. Raises as `open` does."""
        with self._lock:
            segment = self._segment(reference)
        data = bytes(segment.slot(reference.slot, reference.size))
        self._check(reference, segment, data)
        return data

    def _gone_from_sight(self, ref: weakref.ref[Any]) -> None:
        if os.getpid() != self._pid:
            return  # a fork's copy of the view: the lease is the parent's
        with self._lock:
            _, table, index, reference = self._leases.pop(id(ref))
            if self._views.get(reference) is ref:
                del self._views[reference]
            self._bytes -= reference.size
            table.let_go(index)

    def prune(self) -> None:
        """Lets go of the segments whose files are gone: they take up memory for as long as they are mapped."""
        with self._lock:
            self._segments = {name: segment for name, segment in self._segments.items() if segment.path.exists()}

    def rest(self) -> None:
        """Lets go of what is not looked at."""
        with self._lock:
            self._segments.clear()
            if self._table is not None and not self._leases and not self._opening:
                self._table.close()
                self._table = None

    def _lasting_table(self) -> Table | None:
        """Where leases are entered; None: there is no room for it."""
        try:
            if self._table is None:
                self._table = Table(self._directory)
            elif self._table.gone:
                # The directory was removed, and made again: what is looked at is nobody's to reuse, but what comes now must be seen.
                self._table = Table(self._directory)
                self._segments.clear()
                self._views.clear()
        except OSError:
            return None
        return self._table

    def _segment(self, reference: Reference) -> Segment:
        if reference.store != self._directory.name or not is_name(reference.segment):
            raise PayloadGone(f"a payload of {reference.size} bytes lies in another store, {reference.store}: it was sent elsewhere")
        segment = self._segments.get(reference.segment)
        if segment is None:
            try:
                segment = Segment.open(self._directory / reference.segment)
            except FileNotFoundError:
                raise self._not_there(reference) from None
            except OSError as exc:
                if exc.errno in _PASSING:
                    raise
                raise PayloadGone(f"a payload of {reference.size} bytes cannot be read: {exc}") from exc
            self.prune()
            if len(self._segments) >= _MOST_SEGMENTS:
                self._segments.pop(next(iter(self._segments)))
            self._segments[reference.segment] = segment
        if reference.slot >= segment.count or reference.size > segment.slot_bytes:
            raise CorruptMessage(f"a reference names slot {reference.slot} with {reference.size} bytes, which {segment.path.name} has not")
        return segment

    def _check(self, reference: Reference, segment: Segment, data: Any) -> None:
        """That this is the payload: else its slot was used again, or it is damaged."""
        same = xxh3_64_intdigest(data) == reference.checksum
        generation = segment.entry(reference.slot).generation
        for _ in range(_LOOKS):
            if generation >= reference.generation:  # a slot's generations only grow
                break
            time.sleep(_LOOK_S)  # its writer may only be looking whether it is still needed
            generation = segment.entry(reference.slot).generation
        if generation != reference.generation:
            raise self._not_there(reference)
        if not same:
            raise CorruptMessage(f"a payload of {reference.size} bytes in {segment.path} does not match its checksum")

    def _not_there(self, reference: Reference) -> PayloadGone:
        return PayloadGone(
            f"a payload of {reference.size} bytes is not in {self._directory}: every group of its time had settled its message, or its "
            "sender has another EDGESERVE_PAYLOAD_DIR, or it lies on another host, or this one was started anew"
        )


_readers: dict[tuple[int, Path], PayloadReader] = {}
_readers_lock = threading.Lock()


def reader_of(directory: Path) -> PayloadReader:
    """This process's reader of a directory."""
    with _readers_lock:
        key = os.getpid(), directory
        if key not in _readers:
            _readers[key] = PayloadReader(directory)
        return _readers[key]


def is_here(base: Path, reference: Reference) -> bool:
    """Whether this host has, or had, the payload of a broker's message: its file is in a store of a broker below `base`."""
    return reference.store.startswith(BROKER) and is_name(reference.segment) and (base / reference.store / reference.segment).exists()


__all__ = ("LEASE_BYTES", "PayloadReader", "is_here", "reader_of")
