"""One member of a group on the log engine: claims, settles, waits, and notices when other members die."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from edgeserve.core.errors import ClosedError, ConfigurationError, DiskFull, GroupConflict, StoreDamagedWarning, StoreFull
from edgeserve.transport import log, records, settled
from edgeserve.transport.base import Delivery, Fence, Frame, GroupKind, Start, Subscription
from edgeserve.transport.engine import SEND_WINDOW, LogEngine, Window, append_fenced, deliveries, first_position
from edgeserve.transport.groups import Claim, GroupState, MemberRecord
from edgeserve.transport.kv import Txn

_log = logging.getLogger(__name__)
_LOOK_AROUND_S = 1.0
_CLAIM_BYTES = 8 << 20
_MOST_MAIL = 64


class LogSubscription(Subscription):
    """See `Subscription`."""

    def __init__(
        self,
        engine: LogEngine,
        topics: tuple[str, ...],
        group: str,
        kind: GroupKind,
        start: Start,
        ack_timeout_ms: int | None,
        signature: str,
        name: str,
    ) -> None:
        self._engine, self._topics, self._kind, self._name = engine, topics, kind, name
        self._turn = topics
        self._group = f"{group}/{name}" if kind is GroupKind.BROADCAST else group
        self._ack_timeout_ns = (ack_timeout_ms or 0) * 1_000_000
        self._cache = records.StateCache()
        self._scratch = bytearray()
        self._windows: dict[str, Window] = {}
        self._mail: dict[int, deque[log.Batch]] = {}
        self._numbers: dict[str, int] = {}
        # Topics whose state as it was last seen may not be what is stored.
        self._unsure = set(topics)
        self._paused: set[str] = set()
        self._ids_seen = dict.fromkeys(topics, settled.NOTHING)
        # While this member has the group to itself: below which position it has read; else -1. And the term that this is of.
        self._ahead = dict.fromkeys(topics, -1)
        self._term = dict.fromkeys(topics, -1)
        self._more = 0
        self._skipped = False
        self._woken = self._closed = False
        self._looked = time.monotonic()
        self._waker = engine.board.waker()
        self._states: dict[str, GroupState] = {}
        try:
            self._join(start, MemberRecord(self._waker.address, signature, time.time_ns()))
        except BaseException:
            self._waker.close()
            raise

    def _join(self, start: Start, record: MemberRecord) -> None:
        with self._engine.kv.write(self._forget) as txn:
            for topic in self._topics:
                head = records.make_head(txn, topic)
                if self._kind is GroupKind.BROADCAST:
                    self._engine.forget_dead_broadcasts(txn, topic, head)
                state = self._cache.find(txn, topic, self._group)
                if state is None:
                    state = GroupState(self._kind, first_position(txn, head, start))
                    head.groups.append(self._group)
                self._bury_the_dead(head, state, also=self._name)
                if self._name in state.members:
                    raise GroupConflict(f"group {self._group!r} has a live member {self._name!r} on {topic!r}: give this one another name")
                deadline_ns = record.joined_ns + self._ack_timeout_ns if self._ack_timeout_ns else 0
                state.join(self._name, record, self._kind, head.next, deadline_ns)
                head.listeners[record.address] = self._group
                self._numbers[topic] = head.number
                self._mail[head.number] = deque(maxlen=_MOST_MAIL)
                records.save_head(txn, topic, head)
                self._save(txn, topic, state)
        for state in self._states.values():
            self._notify_members(state)

    def _forget(self) -> None:
        """A transaction did not commit: its objects may have been changed, so they are not what is stored."""
        self._cache.forget()
        self._unsure.update(self._topics)

    def _save(self, txn: Txn, topic: str, state: GroupState) -> None:
        self._cache.save(txn, topic, self._group, state)
        self._states[topic] = state

    def _find(self, txn: Txn, topic: str) -> GroupState:
        state = self._cache.find(txn, topic, self._group)
        if state is None:
            raise ClosedError(f"group {self._group!r} of topic {topic!r} was deleted while it was in use")
        self._states[topic] = state
        return state

    def _bury_the_dead(self, head: records.Head, state: GroupState, also: str = "") -> bool:
        others = {name: m.address for name, m in state.members.items() if name != self._name or name == also}
        dead = {name: address for name, address in others.items() if not self._engine.board.alive(address)}
        for name, address in dead.items():
            state.leave(name, head.next, died=True)
            head.listeners.pop(address, None)
        return bool(dead)

    @property
    def active(self) -> bool:
        return self._kind is not GroupKind.FAILOVER or all(s.active == self._name for s in self._states.values())

    @property
    def alone(self) -> bool:
        for state in self._states.values():  # a generator costs more than this loop
            if len(state.members) > 1:
                return False
        return True

    def _check(self) -> None:
        self._engine.check()
        if self._closed:
            raise ClosedError(f"the subscription of group {self._group!r} is closed")

    def _check_topics(self, topics: Iterable[str]) -> None:
        for topic in topics:
            if topic not in self._ids_seen:
                raise ConfigurationError(f"this member of group {self._group!r} is not subscribed to topic {topic!r}")

    # --- receiving ----------------------------------------------------------------------------------------------

    def receive(self, max_messages: int, timeout_ms: float | None = None) -> list[Delivery]:
        if self._closed or not self._engine.usable:
            self._check()
        if max_messages < 1:
            raise ConfigurationError(f"receive() must ask for at least 1 message, not {max_messages!r}")
        self._more = max_messages
        deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        while True:
            if timeout_ms != 0:
                for packet in self._waker.drain():
                    self._collect(packet)
            if self._woken:
                self._woken = False
                return []
            now = time.monotonic()
            if now - self._looked >= _LOOK_AROUND_S:
                self._look_around()
            found: list[Delivery] = []
            for topic in self._turn:
                if topic not in self._paused and len(found) < max_messages:
                    found.extend(self._claim(topic, max_messages - len(found)))
            if len(self._turn) > 1:
                # Whoever was asked first is asked last the next time: a topic that is always full does not starve the others.
                self._turn = (*self._turn[1:], self._turn[0])
            if self._skipped and not found:
                self._skipped = False  # damage is no end: what comes after it may be there
                continue
            if found or (deadline is not None and now >= deadline):
                return found
            self._waker.wait(self._patience(now, deadline))
            if self._closed or not self._engine.usable:
                self._check()

    def _patience(self, now: float, deadline: float | None) -> float:
        seconds = _LOOK_AROUND_S if deadline is None else min(_LOOK_AROUND_S, deadline - now)
        due = [c for t, s in self._states.items() if t not in self._paused and (c := s.next_change_ns(self._name)) is not None]
        if due:
            seconds = min(seconds, (min(due) - time.time_ns()) / 1e9 + 0.0005)
        return max(seconds, 0.0)

    def _collect(self, packet: bytes) -> None:
        """Keeps the batch that came with a wake-up."""
        batch = log.unpacked(packet)
        if batch is None:
            self._unsure.update(self._topics)
        elif batch.topic_number in self._mail:
            self._mail[batch.topic_number].append(batch)

    def _from_mail(self, topic: str, most: int) -> list[Delivery]:
        """What the sole member can take without a look at the store: the batch that is next came with a wake-up. Whether it really was
        the sole member still, and these positions its own, is found out when it settles."""
        mail, state = self._mail[self._numbers[topic]], self._states[topic]
        if state.sole != self._name or state.term != self._term[topic] or state.waiting:
            return []
        lo = max(self._ahead[topic], state.cursor)
        while mail and mail[0].last < lo:
            mail.popleft()
        if not mail or mail[0].base != lo or mail[0].last >= min(lo + most, state.sole_hi):
            return []
        batch = mail.popleft()
        frames = batch.frames()
        if frames is None:
            return []
        self._ahead[topic] = batch.last + 1
        return deliveries(batch, frames, batch.base, batch.last + 1, 0, topic)

    def _claim(self, topic: str, most: int) -> list[Delivery]:
        if self._mail[self._numbers[topic]] and topic not in self._unsure and (found := self._from_mail(topic, most)):
            return found
        now_ns = time.time_ns()
        with self._engine.kv.read() as txn:
            head, state = records.find_head(txn, topic), self._find(txn, topic)
            if head is None:
                return []
            self._unsure.discard(topic)
            change = state.next_change_ns(self._name)
            overdue = change is not None and change <= now_ns
            ahead, lo = self._ahead[topic], -1
            if state.sole == self._name and state.term == self._term[topic]:
                lo = max(ahead, state.cursor)
                hi = min(head.next, lo + most)
                if lo >= hi and not overdue:
                    return []
                if overdue or hi > state.sole_hi:
                    lo = -1
                else:
                    batches, hi = self._read_ahead(txn, head, lo, hi)
            elif not (overdue or (ahead >= 0 and state.term != self._term[topic]) or state.available(self._name, head.next, now_ns)):
                return []
        if lo < 0:
            return self._claim_for_good(topic, most, now_ns)
        self._ahead[topic] = hi
        return self._decode(topic, [(Claim(lo, hi, self._name, 0, 0), batches)])

    def _read_ahead(self, txn: Txn, head: records.Head, lo: int, hi: int) -> tuple[list[log.Batch], int]:
        """The sole member reads on without a write: it claims when it settles."""
        batches = log.read(txn, head.number, lo, hi, _CLAIM_BYTES)
        return batches, min(hi, batches[-1].last + 1) if batches else hi

    def _claim_for_good(self, topic: str, most: int, now_ns: int) -> list[Delivery]:
        reads: list[tuple[Claim, list[log.Batch]]] = []
        with self._engine.kv.write(self._forget) as txn:
            head, state = records.make_head(txn, topic), self._find(txn, topic)
            unread = self._catch_up(topic, state, 0)
            state.expire(now_ns)
            timed = self._ack_timeout_ns and self._kind is GroupKind.SHARED and state.sole != self._name
            deadline_ns = now_ns + self._ack_timeout_ns if timed else 0
            budget = _CLAIM_BYTES
            for claim in state.claim(self._name, head.next, now_ns, most, deadline_ns):
                batches = log.read(txn, head.number, claim.lo, claim.hi, budget) if budget > 0 else []
                budget -= sum(len(b.raw) for b in batches)
                end = batches[-1].last + 1 if batches else claim.lo
                if end < claim.hi and (batches or budget <= 0):
                    state.unclaim(self._name, end, claim.hi)
                    claim.hi = end
                    budget = 0
                if claim.hi > claim.lo:
                    reads.append((claim, batches))
            state.claim_ahead(self._name, state.cursor, most)
            self._save(txn, topic, state)
        self._unsure.discard(topic)
        self._ahead[topic] = state.cursor if state.sole == self._name else -1
        self._term[topic] = state.term
        if unread:
            self._notify_members(state)
        return self._decode(topic, reads)

    def _catch_up(self, topic: str, state: GroupState, more: int) -> bool:
        """Writes down how far this member has read while it was alone; if it is no more, gives back the rest. Whether there was any."""
        ahead = self._ahead[topic]
        if ahead < 0:
            return False
        if state.term == self._term[topic]:
            state.claim_ahead(self._name, ahead, more)
            return False
        return state.give_back_unread(self._name, ahead)

    def _decode(self, topic: str, reads: Sequence[tuple[Claim, list[log.Batch]]]) -> list[Delivery]:
        found: list[Delivery] = []
        gone: list[int] = []
        for claim, batches in reads:
            count = len(found)
            for batch in batches:
                frames = batch.frames()
                if frames is not None:
                    found.extend(deliveries(batch, frames, claim.lo, claim.hi, claim.deliveries, topic))
            if len(found) - count < claim.hi - claim.lo:
                there = {d[1] for d in found[count:]}
                gone.extend(p for p in range(claim.lo, claim.hi) if p not in there)
        if gone:
            warnings.warn(
                f"skipped {len(gone)} messages of topic {topic!r} ({min(gone)} to {max(gone)}): damaged or missing at {self._engine.url}",
                StoreDamagedWarning,
                stacklevel=2,
            )
            self._skipped = True
            self.settle({topic: gone})
        return found

    def _look_around(self) -> None:
        """Looks once a second whether other members died or held messages too long."""
        self._looked = time.monotonic()
        for topic in self._topics:
            with self._engine.kv.read() as txn:
                state = self._find(txn, topic)
            others = [m.address for name, m in state.members.items() if name != self._name]
            if all(self._engine.board.alive(a) for a in others):
                continue
            with self._engine.kv.write(self._forget) as txn:
                head, state = records.make_head(txn, topic), self._find(txn, topic)
                self._bury_the_dead(head, state)
                records.save_head(txn, topic, head)
                self._save(txn, topic, state)
            self._notify_members(state)

    def _notify_members(self, state: GroupState) -> None:
        self._engine.notify([m.address for name, m in state.members.items() if name != self._name])

    def wake(self) -> None:
        self._woken = True
        self._engine.board.notify(self._waker.address)

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
        engine, first = self._engine, self._topics[0]
        if self._closed or not engine.usable:
            self._check()
        for topic in acks:
            if topic not in self._ids_seen:
                self._check_topics(acks)
        now_ns, wake = time.time_ns(), set[str]()
        published: list[tuple[str, records.Head, bytes, int]] = []
        with engine.kv.write(self._forget) as txn:
            # First what is done, so that in a full store its room is there for the results.
            works_off = seen_all = False
            for topic in self._topics:
                positions, own = acks.get(topic, ()), topic == first
                works_off = works_off or bool(positions)
                if positions or (own and (ids or attributes)):
                    seen_all |= self._settle_topic(txn, topic, positions, ids if own else (), attributes if own else None, wake)
            if fence is not None:
                wake.update(append_fenced(txn, fence, decisions, engine.limits, self._scratch, works_off=works_off).listeners)
            for topic, frames in outputs.items() if outputs else ():
                if frames:
                    head = log.append(txn, topic, frames, now_ns, engine.limits, self._scratch, works_off=works_off)
                    published.append((topic, head, log.packet(head, self._scratch), len(frames)))
        if seen_all:
            self._ids_seen[first] = settled.seen_all(self._states[first])
        for _, head, packet, _ in published:
            for address in head.listeners:
                engine.board.notify(address, packet)
        if wake:
            engine.notify(wake)
        for topic, head, _, count in published:
            window = self._windows.get(topic)
            if window is None:
                window = self._windows[topic] = Window(engine, topic, SEND_WINDOW)
            window.wait(head, count)

    def _settle_topic(
        self,
        txn: Txn,
        topic: str,
        positions: Sequence[int],
        ids: Sequence[bytes],
        attributes: Mapping[str, bytes] | None,
        wake: set[str],
    ) -> bool:
        """Adds to `wake` whom this concerns; returns whether this member had seen all ids before these."""
        state, ahead = self._cache.find(txn, topic, self._group) or self._find(txn, topic), self._ahead[topic]
        if ahead >= 0 and state.term == self._term[topic] and state.sole == self._name:
            state.settle_ahead(self._name, topic, ahead, self._more, positions)
        else:
            if self._catch_up(topic, state, self._more):
                wake.update(m.address for name, m in state.members.items() if name != self._name)
            state.settle(self._name, topic, positions)
        seen_all = False
        if ids:
            seen_all = self._ids_seen[topic] == settled.seen_all(state)
            settled.keep_ids(txn, self._numbers[topic], self._group, state, ids)
        if attributes:
            state.attributes.update(attributes)
            wake.update(m.address for name, m in state.members.items() if name != self._name)
        if state.blocked:
            wake.update(state.unblock(records.make_head(txn, topic).next))
        self._cache.save(txn, topic, self._group, state)
        self._states[topic] = state
        return seen_all

    def nack(self, topic: str, positions: Sequence[int], delay_ms: float = 0) -> None:
        self._check()
        self._check_topics((topic,))
        due_ns = time.time_ns() + int(delay_ms * 1e6) if delay_ms else 0
        with self._engine.kv.write(self._forget) as txn:
            state = self._find(txn, topic)
            self._catch_up(topic, state, self._more)
            state.nack(self._name, topic, positions, due_ns)
            self._save(txn, topic, state)
        self._notify_members(state)

    def flush(self) -> None:
        """Every settle is durable when it returns."""
        self._check()

    def settled_ids(self) -> list[bytes]:
        self._check()
        ids: list[bytes] = []
        with self._engine.kv.read() as txn:
            for topic in self._topics:
                state = self._find(txn, topic)
                if settled.seen_all(state) != self._ids_seen[topic]:
                    ids.extend(settled.read_ids(txn, self._numbers[topic], self._group, state, self._ids_seen[topic]))
                    self._ids_seen[topic] = settled.seen_all(state)
        return ids

    def attributes(self) -> dict[str, bytes]:
        self._check()
        with self._engine.kv.read() as txn:
            return dict(self._find(txn, self._topics[0]).attributes)

    def floor(self, topic: str) -> int:
        self._check()
        self._check_topics((topic,))
        with self._engine.kv.read() as txn:
            return self._find(txn, topic).floor()

    def pause(self, topic: str) -> None:
        self._check_topics((topic,))
        self._paused.add(topic)

    def resume(self, topic: str) -> None:
        self._check_topics((topic,))
        self._paused.discard(topic)

    def close(self) -> None:
        if self._closed or self._engine.pid != os.getpid():
            return
        self._closed = True
        try:
            for topic in self._topics:
                with self._engine.kv.write(self._forget) as txn:
                    rest = self._leave(txn, topic)
                if rest is not None:
                    self._notify_members(rest)
        except (StoreFull, DiskFull) as exc:
            # The others find the address dead, and take over as they would after a kill.
            _log.warning("group %r was left without a word: %s", self._group, exc)
        finally:
            for window in self._windows.values():
                window.close()
            self._waker.close()

    def _leave(self, txn: Txn, topic: str) -> GroupState | None:
        """Returns the group's state without this member, if there is a group without it."""
        head, state = records.make_head(txn, topic), self._cache.find(txn, topic, self._group)
        head.listeners.pop(self._waker.address, None)
        if state is not None:
            state.leave(self._name, head.next, died=False)
            if self._kind is GroupKind.BROADCAST:
                settled.forget_group(txn, topic, head, self._group)
            else:
                self._cache.save(txn, topic, self._group, state)
        records.save_head(txn, topic, head)
        return None if self._kind is GroupKind.BROADCAST else state


__all__ = ("LogSubscription",)
