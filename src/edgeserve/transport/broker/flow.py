"""Holds back a source that runs ahead of a join: who holds a join says what it has settled, and a sender counts what is left of its own.

A join keeps what waits for its partner, up to a bound. Of two sources of very different speed the faster one would drive it there, since a
broker takes all that it is sent. So each topic has a channel beside it which stores nothing: holders say there which entries are settled,
at once, and every second that they are there; senders that are about to run ahead ask who is. Like on the embedded engine a sender waits
for its own messages only, and no longer than a second for a join that does not move. What is lost on the channel costs nothing: a holder
says with everything below which entry all is settled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.driver import Channel, Driver

_log = logging.getLogger("edgeserve")
_ASK_AT = 4
"""A sender asks who is there when it has sent a fourth of its window."""
_ANSWER_S = 0.1
_STALL_S = 1.0
_FIRST_S = 5.0
"""For a join that has not moved yet: its other sources may only be starting."""
_GONE_S = 5.0
_SLICE_S = 0.1
_MOST_EARLY = 10_000
_MOST_ENTRIES = 8_000
"""In one message of the channel."""


class News(msgspec.Struct, array_like=True, omit_defaults=True):
    """What a holder says; without a group it is a sender's question."""

    group: str = ""
    floor: int = -1
    settled: list[int] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(News).decode


def _read(data: bytes) -> News | None:
    try:
        return _decode(data)
    except msgspec.DecodeError:
        return None  # somebody else's; nothing depends on it


class Teller:
    """The holder's side of a topic's channel. `floor`: the entry below which all is settled, -1 unknown."""

    def __init__(self, driver: Driver, topic: str, group: str, floor: Callable[[], int]) -> None:
        self._group, self._floor = group, floor
        self._channel = driver.channel(topic, self._hear)

    def _hear(self, data: bytes) -> None:
        news = _read(data)
        if news is not None and not news.group:
            self.tell([])

    def tell(self, settled: list[int]) -> None:
        """Says what was settled; to be called about every second, too."""
        floor = self._floor()
        for n in range(0, max(1, len(settled)), _MOST_ENTRIES):
            self._channel.say(_encode(News(self._group, floor, settled[n : n + _MOST_ENTRIES])))

    def close(self) -> None:
        """Idempotent."""
        self._channel.close()


class _Group:
    """What a join has not settled of what one sender has sent: entry to its count of messages."""

    def __init__(self, left: OrderedDict[int, int]) -> None:
        self.left, self.count = left, sum(left.values())
        self.heard = time.monotonic()
        self.moves = 0
        self.stalled_at = -1
        # Settled, as was heard before the broker's word that they are stored.
        self._early: set[int] = set()

    def sent(self, at: int, count: int) -> None:
        if at in self._early:
            self._early = {each for each in self._early if each > at}
            return
        self.left[at] = count
        self.count += count

    def settle(self, news: News) -> None:
        newest = next(reversed(self.left), -1)
        moved = False
        for at in news.settled:
            count = self.left.pop(at, 0)
            self.count -= count
            moved = True
            if not count and at > newest and len(self._early) < _MOST_EARLY:
                self._early.add(at)
        while self.left and (oldest := next(iter(self.left))) < news.floor:
            self.count -= self.left.pop(oldest)
            moved = True
        self.moves += moved

    def shorten(self, most: int) -> None:
        """One this far back is too far back whatever the exact number; it may never move again."""
        while self.count > most and len(self.left) > 1:
            self.count -= self.left.popitem(last=False)[1]


class Restraint:
    """The sender's side.

    Args:
        driver: the broker.
        topic: where it sends.
        window: how many of its messages a join may leave unsettled.
        pending: how many are not stored yet.
    """

    def __init__(self, driver: Driver, topic: str, window: int, pending: Callable[[], int]) -> None:
        self._driver, self._topic, self._window, self._pending = driver, topic, window, pending
        self._room = threading.Condition()
        self._channel: Channel | None = None
        self._asked = 0.0
        self._sent = 0
        self._recent: OrderedDict[int, int] = OrderedDict()
        self._recent_count = 0
        self._groups: dict[str, _Group] = {}
        self._refused = False

    def sent(self, at: int, count: int) -> None:
        """An entry is stored. Any thread."""
        with self._room:
            self._recent[at] = count
            self._recent_count += count
            while self._recent_count > 2 * self._window and len(self._recent) > 1:
                self._recent_count -= self._recent.popitem(last=False)[1]
            for group in self._groups.values():
                group.sent(at, count)
                group.shorten(2 * self._window)

    def wait(self, count: int, stopping: Callable[[], bool]) -> None:
        """Notes that messages were handed over; returns when no live join that moves has more than the window of them left."""
        self._sent += count
        if self._sent < self._window // _ASK_AT or self._refused:
            return
        if self._channel is None:
            self._ask()
        if self._sent <= self._window:
            return
        while not self._groups and (left := self._asked + _ANSWER_S - time.monotonic()) > 0 and not stopping():
            with self._room:
                self._room.wait(min(left, _SLICE_S))
        for name in list(self._groups):
            self._hold_back(name, stopping)

    def _ask(self) -> None:
        try:
            self._channel = self._driver.channel(self._topic, self._hear)
            self._channel.say(_encode(News()))
        except TransportError as exc:
            self._refused = True
            _log.warning("a join of topic %r cannot hold back who sends to it: %s", self._topic, exc)
        self._asked = time.monotonic()

    def _hear(self, data: bytes) -> None:
        news = _read(data)
        if news is None or not news.group:
            return
        with self._room:
            group = self._groups.get(news.group)
            if group is None:
                left = OrderedDict((at, count) for at, count in self._recent.items() if at >= news.floor)
                group = self._groups[news.group] = _Group(left)
            group.heard = time.monotonic()
            group.settle(news)
            self._room.notify_all()

    def _hold_back(self, name: str, stopping: Callable[[], bool]) -> None:
        with self._room:
            group = self._groups[name]
            began, moves = time.monotonic(), group.moves
            while group.count + self._pending() > self._window and group.stalled_at != group.moves and not stopping():
                now = time.monotonic()
                if now - group.heard > _GONE_S:
                    del self._groups[name]
                    return
                if group.moves != moves:
                    began, moves = now, group.moves
                if now - began > (_STALL_S if group.moves else _FIRST_S):
                    group.stalled_at = group.moves
                    return
                self._room.wait(_SLICE_S)

    def close(self) -> None:
        """Idempotent."""
        channel, self._channel = self._channel, None
        self._refused = True
        if channel is not None:
            channel.close()


__all__ = ("Restraint", "Teller")
