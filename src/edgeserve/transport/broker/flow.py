"""Holds back a source that runs ahead of those who read: they say what they have settled, and a sender counts what is left of its own.

A join keeps what waits for its partner, up to a bound. Of two sources of very different speed the faster one would drive it there, since a
broker takes all that it is sent. So each topic has a channel beside it which stores nothing: holders say there which entries are settled,
at once, and every second which are not; senders that are about to run ahead ask who is there. Like on the embedded engine a sender waits
for its own messages only, and no longer than a second for a join that settles none of them. An entry counts as a whole until all of it is
settled, and a join may keep one of its messages for as long as it likes: nobody waits for a single entry.

Members of a group that shares its messages do the same where they are to (`holds_senders`): each says what it has settled, and what the
broker says of all. An entry may take a slow one long, so they say, too, that they move.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

import msgspec

from edgeserve.core.errors import ClosedError, TransportError
from edgeserve.transport.broker.driver import Channel, Driver
from edgeserve.transport.broker.guard import Guard

_log = logging.getLogger("edgeserve")
_ASK_AT = 4
"""A sender asks who is there when it has sent a fourth of its window."""
_ANSWER_S = 0.1
_OPEN_S = 1.0
_AGAIN_S = 1.0
_LONGEST_PAUSE_S = 10.0
_CLOSE_S = 1.0
_STALL_S = 1.0
_SHARED_STALL_S = 3.0
"""It says every second that it moves."""
_FIRST_S = 5.0
"""For a join that has not moved yet: its other sources may only be starting."""
_GONE_S = 5.0
_SLICE_S = 0.1
_MOST_REMEMBERED = 10_000
_MOST_ENTRIES = 8_000
"""In one message of the channel."""


class News(msgspec.Struct, array_like=True, omit_defaults=True):
    """What a holder says; without a group it is a sender's question."""

    group: str = ""
    floor: int = -1
    settled: list[int] = []
    # Up to the entry `last` (-1: it is not said) all is settled but these.
    last: int = -1
    open: Sequence[int] = ()
    # Of a group whose members share what comes: how many messages this one has settled since it said so last; -1: of a join.
    steps: int = -1


class Standing(NamedTuple):
    """What a holder knows of a topic: below the entry `floor` all is settled, and up to `last` all but `open`; -1 unknown."""

    floor: int = -1
    last: int = -1
    open: Sequence[int] = ()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(News).decode


def _read(data: bytes) -> News | None:
    try:
        return _decode(data)
    except msgspec.DecodeError:
        return None  # somebody else's; nothing depends on it


class _Line:
    """A topic's channel, as long as one can be had: some brokers refuse it, and nothing depends on it. Nobody waits for it.

    Args:
        without: what cannot be done without it, for people.
    """

    def __init__(self, driver: Driver, topic: str, hear: Callable[[bytes], None], without: str) -> None:
        self._driver, self._topic, self._hear, self._without = driver, topic, hear, without
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, opened: Callable[[], object]) -> None:
        """Returns at once. `opened` is called when it is open; while the broker is away it is tried again."""
        self._thread = threading.Thread(target=self._keep_trying, args=(opened,), name="edgeserve-line", daemon=True)
        self._thread.start()

    def _keep_trying(self, opened: Callable[[], object]) -> None:
        pause_s = 0.0
        while not self._closed.wait(pause_s):
            if self._try():
                opened()
                return
            if not pause_s and self._driver.trouble() is None:
                _log.warning("%s for now: the broker does not open a channel for that", self._without)
            pause_s = min(max(_AGAIN_S, 2 * pause_s), _LONGEST_PAUSE_S)

    def _try(self) -> bool:
        """Whether there is nothing left to try."""
        try:
            channel = self._driver.channel(self._topic, self._hear)
        except ClosedError:
            return True
        except TransportError as exc:
            _log.warning("%s: %s", self._without, exc)
            return True
        if channel is None:
            return False
        with self._lock:
            if not self._closed.is_set():
                self._channel = channel
                return True
        channel.close()
        return True

    def say(self, data: bytes) -> None:
        channel = self._channel
        if channel is not None:
            channel.say(data)

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(_CLOSE_S)


class Teller:
    """The reader's side of a topic's channel. `standing`: asked for what it knows; `steps`: see `News`."""

    def __init__(
        self, driver: Driver, topic: str, group: str, standing: Callable[[], Standing], steps: Callable[[], int] | None = None
    ) -> None:
        self._group, self._standing, self._steps = group, standing, steps
        self._line = _Line(driver, topic, self._hear, f"group {group!r} cannot hold back who sends to topic {topic!r}")
        self._line.open(lambda: self.tell([]))

    def _hear(self, data: bytes) -> None:
        news = _read(data)
        if news is not None and not news.group:
            self.tell([])

    def tell(self, settled: list[int]) -> None:
        """Says what was settled; to be called about every second without: then it says what is not, which makes good what was lost."""
        floor, last, still_open = self._standing()
        steps = -1 if self._steps is None else self._steps()
        if not settled and len(still_open) <= _MOST_ENTRIES:
            self._line.say(_encode(News(self._group, floor, [], last, still_open, steps)))
            return
        for n in range(0, max(1, len(settled)), _MOST_ENTRIES):
            self._line.say(_encode(News(self._group, floor, settled[n : n + _MOST_ENTRIES], steps=steps)))

    def close(self) -> None:
        """Idempotent."""
        self._line.close()


class _Group:
    """What a join has not settled of what one sender has sent: entry to its count of messages."""

    def __init__(self, left: OrderedDict[int, int]) -> None:
        self.left, self.count = left, sum(left.values())
        self.heard = time.monotonic()
        # Of this sender's entries, not of others'.
        self.moves = 0
        self.shared = False
        self.stalled_at = -1
        # Not settled, and not counted any more.
        self._behind: OrderedDict[int, None] = OrderedDict()
        # Settled, as was heard before the broker's word that they are stored. Most are others'.
        self._early: set[int] = set()

    def sent(self, at: int, count: int) -> None:
        early = at in self._early
        if early or len(self._early) >= _MOST_REMEMBERED:
            self._early = {each for each in self._early if each > at}
        if early:
            self.moves += 1
            return
        self.left[at] = count
        self.count += count

    def settle(self, news: News) -> None:
        newest = next(reversed(self.left), -1)
        self.shared = news.steps >= 0
        self.moves += news.steps > 0
        for at in news.settled:
            if not self._drop(at) and at > newest and len(self._early) < _MOST_REMEMBERED:
                self._early.add(at)
        still_open = set(news.open)
        for entries in (self.left, self._behind):
            for at in list(takewhile(lambda at: at < news.floor or at <= news.last, entries)):
                if at < news.floor or at not in still_open:
                    self._drop(at)

    def _drop(self, at: int) -> bool:
        """Whether it was one of these."""
        if at in self.left:
            self.count -= self.left.pop(at)
        elif at in self._behind:
            del self._behind[at]
        else:
            return False
        self.moves += 1
        return True

    def ahead(self, pending: int) -> int:
        """How many messages are to be waited for, `pending` that are not stored yet included."""
        return self.count + pending if len(self.left) + (pending > 0) > 1 else 0

    def shorten(self, most: int) -> None:
        """One this far back is too far back whatever the exact number; it may never move again."""
        while self.count > most and len(self.left) > 2:
            self._forget_oldest()

    def stall(self) -> None:
        """It holds nobody until it moves again, and then only for what comes from now on."""
        self.stalled_at = self.moves
        while self.left:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        at, count = self.left.popitem(last=False)
        self.count -= count
        self._behind[at] = None
        if len(self._behind) > _MOST_REMEMBERED:
            self._behind.popitem(last=False)


class Restraint:
    """The sender's side.

    Args:
        driver: the broker.
        topic: where it sends.
        window: how many of its messages a join may leave unsettled.
        pending: how many are not stored yet.
    """

    def __init__(self, driver: Driver, topic: str, window: int, pending: Callable[[], int]) -> None:
        self._window, self._pending = window, pending
        self._guard = Guard()
        self._line = _Line(driver, topic, self._hear, f"a join of topic {topic!r} cannot hold back who sends to it")
        # Until when somebody may answer.
        self._answer_by = 0.0
        self._sent = 0
        self._recent: OrderedDict[int, int] = OrderedDict()
        self._recent_count = 0
        self._groups: dict[str, _Group] = {}
        self._closed = False

    def sent(self, at: int, count: int) -> None:
        """An entry is stored. Any thread."""
        with self._guard.mutex:
            self._recent[at] = count
            self._recent_count += count
            while self._recent_count > 2 * self._window and len(self._recent) > 2:
                self._recent_count -= self._recent.popitem(last=False)[1]
            for group in self._groups.values():
                group.sent(at, count)
                group.shorten(2 * self._window)

    def wait(self, count: int, stopping: Callable[[], bool]) -> None:
        """Notes that messages were handed over; returns when no live join that moves has more than the window of them left."""
        self._sent += count
        if self._sent < self._window // _ASK_AT or self._closed:
            return
        if not self._answer_by:
            self._answer_by = time.monotonic() + _OPEN_S
            self._line.open(self._ask)
        if self._sent <= self._window:
            return
        while not self._groups and (left := self._answer_by - time.monotonic()) > 0 and not stopping():
            with self._guard.mutex:
                self._guard.changed.wait(min(left, _SLICE_S))
        for name in list(self._groups):
            self._hold_back(name, stopping)

    def _ask(self) -> None:
        self._answer_by = time.monotonic() + _ANSWER_S
        self._line.say(_encode(News()))

    def _hear(self, data: bytes) -> None:
        news = _read(data)
        if news is None or not news.group:
            return
        with self._guard.mutex:
            group = self._groups.get(news.group)
            if group is None:
                left = OrderedDict((at, count) for at, count in self._recent.items() if at >= news.floor)
                group = self._groups[news.group] = _Group(left)
            group.heard = time.monotonic()
            group.settle(news)
            self._guard.changed.notify_all()

    def _hold_back(self, name: str, stopping: Callable[[], bool]) -> None:
        with self._guard.mutex:
            group = self._groups[name]
            began, moves = time.monotonic(), group.moves
            while group.ahead(self._pending()) > self._window and group.stalled_at != group.moves and not stopping():
                now = time.monotonic()
                if now - group.heard > _GONE_S:
                    del self._groups[name]
                    return
                if group.moves != moves:
                    began, moves = now, group.moves
                if now - began > (_FIRST_S if not group.moves else _SHARED_STALL_S if group.shared else _STALL_S):
                    group.stall()
                    return
                self._guard.changed.wait(_SLICE_S)

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._line.close()


__all__ = ("Restraint", "Standing", "Teller")
