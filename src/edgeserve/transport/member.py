"""One member of a group on the log engine: receives, settles and waits, on one or several topics."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence

from edgeserve.core.errors import ClosedError, ConfigurationError, DiskFull, Fenced, StoreDamaged, StoreFull, TransportError
from edgeserve.transport import log, records
from edgeserve.transport.base import SEND_WINDOW, Buffer, Delivery, Fence, Frame, GroupKind, Start, Subscription
from edgeserve.transport.engine import LogEngine, append_fenced
from edgeserve.transport.groups import MemberRecord
from edgeserve.transport.place import Place
from edgeserve.transport.window import Window

_log = logging.getLogger(__name__)
_LOOK_AROUND_S = 1.0


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
        version: str,
        *,
        holds_senders: bool | None,
    ) -> None:
        self._engine, self._kind = engine, kind
        self._group = f"{group}/{name}" if kind is GroupKind.BROADCAST else group
        self._name = name
        ack_timeout_ns = (ack_timeout_ms or 0) * 1_000_000
        self._places = {topic: Place(engine, topic, self._group, name, ack_timeout_ns) for topic in topics}
        self._first = self._places[topics[0]]
        self._turn = list(self._places.values())
        self._scratch = bytearray()
        self._windows: dict[str, Window] = {}
        # Of the places: one thread may receive while another one settles.
        self._lock = threading.RLock()
        self._more = 0
        self._woken = self._closed = self._deposed = False
        self._looked = time.monotonic()
        self._waker = engine.board.waker()
        try:
            self._record = MemberRecord(self._waker.address, signature, time.time_ns(), version, holds_senders is not False)
            with engine.kv.write(self._forget) as txn:
                for place in self._turn:
                    place.join(txn, kind, start, self._record)
            for place in self._turn:
                engine.notify(place.others())
        except BaseException:
            self._waker.close()
            raise

    def _forget(self) -> None:
        for place in self._turn:
            place.forget()

    @property
    def active(self) -> bool:
        return self._kind is not GroupKind.FAILOVER or all(place.state.active == self._name and not place.lost for place in self._turn)

    @property
    def alone(self) -> bool:
        for place in self._turn:  # a generator costs more than this loop
            if len(place.state.members) > 1 or place.lost:
                return False
        return True

    @property
    def name(self) -> str:
        return self._name

    def members(self) -> list[str]:
        self._check()
        with self._lock:
            self._first.look_around()
            if any([place.lost for place in self._turn]):
                self._come_back()
            return list(self._first.state.members)

    @property
    def knows_all_ids(self) -> bool:
        for place in self._turn:  # a generator costs more than this loop
            if not place.knows_all_ids:
                return False
        return True

    def _check(self) -> None:
        self._engine.check()
        if self._closed:
            raise ClosedError(f"the subscription of group {self._group!r} is closed")

    def _place(self, topic: str) -> Place:
        place = self._places.get(topic)
        if place is None:
            raise ConfigurationError(f"this member of group {self._group!r} is not subscribed to topic {topic!r}")
        return place

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
            if self._deposed:
                self._deposed = False
                raise Fenced(f"another member of group {self._group!r} was the active one for a while: what this one held is that one's")
            now = time.monotonic()
            with self._lock:
                found = self._look(max_messages, now)
                if found is None:
                    continue
                patience_s = 0.0 if found else self._patience(now, deadline)
            if found or (deadline is not None and now >= deadline):
                return found
            self._waker.wait(patience_s)
            if self._closed or not self._engine.usable:
                self._check()

    def _look(self, max_messages: int, now: float) -> list[Delivery] | None:
        """What is there; None: look again at once."""
        if now - self._looked >= _LOOK_AROUND_S:
            self._looked = now
            for place in self._turn:
                place.look_around()
        turn = self._turn
        found = self._receive(turn, max_messages) if len(turn) > 1 else [] if turn[0].paused else turn[0].receive(max_messages)
        if not found and any([place.skipped for place in turn]):
            for place in turn:
                place.skipped = False  # damage is no end: what comes after it may be there
            return None
        if turn[0].lost or (len(turn) > 1 and any([place.lost for place in turn])):
            self._come_back()
            if not found or self._kind is GroupKind.FAILOVER:
                return None
        return found

    def _come_back(self) -> None:
        """Joins the group again: others have taken this member out, as one that stood still. All of a failover group's topics have one
        active member, so there it leaves and joins all of them."""
        _log.warning("a member of group %r was silent for too long and joins again", self._group)
        self._deposed |= self._kind is GroupKind.FAILOVER and any([place.deposed for place in self._turn])
        places = [place for place in self._turn if place.lost or self._kind is GroupKind.FAILOVER]
        self._record.joined_ns = time.time_ns()
        with self._engine.kv.write(self._forget) as txn:
            for place in places:
                place.come_back(txn, self._kind, self._record)
        for place in places:
            place.lost = place.deposed = False
            self._engine.notify(place.others())

    def _receive(self, turn: list[Place], max_messages: int) -> list[Delivery]:
        """From several topics. Whoever was asked first is asked last the next time: one that is always full does not starve the others."""
        found: list[Delivery] = []
        self._turn = [*turn[1:], turn[0]]
        for place in turn:
            if not place.paused and len(found) < max_messages:
                try:
                    found.extend(place.receive(max_messages - len(found)))
                except TransportError:
                    if not found:
                        raise
                    break  # what was claimed before is handed over first; this error comes again
        return found

    def _collect(self, packet: bytes) -> None:
        """Keeps the batch that came with a wake-up."""
        number = log.topic_of(packet)
        for place in self._turn:
            if number < 0:
                place.unsure = True
            elif place.number == number:
                place.keep_mail(packet)

    def _patience(self, now: float, deadline: float | None) -> float:
        seconds = _LOOK_AROUND_S if deadline is None else min(_LOOK_AROUND_S, deadline - now)
        for place in self._turn:
            due_ns = None if place.paused else place.state.next_change_ns(self._name)
            if due_ns is not None:
                seconds = min(seconds, (due_ns - time.time_ns()) / 1e9 + 0.0005)
        return max(seconds, 0.0)

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
        engine, first, places = self._engine, self._first, self._places
        if self._closed or not engine.usable:
            self._check()
        now_ns, wake = time.time_ns(), set[str]()
        published: list[tuple[str, records.Head, bytes, int]] = []
        with self._lock:
            with engine.kv.write(self._forget) as txn:
                # First what is done, so that in a full store its room is there for the results.
                works_off = seen_all = False
                for topic, positions in acks.items():
                    if positions:
                        works_off, place = True, places.get(topic) or self._place(topic)
                        if place is not first:
                            place.settle(txn, positions, self._more, (), None, wake)
                own = acks.get(first.topic, ())
                if own or ids or attributes:
                    seen_all = first.settle(txn, own, self._more, ids, attributes, wake)
                if fence is not None:
                    wake.update(append_fenced(txn, fence, decisions, engine.limits, self._scratch, works_off=works_off).listeners)
                for topic, frames in outputs.items() if outputs else ():
                    if frames:
                        head = log.append(txn, topic, frames, now_ns, engine.limits, self._scratch, works_off=works_off)
                        published.append((topic, head, log.packet(head, self._scratch), len(frames)))
            if seen_all:
                first.seen_all()
        if self.stored is not None and outputs:
            for topic, head, _, count in published:
                self.stored(outputs[topic], head.next - count)
        for _, head, packet, _ in published:
            for address in head.listeners:
                engine.board.notify(address, packet)
        if wake:
            engine.notify(wake)
        for topic, head, _, count in published:
            window = self._windows.get(topic)
            if window is None:
                window = self._windows[topic] = Window(engine, topic, SEND_WINDOW)
            window.wait(head, count, self.stopping)

    def nack(self, topic: str, positions: Sequence[int], delay_ms: float = 0) -> None:
        self._check()
        place = self._place(topic)
        due_ns = time.time_ns() + int(delay_ms * 1e6) if delay_ms else 0
        with self._lock, self._engine.kv.write(place.forget) as txn:
            place.nack(txn, positions, due_ns, self._more)
        self._engine.notify(place.others())

    def flush(self) -> None:
        """Every settle is durable when it returns."""
        self._check()

    def settled_ids(self) -> list[bytes]:
        self._check()
        with self._lock, self._engine.kv.read() as txn:
            return [id_ for place in self._places.values() for id_ in place.new_ids(txn)]

    def attributes(self) -> dict[str, bytes]:
        self._check()
        with self._lock, self._engine.kv.read() as txn:
            return dict(self._first.find(txn).attributes)

    def newest_decision(self, topic: str) -> Buffer | None:
        self._check()
        with self._engine.kv.read() as txn:
            head = records.find_head(txn, topic)
        if head is None or not head.next:
            return None
        try:
            return next((frame for frame, _, _ in self._engine.read(topic, position=head.next - 1)), b"")
        except StoreDamaged as exc:
            _log.warning("the newest record of the log %r cannot be read: %s", topic, exc)
            return b""

    def floor(self, topic: str) -> int:
        self._check()
        with self._lock, self._engine.kv.read() as txn:
            return self._place(topic).find(txn).floor()

    def pause(self, topic: str) -> None:
        self._place(topic).paused = True

    def resume(self, topic: str) -> None:
        self._place(topic).paused = False

    def close(self, *, worked_on: bool = False) -> None:
        if self._closed or self._engine.pid != os.getpid():
            return
        self._closed = True
        try:
            for place in self._turn:
                with self._lock, self._engine.kv.write(place.forget) as txn:
                    left = place.leave(txn, self._waker.address, worked_on=worked_on)
                if left:
                    self._engine.notify(place.others())
        except (StoreFull, DiskFull) as exc:
            # The others find the address dead, and take over as they would after a kill.
            _log.warning("group %r was left without a word: %s", self._group, exc)
        finally:
            for window in self._windows.values():
                window.close()
            self._waker.close()


__all__ = ("LogSubscription",)
