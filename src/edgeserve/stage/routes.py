"""How large payloads travel, told between nodes on `<topic>.routes`: members of groups say there what they use, producers with
routing='auto' what they have made of it. In a thread of its own, from a node's first large payload on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator

import msgspec

from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import EdgeServeError, MessageError, UnknownTopic
from edgeserve.core.message import Header, message_id
from edgeserve.core.payload import decode_value, encode_sized
from edgeserve.payload import Route, Router, Use, memory_name
from edgeserve.transport import Buffer, Publisher, Transport
from edgeserve.transport.checks import MAX_NAME_BYTES
from edgeserve.transport.url import server_is_here

_log = logging.getLogger("edgeserve")

ROUTES = ".routes"
"""Ends the name of the topic."""

TICK_S, SAY_S = 2.0, 5.0
"""How often what has changed is told, and how often a producer says that all is as it was."""

_MOST_PAUSE_S, _PAST_S, _END_S = 60.0, 60.0, 2.0
_MOST_SOURCES, _MOST_IDS = 64, 4096
_SHOWN_NAME = 24


def routes_topic(topic: str) -> str | None:
    """Where is told how a topic's large payloads travel; None: its name is too long for that."""
    name = topic + ROUTES
    return name if len(name.encode()) <= MAX_NAME_BYTES else None


def read_record(frame: Buffer) -> Use | Route | None:
    """What a message there says; None where this version cannot read it."""
    try:
        header, payload = decode_frame(frame)
        return msgspec.convert(decode_value(header.schema, payload), Use | Route)
    except (MessageError, msgspec.ValidationError):
        return None


class Uses:
    """What a member of a group uses of the large payloads that it is handed. Thread-safe."""

    def __init__(self, group: str) -> None:
        self._group, self._lock = group, threading.Lock()
        self._counts: dict[str, list[int]] = {}
        self._used: dict[bytes, None] = {}
        self._unreachable: dict[str, None] = {}

    def seen(self, source: str) -> None:
        """A message was handed to the member."""
        with self._lock:
            self._count(source)[0] += 1

    def used(self, header: Header, *, new: bool = False) -> None:
        """Its payload is used; however often, it counts once. `new`: it was not `seen`."""
        with self._lock:
            if header.id in self._used:
                return
            if len(self._used) >= _MOST_IDS:
                del self._used[next(iter(self._used))]
            self._used[header.id] = None
            count = self._count(header.source_id)
            count[0] += new
            count[1] += 1

    def missed(self, origin: str) -> None:
        """A payload could not be fetched from there."""
        with self._lock:
            if len(self._unreachable) < _MOST_SOURCES:
                self._unreachable[origin] = None

    def _count(self, source: str) -> list[int]:
        if source not in self._counts and len(self._counts) >= _MOST_SOURCES:
            return [0, 0]
        return self._counts.setdefault(source, [0, 0])

    def take(self, *, near: bool) -> Use | None:
        """What is to be said, from then on no more; None: nothing is."""
        with self._lock:
            counts, unreachable = self._counts, tuple(self._unreachable)
            self._counts, self._unreachable = {}, {}
        if not counts and not unreachable:
            return None
        sources = {source: (seen, used) for source, (seen, used) in counts.items()}
        return Use(group=self._group, host=memory_name(), near=near, sources=sources, unreachable=unreachable)


class _Told:
    """The records of one topic."""

    def __init__(self, transport: Transport, topic: str) -> None:
        self._transport, self._topic = transport, topic
        self._publisher: Publisher | None = None
        self._prefix, self._sequence = os.urandom(8), 0
        self._since_ns = time.time_ns() - int(_PAST_S * 1e9)
        self._next: int | None = None

    def say(self, record: Use | Route) -> None:
        if self._publisher is None:
            self._publisher = self._transport.publisher(self._topic)
            # Nothing is worth to be waited for.
            self._publisher.stopping = self._publisher.giving_up = lambda: True
        now, (schema, payload, size) = time.time_ns(), encode_sized(msgspec.to_builtins(record))
        id_ = message_id(self._prefix, self._sequence)
        header = Header(id_, "routes", self._prefix.hex(), self._sequence, now, now, schema, size)
        self._sequence += 1
        self._publisher.publish([encode_frame(header, payload)])

    def news(self) -> Iterator[Use | Route]:
        """What was told since this was read last; at first, in the last minute."""
        for frame, position, _ in self._transport.read(self._topic, self._since_ns, position=self._next):
            self._next = position + 1
            if (record := read_record(frame)) is not None:
                yield record

    def is_there(self) -> bool:
        try:
            self._transport.end(self._topic)
        except UnknownTopic:
            return False
        return True

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()


class Sent:
    """What a producer sends under routing='auto'. Thread-safe.

    Attributes:
        lazy: whether its large payloads stay in place, for now.
    """

    def __init__(self, *, lazy: bool) -> None:
        self.lazy = lazy
        self._lock = threading.Lock()
        self._count = self._bytes = self._apart = 0

    def add(self, size: int, *, apart: bool) -> None:
        """A large payload is sent; `apart`: and stays in place."""
        with self._lock:
            self._count += 1
            self._bytes += size
            self._apart += size * apart

    def take(self) -> tuple[int, int, int]:
        """(how many, their bytes, the bytes of those that stayed in place) since this was called last."""
        with self._lock:
            found = self._count, self._bytes, self._apart
            self._count = self._bytes = self._apart = 0
        return found


class _Reporter:
    """Says what is used, if somebody wants to know."""

    def __init__(self, transport: Transport, topic: str, uses: Uses, *, near: bool) -> None:
        self._uses, self._near = uses, near
        self._told = _Told(transport, topic)
        self._wanted, self._ask_at, self._pause_s = False, 0.0, TICK_S

    def tick(self, now_s: float) -> None:
        use = self._uses.take(near=self._near)
        if use is not None and not self._wanted and now_s >= self._ask_at:
            self._ask_at, self._pause_s = now_s + self._pause_s, min(2 * self._pause_s, _MOST_PAUSE_S)
            self._wanted = self._told.is_there()
        if use is not None and self._wanted:
            self._told.say(use)

    def end(self, now_s: float) -> None:
        self.tick(now_s)
        self._told.close()


class _Decider:
    """Hears what groups use, decides how a producer's large payloads travel, and says so."""

    def __init__(self, who: str, transport: Transport, topic: str, sent: Sent, router: Router) -> None:
        self._who, self._sent, self._router = who, sent, router
        self._told = _Told(transport, topic)
        self._producer = f"{router.source[:_SHOWN_NAME]}@{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._since_ns, self._say_at = time.time_ns(), 0.0

    def tick(self, now_s: float, *, ended: bool = False) -> None:
        router, before = self._router, self._router.mode
        count, size, apart = self._sent.take()
        router.sent(count, size, now_s, apart=apart)
        for record in self._told.news():
            if isinstance(record, Use):
                router.heard(record, now_s)
        if router.decide(now_s) != before:
            self._since_ns, self._say_at = time.time_ns(), 0.0
            self._sent.lazy = router.mode == "lazy"
            how = "stay in place" if self._sent.lazy else "go with their messages"
            _log.info("%s: large payloads %s from now on: %s", self._who, how, router.reason)
        if ended or now_s >= self._say_at:
            self._say_at = now_s + SAY_S
            self._told.say(self._route(ended=ended))

    def _route(self, *, ended: bool) -> Route:
        router = self._router
        return Route(
            source=router.source,
            producer=self._producer,
            mode=router.mode,
            since_ns=self._since_ns,
            mean_bytes=router.mean_bytes,
            rate_hz=router.rate_hz,
            reason=router.reason,
            edges=tuple(router.edges()),
            ended=ended,
        )

    def end(self, now_s: float) -> None:
        self.tick(now_s, ended=True)
        self._told.close()


class Routes:
    """What one node tells and hears.

    Args:
        who: the node, for people.
        transport: where it is connected to.
        reads: (topic, group) that it takes messages as a member of; None: it takes none.
        sends: (topic, source id) of what it sends under routing='auto'; None: nothing.
        origin, why_not: see `Router`.

    Attributes:
        uses: what it uses of what it reads.
        sent: what it sends.
    """

    def __init__(
        self,
        who: str,
        transport: Transport,
        *,
        reads: tuple[str, str] | None = None,
        sends: tuple[str, str] | None = None,
        origin: str = "",
        why_not: str = "",
    ) -> None:
        self._who, self._transport, self._reads, self._sends = who, transport, reads, sends
        self._origin, self._why_not = origin, why_not
        self.uses = Uses("" if reads is None else reads[1])
        self.sent = Sent(lazy=not why_not)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """There is a large payload."""
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=f"edgeserve-routes {self._who}", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread can be had now: the next payload tries again
                    thread.start()
                    self._thread = thread

    def close(self) -> None:
        """Says the last of it, if that is soon done. Idempotent."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_END_S)

    def _run(self) -> None:
        near, parts = server_is_here(self._transport.url), list[_Reporter | _Decider]()
        if self._reads is not None and (topic := routes_topic(self._reads[0])) is not None:
            parts.append(_Reporter(self._transport, topic, self.uses, near=near))
        if self._sends is not None and (topic := routes_topic(self._sends[0])) is not None:
            source, host = self._sends[1], memory_name()
            router = Router(source, time.monotonic(), origin=self._origin, host=host, near=near, why_not=self._why_not)
            parts.append(_Decider(self._who, self._transport, topic, self.sent, router))
        while True:
            ended = self._ended.is_set()
            for part in parts:
                try:
                    (part.end if ended else part.tick)(time.monotonic())
                except (EdgeServeError, OSError) as exc:  # a broker that is away, a store without room: later, or not at all
                    _log.debug("%s cannot tell or hear how payloads travel: %s", self._who, exc)
            if ended:
                return
            self._ended.wait(TICK_S)


__all__ = ("ROUTES", "Routes", "Uses", "read_record", "routes_topic")
