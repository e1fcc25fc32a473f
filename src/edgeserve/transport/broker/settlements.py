"""Settlements on their way: their outputs first, then their record in the group's log, then their acknowledgements, in that order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from edgeserve.core.errors import SendError
from edgeserve.transport.base import SEND_WINDOW
from edgeserve.transport.broker.desk import Desk, Open
from edgeserve.transport.broker.grouplog import ID_BYTES, Settled, runs
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.patience import Grace
from edgeserve.transport.broker.places import Places

MOST_WAITING = 64
_MOST_UNDER_WAY = 192
"""Recorded, and not known to count yet. A fence lets go of decisions older than the newest few hundred."""
LINGER_S, _IDLE_S = 0.2, 0.05
"""To write it down costs the broker as much as a message, and every member reads what every one has written: so much is gathered that some
time has passed since the last time, or since the newest came."""

_MANY_IDS = SEND_WINDOW // 4
"""So many are written down at once: it may be for these that a source waits which may be no further ahead."""
_IDS_IN_A_RECORD = 32_768


class Settlement(msgspec.Struct, eq=False):
    """One call of `settle`. `outputs`: how many of its entries are not durable yet, and one for the call itself. `epoch`: of the lead."""

    ids: Sequence[bytes]
    attributes: dict[str, bytes]
    epoch: int
    outputs: int = 1
    complete: list[tuple[Desk, Open]] = []
    partial: dict[str, dict[int, list[int]]] = {}
    closed: dict[str, list[int]] = {}

    def take_out(self, desk: Desk, positions: Sequence[int]) -> None:
        """Takes messages out of a desk."""
        complete, some = desk.settle(positions)
        for opened in complete:
            self.complete.append((desk, opened))
            if opened.named:
                self.closed.setdefault(desk.topic, []).append(opened.entry.at)
        for opened in some:
            opened.named = True
            self.partial.setdefault(desk.topic, {})[opened.entry.at] = runs(opened.done)


class Settlements:
    """Those of one member, in order.

    Args:
        guard: of the state; shared with the owner.
        check: raises what keeps the owner from going on.
        told: told the entries that are done with, by topic.
        stopping: says whether the owner was told to stop.
    """

    def __init__(
        self,
        places: Places,
        guard: Guard,
        check: Callable[[], None],
        told: Callable[[dict[str, list[int]]], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._places, self._guard, self._check, self._told, self._stopping = places, guard, check, told, stopping
        self._waiting: deque[Settlement] = deque()
        self._recorded: deque[Settlement] = deque()
        self._flushing = self._ids_waiting = 0
        # Whether the owner waits for no longer than until the first of them is to be recorded.
        self._awaited = False
        self._last = self._newest = 0.0
        self.error: Exception | None = None

    def wait_for_room(self) -> None:
        """Returns when there is room for another; holds the lock."""
        grace = Grace(self._stopping)
        while self.full:
            self._wait(grace, 1.0)
            self._check()

    @property
    def full(self) -> bool:
        """Whether there is no room for another."""
        return len(self._waiting) >= MOST_WAITING or len(self._recorded) >= _MOST_UNDER_WAY

    def _wait(self, grace: Grace, seconds: float) -> None:
        """Until something has happened; not much longer than a stop allows."""
        before = len(self._waiting) + len(self._recorded)
        self._guard.changed.wait(seconds)
        left = len(self._waiting) + len(self._recorded)
        if left < before:
            grace.begin_again()
        elif grace.over and self.error is None:
            self.error = SendError(f"told to stop while {left} settlements are not confirmed: what they are of comes again")

    def put(self, one: Settlement, claims: Sequence[tuple[Desk, Sequence[int]]]) -> None:
        """Puts one on its way, with the messages that it takes out of their desks; holds the lock."""
        for desk, positions in claims:
            one.take_out(desk, positions)
        self._waiting.append(one)
        self._newest = time.monotonic()
        self._ids_waiting += len(one.ids)

    def sent(self, one: Settlement, error: Exception | None) -> None:
        """An entry of a settlement's outputs is durable, or will never be."""
        with self._guard.mutex:
            one.outputs -= 1
            if error is not None and self.error is None:
                self.error = error
            # The owner is not woken for what it is going to look at anyway: that would cost each message a change of threads.
            if error is not None or (one.outputs == 0 and (not self._awaited or self._hurries)):
                self._guard.changed.notify_all()

    def drain(self, seconds: float | None) -> bool:
        """Returns when all are done; False when they are not after that long."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._guard.mutex:
            self._flushing += 1
            self._guard.changed.notify_all()
            try:
                grace = Grace(self._stopping)
                while self._waiting or self._recorded:
                    if seconds is None:
                        self._check()
                    elif self.error is not None or (deadline is not None and time.monotonic() > deadline):
                        return False
                    self._wait(grace, 0.5)
                if seconds is None:
                    self._check()  # the last of them may have failed
            finally:
                self._flushing -= 1
        return self.error is None

    # --- the owner's thread -------------------------------------------------------------------------------------

    def due(self) -> float | None:
        """When `record` has something to do; holds the lock. To be asked before each wait."""
        self._awaited = bool(self._waiting) and not self._waiting[0].outputs and self.error is None
        if not self._awaited:
            return None
        return self._last if self._hurries else min(self._last + LINGER_S, self._newest + _IDLE_S)

    @property
    def _hurries(self) -> bool:
        return self._flushing > 0 or len(self._waiting) > MOST_WAITING // 4 or self._ids_waiting >= _MANY_IDS

    def record(self) -> None:
        """Writes down what is done so far, then acknowledges it."""
        while found := self._take_done():
            self._last = time.monotonic()
            records = self._records(found)
            done = partial(self._acknowledge, found)
            if records:
                self._places.write(records, done)
            else:
                done(None)

    def _take_done(self) -> list[Settlement]:
        """Those at the head whose outputs are durable, as far as one record of the log has room and they are under one lead."""
        found = list[Settlement]()
        with self._guard.mutex:
            waiting, size = self._waiting, 0
            while waiting and not waiting[0].outputs and self.error is None:
                size += len(waiting[0].ids)
                if found and (size > _IDS_IN_A_RECORD or waiting[0].epoch != found[0].epoch):
                    break
                self._ids_waiting -= len(waiting[0].ids)
                found.append(waiting.popleft())
            self._recorded.extend(found)
            self._guard.changed.notify_all()
        return found

    def _records(self, found: list[Settlement]) -> dict[str, Settled]:
        records: dict[str, Settled] = {}
        first, epoch = self._places.first, found[0].epoch

        def at(topic: str) -> Settled:
            if topic not in records:
                records[topic] = Settled(first.name, epoch=epoch if topic == first.data_topic else 0)
            return records[topic]

        ids = b"".join([i for one in found for i in one.ids])
        size = _IDS_IN_A_RECORD * ID_BYTES
        while len(ids) > size:  # one settlement alone; an entry has its limits
            first.write([Settled(first.name, ids[:size], epoch=epoch)])
            ids = ids[size:]
        if ids or any(one.attributes for one in found):
            own = at(first.data_topic)
            own.ids = ids
            for one in found:
                own.attributes.update(one.attributes)
        for one in found:
            for topic, entries in one.partial.items():
                at(topic).partial.setdefault(topic, {}).update(entries)
            for topic, closed in one.closed.items():
                at(topic).closed.setdefault(topic, []).extend(closed)
        for record in records.values():
            for topic, closed in record.closed.items():
                for entry in closed:
                    record.partial.get(topic, {}).pop(entry, None)
        if epoch and records:
            at(first.data_topic)  # only there it is known who leads
        return records

    def _acknowledge(self, found: list[Settlement], error: Exception | None) -> None:
        done: dict[str, list[int]] = {}
        if error is None:
            complete = [each for one in found for each in one.complete]
            with self._guard.mutex:
                for desk, opened in complete:
                    desk.finish(opened)
            for desk, opened in complete:
                if opened.inlet is not None:
                    opened.inlet.acknowledge(opened.entry)
                done.setdefault(desk.topic, []).append(opened.entry.at)
        with self._guard.mutex:
            if error is not None and self.error is None:
                self.error = error
            for _ in found:
                self._recorded.popleft()
            self._guard.changed.notify_all()
        if done:
            self._told(done)


__all__ = ("MOST_WAITING", "Settlement", "Settlements")
