"""Cases: who of a group gets what."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeserve.core.errors import GroupBusy, GroupConflict, TransportError
from edgeserve.testing.transport.cases import (
    LONG_MS,
    TransportCases,
    drain,
    frames_of,
    numbered,
    positions_of,
    publish,
    settle_all,
)
from edgeserve.transport import GroupKind, Subscription, Transport

EXCLUSIVE, FAILOVER, BROADCAST = GroupKind.EXCLUSIVE, GroupKind.FAILOVER, GroupKind.BROADCAST


class GroupCases(TransportCases):
    """Kinds of groups, where they start, what is said of them."""

    def test_groups_each_see_all(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10))
        assert frames_of(drain(transport.subscribe(["a"], "g"), 10)) == numbered(10)
        assert frames_of(drain(transport.subscribe(["a"], "h"), 10)) == numbered(10)

    def test_members_of_a_shared_group_divide_the_messages(self, transport: Transport) -> None:
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        publish(transport, "a", numbered(40))
        first = one.receive(4, LONG_MS)
        rest = drain(two, 36)
        assert frames_of(first) + frames_of(rest) == numbered(40)
        settle_all(one, first)
        assert one.receive(1, 0) == two.receive(1, 0) == []

    def test_a_member_that_comes_later_gets_nothing_twice(self, transport: Transport) -> None:
        publish(transport, "a", numbered(30))
        one = transport.subscribe(["a"], "g")
        held = one.receive(10, LONG_MS)
        two = transport.subscribe(["a"], "g")
        settle_all(one, held)
        assert frames_of(drain(two, 20)) == numbered(20, start=10)
        assert one.receive(1, 0) == []

    def test_a_member_that_comes_later_does_not_wait_for_one_that_is_busy(self, transport: Transport) -> None:
        publish(transport, "a", numbered(100))
        one = transport.subscribe(["a"], "g")
        drain(one, 10, batch=5)
        held = one.receive(5, LONG_MS)
        two = transport.subscribe(["a"], "g")
        found = two.receive(100, LONG_MS)
        assert len(found) >= 50
        settle_all(two, found)
        settle_all(one, held)
        rest = drain(one, 100 - 10 - len(held) - len(found))
        assert sorted(positions_of(held) + positions_of(found) + positions_of(rest)) == list(range(10, 100))

    def test_many_members_get_each_message_once(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        publish(transport, "a", numbered(1_200), batch=10)

        def work(_: int) -> list[bytes]:
            subscription, mine = transport.subscribe(["a"], "g"), []
            while found := subscription.receive(7, 300):
                settle_all(subscription, found)
                mine += frames_of(found)
            subscription.close()
            return mine

        everything = [frame for mine in threads.map(work, range(4)) for frame in mine]
        assert sorted(everything) == sorted(numbered(1_200))

    def test_an_exclusive_group_has_one_member(self, transport: Transport) -> None:
        publish(transport, "a", numbered(2))
        one = transport.subscribe(["a"], "g", kind=EXCLUSIVE)
        with pytest.raises(GroupBusy):
            transport.subscribe(["a"], "g", kind=EXCLUSIVE)
        drain(one, 1)
        one.close()
        assert frames_of(drain(transport.subscribe(["a"], "g", kind=EXCLUSIVE), 1)) == [b"m1"]

    def test_a_stand_by_takes_over_when_the_active_member_leaves(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10))
        one = transport.subscribe(["a"], "g", kind=FAILOVER)
        two = transport.subscribe(["a"], "g", kind=FAILOVER)
        drain(one, 3)
        held = one.receive(4, LONG_MS)
        assert (one.active, two.active) == (True, False)
        assert two.receive(5, 0) == []
        one.close()
        found = drain(two, 7)
        assert two.active
        assert frames_of(found)[:4] == frames_of(held)
        assert [(f, d[3]) for f, d in zip(frames_of(found), found, strict=True)] == [(f, 0) for f in numbered(7, start=3)]

    def test_a_waiting_stand_by_is_told(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        one = transport.subscribe(["a"], "g", kind=FAILOVER)
        two = transport.subscribe(["a"], "g", kind=FAILOVER)
        waiting = threads.submit(two.receive, 1, None)
        publish(transport, "a", [b"x"])
        assert frames_of(one.receive(1, LONG_MS)) == [b"x"]
        one.close()
        assert frames_of(waiting.result(LONG_MS / 1000)) == [b"x"]

    def test_every_member_of_a_broadcast_group_sees_all(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", kind=BROADCAST)
        two = transport.subscribe(["a"], "g", kind=BROADCAST)
        publish(transport, "a", numbered(10))
        assert frames_of(drain(one, 10)) == frames_of(drain(two, 10)) == numbered(10)
        one.close()
        two.close()
        assert transport.topic_info("a").groups == {}

    def test_a_new_group_starts_at_the_earliest_the_latest_or_a_time(self, transport: Transport) -> None:
        publish(transport, "a", numbered(5, "old"))
        between = time.time_ns()
        publish(transport, "a", numbered(5, "new"))
        latest = transport.subscribe(["a"], "latest", start="latest")
        publish(transport, "a", numbered(5, "next"))
        assert frames_of(drain(latest, 5)) == numbered(5, "next")
        assert frames_of(drain(transport.subscribe(["a"], "time", start=between), 10)) == numbered(5, "new") + numbered(5, "next")
        assert len(drain(transport.subscribe(["a"], "earliest"), 15)) == 15
        assert transport.subscribe(["a"], "future", start=time.time_ns() + 10**12).receive(1, 0) == []

    def test_start_counts_only_for_a_new_group(self, transport: Transport) -> None:
        publish(transport, "a", numbered(5))
        one = transport.subscribe(["a"], "g")
        drain(one, 2)
        one.close()
        assert frames_of(drain(transport.subscribe(["a"], "g", start="latest"), 3)) == numbered(3, start=2)

    def test_a_group_may_come_before_its_topic(self, transport: Transport) -> None:
        subscription = transport.subscribe(["a"], "g", start="latest")
        publish(transport, "a", numbered(2))
        assert frames_of(drain(subscription, 2)) == numbered(2)

    def test_live_members_must_agree_on_kind_and_signature(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", signature="x, y")
        with pytest.raises(GroupConflict, match="x, y"):
            transport.subscribe(["a"], "g", signature="x")
        with pytest.raises(GroupConflict, match="shared"):
            transport.subscribe(["a"], "g", kind=FAILOVER, signature="x, y")
        one.close()
        transport.subscribe(["a"], "g", kind=FAILOVER, signature="x")

    def test_a_refused_member_leaves_no_trace(self, transport: Transport) -> None:
        transport.subscribe(["b"], "g", signature="x", member="one")
        with pytest.raises(GroupConflict):
            transport.subscribe(["a", "b"], "g", signature="y")
        assert transport.topics() == ["b"]
        assert transport.topic_info("b").groups["g"].members == ("one",)

    def test_two_live_members_need_two_names(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", member="same")
        with pytest.raises(GroupConflict, match="same"):
            transport.subscribe(["a"], "g", member="same")
        one.close()
        assert transport.subscribe(["a"], "g", member="same").active

    def test_a_member_knows_whether_it_is_alone(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g")
        assert one.alone
        two = transport.subscribe(["a"], "g")
        publish(transport, "a", [b"x"])
        drain(one, 1)
        assert not two.alone and not one.alone

    def test_floor_is_below_all_that_is_unsettled(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10))
        subscription = transport.subscribe(["a"], "g")
        assert subscription.floor("a") == 0
        found = subscription.receive(10, LONG_MS)
        subscription.settle({"a": [0, 1, 2, 5]})
        assert subscription.floor("a") == 3
        settle_all(subscription, [d for d in found if d[1] in (3, 4)])
        assert subscription.floor("a") == 6
        subscription.settle({"a": [9, 7, 6, 8]})
        assert subscription.floor("a") == 10

    def test_topic_info_says_who_is_behind(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10))
        one = transport.subscribe(["a"], "g", member="one")
        two = transport.subscribe(["a"], "g", member="two")
        held = one.receive(4, LONG_MS)
        one.settle({"a": positions_of(held)[:1]})
        info = transport.topic_info("a")
        assert (info.name, info.first, info.next) == ("a", 0, 10)
        assert info.stored_bytes >= sum(map(len, numbered(10)))
        group = info.groups["g"]
        assert (group.kind, set(group.members), group.backlog, group.claimed) == (GroupKind.SHARED, {"one", "two"}, 9, 3)
        two.close()
        assert transport.topic_info("a").groups["g"].members == ("one",)

    def test_topic_info_names_the_active_member_and_counts_changes(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", kind=FAILOVER, member="one")
        transport.subscribe(["a"], "g", kind=FAILOVER, member="two")
        before = transport.topic_info("a").groups["g"]
        one.close()
        after = transport.topic_info("a").groups["g"]
        assert (before.active, after.active) == ("one", "two")
        assert after.epoch > before.epoch

    def test_a_group_can_be_forgotten_once_nobody_uses_it(self, transport: Transport) -> None:
        publish(transport, "a", numbered(4))
        subscription: Subscription = transport.subscribe(["a"], "g", member="one")
        drain(subscription, 2)
        with pytest.raises(GroupConflict, match="one"):
            transport.delete_group("a", "g")
        subscription.close()
        transport.delete_group("a", "g")
        assert transport.topic_info("a").groups == {}
        with pytest.raises(TransportError, match="no group 'g'"):
            transport.delete_group("a", "g")
        assert frames_of(drain(transport.subscribe(["a"], "g"), 4)) == numbered(4)


__all__ = ("GroupCases",)
