"""Cases: what comes again, when, and how often it is said to have come."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeserve.testing.transport.cases import LONG_MS, TransportCases, drain, frames_of, numbered, positions_of, publish, settle_all
from edgeserve.transport import ClaimLost, GroupKind, Transport


class RedeliveryCases(TransportCases):
    """Members that leave, time that runs out, messages given back."""

    def test_what_a_leaving_member_held_goes_to_others_as_if_never_delivered(self, transport: Transport) -> None:
        publish(transport, "a", numbered(6))
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        held = one.receive(4, LONG_MS)
        assert len(held) == 4
        settle_all(one, held[1:2])
        one.close()
        found = drain(two, 5)
        assert [(f, d[3]) for f, d in zip(frames_of(found), found, strict=True)] == [(f"m{n}".encode(), 0) for n in (0, 2, 3, 4, 5)]

    @pytest.mark.parametrize("alone", [True, False])
    def test_what_a_leaving_member_worked_on_comes_again_as_a_redelivery(self, transport: Transport, alone: bool) -> None:
        publish(transport, "a", numbered(3))
        one = transport.subscribe(["a"], "g")
        others = [] if alone else [transport.subscribe(["a"], "g")]
        held = one.receive(3, LONG_MS)
        settle_all(one, held[:1])
        one.close(worked_on=True)
        found = drain(others[0] if others else transport.subscribe(["a"], "g"), 2)
        assert [(f, d[3]) for f, d in zip(frames_of(found), found, strict=True)] == [(b"m1", 1), (b"m2", 1)]

    def test_a_waiting_member_is_told_when_another_leaves(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        publish(transport, "a", numbered(1))
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        held = one.receive(1, LONG_MS)
        waiting = threads.submit(two.receive, 1, None)
        one.close()
        assert frames_of(waiting.result(LONG_MS / 1000)) == frames_of(held)

    def test_what_the_last_member_held_waits_for_the_next(self, transport: Transport) -> None:
        publish(transport, "a", numbered(5))
        one = transport.subscribe(["a"], "g")
        drain(one, 1)
        one.receive(3, LONG_MS)
        one.close()
        found = drain(transport.subscribe(["a"], "g"), 4)
        assert frames_of(found) == numbered(4, start=1)
        assert {d[3] for d in found} == {0}

    def test_what_is_not_settled_in_time_comes_again_and_is_counted(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", ack_timeout_ms=30)
        two = transport.subscribe(["a"], "g", ack_timeout_ms=30)
        publish(transport, "a", numbered(2))
        assert frames_of(one.receive(2, LONG_MS)) == numbered(2)
        found = drain(two, 2, settle=False)
        assert [(d[1], d[3]) for d in found] == [(0, 1), (1, 1)]
        with pytest.raises(ClaimLost):
            one.settle({"a": [0]})
        again = drain(one, 2, settle=False)
        assert [(d[1], d[3]) for d in again] == [(0, 2), (1, 2)]

    def test_a_member_that_is_too_late_may_get_its_own_message_again(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", ack_timeout_ms=30)
        transport.subscribe(["a"], "g", ack_timeout_ms=30)
        publish(transport, "a", numbered(1))
        assert [d[3] for d in one.receive(1, LONG_MS)] == [0]
        assert [(d[1], d[3]) for d in one.receive(1, LONG_MS)] == [(0, 1)]
        one.settle({"a": [0]})

    def test_what_is_settled_in_time_does_not_come_again(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g", ack_timeout_ms=LONG_MS)
        two = transport.subscribe(["a"], "g", ack_timeout_ms=20)
        publish(transport, "a", numbered(4))
        settle_all(one, one.receive(2, LONG_MS))
        settle_all(two, two.receive(2, LONG_MS))
        assert one.receive(1, 60) == two.receive(1, 60) == []

    def test_what_is_given_back_comes_again_and_is_counted(self, transport: Transport) -> None:
        publish(transport, "a", numbered(3))
        one = transport.subscribe(["a"], "g")
        one.receive(3, LONG_MS)
        one.nack("a", [1])
        found = one.receive(3, LONG_MS)
        assert [(d[1], d[3]) for d in found] == [(1, 1)]
        one.nack("a", [1])
        assert [(d[1], d[3]) for d in one.receive(3, LONG_MS)] == [(1, 2)]
        one.settle({"a": [0, 1, 2]})
        assert one.receive(1, 0) == []

    def test_what_is_given_back_with_a_delay_does_not_come_before(self, transport: Transport) -> None:
        publish(transport, "a", numbered(2))
        one = transport.subscribe(["a"], "g")
        one.receive(2, LONG_MS)
        before = time.monotonic()
        one.nack("a", [0], delay_ms=80)
        one.nack("a", [1], delay_ms=20)
        assert one.receive(2, 0) == []
        found = drain(one, 2)
        waited_ms = (time.monotonic() - before) * 1000
        assert positions_of(found) == [1, 0]
        assert waited_ms >= 80 - transport.capabilities.redelivery_delay_precision_ms

    def test_what_is_given_back_may_go_to_another_member(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        publish(transport, "a", numbered(1))
        assert len(one.receive(1, LONG_MS)) == 1
        waiting = threads.submit(two.receive, 1, None)
        one.nack("a", [0], delay_ms=5)
        found = waiting.result(LONG_MS / 1000)
        assert [(d[1], d[3]) for d in found] == [(0, 1)]
        two.settle({"a": [0]})

    def test_redelivered_messages_come_first_and_in_stored_order(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10))
        one = transport.subscribe(["a"], "g")
        one.receive(6, LONG_MS)
        one.nack("a", [4])
        one.nack("a", [0, 1])
        one.nack("a", [3])
        found = drain(one, 8, batch=3)
        assert [(d[1], d[3]) for d in found] == [(0, 1), (1, 1), (3, 1), (4, 1), (6, 0), (7, 0), (8, 0), (9, 0)]

    def test_giving_back_what_one_does_not_hold_is_refused(self, transport: Transport) -> None:
        publish(transport, "a", numbered(2))
        one = transport.subscribe(["a"], "g")
        drain(one, 1)
        with pytest.raises(ClaimLost):
            one.nack("a", [0])
        assert positions_of(drain(one, 1)) == [1]

    def test_a_member_may_come_back_under_its_name(self, transport: Transport) -> None:
        publish(transport, "a", numbered(3))
        one = transport.subscribe(["a"], "g", member="same")
        one.receive(3, LONG_MS)
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
