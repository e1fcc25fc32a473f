"""Retention: a topic keeps what its groups have not acknowledged, and beyond that so many bytes for so long."""

from __future__ import annotations

import time
from typing import Any

from edgeserve.core.errors import TransportError
from edgeserve.transport.nats.admin import Admin, time_of
from edgeserve.transport.nats.loop import Connection
from edgeserve.transport.nats.outlet import NatsOutlet

_EVERY_S = 3.0
# Those discard by themselves what they do not need.
_LOG = "~group"
_PARTS = ".parts"
_ON_ITS_WAY_NS = 600 * 10**9


class Trimmer:
    """Looks every few seconds at the topics that this connection has published to."""

    def __init__(self, connection: Connection, admin: Admin) -> None:
        self._connection, self._admin = connection, admin
        self._limits = connection.settings.limits
        self._looked = 0.0
        self._running = False
        connection.soon(lambda: connection.users.add(self))

    def up(self) -> None:
        """Nothing."""

    def forbidden(self, subject: str, error: TransportError) -> None:
        """Nothing: who publishes is told."""

    def tick(self, away_s: float) -> None:
        now = time.monotonic()
        if away_s or self._running or now - self._looked < _EVERY_S:
            return
        self._looked = now
        outlets = [u for u in self._connection.users if isinstance(u, NatsOutlet) and u.dirty and not u.topic.endswith(_LOG)]
        if outlets:
            self._running = True
            self._connection.spawn(self._trim({o.topic for o in outlets}))
            for outlet in outlets:
                outlet.dirty = False

    async def _trim(self, topics: set[str]) -> None:
        try:
            for topic in topics:
                await self.trim(topic)
        except TransportError:
            pass  # another time
        finally:
            self._running = False

    async def trim(self, topic: str) -> None:
        """Drops what is beyond the topic's retention."""
        info = await self._admin.info(topic)
        if info is None or not info["state"]["messages"]:
            return
        state = info["state"]
        keep_from = await self._keep_from(topic, state)
        if topic.endswith(_PARTS) and keep_from > state["first_seq"]:
            keep_from = min(keep_from, await self._referred_to(topic, state))
        if keep_from > state["first_seq"]:
            await self._admin.purge(topic, keep_from)

    async def _keep_from(self, topic: str, state: dict[str, Any]) -> int:
        first, last, count, size = (int(state[name]) for name in ("first_seq", "last_seq", "messages", "bytes"))
        keep_from = first
        if size > self._limits.retention_bytes:
            # As if all were of one size; what is wrong with that the next look puts right.
            keep_from = last + 1 - max(1, count * self._limits.retention_bytes // size)
        oldest = time.time_ns() - self._limits.retention_ns
        if time_of(state["first_ts"]) < oldest:
            keep_from = max(keep_from, await self._admin.at_time(topic, first, last, oldest))
        return keep_from

    async def _referred_to(self, topic: str, parts: dict[str, Any]) -> int:
        """Parts are kept as long as the messages that they belong to; those stand behind them."""
        info = await self._admin.info(topic.removesuffix(_PARTS))
        first, last = int(parts["first_seq"]), int(parts["last_seq"])
        if info is None:
            return last + 1
        state = info["state"]
        if state["messages"]:
            owners = await self._admin.get(topic.removesuffix(_PARTS), int(state["first_seq"]))
            since = 0 if owners is None else owners.time_ns
        else:
            since = time.time_ns()
        return await self._admin.at_time(topic, first, last, since - _ON_ITS_WAY_NS)


__all__ = ("Trimmer",)
