"""Streams and consumers by the API of JetStream: made, looked at, read from by number, trimmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.grouplog import is_group_topic
from edgeserve.transport.nats.answers import ApiError
from edgeserve.transport.nats.loop import Connection
from edgeserve.transport.nats.names import GROUP_PREFIX, Names, unescape

_DUPLICATES_S = 120
_MOST_READS = 128
_READ_BYTES = 8 << 20
_NAME_IN_USE = 10058
_MARKS_KEPT_S = 24 * 3600
SLACK_NS = 2 * 10**9
"""So much earlier than a publish time the server's own time of a message may be."""
_FIRST_SHIFT = 12
"""A topic's first number counts 4096 ns each since 1970: no stream takes in so many entries in its time, and positions stay below 2**63."""


class Stored(NamedTuple):
    """One message of a stream. `id`: what its sender called it."""

    at: int
    data: bytes
    time_ns: int
    id: str


def time_of(text: str) -> int:
    """Nanoseconds of a time as the server writes it."""
    seconds, _, fraction = text.rstrip("Z").partition(".")
    whole = datetime.fromisoformat(f"{seconds}+00:00")
    return int(whole.timestamp()) * 10**9 + int(fraction.ljust(9, "0")[:9] or 0)


def time_text(ns: int) -> str:
    """A time as the server reads it."""
    ns = max(ns, 0)
    return f"{datetime.fromtimestamp(ns // 10**9, UTC):%Y-%m-%dT%H:%M:%S}.{ns % 10**9:09d}Z"


class Admin:
    """Everything here is called in the loop.

    Args:
        connection: to the server.
        names: of the namespace.
    """

    def __init__(self, connection: Connection, names: Names) -> None:
        self.connection, self.names = connection, names
        self._known: dict[str, str] = {}

    # --- streams ------------------------------------------------------------------------------------------------

    async def ensure(self, topic: str) -> str:
        """Makes the topic's stream where there is none; returns when it was made.

        What groups and joins know of a topic, by its positions, outlives a stream that somebody deletes. So its numbers begin with the
        time: in one that is made again each is greater than in the one before. A group's log tells by its numbers that it was made again.
        """
        while topic not in self._known:
            info = await self.info(topic)
            if info is None:
                first = 1 if is_group_topic(topic) else time.time_ns() >> _FIRST_SHIFT
                options = {"duplicate_window": _DUPLICATES_S * 10**9, "first_seq": first}
                await self._create(self.names.stream(topic), [self.names.subject(topic)], topic, options)
            else:
                self._known[topic] = info["created"]
        return self._known[topic]

    async def look_again(self, topic: str) -> str:
        """`ensure`, without trust in what was known: the stream may have been deleted, and made again."""
        self.forget(topic)
        return await self.ensure(topic)

    async def _create(self, stream: str, subjects: list[str], description: str, options: dict[str, Any]) -> None:
        config = {
            "name": stream,
            "subjects": subjects,
            "description": description,
            "retention": "limits",
            "storage": "file",
            "discard": "old",
            "num_replicas": self.connection.settings.replicas,
            "allow_direct": True,
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            **options,
        }
        try:
            await self.connection.api(f"STREAM.CREATE.{stream}", config)
        except ApiError as exc:
            if exc.err_code != _NAME_IN_USE:
                raise TransportError(f"the stream of topic {description!r} cannot be made: {exc}") from exc

    def forget(self, topic: str) -> None:
        """The stream may be gone."""
        self._known.pop(topic, None)

    async def info(self, topic: str) -> dict[str, Any] | None:
        """The state of the topic's stream; None where there is none."""
        try:
            return await self.connection.api(f"STREAM.INFO.{self.names.stream(topic)}")
        except ApiError as exc:
            if exc.missing:
                return None
            raise

    async def state(self, topic: str) -> dict[str, Any]:
        """The state of a topic's stream, which is made where there is none."""
        await self.ensure(topic)
        info = await self.info(topic)
        if info is None:
            self.forget(topic)
            return await self.state(topic)
        state: dict[str, Any] = info["state"]
        return state

    async def topics(self) -> list[str]:
        """The names of all topics."""
        found: list[str] = []
        # By their names, which are a fortieth of what a server says of each otherwise: writers of large payloads ask often.
        for stream in await self._pages("STREAM.NAMES", "streams", {"subject": self.names.subjects}):
            if stream.startswith(self.names.stream_prefix):
                topic = unescape(stream.removeprefix(self.names.stream_prefix))
                if topic is None:
                    topic = await self._described(stream)
                if topic is not None:
                    found.append(topic)
        return found

    async def _described(self, stream: str) -> str | None:
        """The topic of a stream whose name is not all of it; None if it is gone."""
        try:
            info = await self.connection.api(f"STREAM.INFO.{stream}")
        except ApiError as exc:
            if exc.missing:
                return None
            raise
        topic: str = info["config"].get("description", "")
        return topic

    async def _pages(self, subject: str, what: str, body: dict[str, Any]) -> list[Any]:
        found: list[Any] = []
        while True:
            page = await self.connection.api(subject, {**body, "offset": len(found)})
            some = page.get(what) or []
            found += some
            if not some or len(found) >= page.get("total", 0):
                return found

    async def delete(self, topic: str) -> None:
        """Deletes a topic's stream; none is no error."""
        self.forget(topic)
        try:
            await self.connection.api(f"STREAM.DELETE.{self.names.stream(topic)}")
        except ApiError as exc:
            if not exc.missing:
                raise

    async def purge(self, topic: str, before: int) -> None:
        """Drops the messages below a number, as far as groups have acknowledged them."""
        if before <= 1:
            return
        for consumer in await self.consumers(topic):
            before = min(before, floor_of(consumer))
        if before > 1:
            await self.connection.api(f"STREAM.PURGE.{self.names.stream(topic)}", {"seq": before})

    # --- messages -----------------------------------------------------------------------------------------------

    async def get(self, topic: str, at: int) -> Stored | None:
        """The message of a number."""
        body = msgspec.json.encode({"seq": at})
        reply = await self.connection.request(f"$JS.API.DIRECT.GET.{self.names.stream(topic)}", body)
        headers = reply.headers or {}
        if headers.get("Status"):
            return None
        return Stored(int(headers["Nats-Sequence"]), reply.data, time_of(headers["Nats-Time-Stamp"]), headers.get("Nats-Msg-Id", ""))

    async def read(self, topic: str, first: int, last: int) -> AsyncIterator[list[Stored]]:
        """The messages of numbers `first` to `last`, in order, many requests at a time; few at first: some want one message only."""
        many = 1
        while first <= last:
            stop = min(first + many, last + 1)
            some = await asyncio.gather(*(self.get(topic, at) for at in range(first, stop)))
            found = [s for s in some if s is not None]
            if found:
                yield found
            size = 1 + sum(len(s.data) for s in found) // max(1, len(found))
            many = max(1, min(4 * many, _MOST_READS, _READ_BYTES // size))
            first = stop

    async def at_time(self, topic: str, first: int, last: int, ns: int) -> int:
        """The first number whose message was stored at a time or later; `last + 1`: none."""
        low, high = first, last + 1
        while low < high:
            middle = (low + high) // 2
            stored = await self.get(topic, middle)
            if stored is not None and stored.time_ns >= ns:
                high = middle
            else:
                low = middle + 1
        return low

    # --- consumers ----------------------------------------------------------------------------------------------

    async def consumers(self, topic: str) -> list[dict[str, Any]]:
        """The groups' consumers."""
        try:
            found = await self._pages(f"CONSUMER.LIST.{self.names.stream(topic)}", "consumers", {})
        except ApiError as exc:
            if exc.missing:
                return []
            raise
        return [c for c in found if c["name"].startswith(GROUP_PREFIX)]

    async def consumer(self, topic: str, group: str) -> dict[str, Any] | None:
        """A group's consumer; None where there is none."""
        try:
            return await self.connection.api(f"CONSUMER.INFO.{self.names.stream(topic)}.{self.names.consumer(group)}")
        except ApiError as exc:
            if exc.missing:
                return None
            raise

    async def put_consumer(self, topic: str, name: str, config: dict[str, Any], action: str) -> dict[str, Any]:
        """Makes ("create") or changes ("update") a consumer."""
        stream = self.names.stream(topic)
        return await self.connection.api(
            f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": {**config, "name": name}, "action": action}
        )

    async def delete_consumer(self, topic: str, name: str) -> None:
        """Deletes a consumer; none is no error."""
        try:
            await self.connection.api(f"CONSUMER.DELETE.{self.names.stream(topic)}.{name}")
        except ApiError as exc:
            if not exc.missing:
                raise

    # --- what was given back ------------------------------------------------------------------------------------

    async def mark(self, topic: str, group: str, at: int) -> None:
        """Notes that a group's member has given a message back: the server's count of deliveries does not tell that from a member that
        left with messages that it had not begun."""
        subject = f"{self.names.marks(topic, group)}.{at}"
        reply = await self.connection.request(subject)
        if reply.headers and reply.headers.get("Status") == "503":
            options = {"max_age": _MARKS_KEPT_S * 10**9}
            await self._create(self.names.marks_stream, [self.names.marks_subjects], "counts what was given back", options)
            await self.connection.request(subject)

    async def marks(self, topic: str, group: str) -> dict[int, int]:
        """How often messages of a group were given back."""
        subject = f"{self.names.marks(topic, group)}.*"
        try:
            info = await self.connection.api(f"STREAM.INFO.{self.names.marks_stream}", {"subjects_filter": subject})
        except ApiError as exc:
            if exc.missing:
                return {}
            raise
        counts: dict[str, int] = info["state"].get("subjects") or {}
        return {int(name.rpartition(".")[2]): count for name, count in counts.items()}


def floor_of(consumer: dict[str, Any]) -> int:
    """Every message below is acknowledged."""
    return int(consumer["ack_floor"]["stream_seq"]) + 1


__all__ = ("SLACK_NS", "Admin", "Stored", "floor_of", "time_of", "time_text")
