"""Cases: who of a group gets what."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event

import pytest

from edgeserve.core.errors import GroupBusy, GroupConflict, TransportError, UnknownTopic
from edgeserve.testing.transport.cases import (
    LONG_MS,
    MOMENT_MS,
    TransportCases,
    collect,
    drain,
    flush_all,
    frames_of,
    numbered,
    positions_of,
    publish,
    settle_all,
    together,
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
        publish(transport, "a", numbered(40), batch=1)
        first = drain(one, 4, settle=False)
        rest = collect([one, two], 36)
        assert all(positions_of(share) == sorted(positions_of(share)) for share in rest)
        assert frames_of(together([first, *rest])) == numbered(40)
        settle_all(one, first)
        flush_all(one, two)
        assert one.receive(1, MOMENT_MS) == two.receive(1, MOMENT_MS) == []
        assert transport.topic_info("a").groups["g"].backlog == 0

    def test_a_member_that_comes_later_gets_nothing_twice(self, transport: Transport) -> None:
        publish(transport, "a", numbered(30), batch=1)
        one = transport.subscribe(["a"], "g")
        held = drain(one, 10, settle=False)
        two = transport.subscribe(["a"], "g")
        settle_all(one, held)
        assert frames_of(together(collect([two, one], 20))) == numbered(20, start=10)
        assert one.receive(1, MOMENT_MS) == two.receive(1, MOMENT_MS) == []

    def test_a_member_that_comes_later_does_not_wait_for_one_that_is_busy(self, transport: Transport) -> None:
        publish(transport, "a", numbered(100), batch=1)
        one = transport.subscribe(["a"], "g")
        drain(one, 10, batch=5)
        held = one.receive(5, LONG_MS)
        two = transport.subscribe(["a"], "g")
        found = two.receive(100, LONG_MS)
        assert found  # not all: some may be at the first one already
        settle_all(two, found)
        settle_all(one, held)
        rest = collect([one, two], 100 - 10 - len(held) - len(found))
        assert sorted(frames_of(held) + frames_of(found) + frames_of(together(rest))) == sorted(numbered(90, start=10))

    def test_many_members_get_each_message_once(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        publish(transport, "a", numbered(1_200), batch=10)
        settled, until = count(), time.monotonic() + LONG_MS / 1000
        done = Event()

        def work(_: int) -> list[bytes]:
            subscription, mine = transport.subscribe(["a"], "g"), []
            while not done.is_set() and time.monotonic() < until:
                found = subscription.receive(7, MOMENT_MS)
                settle_all(subscription, found)
                mine += frames_of(found)
                if any(next(settled) == 1_199 for _ in found):
                    done.set()
            subscription.close()
            return mine

        everything = [frame for mine in threads.map(work, range(4)) for frame in mine]
        assert sorted(everything) == sorted(numbered(1_200))
        assert transport.subscribe(["a"], "g").receive(1, MOMENT_MS) == []

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
        waiting = threads.submit(two.receive, 1, LONG_MS)
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
        flush_all(one, two)
        assert one.receive(1, 0) == two.receive(1, 0) == []
        assert not two.alone and not one.alone
        two.close()
        publish(transport, "a", [b"x"])
        drain(one, 1)
        one.flush()
        assert one.alone

    @pytest.mark.parametrize("batch", [1, 3, 10])
    def test_floor_is_below_all_that_is_unsettled(self, transport: Transport, batch: int) -> None:
        publish(transport, "a", numbered(10), batch=batch)
        subscription = transport.subscribe(["a"], "g")
        found = drain(subscription, 10, settle=False)
        at = positions_of(found)
        assert at == sorted(set(at))
        assert subscription.floor("a") <= at[0]
        subscription.settle({"a": [at[0], at[1], at[2], at[5]]})
        subscription.flush()
        assert at[2] < subscription.floor("a") <= at[3]
        settle_all(subscription, found[3:5])
        subscription.flush()
        assert at[5] < subscription.floor("a") <= at[6]
        subscription.settle({"a": [at[9], at[7], at[6], at[8]]})
        subscription.flush()
        assert at[9] < subscription.floor("a")

    def test_floor_heeds_what_others_hold_and_what_was_given_back(self, transport: Transport) -> None:
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        publish(transport, "a", numbered(40), batch=1)
        shares = collect([one, two], 40, batch=4, settle=False)
        assert all(shares)
        settle_all(two, shares[1])
        flush_all(two, one)
        assert two.floor("a") <= shares[0][0][1]
        settle_all(one, shares[0][1:])
        one.nack("a", [shares[0][0][1]], delay_ms=LONG_MS)
        flush_all(one, two)
        assert max(one.floor("a"), two.floor("a")) <= shares[0][0][1]

    def test_topic_info_says_who_is_behind(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10), batch=1)
        one = transport.subscribe(["a"], "g", member="one")
        two = transport.subscribe(["a"], "g", member="two")
        held = drain(one, 4, settle=False)
        one.settle({"a": positions_of(held)[:1]})
        one.flush()
        info = transport.topic_info("a")
        assert info.name == "a"
        assert info.first <= held[0][1] < held[-1][1] < info.next
        assert info.stored_bytes >= sum(map(len, numbered(10)))
        group = info.groups["g"]
        assert (group.kind, set(group.members), group.backlog) == (GroupKind.SHARED, {"one", "two"}, 9)
        assert 3 <= group.claimed <= 9  # what members fetched ahead may be counted
        two.close()
        assert transport.topic_info("a").groups["g"].members == ("one",)

    def test_a_group_has_settled_all_when_its_floor_is_the_end_of_the_topic(self, transport: Transport) -> None:
        with pytest.raises(UnknownTopic):
            transport.end("a")
        publish(transport, "a", numbered(6), batch=1)
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        first, second = collect([one, two], 6, batch=1, settle=False)
        assert transport.end("a") > max(d[1] for d in [*first, *second])
        settle_all(one, first)
        flush_all(one, two)
        assert not second or max(one.floor("a"), two.floor("a")) < transport.end("a")
        settle_all(two, second)
        flush_all(one, two)
        two.close()  # the other has not seen what this one has settled
        until = time.monotonic() + LONG_MS / 1000
        while one.floor("a") < transport.end("a"):
            assert time.monotonic() < until
        publish(transport, "a", [b"more"])
        assert one.floor("a") < transport.end("a")

    def test_versions_of_members_and_what_they_share_are_told(self, transport: Transport) -> None:
        publish(transport, "a", numbered(1))
        one = transport.subscribe(["a"], "g", member="one", version="1")
        two = transport.subscribe(["a"], "g", member="two")
        one.settle({}, attributes={"colour": b"red"})
        flush_all(one, two)
        group = transport.topic_info("a").groups["g"]
        assert (dict(group.versions), dict(group.attributes)) == ({"one": "1"}, {"colour": b"red"})

    def test_topic_info_names_the_active_member_and_counts_changes(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", kind=FAILOVER, member="one")
        two = transport.subscribe(["a"], "g", kind=FAILOVER, member="two")
        before = transport.topic_info("a").groups["g"]
        one.close()
        until = time.monotonic() + LONG_MS / 1000
        while not two.active and time.monotonic() < until:
            two.receive(1, MOMENT_MS)
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

    def test_a_topic_can_be_deleted_once_nobody_uses_it(self, transport: Transport) -> None:
        publish(transport, "a", [b"x" * 7_000_000, *numbered(3)])
        one = transport.subscribe(["a"], "g", member="one")
        drain(one, 4)
        one.settle({}, ids=[b"i" * 16])
        stays = transport.subscribe(["a~b"], "g")
        for name in ("ab", "a~b"):
            publish(transport, name, numbered(1))
        with pytest.raises(GroupConflict, match="one"):
            transport.delete_topic("a")
        one.close()
        transport.delete_topic("a")
        assert transport.topics() == ["ab", "a~b"]
        with pytest.raises(TransportError, match="no topic 'a'"):
            transport.delete_topic("a")
        publish(transport, "a", numbered(2, "new"))
        again = transport.subscribe(["a"], "g")
        assert again.settled_ids() == []
        assert frames_of(drain(again, 2)) == numbered(2, "new")
        assert frames_of(drain(stays, 1)) == numbered(1)

    def test_a_topic_says_how_many_messages_it_keeps(self, transport: Transport) -> None:
        publish(transport, "a", numbered(5), batch=1)
        publish(transport, "a", numbered(300), batch=150)
        transport.subscribe(["a"], "g").close()
        info = transport.topic_info("a", groups=False)
        assert (info.messages, info.more, info.groups) == (305, False, {})
        info = transport.topic_info("a")
        assert (info.messages, info.groups["g"].backlog, info.groups["g"].more) == (305, 305, False)


__all__ = ("GroupCases",)
