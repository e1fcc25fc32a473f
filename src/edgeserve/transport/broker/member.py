"""One member of a group on a broker: receives entries and hands over messages, publishes results, settles."""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

from edgeserve.core.errors import ClosedError, EdgeServeError, Fenced, GroupBusy, SendError, TransportError
from edgeserve.transport.base import SEND_WINDOW, Apart, Buffer, ClaimLost, Delivery, Fence, Frame, GroupKind, Start, Subscription
from edgeserve.transport.broker.desk import Desk
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.broker.envelope import INDEX_BITS
from edgeserve.transport.broker.flow import Standing, Teller
from edgeserve.transport.broker.grouplog import DECIDED, Record
from edgeserve.transport.broker.guard import Guard
from edgeserve.transport.broker.lookout import Lookout
from edgeserve.transport.broker.membership import BEAT_S, this_process
from edgeserve.transport.broker.places import Places
from edgeserve.transport.broker.publisher import Appender, BrokerFence, frames_of
from edgeserve.transport.broker.reception import Reception
from edgeserve.transport.broker.settlements import Settlement, Settlements

_log = logging.getLogger("edgeserve")

_RETRY_S = 0.05
_CLOSE_S = 10.0
_LEADS = (GroupKind.FAILOVER,)
_ALONE = (GroupKind.FAILOVER, GroupKind.EXCLUSIVE)
_MANY = 1 << 40


class BrokerSubscription(Subscription):
    """See `Subscription`. `settle` hands over and returns; an error of it is raised by the next call."""

    def __init__(
        self,
        engine: BrokerEngine,
        topics: tuple[str, ...],
        group: str,
        kind: GroupKind,
        start: Start,
        ack_timeout_ms: int | None,
        signature: str,
        name: str,
        version: str,
        *,
        holds_senders: bool | None,
    ) -> None:
        self._engine, self._driver, self._kind, self._start = engine, engine.driver, kind, start
        self._may_lead = kind in _LEADS
        self._group = f"{group}/{name}" if kind is GroupKind.BROADCAST else group
        self._me = this_process(kind, signature, version)
        self._guard = Guard()
        self._appenders: dict[str, Appender] = {}
        self._error: Exception | None = None
        # Whether the owner was told what keeps it from going on.
        self._raised = False
        self._closed = self._ended = False
        self._retry_at = 0.0
        # The lead that the owner knows of (its epoch; 0: none), and whether it is to be told that one was lost.
        self._led, self._lapsed = 0, False
        self._returns: list[tuple[float, int, partial[None]]] = []
        self._trouble = engine.trouble
        # A join holds its inputs for as long as it must.
        ack_timeout_s = (ack_timeout_ms or 0) / 1000 if kind is GroupKind.SHARED else 0.0
        self._places = Places(self._driver, topics, self._group, name, self._guard, self._hear)
        self._settlements = Settlements(self._places, self._guard, self._check, self._tell, self._told_to_stop)
        # What tells the sources how far this member is, or how far the broker says that all are together.
        self._tellers: dict[str, Teller] = {}
        self._tells = self._may_lead if holds_senders is None else holds_senders
        self._floors: dict[str, int] = {}
        self._steps = dict.fromkeys(topics, 0)
        self._reception = Reception(
            *(engine, self._places, topics, self._group, start, self._guard, ack_timeout_s, self._check, self._fail, self._told_to_stop),
            exclusive=kind in _ALONE,
        )
        self._places.join(self._me, start if isinstance(start, int) else 0)
        self._keeper = threading.Thread(target=self._keep, name=f"edgeserve-member-{group}", daemon=True)
        self._lookout = Lookout(f"group {self._group!r}", self._places.bury_the_dead, self._shorten, fail=self._fail_unforeseen)
        try:
            if kind in _LEADS:
                self._places.lead(wait=True)
            self._led = self._lead()
            if self.active:
                self._attach_if_free()
        except BaseException:
            self._leave({})
            raise
        self._keeper.start()
        self._lookout.start()

    def _hear(self, topic: str, record: Record) -> None:
        self._reception.hear(topic, record)

    def _fail(self, error: Exception) -> None:
        with self._guard.mutex:
            self._error = self._error or error
            self._guard.changed.notify_all()

    def _told_to_stop(self) -> bool:
        return self.giving_up is not None and self.giving_up()

    def _fail_unforeseen(self, exc: Exception) -> None:
        error = TransportError(f"a member of group {self._group!r} cannot go on: {type(exc).__name__}: {exc}")
        error.__cause__ = exc
        self._fail(error)

    # --- what is known of the group -----------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return not self._may_lead or (self._led > 0 and self._led == self._lead())

    def _lead(self) -> int:
        """The epoch of the lead that this member has; 0: it has none."""
        return self._places.epoch if self._may_lead and self._places.leads else 0

    @property
    def alone(self) -> bool:
        for place in self._places.of.values():  # asked for every batch, and a generator costs more than this loop
            if not place.alone:
                return False
        return True

    @property
    def name(self) -> str:
        return self._places.first.name

    def members(self) -> list[str]:
        self._check()
        with self._guard.mutex:
            known = self._places.first.log.members
            return sorted(known, key=lambda name: known[name].joined_at)

    @property
    def knows_all_ids(self) -> bool:
        for place in self._places.of.values():
            if place.log.ids:
                return False
        return True

    def in_order(self, topic: str, position: int, before: int) -> bool:
        return self._reception.in_order(topic, position, before)

    def settled_ids(self) -> list[bytes]:
        self._check()
        with self._guard.mutex:
            return self._places.take_ids()

    def attributes(self) -> dict[str, bytes]:
        self._check()
        with self._guard.mutex:
            return self._places.first.log.shared()

    def newest_decision(self, topic: str) -> Buffer | None:
        self._check()
        with self._guard.mutex:
            raw = self._places.first.log.attributes.get(DECIDED + topic)
        if raw is None:
            return None
        at = int.from_bytes(raw, "big")
        for entry in self._driver.scan(topic, at):
            frames = frames_of(entry)[1] if entry.at == at else []
            return frames[-1] if frames else b""
        return b""  # there was one, and it cannot be read

    def floor(self, topic: str) -> int:
        """While this member is alone, and all that others may have been given is settled, what it knows itself is enough."""
        self._check()
        return self._reception.floor(topic)

    def _check(self) -> None:
        engine = self._engine
        if engine.closed or engine.pid != os.getpid():
            engine.check()
        if self._closed:
            raise ClosedError(f"the subscription of group {self._group!r} is closed")
        for place in self._places.of.values():
            if place.error is not None or (place.tail is not None and place.tail.error is not None):
                self._raised = True
                place.check()
        error = self._error or self._settlements.error
        if error is not None:
            self._raised = True
            raise error if isinstance(error, EdgeServeError) else SendError(str(error)) from error

    # --- receiving ----------------------------------------------------------------------------------------------

    def receive(self, max_messages: int, timeout_ms: float | None = None) -> list[Delivery]:
        if self._lapsed:
            self._lapsed = False
            raise Fenced(f"the lead of group {self._group!r} was another member's for a while: what this one held is decided by that one")
        return self._reception.receive(max_messages, timeout_ms)

    def wake(self) -> None:
        if not self._engine.foreign:
            self._reception.wake()

    def pause(self, topic: str) -> None:
        self._reception.pause(topic)

    def resume(self, topic: str) -> None:
        self._reception.resume(topic)

    # --- settling -----------------------------------------------------------------------------------------------

    def settle(
        self,
        acks: Mapping[str, Sequence[int]],
        outputs: Mapping[str, Sequence[Frame]] | None = None,
        *,
        ids: Sequence[bytes] = (),
        decisions: Sequence[Frame] = (),
        fence: Fence | None = None,
        attributes: Mapping[str, bytes] | None = None,
    ) -> None:
        self._check()
        with self._guard.mutex:
            claims = self._claims(acks)
            if self._settlements.full:
                self._settlements.wait_for_room()
                claims = self._claims(acks)
            # Before the decision is appended: should the lead pass in between, the settlement must not count under the new one.
            epoch = self._lead_epoch() if self._may_lead else 0
            job = Settlement(ids, dict(attributes or {}), epoch)
            if self._tellers:
                for topic, positions in acks.items():
                    self._steps[topic] += len(positions)
            if fence is None:
                self._settlements.put(job, claims)
        if fence is not None:
            assert isinstance(fence, BrokerFence)
            fence.stopping = self._told_to_stop
            at = fence.append_at(decisions)
            if decisions:
                job.attributes[DECIDED + fence.topic] = at.to_bytes(8, "big")
            with self._guard.mutex:
                self._settlements.put(job, self._claims(acks))
        now_ns = time.time_ns()
        failed: Exception | None = SendError(f"a settlement of group {self._group!r} was interrupted before its results were handed over")
        try:
            for topic, frames in (outputs or {}).items():
                if frames:
                    self._publish(job, topic, frames, now_ns)
            failed = None
        except Exception as exc:
            failed = exc
            raise
        finally:
            # Without all of its results it must never count as done.
            self._settlements.sent(job, failed)

    def _claims(self, acks: Mapping[str, Sequence[int]]) -> list[tuple[Desk, Sequence[int]]]:
        """What is to be settled, if all of it is in this member's hands."""
        found = []  # a comprehension is a call more
        for topic, positions in acks.items():
            found.append((self._claimed(topic, positions), positions))
        return found

    def _lead_epoch(self) -> int:
        if not self.active:
            raise Fenced(f"another member of group {self._group!r} has the lead: what this one held is that one's")
        return self._places.epoch

    def _claimed(self, topic: str, positions: Sequence[int]) -> Desk:
        desk = self._reception.desks.get(topic) or self._reception.desk(topic)
        if positions and self._may_lead and not self.active:
            raise ClaimLost(topic, positions)
        desk.check(positions)
        return desk

    def _publish(self, job: Settlement, topic: str, frames: Sequence[Frame], now_ns: int) -> None:
        appender = self._appenders.get(topic)
        if appender is None:
            appender = self._appenders[topic] = Appender(self._driver, self._trouble, topic, 4 * SEND_WINDOW)
            appender.stopping = self._told_to_stop
        for batch in [[frame] for frame in frames] if isinstance(frames, Apart) else [frames]:
            # Some may be confirmed before all are handed over, and before it is known how many there are.
            with self._guard.mutex:
                job.outputs += _MANY
            entries = appender.append(batch, now_ns, partial(self._settlements.sent, job), self.stored)
            with self._guard.mutex:
                job.outputs += entries - _MANY

    def nack(self, topic: str, positions: Sequence[int], delay_ms: float = 0) -> None:
        self._check()
        due = time.monotonic() + delay_ms / 1000
        with self._guard.mutex:
            desk = self._claimed(topic, positions)
            gone = desk.give_back(positions, due)
            inlet = desk.inlet
            self._guard.changed.notify_all()
        if inlet is None:
            return
        if any(opened.done for opened in gone):
            self._settlements.drain(None)  # whoever gets such an entry must find written down what of it is settled
        for opened in gone:
            if delay_ms <= 0:
                inlet.give_back(opened.entry)
                continue
            with self._guard.mutex:
                heapq.heappush(self._returns, (due, opened.entry.at, partial(inlet.give_back, opened.entry)))
                self._guard.changed.notify_all()

    def flush(self) -> None:
        """Every settle is durable when it returns, and what others have settled before is known."""
        self._check()
        self._settlements.drain(None)
        self._places.barrier(self._told_to_stop)

    # --- the keeper ---------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """The member's thread."""
        try:
            self._keep_going()
        except Exception as exc:
            self._fail_unforeseen(exc)

    def _keep_going(self) -> None:
        """Records and acknowledges settlements, shows that the member lives, takes the lead when it has to."""
        looked = 0.0
        while True:
            with self._guard.mutex:
                while not self._ended:
                    now = time.monotonic()
                    due = looked + BEAT_S
                    if (recording := self._settlements.due()) is not None:
                        due = min(due, recording)
                    if self._returns:
                        due = min(due, self._returns[0][0])
                    if self._may_lead and self._restless():
                        due = min(due, self._retry_at)
                    if now >= due:
                        break
                    self._guard.changed.wait(due - now)
                if self._ended:
                    return
                returned = list[partial[None]]()
                while self._returns and self._returns[0][0] <= now:
                    returned.append(heapq.heappop(self._returns)[2])
            for give_back in returned:
                give_back()
            try:
                self._settlements.record()
            except EdgeServeError as exc:
                self._fail(exc)
            try:
                if self._places.wants_snapshot:
                    self._lookout.wake()
                if now - looked >= BEAT_S:
                    looked = now
                    self._trouble.say(now)
                    if not self._may_lead:
                        for topic in self._tellers:
                            self._floors[topic] = self._reception.floor(topic) >> INDEX_BITS
                    self._tell({})
                    self._places.show_life(self._me)
                    self._lookout.wake()
                    self._reception.take_back(now)
                if self._may_lead and now >= self._retry_at:
                    self._retry_at = now + _RETRY_S
                    self._follow_the_lead()
            except EdgeServeError as exc:
                # Whatever was asked of the broker is asked again; what must not fail says so where it was handed over.
                if self._closed:
                    continue
                _log.warning("group %r: %s", self._group, exc)

    def _attach(self) -> None:
        self._reception.attach()
        if self._tells and not self._tellers:
            for topic in self._places.of:
                steps = None if self._may_lead else partial(self._take_steps, topic)
                self._tellers[topic] = Teller(self._driver, topic, self._group, partial(self._standing, topic), steps)

    def _attach_if_free(self) -> None:
        try:
            self._attach()
        except GroupBusy:
            if not self._may_lead:
                raise
            # The broker has not noticed yet that the one before is gone; the keeper tries again.

    def _take_steps(self, topic: str) -> int:
        with self._guard.mutex:
            steps, self._steps[topic] = self._steps[topic], 0
            return steps

    def _standing(self, topic: str) -> Standing:
        if not self._may_lead:
            return Standing(self._floors.get(topic, -1))
        with self._guard.mutex:
            return self._reception.desk(topic).standing()

    def _tell(self, done: Mapping[str, list[int]]) -> None:
        """Tells the sources which entries are done with; without any, which are not."""
        for topic, teller in list(self._tellers.items()):
            if self._reception.attached and not self._closed and (topic in done or not done):
                teller.tell(done.get(topic, []))

    def _shorten(self) -> None:
        self._places.keep_short(lambda topic: self._reception.floor(topic) >> INDEX_BITS)

    def _restless(self) -> bool:
        return self._places.nobody_leads or self._led != self._lead() or self._reception.attached != self.active or self._reception.lost

    def _follow_the_lead(self) -> None:
        if self._closed:
            return
        self._places.lead()
        lead = self._lead()
        if self._led not in (0, lead) or (lead and self._reception.lost):
            # Also when it has come back meanwhile: others have decided.
            self._lapsed = True
            self._reception.detach()
        self._led = lead
        if lead and not self._reception.attached:
            self._attach_if_free()
        with self._guard.mutex:
            self._guard.changed.notify_all()

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self, *, worked_on: bool = False) -> None:
        if self._closed or self._engine.foreign:
            return
        stored = self._settlements.drain(_CLOSE_S)
        self._leave(self._reception.begun() if worked_on else {})
        if not stored:
            self._tell_what_is_not_stored()

    def _tell_what_is_not_stored(self) -> None:
        error = self._settlements.error
        if self._raised or isinstance(error, (Fenced, ClaimLost)):
            return  # it was said, or another member does it
        why = error or self._driver.trouble() or f"no answer for {_CLOSE_S:g} s"
        raise SendError(
            f"group {self._group!r} was left before all of its last results were stored ({why}): what they are of comes again to its "
            "other members, or when it is started again"
        ) from error

    def _leave(self, worked: dict[str, list[int]]) -> None:
        with self._guard.mutex:
            self._closed = True
            self._guard.changed.notify_all()
        try:
            if not any(worked.values()):
                self._reception.close()
            # What was begun is written down before others can have it; otherwise they get it first and need not wait for it.
            self._places.leave(worked)
        except TransportError as exc:
            # The others find out by its silence.
            _log.warning("group %r was left without a word: %s", self._group, exc)
        finally:
            self._reception.close()
            for appender in self._appenders.values():
                appender.close()
            with self._guard.mutex:
                self._ended = True
                self._guard.changed.notify_all()
            self._lookout.close()
            if self._keeper.is_alive() and threading.current_thread() is not self._keeper:
                self._keeper.join()
            for teller in self._tellers.values():
                teller.close()
            self._places.close()
        if self._kind is GroupKind.BROADCAST:
            self._forget()

    def _forget(self) -> None:
        """Nobody comes back to a group that was this member's alone."""
        try:
            for topic, place in self._places.of.items():
                self._driver.delete_group(topic, self._group)
                self._driver.delete_topic(place.topic)
        except TransportError as exc:
            _log.warning("group %r was left as it is: %s", self._group, exc)


__all__ = ("BrokerSubscription",)
