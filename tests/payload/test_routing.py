"""How routing='auto' decides: figures in, decisions out, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeserve.payload.routing import AVOID_S, FORGET_S, HOLD_S, LEAST, MARGIN, Edge, Mode, Route, Router, Use

MB = 1_000_000
ORIGIN = "http://camera:7465"


def use(seen: int, used: int, *, group: str = "g", host: str = "there", near: bool = False, unreachable: Sequence[str] = ()) -> Use:
    return Use(group=group, host=host, near=near, sources={"a": (seen, used)}, unreachable=tuple(unreachable))


class Live:
    """A router whose producer sends 10 messages/s, with what groups say of each second."""

    def __init__(self, *, near: bool = False, size: int = MB, why_not: str = "") -> None:
        self.router = Router("a", 0.0, origin=ORIGIN, host="here", near=near, why_not=why_not)
        self.now_s, self.size = 0.0, size

    def seconds(self, count: int, *uses: Use) -> list[Mode]:
        modes: list[Mode] = []
        for _ in range(count):
            self.now_s += 1
            self.router.sent(10, 10 * self.size, self.now_s)
            for each in uses:
                self.router.heard(each, self.now_s)
            modes.append(self.router.decide(self.now_s))
        return modes


def test_payloads_stay_in_place_until_somebody_says_what_he_uses() -> None:
    live = Live()
    assert set(live.seconds(60)) == {"lazy"}
    assert "no group has said" in live.router.reason
    assert list(live.router.edges()) == []


def test_a_share_that_is_used_is_fetched() -> None:
    live = Live()
    assert set(live.seconds(60, use(10, 1))) == {"lazy"}
    (edge,) = live.router.edges()
    assert edge.group == "g"
    assert edge.share == pytest.approx(0.1)
    # Into the broker and out of it, or once to where it is used.
    assert edge.eager_bytes_s == pytest.approx(2 * 10 * MB, rel=0.01)
    assert edge.lazy_bytes_s == pytest.approx(0.1 * 10 * MB, rel=0.01)
    assert edge.saved_bytes == pytest.approx(59 * 10 * MB * 1.9, rel=0.02)
    assert "costs 0.10 payloads, sending all 2.00" in live.router.reason


def test_what_all_take_from_a_broker_beside_them_is_sent() -> None:
    live = Live()
    # In and nothing out, or out to two hosts.
    uses = [use(10, 10, host="b", group="one", near=True), use(10, 10, host="c", group="two", near=True)]
    modes = live.seconds(40, *uses)
    assert modes[-1] == "eager"
    assert modes.index("eager") + 1 >= HOLD_S
    assert live.router.since_s == modes.index("eager") + 1
    one, two = live.router.edges()
    assert one.eager_bytes_s + two.eager_bytes_s == pytest.approx(10 * MB, rel=0.01)
    assert one.lazy_bytes_s + two.lazy_bytes_s == pytest.approx(2 * 10 * MB, rel=0.01)
    # The first ten seconds were the dear way.
    assert live.seconds(60, *uses)[-1] == "eager" and next(live.router.edges()).saved_bytes > 0
    # And back, when less is used.
    modes = live.seconds(40, use(10, 1, host="b", group="one", near=True), use(10, 1, host="c", group="two", near=True))
    assert modes[-1] == "lazy"


def test_groups_on_one_host_share_a_fetch() -> None:
    live = Live()
    live.seconds(30, use(10, 10, group="one"), use(10, 10, group="two"))
    one, two = live.router.edges()
    assert one.lazy_bytes_s + two.lazy_bytes_s == pytest.approx(10 * MB, rel=0.01)
    assert one.eager_bytes_s + two.eager_bytes_s == pytest.approx(3 * 10 * MB, rel=0.01)


def test_members_of_a_group_share_its_messages() -> None:
    live = Live()
    live.seconds(30, use(8, 8, host="b"), use(2, 0, host="c"))
    (edge,) = live.router.edges()
    assert edge.share == pytest.approx(0.8, rel=0.02)
    assert edge.eager_bytes_s == pytest.approx(2 * 10 * MB, rel=0.01)
    assert edge.lazy_bytes_s == pytest.approx(0.8 * 10 * MB, rel=0.03)


def test_on_its_own_host_a_payload_is_read_in_place() -> None:
    live = Live(near=True)
    assert set(live.seconds(30, use(10, 10, host="here", near=True))) == {"lazy"}
    assert live.router.reason == "what is used is read in place, on this host"
    (edge,) = live.router.edges()
    assert edge.eager_bytes_s == edge.lazy_bytes_s == 0


def test_memory_without_a_name_is_no_one_s_own() -> None:
    live = Live()
    live.router.host = ""
    live.seconds(30, use(10, 10, host=""))
    assert next(live.router.edges()).lazy_bytes_s > 0


@pytest.mark.parametrize(("size", "expected"), [(65_536, "eager"), (MB, "lazy")])
def test_a_round_trip_counts_for_small_payloads(size: int, expected: str) -> None:
    """All are used, the broker is on the producer's host: either way each crosses the network once."""
    live = Live(near=True, size=size)
    assert live.seconds(60, use(10, 10))[-1] == expected


def test_a_difference_within_the_margin_changes_nothing() -> None:
    live = Live(near=True, size=65_536)
    assert live.seconds(60, use(10, 10))[-1] == "eager"
    # 1.1 payloads sent, 0.95 fetched.
    assert set(live.seconds(60, use(100, 63))) == {"eager"}
    assert "not worth a change" in live.router.reason


def test_a_host_that_cannot_fetch_gets_payloads_with_their_messages() -> None:
    live = Live()
    live.seconds(5, use(10, 1))
    assert live.seconds(1, use(0, 0, unreachable=["http://another:1"])) == ["lazy"]
    assert live.seconds(1, use(0, 0, unreachable=[ORIGIN])) == ["eager"]
    assert ORIGIN in live.router.reason and "5 min" in live.router.reason
    # What was under way then fails as well, and says nothing new.
    live.seconds(10, use(10, 1, unreachable=[ORIGIN]))
    modes = live.seconds(int(AVOID_S), use(10, 1))
    assert modes.count("eager") == AVOID_S - 11 and modes[-1] == "lazy"
    # Each time for twice as long.
    live.seconds(1, use(10, 1, unreachable=[ORIGIN]))
    assert live.seconds(int(2 * AVOID_S), use(10, 1)).index("lazy") == 2 * AVOID_S - 1


def test_without_an_address_for_others_nothing_is_left_to_be_fetched() -> None:
    live = Live(why_not="because")
    assert set(live.seconds(60, use(10, 0))) == {"eager"}
    assert live.router.reason == "because"


def test_a_group_that_is_gone_counts_no_more_and_one_that_waits_does() -> None:
    live = Live()
    live.seconds(10, use(10, 10, group="one"), use(10, 10, group="two", host="elsewhere"))
    live.seconds(int(FORGET_S) + 1, use(10, 10, group="one"))
    assert [edge.group for edge in live.router.edges()] == ["one"]
    # Nothing is sent, so nobody has anything to say.
    live.now_s += 1000 * FORGET_S
    live.router.sent(0, 0, live.now_s)
    live.router.decide(live.now_s)
    assert [edge.group for edge in live.router.edges()] == ["one"]
    assert live.router.rate_hz < 0.01


def test_what_others_say_is_bounded() -> None:
    live = Live()
    for n in range(1000):
        live.router.heard(use(1, 5, group=f"g{n}", host=f"h{n}"), 1.0)
        live.router.heard(use(1, 5, group="g0", host=f"h{n}"), 1.0)
    live.router.sent(1, MB, 2.0)
    edges = list(live.router.edges())
    assert len(edges) == 256 and all(edge.share <= 1 for edge in edges)


def test_records_are_read_back_and_what_is_none_is_refused() -> None:
    live = Live()
    live.seconds(3, use(10, 1))
    route = Route(
        source="a",
        producer="p",
        mode="lazy",
        since_ns=1,
        mean_bytes=live.router.mean_bytes,
        rate_hz=live.router.rate_hz,
        reason=live.router.reason,
        edges=tuple(live.router.edges()),
    )
    for record in (route, use(3, 2, unreachable=[ORIGIN])):
        assert msgspec.convert(msgspec.to_builtins(record), Use | Route) == record
    edge = msgspec.to_builtins(route.edges[0])
    for wrong in (float("nan"), float("inf"), -1.0, "much"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(edge | {"share": wrong}, Edge)


@settings(max_examples=30)
@given(st.integers(), st.floats(0, 1))
def test_a_share_that_stays_as_it_is_does_not_go_to_and_fro(seed: int, share: float) -> None:
    random, live, modes = Random(seed), Live(near=True), list[Mode]()
    for _ in range(300):
        used = sum(random.random() < share for _ in range(10))
        # In and out cost 1.2 payloads, up to 2.1 would be fetched.
        modes += live.seconds(1, *(use(10, used, host=host, group=host, near=near) for host, near in (("b", True), ("c", False))))
    assert sum(a != b for a, b in pairwise(modes)) <= 1


uses = st.builds(
    lambda group, host, near, seen, used, lost: use(seen, used, group=group, host=host, near=near, unreachable=[ORIGIN] if lost else []),
    st.sampled_from(["one", "two", "three"]),
    st.sampled_from(["here", "there", "elsewhere", ""]),
    st.booleans(),
    st.integers(0, 300),
    st.integers(0, 300),
    st.sampled_from([False] * 20 + [True]),
)
ticks = st.lists(st.tuples(st.floats(0.001, 40), st.integers(0, 200), st.integers(1, 10**8), st.lists(uses, max_size=4)), max_size=60)


@given(ticks, st.booleans())
def test_it_changes_for_a_reason_and_not_too_often(ticks: list[tuple[float, int, int, list[Use]]], near: bool) -> None:
    router = Router("a", 0.0, origin=ORIGIN, host="here", near=near)
    now_s, changed_s, sent, heard = 0.0, 0.0, 0, 0
    for took_s, count, size, said in ticks:
        now_s += took_s
        router.sent(count, count * size, now_s)
        sent += count
        before = router.mode
        lost = before == "lazy" and any(each.unreachable for each in said)
        for each in said:
            router.heard(each, now_s)
            heard += each.sources["a"][0]
        mode = router.decide(now_s)
        edges = list(router.edges())
        assert all(0 <= edge.share <= 1 and edge.eager_bytes_s >= 0 and edge.lazy_bytes_s >= 0 for edge in edges)
        # No way costs more than all payloads in and out, or one to each other host.
        bytes_s = router.rate_hz * router.mean_bytes * (1 + 1e-6)
        assert sum(edge.eager_bytes_s for edge in edges) <= bytes_s * (1 + len(edges))
        assert sum(edge.lazy_bytes_s for edge in edges) <= bytes_s * 3
        assert router.reason
        if mode != before:
            if mode == "lazy" or not lost:
                assert now_s - changed_s >= HOLD_S
                assert max(sent, heard) >= LEAST
                eager, lazy = _prices(router)
                assert (eager < lazy * (1 - MARGIN)) if mode == "eager" else (lazy < eager * (1 - MARGIN))
            changed_s, sent, heard = now_s, 0, 0
            assert router.since_s == now_s


def _prices(router: Router) -> tuple[float, float]:
    prices = [price for _, price in router._priced()]
    return sum(price.eager for price in prices) if prices else router._in, sum(price.lazy for price in prices)
