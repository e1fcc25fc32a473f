"""Following a topic without a group: a consumer that the server forgets when nobody asks it any more."""

from __future__ import annotations

import uuid
from contextlib import suppress

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.driver import Deliver, Entry, Tail
from edgeserve.transport.nats.admin import Admin
from edgeserve.transport.nats.loop import Connection
from edgeserve.transport.nats.puller import Got, Puller

_AHEAD = 256
_EXPIRES_S = 10.0
_FORGOTTEN_S = 60


class NatsTail(Puller, Tail):
    """See `Tail`. A new consumer is made behind the last entry that came, after a new connection or a gap."""

    def __init__(self, connection: Connection, admin: Admin, topic: str, after: int | None, deliver: Deliver) -> None:
        super().__init__(connection, admin, topic, deliver, ahead=_AHEAD, expires_s=_EXPIRES_S)
        self._last = after or 0
        self._number = 0
        connection.call(self._prepare)
        self.begin()

    async def _prepare(self) -> None:
        life = await self._admin.look_again(self._topic)
        if self._life not in ("", life):
            self._last = 0
        self._life = life
        name = f"tail+{uuid.uuid4().hex}"
        config = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self._last + 1,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": _FORGOTTEN_S * 10**9,
        }
        await self._admin.put_consumer(self._topic, name, config, "create")
        self.consumer, self._number = name, 0

    def _accept(self, got: Got) -> bool:
        if f".{self.consumer}." not in got.reply:
            return False
        if got.number != self._number + 1:
            self._start_attaching(0.0)
            return False
        self._number = got.number
        if got.at <= self._last:
            return False
        self._last = got.at
        return True

    def _entry(self, got: Got) -> Entry | None:
        return Entry(got.at, got.data, life=got.life)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        with suppress(TransportError, RuntimeError):
            self._connection.call(self._leave)

    async def _leave(self) -> None:
        self._connection.users.discard(self)
        if self._connection.client is None:
            return
        with suppress(Exception):
            if self._subscription is not None:
                await self._subscription.unsubscribe()
        self._connection.post(f"$JS.API.CONSUMER.DELETE.{self._stream}.{self.consumer}", b"")


__all__ = ("NatsTail",)
