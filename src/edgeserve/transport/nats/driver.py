"""The driver of NATS JetStream: one stream for each topic, one durable consumer for each group."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from edgeserve.transport.base import Start
from edgeserve.transport.broker.driver import Channel, Deliver, Driver, Entry, Extent, Inlet, Outlet, Tail
from edgeserve.transport.nats.admin import SLACK_NS, Admin, Stored, floor_of
from edgeserve.transport.nats.channel import NatsChannel
from edgeserve.transport.nats.inlet import NatsInlet
from edgeserve.transport.nats.loop import Connection
from edgeserve.transport.nats.names import Names
from edgeserve.transport.nats.outlet import HEADER_BYTES, NatsOutlet
from edgeserve.transport.nats.settings import Settings
from edgeserve.transport.nats.tail import NatsTail
from edgeserve.transport.nats.trim import Trimmer


class NatsDriver(Driver):
    """See `Driver`. Any thread may call."""

    what = "NATS"
    precision_ms = 50

    def __init__(self, settings: Settings) -> None:
        self.deadline_s = settings.deadline_s
        self._connection = Connection(settings)
        self._admin = Admin(self._connection, Names(settings.namespace))
        self.max_bytes = self._connection.max_payload - HEADER_BYTES
        self._inlets: weakref.WeakSet[NatsInlet] = weakref.WeakSet()
        Trimmer(self._connection, self._admin)

    # --- appending ----------------------------------------------------------------------------------------------

    def outlet(self, topic: str) -> Outlet:
        self._connection.call(lambda: self._admin.ensure(topic))
        return NatsOutlet(self._connection, self._admin, topic)

    def fenced_outlet(self, topic: str) -> Outlet:
        state = self._connection.call(lambda: self._admin.state(topic))
        return NatsOutlet(self._connection, self._admin, topic, int(state["last_seq"]))

    # --- receiving ----------------------------------------------------------------------------------------------

    def inlet(self, topic: str, group: str, start: Start, *, exclusive: bool) -> Inlet:
        inlet = NatsInlet(self._connection, self._admin, topic, group, start, exclusive=exclusive)
        self._inlets.add(inlet)
        return inlet

    def tail(self, topic: str, after: int | None, deliver: Deliver) -> Tail:
        return NatsTail(self._connection, self._admin, topic, after, deliver)

    def channel(self, topic: str, hear: Callable[[bytes], None]) -> Channel:
        return NatsChannel(self._connection, self._admin.names.channel(topic), hear)

    # --- looking ------------------------------------------------------------------------------------------------

    def newest(self, topic: str) -> Entry | None:
        async def read() -> Stored | None:
            state = await self._admin.state(topic)
            return await self._admin.get(topic, int(state["last_seq"])) if state["messages"] else None

        stored = self._connection.call(read)
        return None if stored is None else Entry(stored.at, stored.data)

    def life(self, topic: str) -> str:
        return self._connection.call(lambda: self._admin.look_again(topic))

    def scan(self, topic: str, first: int | None = None, *, since_ns: int | None = None) -> Iterator[Entry]:
        async def begin() -> tuple[int, int]:
            info = await self._admin.info(topic)
            if info is None or not info["state"]["messages"]:
                return 1, 0
            oldest, last = int(info["state"]["first_seq"]), int(info["state"]["last_seq"])
            if since_ns is not None:
                return await self._admin.at_time(topic, oldest, last, since_ns - SLACK_NS), last
            return max(oldest, first or 0), last

        at, last = self._connection.call(begin)
        pages = self._admin.read(topic, at, last)

        async def turn(pages: AsyncIterator[list[Stored]]) -> list[Stored] | None:
            return await anext(pages, None)

        while (page := self._connection.call(lambda: turn(pages))) is not None:
            for stored in page:
                yield Entry(stored.at, stored.data, stored_ns=stored.time_ns)

    def topics(self) -> list[str]:
        return self._connection.call(self._admin.topics)

    def extent(self, topic: str) -> Extent | None:
        info = self._connection.call(lambda: self._admin.info(topic))
        if info is None:
            return None
        state = info["state"]
        if not state["messages"]:
            return Extent(None, None, 0)
        return Extent(int(state["first_seq"]), int(state["last_seq"]), int(state["bytes"]))

    def groups(self, topic: str) -> list[str]:
        return [_group_of(consumer) for consumer in self._consumers(topic)]

    def _consumers(self, topic: str) -> list[dict[str, Any]]:
        return self._connection.call(lambda: self._admin.consumers(topic))

    def floors(self, topic: str) -> dict[str, int]:
        self._confirm()
        return {_group_of(consumer): floor_of(consumer) for consumer in self._consumers(topic)}

    def floor(self, topic: str, group: str) -> int:
        self._confirm()
        info = self._connection.call(lambda: self._admin.consumer(topic, group))
        return 0 if info is None else floor_of(info)

    def delivered(self, topic: str, group: str) -> int:
        info = self._connection.call(lambda: self._admin.consumer(topic, group))
        return -1 if info is None else int(info["delivered"]["stream_seq"])

    def claimed(self, topic: str, group: str) -> int:
        self._confirm()
        info = self._connection.call(lambda: self._admin.consumer(topic, group))
        return 0 if info is None else int(info["num_ack_pending"])

    def _confirm(self) -> None:
        """What this connection has acknowledged is known to the server."""
        for inlet in list(self._inlets):
            self._connection.call(inlet.confirmed)

    # --- the rest -----------------------------------------------------------------------------------------------

    def discard(self, topic: str, before: int) -> None:
        self._connection.call(lambda: self._admin.purge(topic, before))

    def delete_group(self, topic: str, group: str) -> None:
        self._connection.call(lambda: self._admin.delete_consumer(topic, self._admin.names.consumer(group)))

    def delete_topic(self, topic: str) -> None:
        self._connection.call(lambda: self._admin.delete(topic))

    def trouble(self) -> str | None:
        return self._connection.trouble()

    def close(self) -> None:
        self._connection.close()


def _group_of(consumer: dict[str, Any]) -> str:
    return str(consumer["config"].get("description", ""))


__all__ = ("NatsDriver",)
