"""What waits for a slow task of which only the newest is wanted: received while the task runs, and settled unprocessed when newer comes.

A thread receives whatever comes, at once, so that nobody is held back by what will not be run, and so that it is known what is newest. Of
large payloads in place it has the headers only: those of messages that are dropped are never looked at, and their memory is free again.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ClosedError, ConfigurationError, MessageError
from edgeserve.core.message import Kind
from edgeserve.core.metrics import Counters, Reason
from edgeserve.stage.decisions import drops_attribute, read_drops
from edgeserve.stage.linger import NO_ROOM
from edgeserve.transport import ClaimLost, Delivery, Subscription

MOST_WAITING = 2_000
"""So many messages wait at most, whatever their sources and keys. A broker hands out twice as many before some are settled."""
_MOST_BYTES = 64 << 20
_MOST_UNREAD = 1_024
_AT_A_TIME, _SLICE_MS = 256, 200.0
_QUICK_S, _AGAIN_S = 0.01, 0.05
_TELL_EVERY_S = 1.0


_DEFAULT = 100

Backlog: TypeAlias = Literal["all", "block", "drop_oldest", "latest"]


class Keep(NamedTuple):
    """What of the messages that wait is kept: the newest `most` of each source, or of each source and key."""

    most: int
    per_key: bool

    @property
    def reason(self) -> Reason:
        """What others are counted as."""
        return Reason.SUPERSEDED if self.per_key else Reason.OVERFLOW


def how_many(who: str, backlog: Backlog, max_backlog: int | None) -> int:
    """The newest so many are kept; 0: all.

    Raises:
        ConfigurationError: a bound is given where there is none, or another one.
    """
    if backlog != "drop_oldest" and max_backlog is not None:
        why = "keeps the newest one" if backlog == "latest" else "drops nothing, so that it has no bound"
        raise ConfigurationError(f"{who}: max_backlog={max_backlog} goes with backlog='drop_oldest'; backlog={backlog!r} {why}")
    return {"latest": 1, "drop_oldest": max_backlog or _DEFAULT}.get(backlog, 0)


class _Waiting(msgspec.Struct, eq=False):
    """A message that waits. `of`: what it is one of the newest of; None: it is never dropped. `delivery`: None when it was."""

    position: int
    delivery: Delivery | None
    since: float
    size: int
    source: str = ""
    id: bytes = b""
    of: tuple[Any, ...] | None = None


_position = attrgetter("position")


class Shelf:
    """The messages that wait, in stored order. Pure.

    Args:
        keep: which.
        only: the source that can be run; None: any. Messages of others are for the stage to put aside, as are repeats: what comes again is
            no newer than it was.
        is_known: whether a message with this id has been settled before.
    """

    def __init__(self, keep: Keep, only: str | None, is_known: Callable[[bytes], bool]) -> None:
        self._keep, self._only, self._is_known = keep, only, is_known
        self._order: deque[_Waiting] = deque()
        self._of: dict[tuple[Any, ...], deque[_Waiting]] = {}
        self._count = self._bytes = self.unread = 0
        # Of what waits, and of what was taken last, which is not known to be settled yet.
        self._ids: dict[bytes, _Waiting] = {}
        self._in_hand: set[bytes] = set()

    def __len__(self) -> int:
        return self._count + self.unread

    def put(self, batch: Sequence[Delivery], now: float) -> list[_Waiting]:
        """Takes messages in; returns those that are dropped for them."""
        gone: list[_Waiting] = []
        for delivery in batch:
            one = self._read(delivery, now)
            waits = self._ids.get(one.id)
            if waits is not None and waits.position == one.position:
                waits.delivery, waits.since = delivery, now  # its claim has expired, and is this member's once more
                continue
            order = self._order
            if order and order[-1].position > one.position:
                self._order = order = deque(sorted([*order, one], key=_position))
            else:
                order.append(one)
            if one.of is None:
                self.unread += 1
                continue
            self._ids[one.id] = one
            self._count += 1
            self._bytes += one.size
            same = self._of.setdefault(one.of, deque())
            if same and same[-1].position > one.position:
                insort(same, one, key=_position)
            else:
                same.append(one)
            if len(same) > self._keep.most:
                gone.append(self._drop(same[0]))
        while self._count > MOST_WAITING or (self._bytes > _MOST_BYTES and self._count > 1):
            while self._order[0].delivery is None:
                self._order.popleft()
            gone.append(self._drop(next(one for one in self._order if one.of is not None and one.delivery is not None)))
        if len(self._order) > 2 * len(self) + 64:
            self._order = deque(one for one in self._order if one.delivery is not None)
        return gone

    def _read(self, delivery: Delivery, now: float) -> _Waiting:
        frame, position = delivery[0], delivery[1]
        one = _Waiting(position, delivery, now, len(frame))
        try:
            header, _ = decode_frame(frame)
        except MessageError:
            return one
        source, one.id = header.source_id, header.id
        repeats = one.id in self._ids or one.id in self._in_hand or self._is_known(one.id)
        if header.kind == Kind.DATA and self._only in (None, source) and not repeats:
            one.source = source
            one.of = (source, type(header.key), header.key) if self._keep.per_key else (source,)
        return one

    def _drop(self, one: _Waiting) -> _Waiting:
        """Takes it out; it stays in `_order` without its message."""
        self._leave(one)
        one.delivery = None
        return one

    def _leave(self, one: _Waiting) -> None:
        if one.of is None:
            self.unread -= 1
            return
        same = self._of[one.of]
        same.remove(one)
        if not same:
            del self._of[one.of]
        del self._ids[one.id]
        self._count -= 1
        self._bytes -= one.size

    def take(self, most: int) -> list[_Waiting]:
        """The oldest of those that wait."""
        found: list[_Waiting] = []
        while self._order and len(found) < most:
            one = self._order.popleft()
            if one.delivery is not None:
                self._leave(one)
                found.append(one)
        self._in_hand = {one.id for one in found}
        return found


class Shedding:
    """Receives in a thread of its own, and hands over the newest messages. The others are settled, counted, and told to the group.

    Args:
        subscription: to one topic; nobody else receives of it.
        topic: that one.
        shelf: where messages wait.
        keep: which of them.
        counts: the node's.
        note: told the ids and sources of what was dropped: that is not run when it is sent again, and its source is one that has sent.
        ack_timeout_s: after so long another member may have what waits; 0: never.

    Attributes:
        shed: how many messages were settled unprocessed.
    """

    def __init__(
        self,
        subscription: Subscription,
        topic: str,
        shelf: Shelf,
        keep: Keep,
        counts: Counters,
        note: Callable[[Sequence[bytes], Iterable[str]], None],
        ack_timeout_s: float,
    ) -> None:
        self._subscription, self._topic, self._shelf, self._keep, self._counts = subscription, topic, shelf, keep, counts
        self._note, self._ack_timeout_s = note, ack_timeout_s
        self._guard = threading.Condition()
        self._closed = self._woken = False
        self._error: Exception | None = None
        # Dropped, and not settled yet; settled, and not told to the group yet.
        self._dropped: list[_Waiting] = []
        self._untold, self._tell_at = 0, 0.0
        self.shed = 0
        # How many were handed over the last time, and when.
        self._handed, self._handed_at = 1, 0.0
        self._thread = threading.Thread(target=self._keep_receiving, name=f"edgeserve-shed-{topic[:40]}", daemon=True)
        self._thread.start()

    # --- the thread that receives -------------------------------------------------------------------------------

    def _keep_receiving(self) -> None:
        while not self._closed:
            with self._guard:
                while not self._closed and (self._error is not None or self._shelf.unread >= _MOST_UNREAD):
                    self._guard.wait()
            try:
                self._receive_some()
            except ClosedError:
                return
            except Exception as exc:
                with self._guard:
                    self._error = exc  # the stage's, when it asks the next time
                    self._guard.notify_all()

    def _receive_some(self) -> None:
        batch = [] if self._closed else self._subscription.receive(_AT_A_TIME, 0 if self._dropped else _SLICE_MS)
        if batch:
            with self._guard:
                self._dropped += self._shelf.put(batch, time.monotonic())
                self._guard.notify_all()
        self._settle_dropped()

    def _settle_dropped(self) -> None:
        """What there is no room to settle now is settled with what is dropped next."""
        while gone := self._dropped:
            attributes, now = None, time.monotonic()
            if now >= self._tell_at:
                self._tell_at = now + _TELL_EVERY_S
                attributes = self._telling(len(gone))
            try:
                self._subscription.settle(
                    {self._topic: [one.position for one in gone]}, ids=[one.id for one in gone], attributes=attributes
                )
            except ClaimLost as lost:
                # Another member has them by now, and drops them or not.
                self._dropped = [one for one in gone if one.position not in lost.positions]
                if len(self._dropped) == len(gone):
                    raise
                continue
            except NO_ROOM:
                time.sleep(_AGAIN_S)
                return
            self._dropped = []
            self.shed += len(gone)
            self._untold = 0 if attributes is not None else self._untold + len(gone)
            of = Counter(one.source for one in gone)
            self._note([one.id for one in gone], of)
            for source, n in of.items():
                self._counts.count(self._keep.reason, n, edge=source)

    def _telling(self, more: int) -> dict[str, bytes]:
        """What the group is to know of what its members have dropped: about, where several say it at once."""
        return drops_attribute(read_drops(self._subscription.attributes()) + Counter({str(self._keep.reason): self._untold + more}))

    # --- the stage's --------------------------------------------------------------------------------------------

    def receive(self, max_messages: int, timeout_ms: float) -> list[Delivery]:
        """As `Subscription.receive`."""
        ends = time.monotonic() + timeout_ms / 1000
        while True:
            with self._guard:
                while not (len(self._shelf) or self._woken or self._error is not None or self._closed):
                    if (left := ends - time.monotonic()) <= 0:
                        return []
                    self._guard.wait(left)
                error, self._error, woken, self._woken = self._error, None, self._woken, False
                found = [] if error is not None or woken else self._shelf.take(self._how_many(max_messages))
                self._guard.notify_all()
            if error is not None:
                raise error
            if not found or (found := self._without_stale(found)):
                return [one.delivery for one in found if one.delivery is not None]

    def _how_many(self, most: int) -> int:
        """What is handed over can be dropped no more: one at a time, unless the stage is so quick that it comes to the same."""
        now = time.monotonic()
        quick = not self._keep.per_key and now - self._handed_at < _QUICK_S
        self._handed, self._handed_at = min(2 * self._handed if quick else 1, most, self._keep.most), now
        return self._handed

    def _without_stale(self, found: list[_Waiting]) -> list[_Waiting]:
        """Gives back what has waited for so long that another member may have it."""
        since = time.monotonic() - self._ack_timeout_s
        if not self._ack_timeout_s or found[0].since > since or self._subscription.alone:
            return found
        for one in found:
            if one.since <= since:
                with suppress(ClaimLost, *NO_ROOM):
                    self._subscription.nack(self._topic, [one.position])
        return [one for one in found if one.since > since]

    def wake(self) -> None:
        """As `Subscription.wake`."""
        with self._guard:
            self._woken = True
            self._guard.notify_all()

    def close(self) -> None:
        """Ends the thread; to be called before the subscription is closed, with which what waits goes back. Idempotent."""
        with self._guard:
            self._closed = True
            self._guard.notify_all()
        while self._thread.is_alive():
            self._subscription.wake()
            self._thread.join(0.05)
        with suppress(ClosedError, *NO_ROOM):
            self._settle_dropped()
            if self._untold:
                self._subscription.settle({}, attributes=self._telling(0))
                self._untold = 0


__all__ = ("MOST_WAITING", "Backlog", "Keep", "Shedding", "Shelf", "how_many")
