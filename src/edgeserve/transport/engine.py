"""The log engine: the transport contract over any transactional store (`kv`) and any way to wake others (`wake`)."""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat

from edgeserve.core.errors import ClosedError, ConfigurationError, Fenced, GroupConflict, StoreDamaged, TransportError, UsedAfterFork
from edgeserve.transport import log
from edgeserve.transport.base import (
    Capabilities,
    Delivery,
    Fence,
    Frame,
    GroupKind,
    Publisher,
    Start,
    Subscription,
    TopicInfo,
    Transport,
)
from edgeserve.transport.kv import KV, Space, Txn
from edgeserve.transport.wake import Switchboard, Waker

_STALL_S = 1.0


class LogEngine(Transport):
    """A transport whose topics are logs in a store that all its processes share."""

    def __init__(self, url: str, kv: KV, board: Switchboard, capabilities: Capabilities, limits: log.Limits) -> None:
        self.url, self.capabilities, self.limits = url, capabilities, limits
        self.kv, self.board = kv, board
        self.pid = os.getpid()
        self._closed = False
        self._users: weakref.WeakSet[Subscription | Publisher] = weakref.WeakSet()

    def check(self) -> None:
        """Raises when the connection is closed or belongs to another process."""
        if self.pid != os.getpid():
            raise UsedAfterFork(f"{self.url} was opened by process {self.pid} and used by {os.getpid()}: open it again after the fork")
        if self._closed:
            raise ClosedError(f"{self.url} is closed")

    @contextmanager
    def write(self, cache: log.StateCache | None = None) -> Iterator[Txn]:
        """A write transaction; a cache that took part forgets everything when it fails."""
        try:
            with self.kv.write() as txn:
                yield txn
        except BaseException:
            if cache is not None:
                cache.forget()
            raise

    def notify(self, addresses: Sequence[str]) -> None:
        """Wakes whoever waits at these addresses."""
        for address in addresses:
            self.board.notify(address)

    def publisher(self, topic: str, *, send_window: int = 10_000) -> Publisher:
        self.check()
        log.check_name("a topic", topic)
        if send_window < 1:
            raise ConfigurationError(f"send_window= must be at least 1, not {send_window!r}")
        publisher = _LogPublisher(self, topic, Window(self, send_window))
        self._users.add(publisher)
        return publisher

    def subscribe(
        self,
        topics: Sequence[str],
        group: str,
        *,
        kind: GroupKind = GroupKind.SHARED,
        start: Start = "earliest",
        ack_timeout_ms: int | None = None,
        signature: str = "",
        member: str = "",
    ) -> Subscription:
        # The member's side is a module of its own; it needs this class for its types.
        from edgeserve.transport.member import LogSubscription

        self.check()
        _check_subscription(topics, group, kind, start, ack_timeout_ms)
        name = member or f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        log.check_name("a member", name)
        subscription = LogSubscription(self, tuple(topics), group, GroupKind(kind), start, ack_timeout_ms, signature, name)
        self._users.add(subscription)
        return subscription

    def fence(self, topic: str, holder: str) -> Fence:
        self.check()
        log.check_name("a topic", topic)
        with self.write() as txn:
            head = log.make_head(txn, topic)
            head.fence_epoch += 1
            head.fence_holder = holder
            log.save_head(txn, topic, head)
        return _LogFence(self, topic, head.fence_epoch, holder)

    def read(self, topic: str, start: Start | None = "earliest", *, position: int | None = None) -> Iterator[tuple[bytes, int, int]]:
        self.check()
        with self.kv.read() as txn:
            head = log.find_head(txn, topic)
            if head is None:
                return
            at = first_position(txn, head, start or "earliest") if position is None else max(position, head.first)
        while at < head.next:
            with self.kv.read() as txn:
                batches = log.read(txn, head.number, at, head.next, 4 << 20)
            if not batches:
                return
            for batch in batches:
                frames = batch.frames()
                if frames is None:
                    raise StoreDamaged(f"positions {batch.base} to {batch.last} of topic {topic!r} are damaged in the store")
                for position_, frame in zip(range(batch.base, batch.last + 1), frames, strict=True):
                    if position_ >= at:
                        yield bytes(frame), position_, batch.publish_ns
            at = batches[-1].last + 1

    def topics(self) -> list[str]:
        self.check()
        with self.kv.read() as txn:
            return sorted(bytes(key[1:]).decode() for key, _ in txn.scan(Space.STATE, b"h", b"i"))

    def topic_info(self, topic: str) -> TopicInfo:
        self.check()
        cache = log.StateCache()
        with self.kv.read() as txn:
            head = log.find_head(txn, topic)
            if head is None:
                raise TransportError(
                    f"there is no topic {topic!r} at {self.url}: `edgeserve topic list --node {self.url}` lists those there are"
                )
            states = {group: cache.find(txn, topic, group) for group in head.groups}
        groups = {group: state.info(head.next) for group, state in states.items() if state is not None}
        return TopicInfo(topic, head.first, head.next, head.stored_bytes, groups)

    def delete_group(self, topic: str, group: str) -> None:
        self.check()
        cache = log.StateCache()
        with self.write(cache) as txn:
            head, state = log.find_head(txn, topic), cache.find(txn, topic, group)
            if head is None or state is None:
                raise TransportError(f"there is no group {group!r} on topic {topic!r} at {self.url}")
            live = [name for name, m in state.members.items() if self.board.alive(m.address)]
            if live:
                raise GroupConflict(f"group {group!r} of topic {topic!r} has live members: {', '.join(live)}; stop them first")
            head.groups.remove(group)
            head.listeners = {a: g for a, g in head.listeners.items() if g != group}
            log.drop_ids(txn, head, group)
            txn.delete(Space.STATE, log.group_key(topic, group))
            log.save_head(txn, topic, head)

    def append(self, topic: str, frames: Sequence[Frame], scratch: bytearray) -> log.Head:
        """One batch in a transaction of its own; wakes the listeners."""
        with self.write() as txn:
            head = log.append(txn, topic, frames, time.time_ns(), self.limits, scratch)
        for address in head.listeners:
            self.board.notify(address)
        return head

    def close(self) -> None:
        if not self._closed and self.pid == os.getpid():
            for user in list(self._users):
                user.close()
            self._closed = True
            self.release()

    def release(self) -> None:
        """Lets go of what is below the engine."""
        self.board.close()
        self.kv.close()


def _check_subscription(topics: Sequence[str], group: str, kind: GroupKind, start: Start, ack_timeout_ms: int | None) -> None:
    log.check_name("a group", group)
    if isinstance(topics, str) or not topics or len(set(topics)) < len(topics):
        raise ConfigurationError(f"topics must be a list of at least one topic, each once, not {topics!r}")
    for topic in topics:
        log.check_name("a topic", topic)
    if kind not in list(GroupKind):
        raise ConfigurationError(f"kind= is one of {', '.join(repr(k.value) for k in GroupKind)}, not {kind!r}")
    if start not in ("earliest", "latest") and not isinstance(start, int):
        raise ConfigurationError(f"start= is 'earliest', 'latest' or a publish time in ns, not {start!r}")
    if ack_timeout_ms is not None and ack_timeout_ms <= 0:
        raise ConfigurationError(f"ack_timeout_ms= must be above 0, or None for none, not {ack_timeout_ms!r}")


def first_position(txn: Txn, head: log.Head, start: Start) -> int:
    """Where a reader that starts there begins."""
    if start == "earliest":
        return head.first
    if start == "latest":
        return head.next
    return log.position_at(txn, head, start)


class Window:
    """Holds a sender back while live groups lag: so long as they move, and for a second at most when they don't."""

    def __init__(self, engine: LogEngine, size: int) -> None:
        self._engine, self._size = engine, size
        self._cache = log.StateCache()
        self._stalled: dict[tuple[str, str], int] = {}
        self._waker: Waker | None = None
        self._unchecked = 0

    def wait(self, topic: str, head: log.Head, sent: int) -> None:
        """Returns when no live, moving group of the topic is further behind than the window."""
        self._unchecked += sent
        if not head.listeners or self._unchecked < self._size >> 3:
            return
        self._unchecked = 0
        for group in head.groups:
            while self._behind(topic, group, register=False) is not None and self._wait_for(topic, group):
                self._engine.check()

    def _behind(self, topic: str, group: str, *, register: bool) -> int | None:
        """The group's progress count if the sender has to wait for it."""
        engine = self._engine
        with engine.write(self._cache) if register else engine.kv.read() as txn:
            head, state = log.find_head(txn, topic), self._cache.find(txn, topic, group)
            if head is None or state is None or state.backlog(head.next) <= self._size:
                return None
            if self._stalled.get((topic, group)) == state.settled:
                return None
            if register and self._waker is not None:
                state.blocked[self._waker.address] = self._size * 3 // 4
                self._cache.save(txn, topic, group, state)
            addresses = [m.address for m in state.members.values()]
        return state.settled if any(engine.board.alive(a) for a in addresses) else None

    def _wait_for(self, topic: str, group: str) -> bool:
        """Waits until the group has caught up or moved at least; False: it stands still, go on without it."""
        if self._waker is None:
            self._waker = self._engine.board.waker()
        self._waker.drain()
        before = self._behind(topic, group, register=True)
        if before is None:
            return False
        self._waker.wait(_STALL_S)
        after = self._behind(topic, group, register=False)
        if after == before:
            self._stalled[topic, group] = before
        return after is not None and after != before

    def close(self) -> None:
        """Gives the waiting place up."""
        if self._waker is not None:
            self._waker.close()


class _LogPublisher(Publisher):
    def __init__(self, engine: LogEngine, topic: str, window: Window) -> None:
        self._engine, self._topic, self._window = engine, topic, window
        self._scratch = bytearray()
        self._closed = False

    def _check(self) -> None:
        self._engine.check()
        if self._closed:
            raise ClosedError(f"the publisher of topic {self._topic!r} is closed")

    def publish(self, frames: Sequence[Frame]) -> None:
        self._check()
        if frames:
            head = self._engine.append(self._topic, frames, self._scratch)
            self._window.wait(self._topic, head, len(frames))

    def flush(self) -> None:
        """Every publish is durable when it returns."""
        self._check()

    def close(self) -> None:
        self._closed = True
        self._window.close()


class _LogFence(Fence):
    def __init__(self, engine: LogEngine, topic: str, epoch: int, holder: str) -> None:
        self._engine, self.topic, self.epoch, self._holder = engine, topic, epoch, holder

    def append(self, frames: Sequence[Frame]) -> None:
        self._engine.check()
        with self._engine.write() as txn:
            head = append_fenced(txn, self, frames, self._engine.limits, bytearray())
        self._engine.notify(list(head.listeners))


def append_fenced(txn: Txn, fence: Fence, frames: Sequence[Frame], limits: log.Limits, scratch: bytearray) -> log.Head:
    """Appends to the fence's log inside a transaction, or raises `Fenced`."""
    head = log.make_head(txn, fence.topic)
    if head.fence_epoch != fence.epoch:
        raise Fenced(
            f"the log {fence.topic!r} is held by {head.fence_holder!r} since epoch {head.fence_epoch}, not epoch {fence.epoch} any more"
        )
    return log.append(txn, fence.topic, frames, time.time_ns(), limits, scratch) if frames else head


def deliveries(batch: log.Batch, frames: Sequence[bytes | memoryview], lo: int, hi: int, earlier: int, topic: str) -> list[Delivery]:
    """The part [lo, hi) of a batch as deliveries."""
    lo, hi = max(lo, batch.base), min(hi, batch.last + 1)
    if hi - lo != len(frames):
        frames = frames[lo - batch.base : hi - batch.base]
    return list(zip(frames, range(lo, hi), repeat(batch.publish_ns), repeat(earlier), repeat(topic)))


__all__ = ("LogEngine", "Window", "append_fenced", "deliveries", "first_position")
