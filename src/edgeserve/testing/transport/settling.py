"""Cases: what settles together, and what happens when it may not."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest

from edgeserve.core.errors import Fenced
from edgeserve.testing.transport.cases import (
    LONG_MS,
    MOMENT_MS,
    TransportCases,
    acks_of,
    again_of,
    collect,
    drain,
    flush_all,
    frames_of,
    numbered,
    positions_of,
    publish,
    settle_all,
    soon,
    together,
)
from edgeserve.transport import Apart, ClaimLost, Delivery, Frame, GroupKind, Subscription, Transport


def ids_of(first: int, stop: int) -> list[bytes]:
    """16-byte ids that differ."""
    return [n.to_bytes(16, "big") for n in range(first, stop)]


class SettlingCases(TransportCases):
    """Settling in one step, claims that are lost, ids, fences."""

    @pytest.mark.parametrize("kind", [GroupKind.SHARED, GroupKind.FAILOVER])
    def test_one_thread_receives_while_another_settles(self, transport: Transport, threads: ThreadPoolExecutor, kind: GroupKind) -> None:
        subscription, handed = transport.subscribe(["a"], "g", kind=kind), SimpleQueue[list[Delivery]]()

        def receive() -> None:
            left = 4_000
            while left:
                found = subscription.receive(64, LONG_MS)
                left -= len(found)
                handed.put(found)

        receiving, sending = threads.submit(receive), threads.submit(publish, transport, "a", numbered(4_000), batch=7)
        found: list[Delivery] = []
        while len(found) < 4_000:
            some = handed.get(timeout=LONG_MS / 1000)
            ids = ids_of(len(found), len(found) + len(some))
            subscription.settle(acks_of(some), {"out": [b"r"]}, ids=ids, attributes={"n": b"1"})
            found += some
        for each in (receiving, sending):
            each.result(LONG_MS / 1000)
        subscription.flush()
        assert frames_of(found) == numbered(4_000) and {deliveries for _, _, _, deliveries, _ in found} == {0}
        soon(lambda: transport.topic_info("a").groups["g"].backlog == 0)

    def test_outputs_decisions_ids_and_attributes_are_settled_together(self, transport: Transport) -> None:
        publish(transport, "in", numbered(3))
        fence = transport.fence("log", "one")
        one = transport.subscribe(["in"], "g")
        found = one.receive(3, LONG_MS)
        one.settle(
            {"in": positions_of(found)},
            {"out": [b"r0", [b"r", b"1"]], "other": [b"o"]},
            ids=ids_of(0, 2),
            decisions=[b"d0", b"d1"],
            fence=fence,
            attributes={"k": b"v"},
        )
        one.flush()
        assert frames_of(drain(transport.subscribe(["out"], "sink"), 2)) == [b"r0", b"r1"]
        assert [f for f, _, _ in transport.read("other")] == [b"o"]
        assert [f for f, _, _ in transport.read("log")] == [b"d0", b"d1"]
        two = transport.subscribe(["in"], "g")
        assert two.settled_ids() == ids_of(0, 2)
        assert two.attributes() == {"k": b"v"}
        assert two.receive(1, 0) == []
        assert transport.topic_info("in").groups["g"].backlog == 0

    def test_settling_wakes_who_waits_for_the_output(self, transport: Transport, threads: ThreadPoolExecutor) -> None:
        publish(transport, "in", numbered(1))
        one, sink = transport.subscribe(["in"], "g"), transport.subscribe(["out"], "sink")
        found = one.receive(1, LONG_MS)
        assert sink.receive(1, 0) == []
        waiting = threads.submit(sink.receive, 1, LONG_MS)
        one.settle({"in": positions_of(found)}, {"out": [b"r"]})
        assert frames_of(waiting.result(2 * LONG_MS / 1000)) == [b"r"]

    def test_outputs_may_be_settled_without_inputs(self, transport: Transport) -> None:
        subscription = transport.subscribe(["in"], "g")
        subscription.settle({}, {"out": [b"r"]})
        subscription.settle({}, attributes={"a": b"1"})
        subscription.settle({}, attributes={"b": b"2"})
        subscription.flush()
        assert [f for f, _, _ in transport.read("out")] == [b"r"]
        assert subscription.attributes() == {"a": b"1", "b": b"2"}

    def test_an_engine_that_tells_positions_tells_who_is_done_with_them(self, transport: Transport) -> None:
        if not transport.capabilities.tells_positions:
            pytest.skip("the engine does not tell positions")
        assert transport.settled("t") == [(0, 1 << 63)]  # there is no such topic: nothing to wait for
        stored = dict[bytes, int]()
        here = threading.Lock()

        def note(frames: Sequence[Frame], first: int) -> None:
            with here:  # a broker's thread may tell it
                stored.update((bytes(frame), first + n) for n, frame in enumerate(frames))  # type: ignore[arg-type]

        def is_settled(frame: bytes) -> bool:
            return any(lo <= stored[frame] < hi for lo, hi in transport.settled("t"))

        publisher = transport.publisher("t")
        publisher.stored = note
        for frames in ([b"a", b"b"], [b"c"], [b"d"], [b"e"]):
            publisher.publish(frames)
        publisher.flush()
        assert list(stored.items()) == [(frame, at) for frame, at, _ in transport.read("t")]
        assert not any(map(is_settled, stored))  # nobody has seen them
        one, two = transport.subscribe(["t"], "one"), transport.subscribe(["t"], "two")
        assert not any(map(is_settled, stored))
        one.stored = note
        drain(one, 5, settle=False)
        settle_all(two, drain(two, 5, settle=False))
        one.settle({"t": [stored[frame] for frame in (b"a", b"b", b"c", b"e")]}, {"out": [b"r", b"s"]})
        flush_all(one, two)
        assert [(frame, at) for frame, at, _ in transport.read("out")] == [(b"r", stored[b"r"]), (b"s", stored[b"s"])]
        soon(lambda: is_settled(b"a") and is_settled(b"b") and is_settled(b"c"))
        assert not is_settled(b"d")
        one.close()
        transport.delete_group("t", "one")
        soon(lambda: all(map(is_settled, (b"a", b"b", b"c", b"d", b"e"))))

    def test_an_attribute_that_grows_keeps_its_greatest_value(self, transport: Transport) -> None:
        one, two = transport.subscribe(["t"], "g", member="one"), transport.subscribe(["t"], "g", member="two")
        two.settle({}, attributes={"^a": b"60", "a": b"60"})
        two.flush()
        one.settle({}, attributes={"^a": b"40", "a": b"40"})  # it stood still meanwhile
        one.flush()
        two.flush()
        assert one.attributes() == two.attributes() == {"^a": b"60", "a": b"40"}
        one.settle({}, attributes={"^a": b"70"})
        one.flush()
        assert one.attributes()["^a"] == b"70"

    def test_outputs_that_are_to_be_apart_are_not_all_for_one(self, transport: Transport) -> None:
        publish(transport, "in", numbered(1))
        settler = transport.subscribe(["in"], "g")
        members = [transport.subscribe(["out"], "sink") for _ in range(2)]
        (delivery,) = drain(settler, 1, settle=False)
        settler.settle({"in": [delivery[1]]}, {"out": Apart(numbered(200))})
        found = [member.receive(1, LONG_MS) for member in members]  # and neither settles it
        assert all(found)
        for member, some in zip(members, found, strict=True):
            settle_all(member, some)
        rest = collect(members, 200 - len(found[0]) - len(found[1]))
        assert sorted(frames_of(together([*found, *rest]))) == sorted(numbered(200))

    def test_positions_of_several_topics_are_settled_at_once(self, transport: Transport) -> None:
        publish(transport, "a", numbered(4))
        publish(transport, "b", numbered(4))
        subscription = transport.subscribe(["a", "b"], "g")
        found = drain(subscription, 8, settle=False)
        settle_all(subscription, found)
        subscription.flush()
        for topic in ("a", "b"):
            assert subscription.floor(topic) > max(acks_of(found)[topic])
            assert transport.topic_info(topic).groups["g"].backlog == 0

    def test_a_holder_settles_messages_of_several_topics(self, transport: Transport) -> None:
        for topic in ("a", "b"):
            publish(transport, topic, numbered(4))
        one = transport.subscribe(["b", "a"], "g", kind=GroupKind.FAILOVER)
        found = drain(one, 8, settle=False)
        one.settle({topic: at[:2] for topic, at in acks_of(found).items()}, ids=ids_of(0, 2), attributes={"k": b"v"})
        one.settle({"b": acks_of(found)["b"][2:3]})
        one.flush()
        left = {topic: transport.topic_info(topic).groups["g"].backlog for topic in ("a", "b")}
        assert left == {"a": 2, "b": 1}
        one.close()
        two = transport.subscribe(["b", "a"], "g", kind=GroupKind.FAILOVER)
        assert (two.settled_ids(), two.attributes()) == (ids_of(0, 2), {"k": b"v"})
        assert sorted(frames_of(drain(two, 3))) == sorted([*numbered(4)[2:], numbered(4)[3]])

    def test_a_position_named_twice_settles_no_other(self, transport: Transport) -> None:
        publish(transport, "a", numbered(4))
        subscription = transport.subscribe(["a"], "g")
        at = positions_of(drain(subscription, 4, settle=False))
        subscription.settle({"a": [at[0], at[0], at[2]]})
        subscription.close()
        assert positions_of(drain(transport.subscribe(["a"], "g"), 2)) == [at[1], at[3]]

    # --- claims that are lost

    def _taken_over(self, transport: Transport, topics: list[str]) -> tuple[Subscription, Subscription, dict[str, list[int]]]:
        """Two members and what the first one received, a message of each topic; that of the last topic is the second's by now, who is in
        the group for that topic alone."""
        one, two = transport.subscribe(topics, "g", ack_timeout_ms=20), transport.subscribe(topics[-1:], "g")
        for topic in topics:
            publish(transport, topic, numbered(1))
        mine, taken, until = dict[str, list[int]](), False, time.monotonic() + LONG_MS / 1000
        while not taken or topics[0] not in mine:
            assert time.monotonic() < until
            mine |= acks_of(one.receive(len(topics), MOMENT_MS))
            if not taken and (found := two.receive(1, 10 * MOMENT_MS)):
                taken = topics[-1] in mine and again_of(found)[0] >= 1
                if not taken:
                    two.nack(topics[-1], positions_of(found))
        return one, two, mine

    def test_settling_what_was_lost_writes_nothing(self, transport: Transport) -> None:
        one, two, mine = self._taken_over(transport, ["a"])
        fence = transport.fence("log", "one")
        with pytest.raises(ClaimLost) as lost:
            one.settle(mine, {"out": [b"r"]}, ids=ids_of(0, 1), decisions=[b"d"], fence=fence, attributes={"k": b"v"})
        assert (lost.value.topic, lost.value.positions) == ("a", frozenset(mine["a"]))
        flush_all(one, two)
        assert list(transport.read("out")) == list(transport.read("log")) == []
        assert two.settled_ids() == [] and two.attributes() == {}
        two.settle(mine, {"out": [b"r"]})
        two.flush()
        assert [f for f, _, _ in transport.read("out")] == [b"r"]

    def test_the_rest_can_be_settled_again(self, transport: Transport) -> None:
        one, two, mine = self._taken_over(transport, ["b", "a"])
        with pytest.raises(ClaimLost) as lost:
            one.settle({"a": mine["a"], "b": mine["b"]}, {"out": [b"r0", b"r1"]}, ids=ids_of(0, 2))
        assert (lost.value.topic, lost.value.positions) == ("a", frozenset(mine["a"]))
        two.settle({"a": mine["a"]}, {"out": [b"r1"]}, ids=ids_of(1, 2))
        flush_all(two, one)
        assert one.settled_ids() == ids_of(1, 2)
        until, done = time.monotonic() + LONG_MS / 1000, False
        while not done:
            assert time.monotonic() < until
            try:
                one.settle({"b": mine["b"]}, {"out": [b"r0"]}, ids=ids_of(0, 1))
                done = True
            except ClaimLost:  # what is too late may come again to the only member that wants it
                one.receive(1, MOMENT_MS)
        one.flush()
        assert [f for f, _, _ in transport.read("out")] == [b"r1", b"r0"]

    def test_what_was_never_claimed_cannot_be_settled(self, transport: Transport) -> None:
        publish(transport, "a", numbered(4))
        stored = [p for _, p, _ in transport.read("a")]
        subscription = transport.subscribe(["a"], "g")
        at = positions_of(drain(subscription, 2, settle=False))
        assert at == stored[:2]
        with pytest.raises(ClaimLost) as lost:
            subscription.settle({"a": stored[1:]})
        assert lost.value.positions == set(stored[2:])
        subscription.settle({"a": at})
        with pytest.raises(ClaimLost):
            subscription.settle({"a": at[1:]})
        assert positions_of(drain(subscription, 2)) == stored[2:]

    def test_what_one_member_settles_of_a_batch_no_other_gets(self, transport: Transport) -> None:
        publish(transport, "a", numbered(10))
        one = transport.subscribe(["a", "b"], "g")
        found = drain(one, 10, settle=False)
        settle_all(one, found[2:5])
        two = transport.subscribe(["a"], "g")
        one.close()
        assert frames_of(drain(two, 7)) == numbered(2) + numbered(5, start=5)

    # --- ids and attributes

    def test_settled_ids_are_seen_by_later_and_by_other_members(self, transport: Transport) -> None:
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        assert one.settled_ids() == two.settled_ids() == []
        one.settle({}, ids=ids_of(0, 3))
        one.settle({}, ids=ids_of(3, 5))
        one.flush()
        two.settle({}, ids=ids_of(5, 6))
        flush_all(two, one)
        assert [i for i in two.settled_ids() if i not in ids_of(5, 6)] == ids_of(0, 5)
        assert [i for i in one.settled_ids() if i not in ids_of(0, 5)] == ids_of(5, 6)
        assert one.knows_all_ids and two.knows_all_ids
        assert one.settled_ids() == two.settled_ids() == []
        one.close()
        two.close()
        three = transport.subscribe(["a"], "g")
        assert three.settled_ids() == ids_of(0, 6)
        assert three.settled_ids() == []
        assert transport.subscribe(["a"], "other").settled_ids() == []

    def test_a_settle_that_fails_hides_no_ids_of_others(self, transport: Transport) -> None:
        one, two = transport.subscribe(["b", "a"], "g"), transport.subscribe(["b", "a"], "g")
        assert one.settled_ids() == two.settled_ids() == []
        with pytest.raises(ClaimLost):
            one.settle({"a": [0]}, ids=ids_of(0, 1))
        two.settle({}, ids=ids_of(7, 8))
        flush_all(two, one)
        assert one.settled_ids() == ids_of(7, 8)

    def test_the_newest_100_000_ids_are_kept_and_not_all(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g")
        for stop in range(2_000, 402_000, 2_000):
            one.settle({}, ids=ids_of(stop - 2_000, stop))
            if stop % 80_000 == 0:
                one.flush()
                kept = self._kept(transport)
                assert kept == ids_of(stop - len(kept), stop)
                assert len(kept) >= min(stop, 100_000)
        for stop in range(400_001, 400_011):  # letting go may lag behind where so many come at once
            one.settle({}, ids=ids_of(stop - 1, stop))
            one.flush()
        kept = self._kept(transport)
        assert kept == ids_of(400_010 - len(kept), 400_010)
        assert 100_000 <= len(kept) < 350_000

    def _kept(self, transport: Transport) -> list[bytes]:
        """What one that has just come is told."""
        member = transport.subscribe(["a"], "g")
        kept = member.settled_ids()
        member.close()
        return kept

    def test_ids_since_the_oldest_unsettled_message_are_kept(self, transport: Transport) -> None:
        publish(transport, "a", numbered(200), batch=1)
        one = transport.subscribe(["a"], "g")
        found = one.receive(1, LONG_MS)
        for at in range(0, 398_000, 2_000):
            one.settle({"a": positions_of(one.receive(1, LONG_MS))}, ids=ids_of(at, at + 2_000))
        one.flush()
        assert transport.subscribe(["a"], "g").settled_ids() == ids_of(0, 398_000)
        settle_all(one, found)

    def test_attributes_are_shared_and_outlive_members(self, transport: Transport) -> None:
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        one.settle({}, attributes={"x": b"1", "y": b"\0" * 100})
        one.flush()
        two.settle({}, attributes={"x": b"2"})
        flush_all(two, one)
        assert one.attributes() == two.attributes() == {"x": b"2", "y": b"\0" * 100}
        one.close()
        two.close()
        assert transport.subscribe(["a"], "g").attributes() == {"x": b"2", "y": b"\0" * 100}
        assert transport.subscribe(["a"], "other").attributes() == {}

    # --- fences

    def test_a_fence_is_taken_from_whoever_had_it(self, transport: Transport) -> None:
        first = transport.fence("log", "one")
        first.append([b"1", b"2"])
        second = transport.fence("log", "two")
        assert second.epoch > first.epoch and second.topic == "log"
        with pytest.raises(Fenced, match="two"):
            first.append([b"3"])
        second.append([b"4"])
        third = transport.fence("log", "one")
        with pytest.raises(Fenced):
            second.append([b"5"])
        third.append([])
        second.close()
        third.append([b"6"])
        third.close()
        third.close()
        assert [f for f, _, _ in transport.read("log")] == [b"1", b"2", b"4", b"6"]

    def test_settling_with_a_lost_fence_writes_nothing(self, transport: Transport) -> None:
        publish(transport, "in", numbered(2))
        one = transport.subscribe(["in"], "g")
        found = drain(one, 2, settle=False)
        first, second = positions_of(found)
        mine = transport.fence("log", "one")
        one.settle({"in": [first]}, decisions=[b"d0"], fence=mine)
        one.flush()
        transport.fence("log", "two")
        for decisions in ([b"d1"], []):
            with pytest.raises(Fenced):
                one.settle({"in": [second]}, {"out": [b"r"]}, ids=ids_of(0, 1), decisions=decisions, fence=mine, attributes={"k": b"v"})
        one.flush()
        assert [f for f, _, _ in transport.read("log")] == [b"d0"]
        assert list(transport.read("out")) == []
        other = transport.subscribe(["in"], "g")
        assert (other.settled_ids(), other.attributes()) == ([], {})
        assert first < other.floor("in") <= second
        settle_all(one, found[1:])

    def test_the_newest_decision_is_that_of_the_last_settlement(self, transport: Transport) -> None:
        one, two = transport.subscribe(["in"], "g"), transport.subscribe(["in"], "g")
        fence = transport.fence("log", "one")
        assert one.newest_decision("log") is None
        one.settle({}, decisions=[b"d0", b"d1"], fence=fence)
        flush_all(one, two)
        assert [bytes(m.newest_decision("log") or b"") for m in (one, two)] == [b"d1", b"d1"]
        one.settle({}, fence=fence, attributes={"k": b"v"})
        one.settle({}, decisions=[b"d2"], fence=fence)
        one.close()
        two.flush()
        assert bytes(two.newest_decision("log") or b"") == b"d2"
        assert two.attributes() == {"k": b"v"}

    def test_fences_of_different_logs_have_nothing_to_do_with_each_other(self, transport: Transport) -> None:
        a, b = transport.fence("a.log", "one"), transport.fence("b.log", "two")
        a.append([b"a"])
        b.append([b"b"])
        assert [f for f, _, _ in transport.read("a.log")] == [b"a"]


__all__ = ("SettlingCases",)
