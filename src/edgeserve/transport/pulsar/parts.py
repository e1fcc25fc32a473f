"""Parts of large messages are kept as long as a group has not settled the message that they belong to.

A topic of parts has no groups, so a subscription of our own holds them, and is moved on: behind what the slowest group still needs.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from edgeserve.core.errors import EdgeServeError, MessageError
from edgeserve.transport.broker.driver import Entry
from edgeserve.transport.broker.envelope import Reference, parts_topic, unwrap

if TYPE_CHECKING:
    from edgeserve.transport.pulsar.driver import PulsarDriver

_log = logging.getLogger("edgeserve")

_EVERY_S = 60.0
# A message follows its parts; so long it may be on its way.
_ON_ITS_WAY_NS = 600 * 10**9
# What several senders write is interleaved: the message with the oldest part need not be the first.
_LOOK_ENTRIES = 256
_LOOK_BYTES = 32 << 20
_CLOSE_S = 1.0


class Parts:
    """Looks every minute at the topics whose parts this connection has written or read."""

    def __init__(self, driver: PulsarDriver) -> None:
        self._driver = driver
        self._topics: set[str] = set()
        # Of a topic: before this entry nothing that is unsettled has parts.
        self._clean: dict[str, int] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._said = False

    def use(self, topic: str) -> None:
        """From now on the parts of this topic's messages are looked at."""
        with self._lock:
            self._topics.add(topic)
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._run, name="edgeserve-parts", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(_EVERY_S):
            for topic in sorted(self._topics):
                try:
                    self.trim(topic, time.time_ns())
                    self._said = False
                except EdgeServeError as exc:
                    if not self._said and not self._closed.is_set():
                        _log.warning("the parts of large messages on topic %r are kept for longer than they are needed: %s", topic, exc)
                    self._said = True

    def trim(self, topic: str, now_ns: int) -> None:
        """Lets go of the parts that no unsettled message of a topic refers to."""
        oldest = self._oldest(topic)
        if oldest is None:
            return
        parts = parts_topic(topic)
        recent = next(self._driver.scan(parts, since_ns=now_ns - _ON_ITS_WAY_NS), None)
        newest = self._driver.newest(parts) if recent is None else recent
        if newest is None:
            return
        before = newest.at + 1 if recent is None else recent.at
        self._driver.discard(parts, min([before, *oldest]))

    def _oldest(self, topic: str) -> list[int] | None:
        """The parts that the oldest unsettled messages refer to, [] when there are none; None: not found out yet."""
        floor = min(self._driver.floors(topic).values(), default=None)
        if floor is None:
            return []
        found: list[int] = []
        count = size = 0
        for entry in self._driver.scan(topic, max(floor, self._clean.get(topic, 0))):
            found += parts_of(entry)
            if not found:
                self._clean[topic] = entry.at + 1
            count, size = count + 1, size + len(entry.data)
            if count >= _LOOK_ENTRIES or size >= _LOOK_BYTES:
                return found or None
        return found

    def close(self) -> None:
        """Ends it."""
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_S)


def parts_of(entry: Entry) -> list[int]:
    """The parts that the messages of an entry refer to."""
    try:
        items = unwrap(entry.data, 0)[1]
    except MessageError:
        return []
    return [at for item in items if isinstance(item, Reference) for at in item.parts]


__all__ = ("Parts",)
