"""Cases: what settles together, and what happens when it may not."""

from __future__ import annotations

import pytest

from edgeserve.core.errors import Fenced
from edgeserve.testing.transport.cases import LONG_MS, TransportCases, drain, frames_of, numbered, positions_of, publish, settle_all
from edgeserve.transport import ClaimLost, Subscription, Transport


def ids_of(first: int, stop: int) -> list[bytes]:
    """16-byte ids that differ."""
    return [n.to_bytes(16, "big") for n in range(first, stop)]


class SettlingCases(TransportCases):
    """Settling in one step, claims that are lost, ids, fences."""

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

    def test_settling_wakes_who_waits_for_the_output(self, transport: Transport) -> None:
        publish(transport, "in", numbered(1))
        one, sink = transport.subscribe(["in"], "g"), transport.subscribe(["out"], "sink")
        found = one.receive(1, LONG_MS)
        assert sink.receive(1, 0) == []
        one.settle({"in": positions_of(found)}, {"out": [b"r"]})
        assert frames_of(sink.receive(1, LONG_MS)) == [b"r"]

    def test_outputs_may_be_settled_without_inputs(self, transport: Transport) -> None:
        subscription = transport.subscribe(["in"], "g")
        subscription.settle({}, {"out": [b"r"]})
        subscription.settle({}, attributes={"a": b"1"})
        subscription.settle({}, attributes={"b": b"2"})
        assert [f for f, _, _ in transport.read("out")] == [b"r"]
        assert subscription.attributes() == {"a": b"1", "b": b"2"}

    def test_positions_of_several_topics_are_settled_at_once(self, transport: Transport) -> None:
        publish(transport, "a", numbered(4))
        publish(transport, "b", numbered(4))
        subscription = transport.subscribe(["a", "b"], "g")
        drain(subscription, 8)
        assert (subscription.floor("a"), subscription.floor("b")) == (4, 4)

    def test_a_position_named_twice_settles_no_other(self, transport: Transport) -> None:
        publish(transport, "a", numbered(4))
        subscription = transport.subscribe(["a"], "g")
        subscription.receive(4, LONG_MS)
        subscription.settle({"a": [0, 0, 2]})
        subscription.close()
        assert positions_of(drain(transport.subscribe(["a"], "g"), 2)) == [1, 3]

    # --- claims that are lost

    def _taken_over(self, transport: Transport, topics: list[str]) -> tuple[Subscription, Subscription]:
        """Two members; of the last topic the first one's position 0 expired and is the second's, 1 and 2 are the first's."""
        one = transport.subscribe(topics, "g", ack_timeout_ms=20)
        two = transport.subscribe(topics[-1:], "g")
        for topic in topics:
            publish(transport, topic, numbered(1))
        drain(one, len(topics), settle=False)
        found = two.receive(1, LONG_MS)
        assert [(d[1], d[3]) for d in found] == [(0, 1)]
        return one, two

    def test_settling_what_was_lost_writes_nothing(self, transport: Transport) -> None:
        one, two = self._taken_over(transport, ["a"])
        fence = transport.fence("log", "one")
        with pytest.raises(ClaimLost) as lost:
            one.settle({"a": [0]}, {"out": [b"r"]}, ids=ids_of(0, 1), decisions=[b"d"], fence=fence, attributes={"k": b"v"})
        assert (lost.value.topic, lost.value.positions) == ("a", frozenset([0]))
        assert list(transport.read("out")) == list(transport.read("log")) == []
        assert two.settled_ids() == [] and two.attributes() == {}
        two.settle({"a": [0]}, {"out": [b"r"]})
        assert [f for f, _, _ in transport.read("out")] == [b"r"]

    def test_the_rest_can_be_settled_again(self, transport: Transport) -> None:
        one, two = self._taken_over(transport, ["b", "a"])
        with pytest.raises(ClaimLost) as lost:
            one.settle({"b": [0], "a": [0]}, {"out": [b"r0", b"r1"]}, ids=ids_of(0, 2))
        assert (lost.value.topic, lost.value.positions) == ("a", frozenset([0]))
        two.settle({"a": [0]}, {"out": [b"r1"]}, ids=ids_of(1, 2))
        assert one.settled_ids() == ids_of(1, 2)
        one.settle({"b": [0]}, {"out": [b"r0"]}, ids=ids_of(0, 1))
        assert [f for f, _, _ in transport.read("out")] == [b"r1", b"r0"]

    def test_what_was_never_claimed_cannot_be_settled(self, transport: Transport) -> None:
        publish(transport, "a", numbered(4))
        subscription = transport.subscribe(["a"], "g")
        subscription.receive(2, LONG_MS)
        with pytest.raises(ClaimLost) as lost:
            subscription.settle({"a": [1, 2, 3]})
        assert lost.value.positions == {2, 3}
        subscription.settle({"a": [0, 1]})
        with pytest.raises(ClaimLost):
            subscription.settle({"a": [1]})
        assert positions_of(drain(subscription, 2)) == [2, 3]

    # --- ids and attributes

    def test_settled_ids_are_seen_by_later_and_by_other_members(self, transport: Transport) -> None:
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        assert one.settled_ids() == two.settled_ids() == []
        one.settle({}, ids=ids_of(0, 3))
        one.settle({}, ids=ids_of(3, 5))
        two.settle({}, ids=ids_of(5, 6))
        assert [i for i in two.settled_ids() if i not in ids_of(5, 6)] == ids_of(0, 5)
        assert [i for i in one.settled_ids() if i not in ids_of(0, 5)] == ids_of(5, 6)
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
        assert one.settled_ids() == ids_of(7, 8)

    def test_the_newest_100_000_ids_are_kept_and_not_all(self, transport: Transport) -> None:
        one = transport.subscribe(["a"], "g")
        for stop in range(2_000, 402_000, 2_000):
            one.settle({}, ids=ids_of(stop - 2_000, stop))
            if stop % 20_000 == 0:
                two = transport.subscribe(["a"], "g")
                kept = two.settled_ids()
                two.close()
                assert kept == ids_of(stop - len(kept), stop)
                assert min(stop, 100_000) <= len(kept) < 350_000

    def test_ids_since_the_oldest_unsettled_message_are_kept(self, transport: Transport) -> None:
        publish(transport, "a", numbered(200))
        one = transport.subscribe(["a"], "g")
        found = one.receive(1, LONG_MS)
        for at in range(0, 398_000, 2_000):
            one.settle({"a": positions_of(one.receive(1, LONG_MS))}, ids=ids_of(at, at + 2_000))
        assert transport.subscribe(["a"], "g").settled_ids() == ids_of(0, 398_000)
        settle_all(one, found)

    def test_attributes_are_shared_and_outlive_members(self, transport: Transport) -> None:
        one, two = transport.subscribe(["a"], "g"), transport.subscribe(["a"], "g")
        one.settle({}, attributes={"x": b"1", "y": b"\0" * 100})
        two.settle({}, attributes={"x": b"2"})
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
        assert [f for f, _, _ in transport.read("log")] == [b"1", b"2", b"4"]

    def test_settling_with_a_lost_fence_writes_nothing(self, transport: Transport) -> None:
        publish(transport, "in", numbered(2))
        one = transport.subscribe(["in"], "g")
        found = one.receive(2, LONG_MS)
        mine = transport.fence("log", "one")
        one.settle({"in": [0]}, decisions=[b"d0"], fence=mine)
        transport.fence("log", "two")
        for decisions in ([b"d1"], []):
            with pytest.raises(Fenced):
                one.settle({"in": [1]}, {"out": [b"r"]}, ids=ids_of(0, 1), decisions=decisions, fence=mine, attributes={"k": b"v"})
        assert [f for f, _, _ in transport.read("log")] == [b"d0"]
        assert list(transport.read("out")) == []
        other = transport.subscribe(["in"], "g")
        assert (other.settled_ids(), other.attributes(), other.floor("in")) == ([], {}, 1)
        settle_all(one, found[1:])

    def test_fences_of_different_logs_have_nothing_to_do_with_each_other(self, transport: Transport) -> None:
        a, b = transport.fence("a.log", "one"), transport.fence("b.log", "two")
        a.append([b"a"])
        b.append([b"b"])
        assert [f for f, _, _ in transport.read("a.log")] == [b"a"]


__all__ = ("SettlingCases",)
