"""Pulling a consumer's messages: asked for ahead in the loop, handed over by a thread, which waits while the owner has enough."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import abstractmethod
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from edgeserve.core.errors import ClosedError, TransportError
from edgeserve.transport.broker.driver import Deliver, Entry
from edgeserve.transport.nats.admin import Admin
from edgeserve.transport.nats.client import Client
from edgeserve.transport.nats.loop import Connection

_MOST_BYTES = 8 << 20
_LATE_S = 2.0
_AGAIN_S = 0.2


class Got(NamedTuple):
    """A message as it came. `delivered`: the how manieth time; `number`: of all deliveries of its consumer; `life`: see `Entry`."""

    at: int
    data: bytes
    delivered: int
    number: int
    stored_ns: int
    reply: str
    came: float
    life: str


def got_from(message: Msg, life: str) -> Got:
    """Reads what the server says in the subject that acknowledges."""
    # $JS.ACK.[DOMAIN.ACCOUNT.]STREAM.CONSUMER.DELIVERED.AT.NUMBER.TIME.PENDING[.RANDOM]
    parts = message.reply.split(".")
    first = 4 if len(parts) == 9 else 6
    delivered, at, number, stored_ns = (int(part) for part in parts[first : first + 4])
    return Got(at, message.data, delivered, number, stored_ns, message.reply, time.monotonic(), life)


class Puller:
    """Args:
    connection, admin: the server.
    topic: whose messages.
    deliver: takes them, in a thread of its own; None: `take` hands them out.
    ahead: how many are asked for before they are needed.
    expires_s: for how long the server keeps a request.
    """

    def __init__(self, connection: Connection, admin: Admin, topic: str, deliver: Deliver | None, *, ahead: int, expires_s: float) -> None:
        self._connection, self._admin, self._topic, self._deliver = connection, admin, topic, deliver
        self._ahead, self._expires_s = ahead, expires_s
        self._stream = admin.names.stream(topic)
        self.consumer = ""
        # When the stream was made that the messages are of.
        self._life = ""
        self._queue: SimpleQueue[Got | None] = SimpleQueue()
        # Of what has just come, in the loop: not in order yet.
        self._mixed: list[Got] = []
        self._subscription: Subscription | None = None
        # Requests that the server has: [subject for the answers, messages that are still to come, when it ends]; and these messages in all.
        self._asked: deque[tuple[str, list[float]]] = deque()
        self._coming = 0
        self._inbox = ""
        self._requests = 0
        self._attaching = False
        self._stopped = self._closed = False
        # What the server does not let it do.
        self.error: Exception | None = None

    def begin(self) -> None:
        """Starts, when there is a consumer."""
        self._connection.call(self._register)
        if self._deliver is not None:
            threading.Thread(target=self._hand_over, args=(self._deliver,), name="edgeserve-nats-tail", daemon=True).start()

    async def _register(self) -> None:
        self._connection.users.add(self)
        await self._attach()

    # --- handing over -------------------------------------------------------------------------------------------

    def take(self, seconds: float | None) -> Entry | None:
        """The next entry; None when none came in time (`seconds` None: waits), or when it was closed. Raises what the server refuses."""
        while not self._closed:
            if self.error is not None:
                raise self.error
            try:
                got = self._queue.get(seconds != 0, seconds)
            except Empty:
                return None
            if got is None:
                continue  # closed, or refused
            if self._closed:
                break
            if (self._coming + self._queue.qsize()) * 2 <= self._ahead:  # to wake the loop costs as much as all else
                self._connection.soon(self._pull)
            try:
                entry = self._entry(got)
            except ClosedError:
                break
            if entry is not None:
                return entry
        return None

    def _hand_over(self, deliver: Deliver) -> None:
        while self.error is None:
            with suppress(TransportError):  # its owner asks for `error`
                if (entry := self.take(None)) is None:
                    return
                try:
                    deliver(entry)
                except TransportError:
                    raise
                except Exception as exc:
                    self.error = exc  # nothing is handed over any more

    @abstractmethod
    def _entry(self, got: Got) -> Entry | None:
        """What is handed over; None: nothing."""

    # --- the loop -----------------------------------------------------------------------------------------------

    @abstractmethod
    async def _prepare(self) -> None:
        """Makes sure that there is a consumer, after a new connection or when the server says that there is none."""

    def _accept(self, got: Got) -> bool:
        """Whether a message is taken."""
        return True

    def up(self) -> None:
        self._start_attaching(0.0)

    def tick(self, away_s: float) -> None:
        if not away_s:
            self._pull()

    def forbidden(self, subject: str, error: TransportError) -> None:
        if self.consumer and f".{self._stream}.{self.consumer}.".lower() in f"{subject}.":
            self.error = error
            self._queue.put(None)

    def _start_attaching(self, after_s: float) -> None:
        if not self._attaching and not self._closed and not self._stopped:
            self._attaching = True
            self._connection.spawn(self._attach_again(after_s))

    async def _attach_again(self, after_s: float) -> None:
        try:
            await asyncio.sleep(after_s)
            while not self._closed and not self._stopped:
                with suppress(TransportError):
                    await self._prepare()
                    await self._attach()
                    return
                await asyncio.sleep(_AGAIN_S)
        finally:
            self._attaching = False

    async def _attach(self) -> None:
        client = await self._connection.up()
        if self._subscription is not None:
            with suppress(Exception):
                await self._subscription.unsubscribe()
        self._asked.clear()
        self._coming = 0
        self._inbox = client.new_inbox()
        # What was asked for is bounded, so the client's own bounds must not drop any of it.
        self._subscription = await client.subscribe(f"{self._inbox}.*", cb=self._on_message, pending_msgs_limit=0, pending_bytes_limit=0)
        self._pull_from(client)

    def _pull(self) -> None:
        client = self._connection.client
        if client is not None and self._subscription is not None and not self._attaching and self._room():
            self._pull_from(client)

    def _room(self) -> int:
        now = time.monotonic()
        while self._asked and self._asked[0][1][1] < now:
            self._forget(0)  # its end was not told
        coming = self._coming + self._queue.qsize()
        return self._ahead - coming if coming * 2 <= self._ahead else 0

    def _forget(self, index: int) -> None:
        self._coming -= int(self._asked[index][1][0])
        del self._asked[index]

    def _pull_from(self, client: Client) -> None:
        batch = self._room()
        if batch <= 0 or self._closed or self._stopped:
            return
        self._requests += 1
        inbox = f"{self._inbox}.{self._requests}"
        self._asked.append((inbox, [batch, time.monotonic() + self._expires_s + _LATE_S]))
        self._coming += batch
        body = {
            "batch": batch,
            "expires": int(self._expires_s * 1e9),
            "max_bytes": max(_MOST_BYTES, 2 * self._connection.max_payload),
        }
        with suppress(Exception):  # the connection ended: another comes
            client.send(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self.consumer}", msgspec.json.encode(body), inbox)

    async def _on_message(self, message: Msg) -> None:
        if not message.reply.startswith("$JS.ACK."):
            self._on_status(message)
            return
        # The server serves several requests in turn: what is left of each is not known, but of all of them together.
        if self._asked:
            left = self._asked[0][1]
            left[0] -= 1
            self._coming -= 1
            if left[0] <= 0:
                self._asked.popleft()
        got = got_from(message, self._life)
        if self._accept(got):
            if got.delivered > 1 or self._mixed:
                # What was given back the server hands on in any order; most of it comes at once.
                if not self._mixed:
                    self._connection.loop.call_soon(self._hand_on)
                self._mixed.append(got)
            else:
                self._queue.put(got)
        if not self._asked:
            self._pull()

    def _hand_on(self) -> None:
        mixed, self._mixed = sorted(self._mixed), []
        for got in mixed:
            self._queue.put(got)

    def _on_status(self, message: Msg) -> None:
        headers = message.headers or {}
        status, text = headers.get("Status", ""), headers.get("Description", "").lower()
        if status == "100" or not status:
            return
        for index in [n for n, (inbox, _) in enumerate(self._asked) if inbox == message.subject]:
            self._forget(index)  # at most one
        if status == "503" or (status == "409" and "deleted" in text):
            self._start_attaching(_AGAIN_S)
        elif status != "409" or "max" in text:
            self._pull()  # others of 409: the tick asks again


__all__ = ("Got", "Puller")
