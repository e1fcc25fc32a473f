"""Publishing to one topic: in order, pipelined, each entry until the server has confirmed it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from functools import partial

import msgspec
from nats.aio.msg import Msg

from edgeserve.core.errors import Fenced, SendError, StoreFull, TransportError
from edgeserve.transport.broker.driver import Done, Outlet
from edgeserve.transport.nats.admin import Admin
from edgeserve.transport.nats.client import HEAD
from edgeserve.transport.nats.loop import Connection

_IN_FLIGHT = 256
_IN_FLIGHT_BYTES = 8 << 20
_ANSWER_S = 10.0
_MISSING_S = 0.2
_FULL_S = 0.02
_WRONG_SEQUENCE = (10071, 10164)
_NO_ROOM = (10023, 10028, 10047)
HEADER_BYTES = 512


class _Ack(msgspec.Struct):
    """What the server answers to a publish."""

    seq: int = 0
    error: dict[str, object] | None = None


_decode = msgspec.json.Decoder(_Ack).decode


class _Item:
    __slots__ = ("data", "done", "number", "sent", "token")

    def __init__(self, number: int, data: bytes, done: Done) -> None:
        self.number, self.data, self.done = number, data, done
        self.token = ""
        self.sent = 0.0


class NatsOutlet(Outlet):
    """See the module. With `last` each entry is stored only directly behind the one before it: the server refuses it when somebody else has
    appended. Then one entry is on its way at a time: of two, the second could find the number that it expects after the first was refused.
    """

    def __init__(self, connection: Connection, admin: Admin, topic: str, last: int | None = None) -> None:
        self._connection, self._admin, self._topic, self._last = connection, admin, topic, last
        self._subject = admin.names.subject(topic)
        self._me = time.time_ns().to_bytes(8, "big").hex() + format(id(self) & 0xFFFFFF, "x")
        self._most = _IN_FLIGHT if last is None else 1
        self._lock = threading.Lock()
        self._queue: deque[_Item] = deque()
        self._flight: OrderedDict[int, _Item] = OrderedDict()
        self._bytes = 0
        self._count = 0
        self._woken = self._closed = False
        self._again = False
        self.dirty = False
        connection.soon(lambda: connection.users.add(self))

    def send(self, data: bytes, done: Done) -> None:
        with self._lock:
            self._count += 1
            self._queue.append(_Item(self._count, data, done))
            if self._woken:
                return
            self._woken = True
        self._connection.soon(self._run)

    def close(self) -> None:
        self._closed = True
        self._connection.soon(lambda: self._connection.users.discard(self))

    # --- in the loop --------------------------------------------------------------------------------------------

    @property
    def topic(self) -> str:
        """Where it goes."""
        return self._topic

    def _run(self) -> None:
        """Hands over what there is, as far as it may be in flight."""
        while not self._closed:
            client = self._connection.client
            if client is None or not client.is_connected:
                return  # `up` begins again
            if client.is_full:
                self._connection.loop.call_later(_FULL_S, self._run)
                return
            if self._again:
                self._again = False
                self._take_back()
            with self._lock:
                self._woken = False
                if not self._queue or len(self._flight) >= self._most or self._bytes >= _IN_FLIGHT_BYTES:
                    return
                self._woken = True
                item = self._queue.popleft()
            self._flight[item.number] = item
            self._bytes += len(item.data)
            head = f"{HEAD}Nats-Msg-Id: {self._me}-{item.number}\r\n"
            if self._last is not None:
                head += f"Nats-Expected-Last-Sequence: {self._last}\r\n"
            item.token, inbox = self._connection.expect(self._subject, partial(self._answered, item))
            item.sent = time.monotonic()
            try:
                client.send(self._subject, item.data, inbox, f"{head}\r\n".encode())
            except Exception as exc:
                if client.is_connected:
                    self._tell(item, None, SendError(f"topic {self._topic!r}: {exc}"))
                # Otherwise it stays in flight, and is sent again over the next connection.

    def _take_back(self) -> None:
        """What is in flight is sent again, before the rest; the server drops what it has: the ids are the same."""
        with self._lock:
            for item in reversed(self._flight.values()):
                self._connection.forget(item.token)
                self._queue.appendleft(item)
        self._flight.clear()
        self._bytes = 0

    def up(self) -> None:
        self._again = True
        self._run()

    def tick(self, away_s: float) -> None:
        deadline_s = self._connection.settings.deadline_s
        if deadline_s is not None and away_s > deadline_s:
            error = TransportError(f"topic {self._topic!r}: no NATS server for {away_s:.0f} s (deadline_s=): {self._connection.trouble()}")
            self._fail(error)
        elif not away_s and self._flight and time.monotonic() - next(iter(self._flight.values())).sent > _ANSWER_S:
            client = self._connection.client
            if client is not None and not client.unwritten:
                self.up()

    def forbidden(self, subject: str, error: TransportError) -> None:
        if subject == self._subject.lower():
            self._fail(error)

    def _fail(self, error: TransportError) -> None:
        self._take_back()
        with self._lock:
            queue, self._queue = self._queue, deque()
        for item in queue:
            self._connection.teller.tell(partial(item.done, None, error))

    def _answered(self, item: _Item, reply: Msg | TransportError) -> None:
        if isinstance(reply, TransportError):
            return  # `up` or `forbidden` sees to it
        if reply.headers and reply.headers.get("Status") == "503":
            # There is no such stream any more, or JetStream is not there yet.
            self._connection.spawn(self._make_again())
            return
        ack = _decode(reply.data)
        if ack.error is None:
            self.dirty = True
            if self._last is not None:
                self._last = ack.seq
            self._end(item, ack.seq, None)
            return
        code = ack.error.get("err_code")
        if code in _WRONG_SEQUENCE and self._last is not None:
            self._connection.spawn(self._fenced(item))
            return
        text = f"topic {self._topic!r}: {ack.error.get('description')} (JetStream error {code})"
        self._end(item, None, StoreFull(text) if code in _NO_ROOM else SendError(text))

    async def _make_again(self) -> None:
        await asyncio.sleep(_MISSING_S)
        self._admin.forget(self._topic)
        try:
            await self._admin.ensure(self._topic)
        except TransportError as exc:
            self._fail(exc)
        else:
            self.up()

    async def _fenced(self, item: _Item) -> None:
        """Somebody has appended since; it may have been this entry, confirmed over a connection that was lost."""
        assert self._last is not None
        stored = await self._admin.get(self._topic, self._last + 1)
        if stored is not None and stored.id == f"{self._me}-{item.number}":
            self._last = stored.at
            self._end(item, stored.at, None)
        else:
            self._end(item, None, Fenced(f"somebody else has appended to {self._topic!r} since entry {self._last}"))

    def _end(self, item: _Item, at: int | None, error: Exception | None) -> None:
        self._tell(item, at, error)
        if self._queue:
            self._run()

    def _tell(self, item: _Item, at: int | None, error: Exception | None) -> None:
        if self._flight.pop(item.number, None) is not None:
            self._bytes -= len(item.data)
            self._connection.forget(item.token)
            self._connection.teller.tell(partial(item.done, at, error))


__all__ = ("HEADER_BYTES", "NatsOutlet")
