"""What a member receives: entries fetched from the broker, put on the desks of their topics, handed over as messages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from edgeserve.core.errors import ConfigurationError, StoreDamaged
from edgeserve.transport.base import Delivery, Start
from edgeserve.transport.broker.desk import Desk, Open
from edgeserve.transport.broker.driver import Driver, Entry, Inlet, NoAnswer
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.broker.envelope import INDEX_BITS, INDEX_MASK, Item, Reference
from edgeserve.transport.broker.grouplog import Left, Record, Settled, indexes_of
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.places import Places

_log = logging.getLogger("edgeserve")

_READY_ENTRIES = 16
_SLICE_S = 0.2
_BUSY_S = 0.0002
_ASK_AGAIN_S = 0.1
_DENSE_S = 0.0005
_MISSED_S = 90.0
_SAY_EVERY_S = 5.0
_ASK_LATER_S = 10.0


class Reception:
    """The receiving side of one member.

    Args:
        engine: the connection.
        places: the member's in its group.
        topics, group, start, exclusive: what is received.
        guard: of the state; shared with the owner.
        ack_timeout_s: how long a message may stay unsettled where others could have it; 0: for ever.
        check: raises what keeps the owner from going on.
        fail: told an error that ends it all.
        stopping: says whether the owner was told to stop.
    """

    def __init__(
        self,
        engine: BrokerEngine,
        places: Places,
        topics: Sequence[str],
        group: str,
        start: Start,
        guard: Guard,
        ack_timeout_s: float,
        check: Callable[[], None],
        fail: Callable[[Exception], None],
        stopping: Callable[[], bool],
        *,
        exclusive: bool,
    ) -> None:
        self._engine, self._places, self._group, self._start, self._guard = engine, places, group, start, guard
        self._driver: Driver = engine.driver
        self._ack_timeout_s, self._check, self._fail, self._stopping, self._exclusive = ack_timeout_s, check, fail, stopping, exclusive
        self.desks = {topic: Desk(topic) for topic in topics}
        self._turn = list(self.desks.values())
        self._paused: set[str] = set()
        # Of one topic the caller of `receive` fetches itself: to be woken by another thread would cost it more than all the rest.
        self._only = topics[0] if len(topics) == 1 else None
        self._woken = self.closed = False
        self.attached = False
        self._took = 0.0
        # What came and could not be taken in.
        self._kept: tuple[Inlet | None, Entry | None] = (None, None)
        # From before the group's start, and not told of yet.
        self._skipped = 0
        # When this member last asked for messages, and when it last gave some back because their time was up.
        self._asked = self._late = 0.0
        # Since when the broker does not tell how far the group is, and when that was said last.
        self._unanswered, self._said = 0.0, -_SAY_EVERY_S

    def desk(self, topic: str) -> Desk:
        """The desk of a topic that is subscribed to."""
        desk = self.desks.get(topic)
        if desk is None:
            raise ConfigurationError(f"this member of group {self._group!r} is not subscribed to topic {topic!r}")
        return desk

    # --- ends ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Begins to receive."""
        for topic, desk in self.desks.items():
            if desk.inlet is None:
                inlet = self._driver.inlet(topic, self._group, self._start, exclusive=self._exclusive)
                place = self._places.of[topic]
                with self._guard.mutex:
                    wanted = not self.closed and self.desks[topic] is desk
                    if wanted and place.alone:
                        # Nobody else has entries of it, unless one that died is not gone for the broker. What went back may be settled.
                        desk.follow(place.came, max(place.log.doubt.get(topic, -1), max(desk.gone, default=-1)))
                    if wanted:
                        desk.inlet = inlet
                        self._guard.changed.notify_all()
                if not wanted:  # closed meanwhile, which found none to close: what it is given would be nobody's
                    inlet.close()
                    return
                if self._only is None:
                    threading.Thread(target=self._pump, args=(desk, inlet), name=f"edgeserve-pump-{topic[:40]}", daemon=True).start()
        self.attached = True

    @property
    def lost(self) -> bool:
        """Whether an end was taken away, though its owner may not know why."""
        for desk in self._turn:
            if desk.inlet is not None and desk.inlet.lost:
                return True
        return False

    def detach(self) -> None:
        """Another member leads: what is in hand is that one's."""
        with self._guard.mutex:
            left = self._turn
            self.attached = False
            self.desks = {topic: Desk(topic) for topic in self.desks}
            self._turn = list(self.desks.values())
            self._guard.changed.notify_all()
        for desk in left:
            if desk.inlet is not None:
                desk.inlet.close()

    def close(self) -> None:
        """Ends it; what is not acknowledged goes back."""
        with self._guard.mutex:
            self.closed = True
            self._guard.changed.notify_all()
        for desk in self._turn:
            if desk.inlet is not None:
                desk.inlet.close()

    def begun(self) -> dict[str, list[int]]:
        """Topic to entries that were begun and are not finished."""
        with self._guard.mutex:
            return {topic: [at for at, opened in desk.open.items() if opened.next] for topic, desk in self.desks.items()}

    # --- entries ------------------------------------------------------------------------------------------------

    def _pump(self, desk: Desk, inlet: Inlet) -> None:
        """A thread for each of several topics: what comes from one must not wait for another."""
        try:
            while not self.closed and self.desks[desk.topic] is desk and desk.inlet is inlet:
                with self._guard.mutex:
                    while not self.closed and desk.ready >= _READY_ENTRIES:
                        self._guard.changed.wait(1.0)
                entry = inlet.poll(1.0)
                if entry is not None:
                    try:
                        self._take_in(desk, inlet, entry)
                    except Exception:
                        if not self._exclusive:
                            inlet.give_back(entry)  # else nobody would have it until this member ends
                        raise
        except Exception as exc:
            self._fail(exc)

    def _fetch(self, most: int, seconds: float) -> int:
        """Fetches from the only topic: waits for the first entry, takes what else is there at once. Returns how many messages came."""
        desk = self.desks[self._only] if self._only is not None else None
        inlet = None if desk is None else desk.inlet
        if desk is None or inlet is None or desk.topic in self._paused:
            with self._guard.mutex:
                if not self._woken:
                    self._guard.changed.wait(seconds)
            return 0
        began, count = time.monotonic(), 0
        (of, entry), self._kept = self._kept, (None, None)
        if entry is None or of is not inlet:
            entry = inlet.poll(seconds)
        # To find out that there is no more costs a client as much as all else: only where the first had been waiting it is asked.
        busy = time.monotonic() - began < _BUSY_S
        while entry is not None:
            try:
                count += self._take_in(desk, inlet, entry)
            except Exception:
                if self._exclusive:
                    self._kept = inlet, entry  # the only one who can have it
                else:
                    inlet.give_back(entry)
                raise
            entry = inlet.poll(0) if busy and count < most else None
        return count

    def _take_in(self, desk: Desk, inlet: Inlet, entry: Entry) -> int:
        """Puts an entry on its desk; returns how many messages it has."""
        topic, at, again = desk.topic, entry.at, entry.deliveries
        publish_ns, items = self._engine.unwrap(entry)
        # This runs for every entry that comes while nothing else is to be done: each call, and each look, counts.
        count = len(items)
        referring = type(items[0]) is Reference if count == 1 else Reference in map(type, items)
        frames: Sequence[Any] = [self._whole(topic, item) for item in items] if referring else items
        place = self._places.of[topic]
        log = place.log
        left_out = at < log.start_at and log.left_out(at, entry.life)
        if left_out or self._skipped:
            self._count_skipped(count if left_out else 0)
        alone = place.alone
        if not alone:
            # Where entries come one after the other in their order, hardly one of them was another's.
            now, before = time.monotonic(), self._took
            self._took = now
            place.bury_who_just_died(thorough=not entry.first and (at <= desk.last or now - before > _DENSE_S))
        gap = alone and at > desk.last + 1 and not self._exclusive
        # Who has just come, and was not heard of yet, may have been given what is missing; and of an entry that somebody had before it
        # must be known here what is settled.
        if gap or (count > 1 and (again or at <= desk.last)):
            place.barrier(self._stopping)
        with self._guard.mutex:
            if self.closed or self.desks[topic] is not desk:
                return 0
            log = place.log  # another one, if this member was cut off
            if entry.life != desk.life and desk.begin_anew(entry.life):
                place.forget_entries()
            worked = bool(log.worked) and at in log.worked.get(topic, ())
            again = again or int(worked or at <= log.doubt.get(topic, -1))
            done = range(count) if left_out else indexes_of(log.partial[topic].get(at, ())) if topic in log.partial else ()
            opened = Open(entry, publish_ns, frames, count, count, again, inlet)
            if done:
                opened.learn(done)
            if worked:
                opened.named = True
            if gap and not (place.alone and desk.followed == place.came):
                desk.unsure_upto = at - 1
            kept = desk.add(opened)
            if self._only is None:
                self._guard.changed.notify_all()
        if not kept:
            inlet.acknowledge(entry)
        return count

    def _count_skipped(self, count: int) -> None:
        if count:
            self._skipped += count
        elif self._skipped:
            _log.info("group %r begins at a time: %d messages that were older were left out", self._group, self._skipped)
            self._skipped = 0

    def _whole(self, topic: str, item: Item) -> bytes | memoryview:
        try:
            return self._engine.fetch(topic, item)
        except StoreDamaged as exc:
            # It would be in the way for ever; an empty frame is put aside by name.
            _log.warning("%s", exc)
            return b""

    def hear(self, topic: str, record: Record) -> None:
        """What others say of entries; holds the lock."""
        desk = self.desks.get(topic)
        if desk is None or not desk.open:
            return
        if type(record) is Settled:
            desk.learn({at: indexes_of(done) for at, done in record.partial.get(topic, {}).items() if at in desk.open}, ())
        elif type(record) is Left:
            desk.learn({}, record.worked.get(topic, ()))

    # --- messages -----------------------------------------------------------------------------------------------

    def receive(self, max_messages: int, timeout_ms: float | None) -> list[Delivery]:
        """See `Subscription.receive`."""
        if max_messages < 1:
            raise ConfigurationError(f"receive() must ask for at least 1 message, not {max_messages!r}")
        self._check()  # before the lock: a child of the process that holds it would wait for ever
        self._asked = time.monotonic()
        deadline = None if timeout_ms is None else self._asked + timeout_ms / 1000
        if not self.attached and not self._exclusive:
            self.attach()
        polled, came = False, 0
        while True:
            with self._guard.mutex:
                if not came:
                    self._check()
                if self._woken:
                    self._woken = False
                    return []
                now = time.monotonic()
                found = self._take(max_messages, now)
                if found:
                    if self._only is None:
                        self._guard.changed.notify_all()
                    return found
                if deadline is not None and now >= deadline and (polled or self._only is None):
                    return []
                wait = _SLICE_S if deadline is None else min(_SLICE_S, deadline - now)
                due = min((d for d in (desk.next_due() for desk in self._turn) if d is not None), default=None)
            came = self._fetch(max_messages, max(0.0, wait if due is None else min(wait, due - now)))
            polled = True

    def _take(self, most: int, now: float) -> list[Delivery]:
        """Whoever was asked first is asked last the next time: one topic that is always full does not starve the others."""
        found: list[Delivery] = []
        turn = self._turn
        if len(turn) > 1:
            self._turn = [*turn[1:], turn[0]]
        for desk in turn:
            if desk.topic not in self._paused and len(found) < most:
                some = desk.take(most - len(found), now)
                if some and self._ack_timeout_s and not self._places.of[desk.topic].alone:
                    desk.stamp(some, now + self._ack_timeout_s)
                found += some
        return found

    def wake(self) -> None:
        """Ends a `receive` that waits."""
        with self._guard.mutex:
            self._woken = True
            self._guard.changed.notify_all()

    def pause(self, topic: str) -> None:
        """See `Subscription.pause`."""
        self.desk(topic)
        self._paused.add(topic)

    def resume(self, topic: str) -> None:
        """See `Subscription.resume`."""
        self.desk(topic)
        with self._guard.mutex:
            self._paused.discard(topic)
            self._guard.changed.notify_all()

    def take_back(self, now: float) -> None:
        """Gives back what was not settled in time, where others could have it."""
        if not self._ack_timeout_s:
            return
        gone: list[tuple[Inlet, Open]] = []
        with self._guard.mutex:
            for topic, desk in self.desks.items():
                if self._places.of[topic].alone or desk.inlet is None:
                    continue
                gone += [(desk.inlet, desk.drop(at)) for at in desk.overdue(now)]
                desk.stamp_unstamped(now + self._ack_timeout_s)
        for inlet, opened in gone:
            inlet.give_back(opened.entry)
        if gone:
            self._late = now
        elif self._late > self._asked:
            self._stand_aside()

    def _stand_aside(self) -> None:
        """This member's task stands still: it would be given again what it gave back. It is given nothing until it asks for more."""
        with self._guard.mutex:
            self.attached, self._late = False, 0.0
            inlets = [desk.inlet for desk in self.desks.values() if desk.inlet is not None]
            for desk in self.desks.values():
                desk.inlet = None
                desk.drop_all()
        for inlet in inlets:
            inlet.close()

    # --- the floor ----------------------------------------------------------------------------------------------

    def floor(self, topic: str) -> int:
        """Every position below is settled by the group. While this member is alone, and all that others may have been given is settled,
        what it knows itself is enough."""
        desk, place = self.desk(topic), self._places.of[topic]
        with self._guard.mutex:
            came, alone = place.came, place.alone
            # Who was found dead the broker may still hand entries to, until it misses it.
            trusts = alone and desk.followed == came and time.monotonic() - place.buried_at > _MISSED_S
            known = desk.last >= 0 and desk.unsure_upto < 0 and (self._exclusive or trusts)
            at_least = desk.floor() if known else 0
            # With nothing in hand the broker is asked what others have settled behind that.
            if known and desk.in_hand:
                return at_least
            asks = alone and desk.followed != came
        now = time.monotonic()
        if now < desk.ask_at:
            asks = False
        try:
            if asks:
                # Who else there was is gone: what it was given and did not settle comes again, some time.
                given = self._driver.delivered(topic, self._group)
                with self._guard.mutex:
                    desk.follow(came, given)
            if now >= desk.ask_at:
                desk.settled = self._driver.floor(topic, self._group)
                desk.ask_at, self._unanswered = now + _ASK_AGAIN_S, 0.0
        except NoAnswer as exc:
            # What was known is a floor still.
            self._bear(exc, desk, now)
        with self._guard.mutex:
            at = desk.settled
            desk.forget_below(at)
            if place.alone and desk.followed == came and at > desk.unsure_upto:
                desk.unsure_upto = -1
            stands = desk.floor_of(at, indexes_of(place.log.partial.get(topic, {}).get(at, ())))
            return min(stands, desk.floor()) if desk.in_hand else max(stands, at_least)

    def _bear(self, error: NoAnswer, desk: Desk, asked: float) -> None:
        """The broker does not tell how far the group is: it is asked again, less and less often, for as long as the user wants to wait."""
        now = time.monotonic()
        self._unanswered = self._unanswered or asked
        waited, deadline_s = now - self._unanswered, self._driver.deadline_s
        if deadline_s is not None and waited > deadline_s:
            raise error
        desk.ask_at = now + min(max(waited, _ASK_AGAIN_S), _ASK_LATER_S)
        if now - self._said > _SAY_EVERY_S and self._driver.trouble() is None:
            self._said = now
            _log.warning("group %r waits with its watermarks and ends until it is known how far it is: %s", self._group, error)

    def in_order(self, topic: str, position: int, before: int) -> bool:
        """See `Subscription.in_order`."""
        desk, place, at = self.desks.get(topic) or self.desk(topic), self._places.of[topic], position >> INDEX_BITS
        with self._guard.mutex:
            if desk.unsure_upto >= at:
                return False  # something is missing in the batch itself
            # Of the entry before, what did not come is done.
            follows = position == before + 1 or (position & INDEX_MASK == 0 and at == (before >> INDEX_BITS) + 1)
            if follows and before >= 0 and desk.unsure_upto < 0 and not desk.gone and desk.followed == place.came:
                return True
        return self.floor(topic) >= position


__all__ = ("Reception",)
