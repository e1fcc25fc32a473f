"""One member of a group on a broker: receives entries and hands over messages, publishes results, settles."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

from edgeserve.core.errors import ClosedError, ConfigurationError, EdgeServeError, GroupBusy, SendError, TransportError
from edgeserve.transport.base import SEND_WINDOW, Buffer, ClaimLost, Delivery, Fence, Frame, GroupKind, Start, Subscription
from edgeserve.transport.broker.desk import Desk, Open
from edgeserve.transport.broker.driver import Entry, Inlet
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.broker.envelope import INDEX_BITS
from edgeserve.transport.broker.grouplog import Settled
from edgeserve.transport.broker.membership import BEAT_S, Membership
from edgeserve.transport.broker.publisher import Appender, BrokerFence, frames_of

_log = logging.getLogger("edgeserve")

_READY_ENTRIES = 16
_SLICE_S = 0.2
_BUSY_S = 0.0002
_ASK_AGAIN_S = 0.1
_NONE = -2
_MOST_JOBS = 64
_LINGER_S = 0.05
_RETRY_S = 0.2
_SAY_EVERY_S = 5.0
_CLOSE_S = 10.0
_DECIDED = "\0decided:"
_LEADS = (GroupKind.FAILOVER,)
_ALONE = (GroupKind.FAILOVER, GroupKind.EXCLUSIVE)


class _Job:
    """A settlement on its way: its outputs, then its record in the group's log, then its acknowledgements."""

    __slots__ = ("attributes", "closed", "complete", "ids", "outputs", "partial")

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self.ids: Sequence[bytes] = ()
        self.attributes: dict[str, bytes] = {}
        self.complete: list[tuple[Inlet, Entry]] = []
        self.partial: dict[str, dict[int, list[int]]] = {}
        self.closed: dict[str, list[int]] = {}


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
    ) -> None:
        self._engine, self._driver, self._kind, self._start = engine, engine.driver, kind, start
        self._group = f"{group}/{name}" if kind is GroupKind.BROADCAST else group
        self._signature = signature
        # A join holds its inputs for as long as it must.
        self._ack_timeout_s = (ack_timeout_ms or 0) / 1000 if kind is GroupKind.SHARED else 0.0
        self._lock = threading.Condition(threading.RLock())
        self._desks = {topic: Desk(topic) for topic in topics}
        self._turn = list(self._desks.values())
        self._paused: set[str] = set()
        # By topic: the newest entry that others may have in hand, None while there are others; and what the broker said last.
        self._others: dict[str, int | None] = {}
        self._floors: dict[str, tuple[int, float]] = {}
        self._inlets: dict[str, Inlet] = {}
        # Of one topic the caller of `receive` fetches itself: to be woken by another thread would cost it more than all the rest.
        self._only = topics[0] if len(topics) == 1 else None
        self._appenders: dict[str, Appender] = {}
        self._jobs: deque[_Job] = deque()
        self._recorded: deque[_Job] = deque()
        self._flushing = 0
        self._error: Exception | None = None
        self._woken = self._closed = self._ended = False
        self._retry_at = 0.0
        self._away_since = self._said_away = 0.0
        start_ns = start if isinstance(start, int) else 0
        self._membership = Membership(self._driver, topics[0], self._group, name, self._lock)
        self._membership.join(kind, signature, start_ns)
        self._keeper = threading.Thread(target=self._keep, name=f"edgeserve-member-{group}", daemon=True)
        try:
            if kind in _LEADS:
                self._membership.lead(wait=True)
            if self.active:
                self._attach()
        except BaseException:
            self._leave({})
            raise
        self._keeper.start()

    # --- what is known of the group -----------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self._kind not in _LEADS or self._membership.leads

    @property
    def alone(self) -> bool:
        return self._membership.alone

    @property
    def knows_all_ids(self) -> bool:
        return not self._membership.log.ids

    def settled_ids(self) -> list[bytes]:
        self._check()
        with self._lock:
            return self._membership.log.take_ids()

    def attributes(self) -> dict[str, bytes]:
        self._check()
        with self._lock:
            return {k: v for k, v in self._membership.log.attributes.items() if not k.startswith(_DECIDED)}

    def newest_decision(self, topic: str) -> Buffer | None:
        self._check()
        with self._lock:
            raw = self._membership.log.attributes.get(_DECIDED + topic)
        if raw is None:
            return None
        at = int.from_bytes(raw, "big")
        for entry in self._driver.scan(topic, at):
            frames = frames_of(entry)[1] if entry.at == at else []
            return frames[-1] if frames else None
        return None

    def floor(self, topic: str) -> int:
        """While this member is alone, and all that others may have been given is settled, what it knows itself is enough."""
        self._check()
        desk = self._desk(topic)
        if self._kind in _ALONE and desk.last >= 0:
            with self._lock:
                return desk.floor()
        if not self.alone:
            self._others[topic] = None
        elif self._others.get(topic) == _NONE:
            with self._lock:
                return desk.floor()
        elif self._others.get(topic) is None:
            # Who else there was is gone: what it was given and did not settle comes again, some time.
            self._others[topic] = self._driver.delivered(topic, self._group)
        now = time.monotonic()
        at, asked = self._floors.get(topic, (0, 0.0))
        if now - asked > _ASK_AGAIN_S:
            at = self._driver.floor(topic, self._group)
            self._floors[topic] = at, now
        others = self._others[topic]
        if others is not None and at > others:
            self._others[topic] = _NONE
            with self._lock:
                return desk.floor()
        with self._lock:
            return min(desk.floor_of(at), desk.floor()) if desk.last >= 0 else desk.floor_of(at)

    def _check(self) -> None:
        self._engine.check()
        if self._closed:
            raise ClosedError(f"the subscription of group {self._group!r} is closed")
        self._membership.check()
        if self._error is not None:
            raise self._error if isinstance(self._error, EdgeServeError) else SendError(str(self._error)) from self._error

    def _desk(self, topic: str) -> Desk:
        desk = self._desks.get(topic)
        if desk is None:
            raise ConfigurationError(f"this member of group {self._group!r} is not subscribed to topic {topic!r}")
        return desk

    # --- receiving ----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Begins to receive."""
        start = self._start
        for topic in self._desks:
            if topic not in self._inlets:
                inlet = self._driver.inlet(topic, self._group, start, exclusive=self._kind in _ALONE)
                with self._lock:
                    self._inlets[topic] = inlet
                    self._lock.notify_all()
                if self._only is None:
                    threading.Thread(target=self._pump, args=(topic, inlet), name=f"edgeserve-pump-{topic[:40]}", daemon=True).start()

    def _detach(self) -> None:
        """Another member leads: what is in hand is that one's."""
        with self._lock:
            inlets, self._inlets = self._inlets, {}
            self._desks = {topic: Desk(topic) for topic in self._desks}
            self._turn = list(self._desks.values())
            self._lock.notify_all()
        for inlet in inlets.values():
            inlet.close()

    def _pump(self, topic: str, inlet: Inlet) -> None:
        """A thread for each of several topics: what comes from one must not wait for another."""
        try:
            while self._inlets.get(topic) is inlet and not self._closed:
                with self._lock:
                    while not self._closed and self._desks[topic].ready >= _READY_ENTRIES:
                        self._lock.wait(1.0)
                entry = inlet.poll(1.0)
                if entry is not None:
                    self._take_in(topic, inlet, entry)
        except Exception as exc:
            with self._lock:
                self._error = self._error or exc
                self._lock.notify_all()

    def _fetch(self, most: int, seconds: float) -> None:
        """Fetches from the only topic: waits for the first entry, takes what else is there at once."""
        topic = self._only
        inlet = self._inlets.get(topic) if topic is not None else None
        if topic is None or inlet is None or topic in self._paused:
            with self._lock:
                if not self._woken:
                    self._lock.wait(seconds)
            return
        began, count = time.monotonic(), 0
        entry = inlet.poll(seconds)
        # To find out that there is no more costs a client as much as all else: only where the first had been waiting it is asked.
        busy = time.monotonic() - began < _BUSY_S
        while entry is not None:
            count += self._take_in(topic, inlet, entry)
            entry = inlet.poll(0) if busy and count < most else None

    def _take_in(self, topic: str, inlet: Inlet, entry: Entry) -> int:
        """Puts an entry on the desk; returns how many messages it has."""
        engine, log = self._engine, self._membership.log
        publish_ns, items = engine.unwrap(topic, entry)
        frames = [item if isinstance(item, bytes) else engine.fetch(topic, item) for item in items]
        with self._lock:
            if self._closed or self._inlets.get(topic) is not inlet:
                return 0
            desk = self._desks[topic]
            again = max(entry.deliveries, entry.at in log.worked.get(topic, ()), entry.at <= log.doubt.get(topic, -1))
            done = log.partial.get(topic, {}).get(entry.at, ()) if publish_ns >= log.start_ns else range(len(frames))
            opened = Open(entry, publish_ns, frames, again, done, 0.0)
            opened.named = opened.named or entry.at in log.worked.get(topic, ())
            kept = desk.add(opened)
            if self._only is None:
                self._lock.notify_all()
        if not kept:
            inlet.acknowledge(entry)
        return len(frames)

    def receive(self, max_messages: int, timeout_ms: float | None = None) -> list[Delivery]:
        if max_messages < 1:
            raise ConfigurationError(f"receive() must ask for at least 1 message, not {max_messages!r}")
        deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        polled = False
        while True:
            with self._lock:
                self._check()
                if self._woken:
                    self._woken = False
                    return []
                now = time.monotonic()
                found = self._take(max_messages, now)
                if found:
                    if self._only is None:
                        self._lock.notify_all()
                    return found
                if deadline is not None and now >= deadline and (polled or self._only is None):
                    return []
                wait = _SLICE_S if deadline is None else min(_SLICE_S, deadline - now)
                due = min((d for d in (desk.next_due() for desk in self._turn) if d is not None), default=None)
            self._fetch(max_messages, max(0.0, wait if due is None else min(wait, due - now)))
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
                if some and self._ack_timeout_s:
                    desk.stamp(some, now + self._ack_timeout_s)
                found += some
        return found

    def wake(self) -> None:
        with self._lock:
            self._woken = True
            self._lock.notify_all()

    def pause(self, topic: str) -> None:
        self._desk(topic)
        self._paused.add(topic)

    def resume(self, topic: str) -> None:
        self._desk(topic)
        with self._lock:
            self._paused.discard(topic)
            self._lock.notify_all()

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
        with self._lock:
            self._check()
            for topic, positions in acks.items():
                self._claimed(topic, positions)
            while len(self._jobs) >= _MOST_JOBS:
                self._lock.wait(1.0)
                self._check()
        decided = {}
        if fence is not None:
            assert isinstance(fence, BrokerFence)
            at = fence.append_at(decisions)
            if decisions:
                decided = {_DECIDED + fence.topic: at.to_bytes(8, "big")}
        job = _Job(1)
        job.ids, job.attributes = ids, {**(attributes or {}), **decided}
        with self._lock:
            for topic, positions in acks.items():
                self._claimed(topic, positions)
            for topic, positions in acks.items():
                self._take_out(job, topic, positions)
            self._jobs.append(job)
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
            self._sent(job, failed)

    def _claimed(self, topic: str, positions: Sequence[int]) -> None:
        if positions and not self.active:
            raise ClaimLost(topic, positions)
        self._desk(topic).check(positions)

    def _take_out(self, job: _Job, topic: str, positions: Sequence[int]) -> None:
        desk, inlet = self._desks[topic], self._inlets.get(topic)
        complete, some = desk.settle(positions)
        if inlet is not None:
            job.complete += [(inlet, opened.entry) for opened in complete]
        closed = [opened.entry.at for opened in complete if opened.named]
        if closed:
            job.closed[topic] = closed
        for opened in some:
            opened.named = True
            job.partial.setdefault(topic, {})[opened.entry.at] = sorted(opened.done)

    def _publish(self, job: _Job, topic: str, frames: Sequence[Frame], now_ns: int) -> None:
        appender = self._appenders.get(topic)
        if appender is None:
            appender = self._appenders[topic] = Appender(self._driver, topic, 4 * SEND_WINDOW)
        # Some may be confirmed before it is known how many there are: the count is below zero for that long.
        entries = appender.append(frames, now_ns, partial(self._sent, job))
        with self._lock:
            job.outputs += entries

    def _sent(self, job: _Job, error: Exception | None) -> None:
        """An entry of a settlement's outputs is durable, or will never be."""
        with self._lock:
            job.outputs -= 1
            if error is not None and self._error is None:
                self._error = error
            if job.outputs == 0 or error is not None:
                self._lock.notify_all()

    def nack(self, topic: str, positions: Sequence[int], delay_ms: float = 0) -> None:
        self._check()
        with self._lock:
            self._claimed(topic, positions)
            gone = self._desk(topic).give_back(positions, time.monotonic() + delay_ms / 1000)
            inlet = self._inlets.get(topic)
            self._lock.notify_all()
        for opened in gone:
            if inlet is not None:
                self._later(delay_ms / 1000, partial(inlet.give_back, opened.entry))

    def _later(self, seconds: float, do: partial[None]) -> None:
        if seconds <= 0:
            do()
            return
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        timer.start()

    def flush(self) -> None:
        """Every settle is durable when it returns, and what others have settled before is known."""
        self._drain_jobs(None)
        self._membership.barrier()

    def _drain_jobs(self, seconds: float | None) -> bool:
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._lock:
            self._flushing += 1
            self._lock.notify_all()
            try:
                while self._jobs or self._recorded:
                    if seconds is None:
                        self._check()
                    elif self._error is not None or (deadline is not None and time.monotonic() > deadline):
                        return False
                    self._lock.wait(0.5)
            finally:
                self._flushing -= 1
        return True

    # --- the keeper ---------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """The member's thread: records and acknowledges settlements, shows that the member lives, takes the lead when it has to."""
        looked = recorded = 0.0
        while True:
            with self._lock:
                while not self._ended:
                    now = time.monotonic()
                    due = looked + BEAT_S
                    if self._jobs and not self._jobs[0].outputs:
                        hurry = self._flushing or len(self._jobs) > _MOST_JOBS // 4
                        due = min(due, recorded + (0.0 if hurry else _LINGER_S))
                    if self._kind in _LEADS and self._restless():
                        due = min(due, self._retry_at)
                    if now >= due:
                        break
                    self._lock.wait(due - now)
                if self._ended:
                    return
                jobs = self._finished_jobs()
            now = time.monotonic()
            if jobs:
                recorded = now
                self._record(jobs)
            try:
                if now - looked >= BEAT_S:
                    looked = now
                    self._look_around(now)
                if self._kind in _LEADS and now >= self._retry_at:
                    self._retry_at = now + _RETRY_S
                    self._follow_the_lead()
            except EdgeServeError as exc:
                # Whatever was asked of the broker is asked again; what must not fail says so where it was handed over.
                if self._closed:
                    return
                _log.warning("group %r: %s", self._group, exc)

    def _restless(self) -> bool:
        return not self._membership.log.leader or (self._membership.leads != bool(self._inlets))

    def _finished_jobs(self) -> list[_Job]:
        jobs = []
        while self._jobs and not self._jobs[0].outputs and self._error is None:
            jobs.append(self._jobs.popleft())
        self._recorded.extend(jobs)
        return jobs

    def _record(self, jobs: list[_Job]) -> None:
        """Writes the settlements down, then acknowledges."""
        record = Settled(self._membership.name, b"".join([i for job in jobs for i in job.ids]))
        for job in jobs:
            record.attributes.update(job.attributes)
            for topic, entries in job.partial.items():
                record.partial.setdefault(topic, {}).update(entries)
            for topic, closed in job.closed.items():
                record.closed.setdefault(topic, []).extend(closed)
        for topic, closed in record.closed.items():
            for at in closed:
                record.partial.get(topic, {}).pop(at, None)
        done = partial(self._acknowledge, jobs)
        try:
            if record.ids or record.attributes or any(record.partial.values()) or record.closed:
                self._membership.write([record], done)
            else:
                done(None)
            self._snapshot()
        except EdgeServeError as exc:
            with self._lock:
                self._error = self._error or exc
                self._lock.notify_all()

    def _snapshot(self) -> None:
        log = self._membership.log
        with self._lock:
            if not log.wants_snapshot or log.first_of(log.members) != self._membership.name:
                return
            desk = self._turn[0]
            snapshot = log.snapshot(desk.last, desk.floor() >> INDEX_BITS)
        self._membership.write([snapshot])
        if snapshot.ids_after > 0:
            self._driver.discard(self._membership.topic, snapshot.ids_after)

    def _acknowledge(self, jobs: list[_Job], error: Exception | None) -> None:
        if error is None:
            for job in jobs:
                for inlet, entry in job.complete:
                    inlet.acknowledge(entry)
        with self._lock:
            for _ in jobs:
                self._recorded.popleft()
            self._lock.notify_all()

    def _look_around(self, now: float) -> None:
        self._say_trouble(now)
        member = self._membership
        if member.name not in member.log.members and not self._closed:
            # Taken for dead while it was held up.
            _log.warning("a member of group %r was silent for too long and joins again", self._group)
            member.come_back(self._kind, self._signature)
        member.beat()
        member.bury_the_dead()
        if self._ack_timeout_s and not self.alone:
            self._take_back(now)

    def _say_trouble(self, now: float) -> None:
        trouble = self._driver.trouble()
        if trouble is None:
            if self._away_since:
                _log.warning("%s is back after %.0f s", self._driver.what, now - self._away_since)
            self._away_since = self._said_away = 0.0
            return
        self._away_since = self._away_since or now
        if now - self._said_away >= _SAY_EVERY_S:
            self._said_away = now
            _log.warning("%s has been away for %.0f s, waiting: %s", self._driver.what, now - self._away_since, trouble)

    def _take_back(self, now: float) -> None:
        """Gives back what was not settled in time."""
        gone: list[tuple[Inlet, Open]] = []
        with self._lock:
            for topic, desk in self._desks.items():
                inlet = self._inlets.get(topic)
                late = [desk.drop(at) for at in desk.overdue(now)]
                if inlet is not None:
                    gone += [(inlet, opened) for opened in late]
        for inlet, opened in gone:
            inlet.give_back(opened.entry)

    def _follow_the_lead(self) -> None:
        member = self._membership
        member.lead()
        if member.leads and not self._inlets:
            try:
                self._attach()
            except GroupBusy:
                pass  # the broker has not noticed yet that the one before is gone
        elif not member.leads and self._inlets:
            self._detach()
        with self._lock:
            self._lock.notify_all()

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self, *, worked_on: bool = False) -> None:
        if self._closed or self._engine.foreign:
            return
        self._drain_jobs(_CLOSE_S)
        worked: dict[str, list[int]] = {}
        if worked_on:
            for topic, desk in self._desks.items():
                worked[topic] = [at for at, opened in desk.open.items() if opened.next]
        self._leave(worked)

    def _leave(self, worked: dict[str, list[int]]) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        try:
            for inlet in self._inlets.values():
                inlet.close()
            for appender in self._appenders.values():
                appender.close()
            self._membership.leave(worked)
            if self._kind is GroupKind.BROADCAST:
                for topic in self._desks:
                    self._driver.delete_group(topic, self._group)
                self._driver.delete_topic(self._membership.topic)
        except TransportError as exc:
            # The others find out by its silence.
            _log.warning("group %r was left without a word: %s", self._group, exc)
        finally:
            with self._lock:
                self._ended = True
                self._lock.notify_all()
            if self._keeper.is_alive() and threading.current_thread() is not self._keeper:
                self._keeper.join()
            self._membership.close()


__all__ = ("BrokerSubscription",)
