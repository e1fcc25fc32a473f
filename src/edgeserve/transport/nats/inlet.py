"""One member's share of a group's entries: a pull consumer that the group's members have together."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from edgeserve.core.errors import TransportError
from edgeserve.transport.base import Start
from edgeserve.transport.broker.driver import Entry, Inlet
from edgeserve.transport.nats.admin import SLACK_NS, Admin, time_text
from edgeserve.transport.nats.answers import ApiError
from edgeserve.transport.nats.loop import Connection
from edgeserve.transport.nats.puller import Got, Puller

_log = logging.getLogger("edgeserve")

# A member that is gone does not say for which entries it works any more; so long after, others get them.
ACK_WAIT_S = 5.0
_EXCLUSIVE_ACK_WAIT_S = 30.0
_EXPIRE_S = 0.1
_EXPIRED_S = (0.35, 5.0)
_AGAIN_S = 2.0
_SHARED_PENDING = 4096
# What a join holds is bounded by its own limits: at one of the server's it would wait for what it is not given.
_EXCLUSIVE_PENDING = -1
_SHARED_AHEAD = 32
_EXCLUSIVE_AHEAD = 256
_HELD_UP_S = 3.0
# As many as a desk remembers to be done.
_REMEMBERED = 65_536
_DRAIN_S = 2.0
_HOLDER, _CLEAN = "edgeserve.holder", "edgeserve.clean"


class NatsInlet(Puller, Inlet):
    """See `Inlet`.

    Deliveries: the server counts each of them, also those of entries that a member had fetched ahead and gave back when it left. What
    counts here is how often an entry was given back by `give_back`: a mark in a stream beside the topics is made first. That a member
    died is seen in the group's log.

    Exclusive: the consumer says who holds it. Whoever takes it lets everything that was in hand come again, at once and in order, by
    making the time for acknowledgements very short for a moment; what was acknowledged stays so. How long that moment has to be depends
    on the server, which hands on what comes again in any order, too: so nothing is handed over until all of it has come. A holder that
    was held up looks whether it is still the one before it asks for more; its requests end within a second. The server numbers what it
    delivers: where a number is missing another one has been given something, and all that is in hand is made to come again.
    """

    def __init__(self, connection: Connection, admin: Admin, topic: str, group: str, start: Start, *, exclusive: bool) -> None:
        # What one member has fetched ahead the others cannot have.
        ahead, expires_s = (_EXCLUSIVE_AHEAD, 1.0) if exclusive else (_SHARED_AHEAD, ACK_WAIT_S)
        super().__init__(connection, admin, topic, None, ahead=ahead, expires_s=expires_s)
        self._group, self._start, self._exclusive = group, start, exclusive
        self.consumer = admin.names.consumer(group)
        self._me = uuid.uuid4().hex
        self._hands = threading.Lock()
        self._held: dict[int, str] = {}
        self._marks: dict[int, int] = {}
        self._marks_at = -1.0
        # When the newest of those that came were stored, by their numbers.
        self._stored: dict[int, int] = {}
        # How those are given back that came since it was seen that the stream may be another one.
        self._doubted: list[str] = []
        self._since_ns = time.time_ns()
        self._beat = self._seen = time.monotonic()
        # Of an exclusive one: the number of the newest delivery, 0 where that is not known; and whether one was missing.
        self._number, self._gap = 0, False
        # What is to come again before anything else: how many, up to which, how often that was begun; those that have come, and when.
        self._owed = self._upto = self._tries = 0
        self._again: dict[int, Got] = {}
        self._again_at = 0.0
        self.last_ack = ""
        connection.call(self._join)
        self.begin()

    # --- the consumer -------------------------------------------------------------------------------------------

    def _wanted(self) -> dict[str, Any]:
        return {
            "ack_wait": int((_EXCLUSIVE_ACK_WAIT_S if self._exclusive else ACK_WAIT_S) * 1e9),
            "max_ack_pending": _EXCLUSIVE_PENDING if self._exclusive else _SHARED_PENDING,
            "metadata": {_HOLDER: self._me if self._exclusive else "", _CLEAN: ""},
        }

    async def _join(self) -> None:
        """Makes the group's consumer where there is none; an existing one keeps its place."""
        life = await self._admin.look_again(self._topic)
        start = self._start_again() if self._life else self._start
        if self._life not in ("", life):
            self._begin_anew()
        self._life = life
        info = await self._admin.consumer(self._topic, self._group)
        if info is None:
            policy: dict[str, Any] = {"deliver_policy": "new" if start == "latest" else "all"}
            if isinstance(start, int):
                policy = {"deliver_policy": "by_start_time", "opt_start_time": time_text(start - SLACK_NS)}
            config = {
                "durable_name": self.consumer,
                "description": self._group,
                "ack_policy": "explicit",
                "replay_policy": "instant",
                "max_deliver": -1,
                **policy,
                **self._wanted(),
            }
            try:
                await self._admin.put_consumer(self._topic, self.consumer, config, "create")
            except ApiError:
                info = await self._admin.consumer(self._topic, self._group)
                if info is None:
                    raise
            else:
                return
        await self._take_over(info)

    def _start_again(self) -> Start:
        """Where the group begins when its consumer is gone. What came meanwhile is not left out; what was done is known by its ids."""
        return self._since_ns if self._start == "latest" else self._start

    def _begin_anew(self) -> None:
        """The stream was deleted and made again: its numbers, and the subjects that acknowledge, mean other messages now."""
        _log.warning(
            "topic %r was deleted and made again: group %r begins anew there; what it had not received before is lost",
            *(self._topic, self._group),
        )
        with self._hands:
            self._held.clear()
        self._stored.clear()
        self._marks, self._marks_at, self.last_ack = {}, -1.0, ""

    async def _take_over(self, info: dict[str, Any]) -> None:
        known, wanted = info["config"], self._wanted()
        self._owed = 0
        self._again.clear()
        if self._exclusive and info["num_ack_pending"] and (known.get("metadata") or {}).get(_CLEAN) != "1":
            await self._update(known, {**wanted, "ack_wait": int(_EXPIRE_S * 1e9)})
            await asyncio.sleep(min(_EXPIRED_S[0] * 2**self._tries, _EXPIRED_S[1]))
            now = await self._admin.consumer(self._topic, self._group)
            if now is not None and _holder(now) != self._me:
                self._stopped = True  # another one was faster
                return
            self._expect_again(info if now is None else now)
        if self._exclusive or any(known.get(name) != wanted[name] for name in ("ack_wait", "max_ack_pending")):
            await self._update(known, wanted)
        if self._exclusive:
            self._number = info["delivered"]["consumer_seq"]  # what another is given meanwhile is missed by its number

    def _expect_again(self, info: dict[str, Any]) -> None:
        self._owed, self._upto, self._again_at = info["num_ack_pending"], info["delivered"]["stream_seq"], time.monotonic()
        self._tries = self._tries + 1 if self._owed else 0

    async def _update(self, known: dict[str, Any], changes: dict[str, Any]) -> None:
        metadata = {k: v for k, v in (known.get("metadata") or {}).items() if not k.startswith("_nats")}
        changed = {**known, **changes, "metadata": {**metadata, **changes.get("metadata", {})}}
        await self._admin.put_consumer(self._topic, self.consumer, changed, "update")

    async def _prepare(self) -> None:
        holder = ""
        if self._exclusive:
            gap, self._gap, self._number = self._gap, False, 0
            if gap and self._subscription is not None:  # what was asked for must not be delivered to where nobody hears it
                subscription, self._subscription = self._subscription, None
                with suppress(Exception):
                    await subscription.unsubscribe()
            info = await self._admin.consumer(self._topic, self._group)
            holder = "" if info is None else _holder(info)
            self._stopped = holder not in ("", self._me)
            # More than is here: it was on its way when the connection ended, and would come again behind what is newer.
            if info is not None and holder == self._me and (gap or info["num_ack_pending"] > len(self._held)):
                await self._take_over(info)
        if not holder:
            await self._join()
            self._accept_again()

    def _accept_again(self) -> None:
        doubted, self._doubted = self._doubted, []
        if doubted:
            self._stored.clear()
        for reply in doubted:
            self._connection.post(reply, b"-NAK")

    # --- receiving ----------------------------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        return self._stopped

    def poll(self, seconds: float) -> Entry | None:
        return self.take(seconds)

    def _pull(self) -> None:
        if self._exclusive and time.monotonic() - self._seen > _HELD_UP_S:
            self._start_attaching(0.0)
        super()._pull()

    def _accept(self, got: Got) -> bool:
        if self._exclusive and not self._follows(got):
            return False
        if not self._exclusive and (self._doubted or self._is_of_another_stream(got)):
            self._doubted.append(got.reply)
            self._start_attaching(0.0)
            return False
        with self._hands:
            self._held[got.at] = got.reply
        return not self._owed or self._comes_first(got)

    def _comes_first(self, got: Got) -> bool:
        """Whether it may be handed over now: not before all that is to come again has, in order."""
        if got.at > self._upto:
            self._all_again()  # the server has not let go of all: it would come behind this
            return False
        self._again[got.at], self._again_at = got, time.monotonic()
        self._count_again()
        return False

    def _count_again(self) -> None:
        if self._owed and len(self._again) >= self._owed:
            self._owed = self._tries = 0
            for each in sorted(self._again.values()):
                self._queue.put(each)
            self._again.clear()

    def _all_again(self) -> None:
        self._gap = True
        self._start_attaching(0.0)

    def _not_again(self, at: int) -> None:
        """It was settled meanwhile, and does not come any more."""
        if self._owed and at <= self._upto and at not in self._again:
            self._owed -= 1
            self._count_again()

    def _follows(self, got: Got) -> bool:
        """Whether nobody else was given anything since the last one."""
        if self._gap:
            return False  # it comes again
        if self._number and got.number != self._number + 1:
            _log.warning(
                "group %r on topic %r: another member was given messages while this one held the consumer: all come again",
                *(self._group, self._topic),
            )
            self._all_again()
            return False
        self._number = got.number
        return True

    def _is_of_another_stream(self, got: Got) -> bool:
        """Whether a message is another than the one that came under its number before: the stream was made again, and another member has
        made the consumer, so that the server had no reason to say so."""
        before = self._stored.setdefault(got.at, got.stored_ns)
        if len(self._stored) > _REMEMBERED:
            del self._stored[next(iter(self._stored))]
        return before != got.stored_ns

    def _entry(self, got: Got) -> Entry | None:
        return Entry(got.at, got.data, self._given_back(got) if got.delivered > 1 else 0, got.reply, got.life, first=got.delivered == 1)

    def _given_back(self, got: Got) -> int:
        if self._marks_at < got.came:
            now = time.monotonic()
            try:
                self._marks = self._connection.call(lambda: self._admin.marks(self._topic, self._group))
            except TransportError as exc:
                _log.warning("cannot read how often messages of %r were given back, so they count as tried: %s", self._topic, exc)
                return got.delivered - 1
            self._marks_at = now
        return self._marks.get(got.at, 0)

    def tick(self, away_s: float) -> None:
        now = time.monotonic()
        held_up, self._seen = now - self._seen > _HELD_UP_S, now
        if away_s:
            return
        if held_up and self._exclusive:
            self._start_attaching(0.0)
            return
        if now - self._beat >= (_EXCLUSIVE_ACK_WAIT_S if self._exclusive else ACK_WAIT_S) / 3:
            self._beat = now
            with self._hands:
                replies = list(self._held.values())
            for reply in replies:
                self._connection.post(reply, b"+WPI")
        if self._owed and now - self._again_at > _AGAIN_S:
            self._all_again()
        super().tick(away_s)

    # --- settling -----------------------------------------------------------------------------------------------

    def _out_of_hand(self, entry: Entry) -> str:
        """The subject that settles it; "" where its stream is gone: what the subject means now is another message."""
        with self._hands:
            return self._held.pop(entry.at, entry.token) if entry.life == self._life else ""

    def acknowledge(self, entry: Entry) -> None:
        reply = self._out_of_hand(entry)
        if reply:
            self.last_ack = reply
            self._connection.post(reply, b"+ACK")
            if self._owed:
                self._connection.soon(lambda: self._not_again(entry.at))

    def give_back(self, entry: Entry) -> None:
        reply = self._out_of_hand(entry)
        if not reply:
            return
        self._connection.soon(lambda: self._connection.spawn(self._return(entry.at, reply)))

    async def _return(self, at: int, reply: str) -> None:
        with suppress(TransportError):
            await self._admin.mark(self._topic, self._group, at)
        self._connection.post(reply, b"-NAK")

    async def confirmed(self) -> None:
        """Returns when the server has taken in the last acknowledgement; it does so in order."""
        if self.last_ack:
            await self._connection.settled(self.last_ack)

    # --- the end ------------------------------------------------------------------------------------------------

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
            return  # the server gives to others what is not worked on, after a while
        with suppress(Exception):
            async with asyncio.timeout(_DRAIN_S):
                if self._subscription is not None:
                    await self._subscription.drain()  # type: ignore[no-untyped-call]
                info = await self._admin.consumer(self._topic, self._group) if self._exclusive else None
                if self._exclusive and (info is None or _holder(info) != self._me):
                    return  # all of it is in another's hands
                with self._hands:
                    held = sorted(self._held.items())
                    self._held.clear()
                if not self._exclusive:
                    for _, reply in held:
                        self._connection.post(reply, b"-NAK")
                await self._connection.sent()
                # What an exclusive one still held comes again in order when the next takes over; given back singly it would not.
                if info is not None and not held and not self._owed:
                    await self._update(info["config"], {"metadata": {_HOLDER: "", _CLEAN: "1"}})


def _holder(info: dict[str, Any]) -> str:
    return str((info["config"].get("metadata") or {}).get(_HOLDER, ""))


__all__ = ("ACK_WAIT_S", "NatsInlet")
