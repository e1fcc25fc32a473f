"""The transport contract over any broker that a `Driver` reaches."""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from edgeserve.core.errors import ClosedError, GroupConflict, MessageError, StoreDamaged, TransportError, UnknownTopic, UsedAfterFork
from edgeserve.core.process import lives, this_host
from edgeserve.transport.base import (
    SEND_WINDOW,
    Capabilities,
    Fence,
    GroupInfo,
    GroupKind,
    Publisher,
    Start,
    Subscription,
    TopicInfo,
    Transport,
)
from edgeserve.transport.broker.driver import Driver, Entry
from edgeserve.transport.broker.envelope import INDEX_BITS, Item, Reference, parts_topic, position, unwrap
from edgeserve.transport.broker.grouplog import GroupLog, decode_line, group_of, group_topic, indexes_of, is_group_topic
from edgeserve.transport.broker.history import find_snapshot
from edgeserve.transport.broker.membership import BEAT_S, given_name
from edgeserve.transport.broker.publisher import BrokerFence, BrokerPublisher
from edgeserve.transport.broker.trouble import Trouble
from edgeserve.transport.checks import check_name, check_subscription, check_window

_COUNTED_ENTRIES = 512
_COUNTED_BYTES = 32 << 20


def _part(entry: Entry | None) -> bytes | memoryview:
    """The part that an entry holds; none where it is gone or cannot be read."""
    try:
        items = [] if entry is None else unwrap(entry.data, 0)[1]
    except MessageError:
        return b""
    return b"".join(item for item in items if not isinstance(item, Reference))


class BrokerEngine(Transport):
    """A transport whose topics are a broker's."""

    def __init__(self, url: str, driver: Driver, capabilities: Capabilities) -> None:
        self.url, self.driver, self.capabilities = url, driver, capabilities
        self.trouble = Trouble(driver)
        self.pid = os.getpid()
        self.closed = False
        self._users: weakref.WeakSet[Subscription | Publisher] = weakref.WeakSet()

    @property
    def foreign(self) -> bool:
        """Whether this is a child of the process that the connection belongs to."""
        return self.pid != os.getpid()

    def check(self) -> None:
        """Raises when the connection is closed or belongs to another process."""
        if self.pid != os.getpid():
            raise UsedAfterFork(f"{self.url} was opened by process {self.pid} and used by {os.getpid()}: open it again after the fork")
        if self.closed:
            raise ClosedError(f"{self.url} is closed")

    def publisher(self, topic: str, *, send_window: int = SEND_WINDOW) -> Publisher:
        self.check()
        check_name("a topic", topic)
        check_window(send_window)
        publisher = BrokerPublisher(self, topic, send_window)
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
        from edgeserve.transport.broker.member import BrokerSubscription

        self.check()
        check_subscription(topics, group, kind, start, ack_timeout_ms)
        name = member or f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        check_name("a member", name)
        subscription = BrokerSubscription(
            self, tuple(topics), group, GroupKind(kind), start, ack_timeout_ms, signature, name, version, holds_senders=holds_senders
        )
        self._users.add(subscription)
        return subscription

    def fence(self, topic: str, holder: str) -> Fence:
        self.check()
        check_name("a topic", topic)
        return BrokerFence(self, topic, holder)

    def read(self, topic: str, start: Start | None = "earliest", *, position: int | None = None) -> Iterator[tuple[bytes, int, int]]:
        self.check()
        if start == "latest" and position is None:
            return
        since_ns = start if isinstance(start, int) and position is None else None
        first = None if position is None else position >> INDEX_BITS
        for entry in self.driver.scan(topic, first, since_ns=since_ns):
            publish_ns, items = self.unwrap(entry)
            for index, item in enumerate(items):
                at = entry.at << INDEX_BITS | index
                if (position is None or at >= position) and (since_ns is None or publish_ns >= since_ns):
                    yield bytes(self.fetch(topic, item)), at, publish_ns

    def unwrap(self, entry: Entry) -> tuple[int, Sequence[Item]]:
        """(publish time, frames) of an entry; what cannot be read is a frame as it is, for the stage to put aside by name."""
        try:
            return unwrap(entry.data, time.time_ns())
        except MessageError:
            return time.time_ns(), [entry.data]

    def fetch(self, topic: str, item: Item) -> bytes | memoryview:
        """A frame, gathered from its parts if it is only a reference."""
        if not isinstance(item, Reference):
            return item
        frame = b"".join(_part(self.driver.get(parts_topic(topic), at)) for at in item.parts)
        if not item.check(frame):
            raise StoreDamaged(
                f"a message of {item.size} bytes on topic {topic!r} cannot be put together: its parts on {parts_topic(topic)!r} are gone "
                "or damaged; keep them for longer (retention)"
            )
        return frame

    def topics(self) -> list[str]:
        self.check()
        return sorted(t for t in self.driver.topics() if not is_group_topic(t))

    def topic_info(self, topic: str, *, groups: bool = True) -> TopicInfo:
        self.check()
        extent = self.driver.extent(topic)
        if extent is None:
            raise self._no_topic(topic)
        first = 0 if extent.first is None else position(extent.first, 0)
        next_ = first if extent.last is None else position(extent.last + 1, 0)
        messages, more = self._count(topic, self.driver.scan(topic))
        found = {group: self._group_info(topic, group) for group in self.driver.groups(topic)} if groups else {}
        return TopicInfo(topic, first, next_, extent.stored_bytes, messages, more, found)

    def end(self, topic: str) -> int:
        self.check()
        extent = self.driver.extent(topic)
        if extent is None:
            raise self._no_topic(topic)
        return 0 if extent.last is None else position(extent.last + 1, 0)

    def settled(self, topic: str) -> Sequence[tuple[int, int]]:
        self.check()
        floors = self.driver.floors(topic)
        # A group that nobody has received anything in is only in its own log yet.
        if self._logged(topic) - floors.keys():
            return []
        if not floors:
            return [] if self.driver.extent(topic) is not None else [(0, 1 << 63)]
        floor = position(min(floors.values()), 0)
        return [(0, floor)] if floor else []

    def _logged(self, topic: str) -> set[str]:
        """The groups of a topic that have a log."""
        return {group for name in self.driver.topics() if (group := group_of(name, topic)) is not None}

    def _no_topic(self, topic: str) -> TransportError:
        return UnknownTopic(f"there is no topic {topic!r} at {self.url}: `edgeserve topic list --node {self.url}` lists those there are")

    def _count(self, topic: str, entries: Iterator[Entry], settled: Mapping[int, Sequence[int]] = {}) -> tuple[int, bool]:
        """The messages in entries less those that are settled already; and whether there are more, not counted because it would take long:
        how many messages are in an entry stands in the entry only."""
        count = size = 0
        for number, entry in enumerate(entries):
            if number >= _COUNTED_ENTRIES or size > _COUNTED_BYTES:
                return count, True
            count += len(self.unwrap(entry)[1]) - len(indexes_of(settled.get(entry.at, ())))
            size += len(entry.data)
        return count, False

    def _group_info(self, topic: str, group: str) -> GroupInfo:
        log = self.replay(topic, group)
        floor, done = self.driver.floor(topic, group), self.driver.acknowledged(topic, group)
        left = (e for e in self.driver.scan(topic, floor) if not any(first <= e.at <= last for first, last in done))
        backlog, more = self._count(topic, left, log.partial.get(topic, {}))
        members = tuple(given_name(name) for name in log.members)
        kind = next((m.kind for m in log.members.values()), GroupKind.SHARED)
        active = (given_name(log.leader) or None) if kind is GroupKind.FAILOVER else None
        versions = {given_name(name): m.version for name, m in log.members.items() if m.version}
        return GroupInfo(kind, members, active, backlog, self.driver.claimed(topic, group), log.epoch, more, versions, log.shared())

    def replay(self, topic: str, group: str) -> GroupLog:
        """What a group's log says now, members that are known to be dead left out."""
        log, driver, name = GroupLog(""), self.driver, group_topic(topic, group)
        if driver.extent(name) is None:
            return log
        found = find_snapshot(driver, group, name)
        if found is not None:
            log.restore(*found)
        begin = None if found is None else log.upto + 1
        for entry in driver.scan(name, begin):
            log.apply(decode_line(group, entry.data), entry.at)
        for member, state in list(log.members.items()):
            if lives(state.host, state.process) is False:
                del log.members[member]
        return log

    def delete_group(self, topic: str, group: str) -> None:
        self.check()
        if self.driver.extent(topic) is None or group not in self.driver.groups(topic):
            raise TransportError(f"there is no group {group!r} on topic {topic!r} at {self.url}")
        self._refuse_live(topic, [group])
        self.driver.delete_group(topic, group)
        self.driver.delete_topic(group_topic(topic, group))

    def delete_topic(self, topic: str) -> None:
        self.check()
        if is_group_topic(topic) or self.driver.extent(topic) is None:
            raise self._no_topic(topic)
        # A group may have a log before it has anything at the broker, and after.
        groups = self._logged(topic).union(self.driver.groups(topic))
        self._refuse_live(topic, sorted(groups))
        # The topic itself last: cut short, it can be asked for again.
        for name in (*(group_topic(topic, group) for group in groups), parts_topic(topic), topic):
            self.driver.delete_topic(name)

    def _refuse_live(self, topic: str, groups: Sequence[str]) -> None:
        """Raises `GroupConflict` where a group has live members."""
        before = {group: self.replay(topic, group) for group in groups}
        if any(m.host != this_host() for log in before.values() for m in log.members.values()):
            # Members of other hosts show by a heartbeat that they live.
            time.sleep(BEAT_S * 2)
        for group, log in before.items():
            live = log.members
            if any(m.host != this_host() for m in live.values()) and self.replay(topic, group).at == log.at:
                live = {name: m for name, m in live.items() if m.host == this_host()}
            if live:
                names = ", ".join(given_name(name) for name in live)
                raise GroupConflict(f"group {group!r} of topic {topic!r} has live members: {names}; stop them first")

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not self.foreign:
                with ExitStack() as stack:  # what one of them has to say keeps no other from being closed
                    stack.callback(self.driver.close)
                    for user in list(self._users):
                        stack.callback(user.close)
        finally:
            self.closed = True


__all__ = ("BrokerEngine",)
