"""The log engine: the transport contract over any transactional store (`kv`) and any way to wake others (`wake`)."""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from edgeserve.core.errors import (
    ClosedError,
    Fenced,
    GroupConflict,
    StoreDamaged,
    StoreFull,
    TransportError,
    UnknownTopic,
    UsedAfterFork,
)
from edgeserve.transport import log, records
from edgeserve.transport.base import (
    SEND_WINDOW,
    Capabilities,
    Fence,
    Frame,
    GroupKind,
    Publisher,
    Start,
    Subscription,
    TopicInfo,
    Transport,
)
from edgeserve.transport.checks import check_name, check_subscription, check_window
from edgeserve.transport.groups import GroupState, settled_by_all
from edgeserve.transport.kv import KV, Txn
from edgeserve.transport.settled import forget_group
from edgeserve.transport.wake import Switchboard

if TYPE_CHECKING:
    from edgeserve.transport.window import Window

_engines: weakref.WeakSet[LogEngine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_engines):
        engine.usable = False


os.register_at_fork(after_in_child=_after_fork)


class LogEngine(Transport):
    """A transport whose topics are logs in a store that all its processes share.

    Attributes:
        usable: whether `check` has nothing to say: the hot paths ask this first.
    """

    def __init__(
        self, url: str, kv: KV, board: Switchboard, capabilities: Capabilities, limits: records.Limits, identity: str = ""
    ) -> None:
        self.url, self.capabilities, self.limits, self.identity = url, capabilities, limits, identity
        self.kv, self.board = kv, board
        self.pid = os.getpid()
        self._closed = False
        self.usable = True
        _engines.add(self)
        self._users: weakref.WeakSet[Subscription | Publisher] = weakref.WeakSet()

    def check(self) -> None:
        """Raises when the connection is closed or belongs to another process."""
        if self.pid != os.getpid():
            raise UsedAfterFork(f"{self.url} was opened by process {self.pid} and used by {os.getpid()}: open it again after the fork")
        if self._closed:
            raise ClosedError(f"{self.url} is closed")

    def notify(self, addresses: Iterable[str]) -> None:
        """Wakes whoever waits at these addresses."""
        for address in addresses:
            self.board.notify(address)

    def publisher(self, topic: str, *, send_window: int = SEND_WINDOW) -> Publisher:
        self.check()
        check_name("a topic", topic)
        check_window(send_window)
        # It needs this class for its types.
        from edgeserve.transport.window import Window

        publisher = _LogPublisher(self, topic, Window(self, topic, send_window))
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
        version: str = "",
        holds_senders: bool | None = None,
    ) -> Subscription:
        # The member's side is a module of its own; it needs this class for its types.
        from edgeserve.transport.member import LogSubscription

        self.check()
        check_subscription(topics, group, kind, start, ack_timeout_ms)
        name = member or f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        check_name("a member", name)
        subscription = LogSubscription(
            self, tuple(topics), group, GroupKind(kind), start, ack_timeout_ms, signature, name, version, holds_senders=holds_senders
        )
        self._users.add(subscription)
        return subscription

    def fence(self, topic: str, holder: str) -> Fence:
        self.check()
        check_name("a topic", topic)
        with self.kv.write() as txn:
            head = records.make_head(txn, topic)
            head.fence_epoch += 1
            head.fence_holder = holder
            records.save_head(txn, topic, head)
        return _LogFence(self, topic, head.fence_epoch, holder)

    def read(self, topic: str, start: Start | None = "earliest", *, position: int | None = None) -> Iterator[tuple[bytes, int, int]]:
        self.check()
        with self.kv.read() as txn:
            head = records.find_head(txn, topic)
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
                if not frames:
                    continue
                for position_, frame in zip(range(batch.base, batch.last + 1), frames, strict=True):
                    if position_ >= at:
                        yield bytes(frame), position_, batch.publish_ns
            at = batches[-1].last + 1

    def topics(self) -> list[str]:
        self.check()
        with self.kv.read() as txn:
            return records.topics(txn)

    def topic_info(self, topic: str, *, groups: bool = True) -> TopicInfo:
        self.check()
        with self.kv.read() as txn:
            head = self._head(txn, topic)
            states = {group: records.group_state(txn, topic, group) for group in head.groups} if groups else {}
        found = {group: state.info(head.next) for group, state in states.items() if state is not None}
        return TopicInfo(topic, head.first, head.next, head.stored_bytes, head.next - head.first, groups=found)

    def end(self, topic: str) -> int:
        self.check()
        with self.kv.read() as txn:
            head = self._head(txn, topic)
            return 0 if head.next == head.first else head.next

    def _head(self, txn: Txn, topic: str) -> records.Head:
        """Of a topic that has to be there."""
        head = records.find_head(txn, topic)
        if head is None:
            raise UnknownTopic(f"there is no topic {topic!r} at {self.url}: `edgeserve topic list --node {self.url}` lists those there are")
        return head

    def settled(self, topic: str) -> Sequence[tuple[int, int]]:
        self.check()
        with self.kv.read() as txn:
            head = records.find_head(txn, topic)
            if head is None:
                return [(0, 1 << 63)]
            states = [state for group in head.groups if (state := records.group_state(txn, topic, group)) is not None]
        states = [state for state in states if not self._is_forgotten(state)]
        lo = 0 if states else head.first
        return settled_by_all(states, lo, head.next) if states else [(0, lo)] if lo else []

    def _is_forgotten(self, state: GroupState) -> bool:
        """Whether it is the group of a broadcast member that was killed: nobody can come back for what it holds."""
        return state.kind is GroupKind.BROADCAST and not any(self.board.alive(m.address) for m in state.members.values())

    def delete_group(self, topic: str, group: str) -> None:
        self.check()
        with self.kv.write() as txn:
            head, state = records.find_head(txn, topic), records.group_state(txn, topic, group)
            if head is None or state is None:
                raise TransportError(f"there is no group {group!r} on topic {topic!r} at {self.url}")
            self._refuse_live(topic, group, state)
            forget_group(txn, topic, head, group)
            records.save_head(txn, topic, head)

    def delete_topic(self, topic: str) -> None:
        self.check()
        with self.kv.write() as txn:
            head = self._head(txn, topic)
            for group in list(head.groups):
                state = records.group_state(txn, topic, group)
                if state is not None:
                    self._refuse_live(topic, group, state)
                forget_group(txn, topic, head, group)
            log.delete(txn, topic, head)

    def _refuse_live(self, topic: str, group: str, state: GroupState) -> None:
        live = [name for name, m in state.members.items() if self.board.alive(m.address)]
        if live:
            raise GroupConflict(f"group {group!r} of topic {topic!r} has live members: {', '.join(live)}; stop them first")

    def forget_dead_broadcasts(self, txn: Txn, topic: str, head: records.Head) -> bool:
        """Forgets the groups of broadcast members that were killed: nobody can come back for what they hold. The caller saves the head."""
        dead = []
        for group in head.groups:
            state = records.group_state(txn, topic, group)
            if state and self._is_forgotten(state):
                dead.append(group)
        for group in dead:
            forget_group(txn, topic, head, group)
        return bool(dead)

    def make_room(self) -> bool:
        """The store is full: whether something could be forgotten."""
        freed = False
        for topic in self.topics():
            with self.kv.write() as txn:
                head = records.make_head(txn, topic)
                if self.forget_dead_broadcasts(txn, topic, head):
                    records.save_head(txn, topic, head)
                    freed = True
        return freed

    def close(self) -> None:
        if not self._closed and self.pid == os.getpid():
            for user in list(self._users):
                user.close()
            self._closed, self.usable = True, False
            self.release()

    def release(self) -> None:
        """Lets go of what is below the engine."""
        self.board.close()
        self.kv.close()


def first_position(txn: Txn, head: records.Head, start: Start) -> int:
    """Where a reader that starts there begins."""
    if start == "earliest":
        return head.first
    if start == "latest":
        return head.next
    return log.position_at(txn, head, start)


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
        if self._closed or not self._engine.usable:
            self._check()
        if not frames:
            return
        engine, scratch = self._engine, self._scratch
        while True:
            try:
                with engine.kv.write() as txn:
                    head = log.append(txn, self._topic, frames, time.time_ns(), engine.limits, scratch)
                break
            except StoreFull:
                if not engine.make_room():
                    raise
        if self.stored is not None:
            self.stored(frames, head.next - len(frames))
        packet = log.packet(head, scratch)
        for address in head.listeners:
            engine.board.notify(address, packet)
        self._window.wait(head, len(frames), self.stopping)

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
        with self._engine.kv.write() as txn:
            head = append_fenced(txn, self, frames, self._engine.limits, bytearray())
        self._engine.notify(list(head.listeners))


def append_fenced(
    txn: Txn, fence: Fence, frames: Sequence[Frame], limits: records.Limits, scratch: bytearray, *, works_off: bool = False
) -> records.Head:
    """Appends to the fence's log inside a transaction, or raises `Fenced`."""
    head = records.make_head(txn, fence.topic)
    if head.fence_epoch != fence.epoch:
        raise Fenced(
            f"the log {fence.topic!r} is held by {head.fence_holder!r} since epoch {head.fence_epoch}, not epoch {fence.epoch} any more"
        )
    return log.append(txn, fence.topic, frames, time.time_ns(), limits, scratch, works_off=works_off) if frames else head


__all__ = ("LogEngine", "append_fenced", "first_position")
