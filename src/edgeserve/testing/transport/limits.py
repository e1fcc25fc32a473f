"""Cases: what is kept, for how long, how full the store may be, and how far a sender may run ahead."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeserve.core.errors import StoreFull
from edgeserve.testing.transport.cases import (
    LONG_MS,
    MOMENT_MS,
    Open,
    TransportCases,
    drain,
    frames_of,
    numbered,
    positions_of,
    publish,
    settle_all,
)
from edgeserve.transport import GroupKind, Transport

_KB = b"x" * 1000


class LimitCases(TransportCases):
    """Retention, the store's size, the send window."""

    def _bounded(self, open: Open, **limits: float) -> Transport:
        """A connection to a store that keeps no more than it was told to."""
        transport = open()
        if not transport.capabilities.retention_by_size:
            pytest.skip("retention_by_size: the engine keeps whole segments, so that what is kept is not known to the message")
        return open(**limits)

    def _held(self, transport: Transport) -> None:
        """Of an engine whose senders wait for the groups."""
        if not transport.capabilities.holds_senders:
            pytest.skip("holds_senders: the send window counts what the broker has not confirmed, its backlog is the buffer")

    def test_what_is_settled_goes_when_the_topic_grows_beyond_its_size(self, open: Open) -> None:
        transport = self._bounded(open, retention_mb=0.1)
        publish(transport, "a", [_KB] * 2_000, batch=10)
        info = transport.topic_info("a")
        assert info.next == 2_000
        assert 1_800 < info.first < 2_000
        assert info.stored_bytes < 130_000
        found = [position for _, position, _ in transport.read("a")]
        assert found == list(range(info.first, 2_000))
        assert positions_of(transport.subscribe(["a"], "late").receive(1, LONG_MS)) == [info.first]

    def test_what_a_group_has_not_settled_is_kept_whatever_the_size(self, open: Open) -> None:
        transport = self._bounded(open, retention_mb=0.1)
        subscription = transport.subscribe(["a"], "g")
        publisher = transport.publisher("a", send_window=10**9)
        frames = [_KB + str(n).encode() for n in range(1_000)]
        for at in range(0, 1_000, 10):
            publisher.publish(frames[at : at + 10])
        assert transport.topic_info("a").first == 0
        held = subscription.receive(1, LONG_MS)
        assert frames_of(drain(subscription, 999)) == frames[1:]
        publish(transport, "a", [_KB] * 200, batch=10)
        assert transport.topic_info("a").first == 0
        subscription.settle({"a": positions_of(held)})
        drain(subscription, 200)
        publish(transport, "a", [_KB] * 200, batch=10)
        assert transport.topic_info("a").first > 900
        drain(subscription, 200)

    @pytest.mark.parametrize("size_mb", [1, 1_000], ids=["full", "retention"])
    def test_one_held_message_does_not_keep_what_is_settled_after_it(self, open: Open, size_mb: int) -> None:
        transport = self._bounded(open, size_mb=size_mb, retention_mb=0.1 if size_mb > 1 else 10)
        publish(transport, "a", [b"held", _KB], batch=2)
        one = transport.subscribe(["a"], "g")
        held = positions_of(one.receive(1, LONG_MS))
        drain(one, 1)
        for n in range(60):
            publish(transport, "a", numbered(100, _KB.decode()), batch=10)
            if n == 30:
                held += positions_of(one.receive(1, LONG_MS))
                drain(one, 99)
            else:
                drain(one, 100)
        info = transport.topic_info("a")
        assert (info.first, one.floor("a")) == (0, 0)
        assert info.stored_bytes < (1 << 20 if size_mb == 1 else 1_400_000)
        kept = [position for _, position, _ in transport.read("a")]
        assert kept[:3] == [0, 1, 3002] and kept[-1] == 6_001 and kept == sorted(set(kept))
        # To whoever comes later what was let go is not there, and no damage.
        late = transport.subscribe(["a"], "late")
        assert positions_of(drain(late, len(kept))) == kept
        assert late.floor("a") == transport.topic_info("a").next
        one.close(worked_on=True)
        again = transport.subscribe(["a"], "g")
        assert positions_of(drain(again, 2)) == held
        for _ in range(10):
            publish(transport, "a", [_KB] * 300, batch=10)
            drain(again, 300)
            drain(late, 300)
        assert transport.topic_info("a").first > 7_500

    def test_what_is_settled_goes_when_it_is_old(self, open: Open) -> None:
        transport = self._bounded(open, retention_s=0.02)
        subscription = transport.subscribe(["a"], "g")
        publish(transport, "a", numbered(500), batch=50)
        drain(subscription, 450)
        threading.Event().wait(0.03)  # only time makes messages old
        publish(transport, "a", numbered(1_000), batch=50)
        assert 400 <= transport.topic_info("a").first <= 450
        assert positions_of(drain(subscription, 1_050))[0] == 450

    def test_a_full_store_says_who_holds_it_and_goes_on_when_that_one_settles(self, open: Open) -> None:
        transport = self._bounded(open, size_mb=1, retention_mb=0.1)
        transport.subscribe(["a"], "slow").close()
        publisher, sent = transport.publisher("a"), 0
        with pytest.raises(StoreFull, match="'slow'"):
            while sent < 5_000:
                publisher.publish([_KB] * 10)
                sent += 10
        assert 500 < sent < 1_100
        assert transport.topic_info("a").next == sent
        subscription = transport.subscribe(["a"], "slow")
        drain(subscription, sent // 2)
        publisher.publish([_KB])
        assert len(drain(subscription, sent // 2 + 1)) == sent // 2 + 1

    def test_a_store_that_is_full_of_a_tasks_inputs_can_be_worked_off(self, open: Open) -> None:
        transport = self._bounded(open, size_mb=1, retention_mb=0.1)
        transport.subscribe(["in"], "g").close()
        transport.subscribe(["out"], "sink").close()
        sent = 0
        with pytest.raises(StoreFull):
            while sent < 5_000:
                publish(transport, "in", [_KB] * 100, batch=100)
                sent += 100
        one, sink = transport.subscribe(["in"], "g"), transport.subscribe(["out"], "sink")
        for _ in range(sent // 20):
            found = one.receive(20, LONG_MS)
            one.settle({"in": positions_of(found)}, {"out": frames_of(found)}, ids=[b"i" * 16] * len(found))
        assert len(drain(sink, sent)) == sent
        publish(transport, "in", [_KB] * 100, batch=100)

    def test_settling_into_a_full_store_writes_nothing_and_may_be_repeated(self, open: Open) -> None:
        transport = self._bounded(open, size_mb=1, retention_mb=0.1)
        transport.subscribe(["out"], "slow").close()
        publish(transport, "in", numbered(2))
        one = transport.subscribe(["in"], "g")
        one.receive(2, LONG_MS)
        publish(transport, "out", [_KB] * 900, batch=100)
        outputs = {"out": [_KB * 1_500]}
        for _ in range(2):
            with pytest.raises(StoreFull):
                one.settle({"in": [0]}, outputs, ids=[b"i" * 16])
        assert (one.floor("in"), transport.topic_info("out").next) == (0, 900)
        drain(transport.subscribe(["out"], "slow"), 900)
        one.settle({"in": [0]}, outputs, ids=[b"i" * 16])
        assert (one.floor("in"), transport.topic_info("out").next) == (1, 901)

    def test_a_forgotten_group_holds_no_space(self, open: Open) -> None:
        transport = self._bounded(open, size_mb=1, retention_mb=0.1)
        transport.subscribe(["a"], "gone").close()
        with pytest.raises(StoreFull):
            publish(transport, "a", [_KB] * 5_000, batch=10)
        transport.delete_group("a", "gone")
        publish(transport, "a", [_KB] * 5_000, batch=10)

    def test_the_first_message_of_a_topic_may_be_what_finds_the_store_full(self, open: Open) -> None:
        transport = self._bounded(open, size_mb=1, retention_mb=10)
        one = transport.subscribe(["old"], "g")
        publish(transport, "old", [_KB] * 1_000, batch=100)
        drain(one, 1_000)
        publish(transport, "new", [_KB * 100])
        assert [f for f, _, _ in transport.read("new")] == [_KB * 100]

    def test_a_publisher_waits_for_a_slow_group_that_moves(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        self._held(transport)
        subscription = transport.subscribe(["a"], "g")
        sending = threads.submit(publish, transport, "a", numbered(3_000), batch=10, send_window=100)
        most = 0
        for _ in range(300):
            drain(subscription, 10)
            most = max(most, transport.topic_info("a").groups["g"].backlog)
        sending.result(LONG_MS / 1000)
        assert most <= 100 + 10 + 100 // 8

    def test_settled_outputs_wait_for_a_slow_group_that_moves(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        self._held(transport)
        publish(transport, "in", numbered(300))
        one, sink = transport.subscribe(["in"], "g"), transport.subscribe(["out"], "sink")

        def work() -> None:
            for _ in range(300):
                found = one.receive(1, LONG_MS)
                one.settle({"in": positions_of(found)}, {"out": [b"r"] * 100})

        working = threads.submit(work)
        most = 0
        for _ in range(300):
            drain(sink, 100)
            most = max(most, transport.topic_info("out").groups["sink"].backlog)
        working.result(LONG_MS / 1000)
        assert most <= 10_000 + 100 + 10_000 // 8

    def test_a_publisher_does_not_hang_on_a_group_that_stands_still(self, transport: Transport) -> None:
        standing = transport.subscribe(["a"], "g")
        moving = transport.subscribe(["a"], "h", kind=GroupKind.BROADCAST)
        publish(transport, "a", numbered(1_000), batch=10, send_window=50)
        assert transport.topic_info("a").groups["g"].backlog == 1_000
        assert len(drain(moving, 1_000)) == len(drain(standing, 1_000)) == 1_000

    def test_a_publisher_does_not_wait_for_groups_without_members(self, transport: Transport) -> None:
        transport.subscribe(["a"], "g").close()
        before = time.monotonic()
        publish(transport, "a", numbered(100), batch=1, send_window=10)
        assert transport.topic_info("a").groups["g"].backlog == 100
        assert time.monotonic() - before < LONG_MS / 1000

    @pytest.mark.parametrize("kind", [GroupKind.SHARED, GroupKind.FAILOVER])
    def test_nobody_waits_for_a_member_that_holds_back_no_senders(self, transport: Transport, kind: GroupKind) -> None:
        subscription = transport.subscribe(["a"], "g", kind=kind, holds_senders=False)
        waits = 0

        def waiting() -> bool:
            nonlocal waits
            waits += 1
            return False

        publisher = transport.publisher("a", send_window=50)
        publisher.stopping = waiting
        for frame in numbered(1_000):
            publisher.publish([frame])
        publisher.close()
        assert waits <= (0 if transport.capabilities.holds_senders else 20)  # a broker's sender asks whether there is anybody
        assert len(drain(subscription, 1_000)) == 1_000

    def test_a_publisher_waits_for_members_that_are_to_hold_it_back(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        """Two members share the messages; on every engine a sender is no further ahead than its window, and what is sent at once."""
        members = [transport.subscribe(["a"], "g", holds_senders=True) for _ in range(2)]
        sent = [0]

        def send() -> None:
            publisher = transport.publisher("a", send_window=100)
            for frame in numbered(2_000):
                publisher.publish([frame])
                sent[0] += 1
            publisher.close()

        sending = threads.submit(send)
        taken, most = 0, 0
        while taken < 2_000:
            for member in members:
                found = member.receive(10, MOMENT_MS)
                if found:
                    settle_all(member, found)
                most = max(most, sent[0] - taken)
                taken += len(found)
        sending.result(LONG_MS / 1000)
        assert most <= 100 + 20 + (13 if transport.capabilities.holds_senders else 400)


__all__ = ("LimitCases",)
