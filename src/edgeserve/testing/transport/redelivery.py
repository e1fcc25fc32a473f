"""Cases: what comes again, when, and how often it is said to have come."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeserve.testing.transport.cases import (
    LONG_MS,
    MOMENT_MS,
    TransportCases,
    again_of,
    collect,
    drain,
    flush_all,
    frames_of,
    numbered,
    positions_of,
    publish,
    settle_all,
)
from edgeserve.transport import ClaimLost, GroupKind, Subscription, Transport


class RedeliveryCases(TransportCases):
    """Members that leave, time that runs out, messages given back."""

    @pytest.mark.parametrize("batch", [1, 4, 6])
    def test_what_a_leaving_member_held_goes_to_others_as_if_never_delivered(self, transport: Transport, batch: int) -> None:
        one = transport.subscribe(["a"], "g")
        publish(transport, "a", numbered(6), batch=batch)
        held = drain(one, 4, settle=False)
        two = transport.subscribe(["a"], "g")
        settle_all(one, held[1:2])
        one.close()
        found = drain(two, 5)
        assert [(f, d[3]) for f, d in zip(frames_of(found), found, strict=True)] == [(f"m{n}".encode(), 0) for n in (0, 2, 3, 4, 5)]

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("alone", [True, False])
    def test_what_a_leaving_member_worked_on_comes_again_as_a_redelivery(self, transport: Transport, alone: bool, batch: int) -> None:
        publish(transport, "a", numbered(3), batch=batch)
        one = transport.subscribe(["a"], "g")
        held = drain(one, 3, settle=False)
        others = [] if alone else [transport.subscribe(["a"], "g")]
        settle_all(one, held[:1])
        one.close(worked_on=True)
        found = drain(others[0] if others else transport.subscribe(["a"], "g"), 2)
        # Entries that were given back one by one need not come in their order.
        assert sorted(zip(frames_of(found), again_of(found), strict=True)) == [(b"m1", 1), (b"m2", 1)]

    def test_a_waiting_member_is_told_when_another_leaves(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        publish(transport, "a", numbered(1))
        one = transport.subscribe(["a"], "g")
        held = one.receive(1, LONG_MS)
        two = transport.subscribe(["a"], "g")
        waiting = threads.submit(two.receive, 1, LONG_MS)
        one.close()
        assert frames_of(waiting.result(LONG_MS / 1000)) == frames_of(held)

    def test_what_the_last_member_held_waits_for_the_next(self, transport: Transport) -> None:
        publish(transport, "a", numbered(5))
        one = transport.subscribe(["a"], "g")
        drain(one, 1)
        drain(one, 3, settle=False)
        one.close()
        found = drain(transport.subscribe(["a"], "g"), 4)
        assert frames_of(found) == numbered(4, start=1)
        assert {d[3] for d in found} == {0}

    def test_what_is_not_settled_in_time_comes_again_and_is_counted(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", ack_timeout_ms=30)
        two = transport.subscribe(["a"], "g", ack_timeout_ms=LONG_MS)
        publish(transport, "a", numbered(2))
        # Whoever gets them first and next: it ends when the second one has both after the first one has had them.
        had, held, times = set[int](), list[int](), Counter[int]()
        until = time.monotonic() + LONG_MS / 1000
        while len(held) < 2:
            assert time.monotonic() < until
            for member, moment_ms in ((one, MOMENT_MS), (two, 10 * MOMENT_MS)):
                for _, position, _, again, _ in member.receive(2, moment_ms):
                    assert again == times[position]
                    times[position] += 1
                    if member is one:
                        had.add(position)
                    elif position in had:
                        held.append(position)
                    else:
                        two.nack("a", [position])
        with pytest.raises(ClaimLost) as lost:
            one.settle({"a": held})
        assert (lost.value.topic, lost.value.positions) == ("a", frozenset(held))
        two.settle({"a": held})
        flush_all(two, one)
        assert one.receive(1, MOMENT_MS) == []
        assert transport.topic_info("a").groups["g"].backlog == 0

    def test_a_member_that_is_too_late_may_get_its_own_message_again(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", ack_timeout_ms=30)
        two = transport.subscribe(["a"], "g", ack_timeout_ms=30)
        publish(transport, "a", numbered(1))
        times, had, until = 0, Counter[Subscription](), time.monotonic() + LONG_MS / 1000
        while 2 not in had.values():
            assert time.monotonic() < until
            for member in (one, two):
                for delivery in member.receive(1, MOMENT_MS):
                    assert delivery[3] == times
                    times += 1
                    had[member] += 1

    def test_what_is_settled_in_time_does_not_come_again(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", ack_timeout_ms=LONG_MS)
        two = transport.subscribe(["a"], "g", ack_timeout_ms=LONG_MS)
        publish(transport, "a", numbered(4), batch=1)
        collect([one, two], 4)
        flush_all(one, two)
        assert one.receive(1, 60) == two.receive(1, 60) == []

    @pytest.mark.parametrize("batch", [1, 3])
    def test_what_is_given_back_comes_again_and_is_counted(self, transport: Transport, batch: int) -> None:
        publish(transport, "a", numbered(3), batch=batch)
        one = transport.subscribe(["a"], "g")
        at = positions_of(drain(one, 3, settle=False))
        for again in (1, 2):
            one.nack("a", [at[1]])
            found = one.receive(3, LONG_MS)
            assert (positions_of(found), again_of(found)) == ([at[1]], [again])
        one.settle({"a": at})
        one.flush()
        assert one.receive(1, MOMENT_MS) == []

    @pytest.mark.parametrize("batch", [1, 2])
    def test_what_is_given_back_with_a_delay_does_not_come_before(self, transport: Transport, batch: int) -> None:
        publish(transport, "a", numbered(2), batch=batch)
        one = transport.subscribe(["a"], "g")
        at = positions_of(drain(one, 2, settle=False))
        apart_ms = 60 + 2 * transport.capabilities.redelivery_delay_precision_ms
        before = time.monotonic()
        one.nack("a", [at[0]], delay_ms=20 + apart_ms)
        one.nack("a", [at[1]], delay_ms=20)
        assert one.receive(2, 0) == []
        found = drain(one, 2)
        waited_ms = (time.monotonic() - before) * 1000
        assert positions_of(found) == [at[1], at[0]]
        assert waited_ms >= 20 + apart_ms - transport.capabilities.redelivery_delay_precision_ms

    def test_what_is_given_back_may_go_to_another_member(self, transport: Transport) -> None:
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        publish(transport, "a", numbered(1))
        times, had, until = 0, set[Subscription](), time.monotonic() + LONG_MS / 1000
        while len(had) < 2:
            assert time.monotonic() < until
            for member in (one, two):
                for _, position, _, again, _ in member.receive(1, MOMENT_MS):
                    assert again == times
                    times += 1
                    had.add(member)
                    member.nack("a", [position], delay_ms=5)
        assert [d[3] for share in collect([one, two], 1) for d in share] == [times]

    def test_redelivered_messages_come_first_and_in_stored_order(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10))
        one = transport.subscribe(["a"], "g")
        at = positions_of(drain(one, 6, settle=False))
        one.nack("a", [at[4]])
        one.nack("a", [at[0], at[1]])
        one.nack("a", [at[3]])
        found = drain(one, 8, batch=3)
        assert positions_of(found) == sorted(positions_of(found))
        assert list(zip(frames_of(found), again_of(found), strict=True)) == [
            (f"m{n}".encode(), int(n < 6)) for n in (0, 1, 3, 4, 6, 7, 8, 9)
        ]

    def test_giving_back_what_one_does_not_hold_is_refused(self, transport: Transport) -> None:
        publish(transport, "a", numbered(2))
        one = transport.subscribe(["a"], "g")
        first = drain(one, 1)
        with pytest.raises(ClaimLost):
            one.nack("a", positions_of(first))
        assert frames_of(drain(one, 1)) == [b"m1"]

    def test_a_member_may_come_back_under_its_name(self, transport: Transport) -> None:
        publish(transport, "a", numbered(3))
        one = transport.subscribe(["a"], "g", member="same")
        drain(one, 3, settle=False)
        one.close()
        assert frames_of(drain(transport.subscribe(["a"], "g", member="same"), 3)) == numbered(3)

    def test_stand_bys_take_over_one_after_the_other(self, transport: Transport) -> None:
        publish(transport, "a", numbered(9))
        members = [transport.subscribe(["a"], "g", kind=GroupKind.FAILOVER) for _ in range(3)]
        for n, member in enumerate(members):
            assert [m.receive(1, 0) for m in members[n + 1 :]] == [[]] * (2 - n)
            assert frames_of(drain(member, 3)) == numbered(3, start=3 * n)
            member.receive(2, 0)
            member.close()


__all__ = ("RedeliveryCases",)
