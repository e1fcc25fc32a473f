"""Writing payloads: a slot for each, found among those that every group has settled."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypeAlias

import msgspec
from xxhash import xxh3_64_intdigest

from edgeserve.core.codec import Buffer
from edgeserve.payload.leases import key_of, leased
from edgeserve.payload.locks import is_left
from edgeserve.payload.reference import Reference
from edgeserve.payload.segment import PAGE, SUFFIX, Entry, Segment, prefix_of

_log = logging.getLogger("edgeserve")

LIMIT_BYTES = 256 << 20
"""How much of a writer's payloads may wait to be settled; what writers before it have left on its topic counts."""

_SEGMENT_BYTES = 16 << 20
_MOST_SLOTS = 64
_FEWEST_SLOTS = 2
_STALL_S = 1.0
_PAUSE_S = (0.0002, 0.005)
_AGAIN_S = 1.0
_SWEEP_EVERY_S = 0.1

Ranges: TypeAlias = Sequence[tuple[int, int]]

Settled: TypeAlias = Callable[[str], Ranges]
"""Takes a topic; the positions [lo, hi), ascending and disjoint, of messages that no group will ask for any more."""

End: TypeAlias = Callable[[str], int]
"""Takes a topic; the position behind its newest message, 0 where there is none, -1 while nobody tells."""


class Slot(msgspec.Struct, eq=False):
    """A slot. `key`: of its payload; `position`, `whole`: see `Entry`; -1: its message is not stored yet."""

    segment: Segment
    index: int
    generation: int = 0
    key: int = 0
    position: int = -1
    whole: bool = False


def is_settled(position: int, ranges: Ranges, *, whole: bool) -> bool:
    """Whether the message of a slot is in these ranges; `whole`: and all before it."""
    if whole:
        return bool(ranges) and ranges[0][0] == 0 and position < ranges[0][1]
    at = bisect_right(ranges, position, key=itemgetter(0)) - 1
    return at >= 0 and position < ranges[at][1]


def slot_bytes_for(size: int) -> int:
    """The size of the slots that a payload goes to: a quarter of a power of two, and whole pages, so that few sizes serve all."""
    step = max(PAGE, 1 << max(0, size.bit_length() - 3))
    return max(PAGE, (size + step - 1) // step * step)


class PayloadWriter:
    """Keeps the payloads of one node's messages on one topic. Thread-safe.

    Args:
        directory: see `make_payload_directory`.
        topic: where the messages go.
        settled, end: asked when a slot is wanted.
        limit_bytes: how much memory its segments may take.
        sweep: called, with a lock held, when writers before it have left something on its topic: see `Sweep.look`.
        whole: any message may be stored twice without its being told, so that all before it has to be settled, too.
        origin, token: see `Reference`.

    Attributes:
        refused: how many payloads found no room in time, so that they travel with their messages.
    """

    def __init__(
        self,
        directory: Path,
        topic: str,
        settled: Settled,
        end: End,
        limit_bytes: int = LIMIT_BYTES,
        *,
        sweep: Callable[[], object] = lambda: None,
        whole: bool = False,
        origin: str = "",
        token: str = "",
    ) -> None:
        self._whole, self._origin, self._token = whole, origin, token
        self._directory, self._topic, self._settled, self._end, self._limit_bytes = directory, topic, settled, end, limit_bytes
        self._sweep = sweep
        self._lock = threading.RLock()
        self._segments: list[Segment] = []
        # By the slots' size, the one used last on top: its pages are in the caches.
        self._free: dict[int, list[Slot]] = {}
        self._used: dict[int, Slot] = {}
        # Frames that are not stored yet, by `id`, with their slots.
        self._unplaced: dict[int, tuple[object, Slot]] = {}
        self._stalled = self._told = False
        self._no_memory_until = self._sweep_at = 0.0
        self.refused = 0

    def put(self, buffers: Sequence[Buffer], size: int) -> tuple[Reference, Slot] | None:
        """Keeps a payload of `size` bytes; waits for room, up to a second while nothing is settled. None: there is none for it.

        Raises:
            OSError: it cannot be looked for room now, for want of descriptors; nothing is kept.
        """
        slot = self._find(slot_bytes_for(size))
        if slot is None:
            self.refused += 1
            return None
        segment, index = slot.segment, slot.index
        try:
            segment.write(index, buffers)
            checksum = xxh3_64_intdigest(segment.slot(index, size))
            slot.generation = generation = slot.generation + 1
            slot.key = key_of(segment.path.name, index, generation)
            segment.enter(index, Entry(generation, size, checksum))
        except BaseException:
            self.cancel(slot)
            raise
        return Reference(self._directory.name, segment.path.name, index, generation, size, checksum, self._origin, self._token), slot

    # --- what becomes of a frame --------------------------------------------------------------------------------

    def expect(self, frame: object, slot: Slot) -> None:
        """This is the frame that refers to the payload in `slot`."""
        with self._lock:
            self._unplaced[id(frame)] = (frame, slot)

    def cancel(self, slot: Slot) -> None:
        """No frame will refer to what is in this slot."""
        with self._lock:
            slot.segment.name(slot.index, 0)
            self._let_go(slot)

    def placed(self, frames: Iterable[object], first: int) -> None:
        """Frames were stored, one after the other, the first at position `first`."""
        if not self._unplaced:
            return
        with self._lock:
            for position, frame in enumerate(frames, first):
                known = self._unplaced.pop(id(frame), None)
                if known is not None:
                    self._place(known[1], position)

    def doubt(self, frames: Iterable[object]) -> None:
        """Frames may have been stored, and will be stored again: until all before the second is settled, nobody can say of the first."""
        with self._lock:
            for frame in frames:
                known = self._unplaced.get(id(frame))
                if known is not None:
                    known[1].whole = True

    def drop(self, frames: Iterable[object]) -> None:
        """Frames were not stored, and will not be."""
        with self._lock:
            for slot in self._forget(frames):
                self.cancel(slot)

    def abandon(self, frames: Iterable[object]) -> None:
        """Frames may have been stored, and will not be again: what the topic has now has to be settled before their slots are free."""
        with self._lock:
            if slots := self._forget(frames):
                end = self._end(self._topic)
                for slot in slots:
                    slot.whole = True
                    if end >= 0:
                        self._place(slot, max(0, end - 1))

    def _forget(self, frames: Iterable[object]) -> list[Slot]:
        """Expects these no longer; their slots."""
        return [known[1] for frame in frames if (known := self._unplaced.pop(id(frame), None)) is not None]

    def _place(self, slot: Slot, position: int) -> None:
        slot.position, slot.whole = position, slot.whole or self._whole
        slot.segment.place(slot.index, position, whole=slot.whole)

    # --- finding a slot -----------------------------------------------------------------------------------------

    def _find(self, slot_bytes: int) -> Slot | None:
        """A slot of this size that nothing is in; it is in use from then on."""
        if (slot := self._take(slot_bytes)) is not None:
            return slot
        if slot_bytes > self._limit_bytes:
            return None
        began, pause_s = time.monotonic(), _PAUSE_S[0]
        while True:
            with self._lock:
                freed = self._reclaim()
                slot = self._take(slot_bytes)
                if slot is None and self._grow(slot_bytes):
                    slot = self._take(slot_bytes)
                if freed or slot is not None:
                    self._stalled, began = False, time.monotonic()
                if slot is not None:
                    return slot
                if self._stalled or not self._used or time.monotonic() - began > _STALL_S:
                    self._stall()
                    return None
            # Without the lock: who stores what was put before says so meanwhile.
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S[1])

    def _take(self, slot_bytes: int) -> Slot | None:
        with self._lock:
            free = self._free.get(slot_bytes)
            if not free:
                return None
            slot = free.pop()
            self._used[id(slot)] = slot
            return slot

    # --- with the lock held -------------------------------------------------------------------------------------

    def _stall(self) -> None:
        if self._stalled:
            return
        self._stalled = True
        if self._used or time.monotonic() >= self._no_memory_until:  # else that was said
            taken = sum(segment.bytes for segment in self._segments) + self._left_by_others()
            what = "payloads for topic %r wait to be settled in %d MiB of shared memory: until some are, others travel with their messages"
            _log.warning(what, self._topic, taken >> 20)

    def _reclaim(self) -> int:
        """Takes back the slots of messages that no group will ask for any more, and nobody looks at; returns how many."""
        free = self._releasable([slot for slot in self._used.values() if slot.position >= 0])
        if not free:
            return 0
        still: set[int] = set()
        try:
            # A group that has begun meanwhile, or who looks without a claim on the message, sees that it is gone, or is seen now.
            for slot in free:
                slot.segment.name(slot.index, 0)
            still = {id(slot) for slot in self._releasable(free)}
        finally:
            for slot in free:
                if id(slot) in still:
                    self._let_go(slot)
                else:
                    slot.segment.name(slot.index, slot.generation)
        return len(still)

    def _releasable(self, slots: Sequence[Slot]) -> list[Slot]:
        if not slots:
            return []
        ranges = self._settled(self._topic)
        done = [slot for slot in slots if is_settled(slot.position, ranges, whole=slot.whole)]
        held = leased(self._directory) if done else frozenset()
        return [slot for slot in done if slot.key not in held]

    def _let_go(self, slot: Slot) -> None:
        slot.position, slot.whole = -1, False
        self._used.pop(id(slot), None)
        self._free.setdefault(slot.segment.slot_bytes, []).append(slot)

    def _grow(self, slot_bytes: int) -> bool:
        """Whether there is another segment for slots of this size now."""
        if time.monotonic() < self._no_memory_until:
            return False
        count = max(_FEWEST_SLOTS, min(_MOST_SLOTS, _SEGMENT_BYTES // slot_bytes))
        count = max(1, min(count, self._limit_bytes // slot_bytes))
        left = self._left_by_others()
        if left and (now := time.monotonic()) >= self._sweep_at:
            self._sweep_at = now + _SWEEP_EVERY_S
            self._sweep()
            left = self._left_by_others()
        room = self._limit_bytes - left
        while sum(segment.count * segment.slot_bytes for segment in self._segments) + count * slot_bytes > room:
            if not self._drop_an_empty_one(slot_bytes):
                return False
        try:
            segment = Segment.create(self._directory, self._topic, slot_bytes, count)
        except OSError as exc:
            self._no_memory_until = time.monotonic() + _AGAIN_S
            self._tell_of_no_memory(exc, count * slot_bytes)
            return False
        self._segments.append(segment)
        self._free.setdefault(slot_bytes, []).extend(Slot(segment, index) for index in range(count))
        return True

    def _left_by_others(self) -> int:
        """Bytes of segments of this topic whose writers have ended: a source that is started over and over must not fill the memory."""
        mine, prefix = {segment.path.name for segment in self._segments}, prefix_of(self._topic)
        try:
            names = [name for name in os.listdir(self._directory) if name.startswith(prefix) and name.endswith(SUFFIX)]
        except FileNotFoundError:
            return 0
        left = 0
        for name in names:
            if name not in mine and is_left(path := self._directory / name):
                with contextlib.suppress(FileNotFoundError):  # somebody else removes it
                    left += path.stat().st_size
        return left

    def _drop_an_empty_one(self, slot_bytes: int) -> bool:
        """Payloads of another size came before: lets go of a segment for these."""
        busy = {slot.segment.path for slot in self._used.values()}
        for segment in self._segments:
            if segment.slot_bytes != slot_bytes and segment.path not in busy:
                self._remove(segment)
                return True
        return False

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        free = self._free[segment.slot_bytes]
        free[:] = [slot for slot in free if slot.segment is not segment]
        segment.path.unlink(missing_ok=True)
        segment.close()

    def _tell_of_no_memory(self, error: OSError, size: int) -> None:
        if self._told:
            return
        self._told = True
        _log.warning(
            "no %d MiB for payloads in %s (%s): payloads travel with their messages. %s",
            *(size >> 20 or 1, self._directory, error.strerror),
            "Give it more room (a container: --shm-size), or name another directory with EDGESERVE_PAYLOAD_DIR; it has "
            f"{shutil.disk_usage(self._directory).free >> 20} MiB free"
            if error.errno == errno.ENOSPC
            else "It is tried again",
        )

    def close(self) -> int:
        """Lets go of what is settled. What is not stays for those who will ask for it, see `Sweep`; returns how many that are."""
        with self._lock:
            self.abandon([frame for frame, _ in list(self._unplaced.values())])
            with contextlib.suppress(OSError):  # what cannot be looked at now goes with whoever comes by
                self._reclaim()
            left = len(self._used)
            busy = {slot.segment.path for slot in self._used.values()}
            for segment in list(self._segments):
                if segment.path in busy:
                    segment.close()
                else:
                    self._remove(segment)
            self._segments.clear()
            return left


__all__ = ("LIMIT_BYTES", "End", "PayloadWriter", "Ranges", "Settled", "Slot", "is_settled", "slot_bytes_for")
