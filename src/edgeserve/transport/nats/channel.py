"""A topic's channel: a plain subject, which no stream stores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.driver import Channel
from edgeserve.transport.nats.client import Client
from edgeserve.transport.nats.loop import Connection


class NatsChannel(Channel):
    """See `Channel`. Listens anew over each new connection; without one it waits for none."""

    def __init__(self, connection: Connection, subject: str, hear: Callable[[bytes], None]) -> None:
        self._connection, self._subject, self._hear = connection, subject, hear
        self._at: Client | None = None
        self._subscription: Subscription | None = None
        self._closed = False
        connection.call(self._register)

    async def _register(self) -> None:
        self._connection.users.add(self)
        await self._listen()

    async def _listen(self) -> None:
        client = self._connection.client
        if client is None or self._closed or self._at is client:
            return
        self._at = client
        with suppress(Exception):  # the connection ends; `up` begins again
            self._subscription = await client.subscribe(self._subject, cb=self._take)

    async def _take(self, message: Msg) -> None:
        self._connection.teller.tell(partial(self._hear, message.data))

    def say(self, data: bytes) -> None:
        if self._connection.client is not None:
            self._connection.post(self._subject, data)

    def up(self) -> None:
        self._connection.spawn(self._listen())

    def tick(self, away_s: float) -> None:
        pass

    def forbidden(self, subject: str, error: TransportError) -> None:
        pass  # nobody is held back, then

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(TransportError, RuntimeError):
            self._connection.call(self._leave)

    async def _leave(self) -> None:
        self._connection.users.discard(self)
        if self._connection.client is self._at and self._subscription is not None:
            with suppress(Exception):
                await self._subscription.unsubscribe()


__all__ = ("NatsChannel",)
