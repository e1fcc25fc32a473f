"""`ByKey`, and `Exact` within keys: what becomes of the items of a key is what a policy of this key's items alone makes of them."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeserve.align import Adapted, ByKey, Exact, JoinSet, Latest, Policy, Released, SpreadRefused, make_policy
from edgeserve.core.errors import ConfigurationError, JoinOverflow, UnknownSource
from edgeserve.core.message import WATERMARK_END

INTERVAL_NS = 3
SOURCES = ("a", "b")


@dataclass(frozen=True)
class Push:
    source: str
    stamp_ns: int
    key: Hashable
    item: str


@dataclass(frozen=True)
class Mark:
    source: str
    watermark_ns: int


@dataclass(frozen=True)
class Now:
    now_ns: int


Event = Push | Mark | Now
Make = Callable[[Sequence[str]], Policy]


class Pairs:
    """A user's own policy: pairs of the newest, made known by watermarks and by a timer."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.newest: dict[str, Any] = {}
        self.due: int | None = None

    def push(self, source: str, stamp_ns: int, item: Any) -> list[Any]:
        self.newest[source] = SimpleNamespace(stamp_ns=stamp_ns, item=item)
        self.due = max(member.stamp_ns for member in self.newest.values()) + 2
        return []

    def watermark(self, source: str, watermark_ns: int) -> list[Any]:
        return self._pair() if all(member.stamp_ns < watermark_ns for member in self.newest.values()) else []

    def advance(self, now_ns: int) -> list[Any]:
        return self._pair() if self.due is not None and now_ns >= self.due else []

    def next_due_ns(self) -> int | None:
        return self.due

    def explain(self) -> str:
        return "pairs of the newest"

    def _pair(self) -> list[Any]:
        self.due = None
        if len(self.newest) < 2:
            return []
        newest, self.newest = self.newest, {}
        return [SimpleNamespace(members=newest)]


POLICIES: dict[str, Make] = {
    "latest": partial(Latest, max_interval_ns=INTERVAL_NS),
    "latest without overlap": partial(Latest, max_interval_ns=INTERVAL_NS, no_overlap=True),
    "latest with a period": partial(Latest, max_interval_ns=INTERVAL_NS, min_period_ns=5),
    "latest with a period, without overlap": partial(Latest, max_interval_ns=INTERVAL_NS, min_period_ns=5, no_overlap=True),
    "exact": Exact,
    "exact on the key": partial(Exact, on="key", max_interval_ns=INTERVAL_NS),
    "a user's own": lambda sources: Adapted(sources, Pairs(sources)),
}


@st.composite
def events(draw: st.DrawFn, keys: Sequence[Hashable] = ("p", "q", "r")) -> list[Event]:
    """What arrives: few event times and keys, so that they meet, ends and beginnings of sources, a clock that may be set back."""
    found: list[Event] = []
    now_ns = 10
    for n in range(draw(st.integers(0, 40))):
        source = draw(st.sampled_from(SOURCES))
        kind = draw(st.integers(0, 8))
        if kind == 0:
            now_ns = max(0, now_ns + draw(st.integers(-3, 8)))
            found.append(Now(now_ns))
        elif kind == 1:
            found.append(Mark(source, draw(st.integers(0, 9) | st.just(WATERMARK_END))))
        else:
            found.append(Push(source, draw(st.integers(0, 9)), draw(st.sampled_from(keys)), f"{source}{n}"))
    return found


def play(join: Policy, event: Event) -> list[JoinSet]:
    if isinstance(event, Push):
        return join.push(event.source, event.stamp_ns, event.item, event.key)
    return join.watermark(event.source, event.watermark_ns) if isinstance(event, Mark) else join.advance(event.now_ns)


def left(join: Policy, sets: Sequence[JoinSet]) -> list[Released]:
    """What has left a join: with final sets, and otherwise."""
    final = [Released(s, m.stamp_ns, m.item, "") for found in sets if found.final for s, m in found.members.items()]
    return final + join.drain()


def items(sets: Sequence[JoinSet]) -> list[tuple[Any, ...]]:
    return [tuple(member.item for member in found.members.values()) for found in sets]


class Model:
    """One policy per key, told everything that is not another key's."""

    def __init__(self, make: Make, keys: Sequence[Hashable]) -> None:
        self.joins = {key: make(SOURCES) for key in keys}
        self.sets: dict[Hashable, list[JoinSet]] = defaultdict(list)

    def play(self, event: Event) -> None:
        for key, join in self.joins.items():
            if not isinstance(event, Push) or event.key == key:
                self.sets[key] += play(join, event)

    def explained(self) -> dict[str, tuple[int, int | None, int | None, Counter[str]]]:
        reports = [join.explain() for join in self.joins.values()]
        found = {}
        for source in SOURCES:
            of = [report[source] for report in reports]
            oldest = [r.oldest_ns for r in of if r.oldest_ns is not None]
            newest = [r.newest_ns for r in of if r.newest_ns is not None]
            dropped = sum((Counter(r.dropped) for r in of), Counter[str]())
            found[source] = (sum(r.held for r in of), min(oldest, default=None), max(newest, default=None), dropped)
        return found


def is_as_the_model(make: Make, join: Policy, happens: list[Event]) -> None:
    keys = ("p", "q", "r")
    model, sets = Model(make, keys), dict[Hashable, list[JoinSet]]()
    key_of = {event.item: event.key for event in happens if isinstance(event, Push)}
    released: list[Released] = []
    leaving = join.leaving
    now_ns, was_set_back = 0, False
    for event in happens:
        model.play(event)
        found = play(join, event)
        for one in found:
            of = {key_of[member.item] for member in one.members.values()}
            assert len(of) == 1, "keys have met"
            sets.setdefault(of.pop(), []).append(one)
        released += left(join, found)
        assert join.leaving is leaving and not leaving
        dues = [due for inner in model.joins.values() if (due := inner.next_due_ns()) is not None]
        due, expected = join.next_due_ns(), min(dues, default=None)
        if isinstance(event, Now):
            was_set_back, now_ns = was_set_back or event.now_ns < now_ns, event.now_ns
        # Who begins to wait when the clock was set back wants to be told so at once.
        assert due == expected or (was_set_back and due == now_ns and expected is not None)
        assert {s: (r.held, r.oldest_ns, r.newest_ns, Counter(r.dropped)) for s, r in join.explain().items()} == model.explained()
    assert {key: items(found) for key, found in sets.items()} == {key: items(found) for key, found in model.sets.items() if found}
    assert len(released) == len({r.item for r in released}), "an item left twice"
    expected = [r for key in keys for r in left(model.joins[key], model.sets[key])]
    assert sorted(released) == sorted(expected)


SET_BACK_MEANWHILE = [Push("b", 0, "q", "b0"), Push("a", 0, "q", "a1"), Now(10), Now(9), Push("a", 0, "q", "a2"), Now(9)]
"""The clock is set back while no key waits for it."""


@given(events(), st.sampled_from(sorted(POLICIES)))
@example(SET_BACK_MEANWHILE, "latest with a period")
def test_each_key_has_the_sets_and_drops_of_a_policy_of_its_own(happens: list[Event], name: str) -> None:
    if name == "a user's own":
        # A lower watermark than the last settles something there, and is one that a join by key does not hand on.
        happens = [event for event in happens if not isinstance(event, Mark)]
    is_as_the_model(POLICIES[name], ByKey(SOURCES, POLICIES[name]), happens)


@given(events())
def test_exact_within_keys_is_an_exact_join_of_each(happens: list[Event]) -> None:
    is_as_the_model(Exact, Exact(SOURCES, on="key_and_time"), happens)


@given(events(), st.randoms(use_true_random=False))
def test_exact_within_keys_makes_the_same_sets_whatever_the_order_of_arrival(happens: list[Event], random: Any) -> None:
    # A source that begins anew after its end has two lives, and the order between these and the other source counts.
    happens = [event for event in happens if isinstance(event, Push) or (isinstance(event, Mark) and event.watermark_ns < WATERMARK_END)]
    queues = [[event for event in happens if event.source == source] for source in SOURCES]
    found = []
    for _ in range(2):
        join, waiting, sets = make_policy("exact", SOURCES, by=True), [queue[:] for queue in queues], list[JoinSet]()
        while any(waiting):
            sets += play(join, random.choice([queue for queue in waiting if queue]).pop(0))
        for source in SOURCES:
            join.watermark(source, WATERMARK_END)
        found.append((sorted(items(sets)), sorted(left(join, sets))))
    assert found[0] == found[1]


@given(events(), st.sampled_from(sorted(POLICIES)), st.integers(1, 4), st.integers(1, 4))
def test_bounds_hold_and_every_item_leaves_once(happens: list[Event], name: str, max_keys: int, max_held: int) -> None:
    join = ByKey(SOURCES, POLICIES[name], max_keys=max_keys, max_held=max_held)
    used: set[str] = set()
    released: list[Released] = []
    for event in happens:
        found = play(join, event)
        used |= {member.item for one in found for member in one.members.values()}
        released += left(join, found)
        held = {source: report.held for source, report in join.explain().items()}
        assert max(held.values()) <= max_held and len(join._entries) <= max_keys
        assert len(join._timers) <= 256 + 2 * max_keys + 1
    pushed = [event.item for event in happens if isinstance(event, Push)]
    assert len(released) == len({r.item for r in released}) and len(released) + sum(held.values() if happens else ()) == len(pushed)
    assert {r.item for r in released if not r.reason} <= used
    assert not {r.item for r in released if r.reason} & used


@given(events(), st.sampled_from(sorted(POLICIES)), st.integers(1, 3), st.integers(1, 4))
def test_overflow_as_an_error_takes_nothing(happens: list[Event], name: str, max_keys: int, max_held: int) -> None:
    join = ByKey(SOURCES, POLICIES[name], max_keys=max_keys, max_held=max_held, overflow="error")
    for event in happens:
        before = join.explain()
        try:
            play(join, event)
        except JoinOverflow:
            assert join.explain() == before
        assert all(r.reason != "overflow" for r in join.drain())


@given(events(), st.sampled_from([name for name in sorted(POLICIES) if name.startswith(("latest", "exact"))]), st.booleans())
def test_restored_state_goes_on_as_a_policy_of_each_key_does(happens: list[Event], name: str, used: bool) -> None:
    """Restored into one join as into one per key: what is made of it afterwards is the same."""
    make, keys = POLICIES[name], ("p", "q", "r")
    cut = len(happens) // 2
    join, model = ByKey(SOURCES, make), Model(make, keys)
    for event in happens[:cut]:
        if isinstance(event, Push):
            for policy in (join, model.joins[event.key]):
                policy.restore(event.source, event.stamp_ns, event.item, event.key, used=used)
        elif isinstance(event, Mark):
            join.watermark(event.source, event.watermark_ns)
            model.play(event)
    sets: list[JoinSet] = []
    for event in [Now(10**6), *happens[cut:], Now(2 * 10**6)]:
        model.play(event)
        sets += play(join, event)
    assert sorted(items(sets)) == sorted(items([one for found in model.sets.values() for one in found]))
    assert sorted(left(join, sets)) == sorted(r for key in keys for r in left(model.joins[key], model.sets[key]))


def test_keys_of_different_types_are_different() -> None:
    for join in (ByKey(SOURCES, Latest), Exact(SOURCES, on="key"), Exact(SOURCES, on="key_and_time")):
        keys = (1, "1", b"1", True, 1.0)
        for key in keys:
            assert join.push("a", 5, f"a of {key!r}", key) == []
        for key in reversed(keys):
            assert items(join.push("b", 5, "b", key)) == [(f"a of {key!r}", "b")]


@pytest.mark.parametrize("join", [ByKey(SOURCES, Latest), Exact(SOURCES, on="key_and_time")])
def test_an_item_without_key_is_dropped_and_named(join: Policy) -> None:
    assert join.push("a", 1, "a1") == []
    join.restore("a", 2, "a2")
    assert join.drain() == [Released("a", 1, "a1", "unmatched"), Released("a", 2, "a2", "unmatched")]
    report = join.explain()["a"]
    assert report.dropped == {"unmatched": 2} and "2 items had no key: stamp them with key= at the source" in report.note


def test_the_least_recently_used_key_makes_room_and_what_was_used_counts_as_used() -> None:
    join = ByKey(SOURCES, Latest, max_keys=2)
    join.push("a", 1, "a of x", "x")
    join.push("a", 1, "a of y", "y")
    assert items(join.push("b", 1, "b of x", "x")) == [("a of x", "b of x")]
    join.push("a", 1, "a of z", "z")
    assert join.drain() == [Released("a", 1, "a of y", "overflow")]
    join.push("a", 2, "newer of z", "z")
    join.push("a", 1, "again of y", "y")
    assert join.drain() == [
        Released("a", 1, "a of z", "superseded"),
        Released("a", 1, "a of x", ""),
        Released("b", 1, "b of x", ""),
    ]
    report = join.explain()["a"]
    assert report.dropped == {"overflow": 1, "superseded": 1}
    assert "keys with items held: 2 of 2" in report.note and "2 keys were forgotten to make room: raise max_held" in report.note


def test_max_held_counts_over_all_keys_and_frees_the_key_of_that_source() -> None:
    join = ByKey(SOURCES, Latest, max_held=2)
    join.push("b", 1, "b of u", "u")
    for key in "xyz":
        join.push("a", 1, f"a of {key}", key)
    assert join.drain() == [Released("a", 1, "a of x", "overflow")]
    assert (join.explain()["a"].held, join.explain()["b"].held) == (2, 1)


def test_overflow_as_an_error_lets_a_newer_item_of_a_known_key_in() -> None:
    join = ByKey(SOURCES, Latest, max_keys=1, overflow="error")
    join.push("a", 1, "a0", "x")
    with pytest.raises(JoinOverflow, match="holds 1 keys already; raise max_held"):
        join.push("a", 1, "a", "y")
    join.push("a", 2, "a1", "x")
    assert join.drain() == [Released("a", 1, "a0", "superseded")]


def test_a_period_counts_for_each_key() -> None:
    join = ByKey(["a"], partial(Latest, min_period_ns=100))
    for number, key in enumerate("xy"):
        join.push("a", number, f"{key}0", key)
    assert items(join.advance(1_000)) == [("x0",), ("y0",)]
    join.push("a", 2, "y1", "y")
    assert join.advance(1_050) == [] and join.next_due_ns() == 1_100
    join.push("a", 2, "z0", "z")
    assert join.next_due_ns() == 0 and items(join.advance(1_060)) == [("z0",)]
    join.push("a", 3, "x1", "x")
    assert items(join.advance(1_100)) == [("y1",), ("x1",)]


def test_a_clock_set_back_delays_no_key_by_more_than_a_period() -> None:
    join = ByKey(["a"], partial(Latest, min_period_ns=100))
    for number in range(2):
        join.push("a", number, f"x{number}", "x")
        if not number:
            assert items(join.advance(1_000_000)) == [("x0",)]
    assert join.advance(500) == [] and join.next_due_ns() == 600
    assert items(join.advance(600)) == [("x1",)]


def test_a_watermark_settles_what_a_users_own_policy_holds_of_any_key() -> None:
    join = ByKey(SOURCES, lambda sources: Adapted(sources, Pairs(sources)))
    for key in "xyz":
        for source in SOURCES:
            join.push(source, 5 if key != "y" else 9, source + key, key)
    assert items(join.watermark("a", 6)) == [("ax", "bx"), ("az", "bz")]
    assert join.watermark("a", 6) == [] and items(join.watermark("b", 10)) == [("ay", "by")]


def test_sets_that_a_key_makes_of_a_watermark_it_slept_through_come_with_its_next_item() -> None:
    class Again(Pairs):
        def _pair(self) -> list[Any]:
            return [SimpleNamespace(members=dict(self.newest))] if len(self.newest) == 2 else []

    join = ByKey(SOURCES, lambda sources: Adapted(sources, Again(sources)))
    for source in SOURCES:
        join.push(source, 5, source, "x")
    assert len(join.advance(100)) == 1 and join.explain()["a"].held == 0
    assert join.watermark("a", 6) == []
    assert items(join.push("a", 7, "a1", "x")) == [("a", "b")]


def test_empty_keys_are_forgotten() -> None:
    join = ByKey(SOURCES, partial(Latest, no_overlap=True))
    for key in range(1_000):
        join.push("a", key, f"a{key}", key)
        assert len(join.push("b", key, f"b{key}", key)) == 1
    assert not join._entries and len(join.drain()) == 2_000


class Counted(Exact):
    """Counts how often any of them is told a watermark."""

    told = 0

    def watermark(self, source: str, watermark_ns: int) -> list[JoinSet]:
        Counted.told += 1
        return super().watermark(source, watermark_ns)

    def is_empty(self) -> bool:
        return False  # so that all keys are remembered


def test_watermarks_and_the_time_go_to_the_keys_that_have_something_to_do() -> None:
    join, Counted.told = ByKey(SOURCES, Counted), 0
    for key in range(1_000):
        for source in SOURCES:
            join.push(source, 5, f"{source}{key}", key)
    join.push("a", 5, "waits", "w")
    assert Counted.told == 0
    join.watermark("b", 6)
    assert Counted.told == 1 and join.drain() == [Released("a", 5, "waits", "unmatched")]
    join.push("a", 7, "a", 0)
    assert Counted.told == 2
    latest, asked = ByKey(["a"], partial(Latest, min_period_ns=10**6)), []
    for key in range(1_000):
        latest.push("a", key, f"a{key}", key)
        asked += latest.advance(key)
        latest.push("a", key, f"b{key}", key)
    assert len(asked) == 1_000 and len(latest._timers) == 1_000 and latest.next_due_ns() == 10**6
    assert items(latest.advance(10**6 + 1)) == [("b0",), ("b1",)]


def test_a_source_that_ended_and_began_anew_while_a_key_was_idle() -> None:
    join = ByKey(SOURCES, Counted)
    join.watermark("a", 50)
    for source in SOURCES:
        join.push(source, 60, f"{source}0", "x")
    join.watermark("a", WATERMARK_END)
    join.watermark("a", 10)
    join.push("a", 30, "a1", "x")
    assert items(join.push("b", 30, "b1", "x")) == [("a1", "b1")]
    join.watermark("a", 5)
    assert join.explain()["a"].watermark_ns == 10


def test_spreads_that_are_too_large_are_named_whichever_key_they_are_of() -> None:
    join = ByKey(SOURCES, partial(Latest, max_interval_ns=10), max_keys=2)
    assert join.max_interval_ns == 10
    for key, stamp_ns in (("x", 60), ("y", 40), ("z", 50)):
        join.push("a", 0, f"a{key}", key)
        assert join.push("b", stamp_ns, f"b{key}", key) == []
        assert join.spread_refused() == SpreadRefused("a", "b", stamp_ns) and join.spread_refused() is None
    join.push("a", 0, "a", "u")  # by now x and y are forgotten
    report = join.explain()["b"]
    assert report.nearest_miss_ns == 40
    assert "key 'y': " in report.note and "'b' was 40 ns ahead of 'a'" in report.note


def test_explain_says_what_the_key_that_waits_longest_lacks() -> None:
    join = ByKey(SOURCES, Counted)
    join.push("a", 7, "a7", "x")
    join.push("a", 5, "a5", "y")
    join.watermark("a", 3)
    reports = join.explain()
    assert (reports["a"].held, reports["a"].oldest_ns, reports["a"].newest_ns, reports["a"].watermark_ns) == (2, 5, 7, 3)
    assert reports["a"].note.startswith("keys with items held: 2 of 2; key 'x': its oldest item lacks 'b'")
    assert reports["b"].note == "keys with items held: 0 of 2"


def test_the_nearest_miss_within_keys_is_of_one_key() -> None:
    join = Exact(SOURCES, on="key_and_time")
    join.push("a", 100, "ax", "x")
    join.push("b", 101, "by", "y")
    assert join.explain()["a"].nearest_miss_ns is None
    join.push("b", 105, "bx", "x")
    report = join.explain()["a"]
    assert report.nearest_miss_ns == 5 and report.note.startswith("keys with items held: 1; ")
    join.watermark("b", 200)
    assert [r.item for r in join.drain()] == ["ax"] and join.explain()["b"].nearest_miss_ns == 5


def test_an_item_that_a_policy_refuses_is_not_held() -> None:
    class Refusing(Pairs):
        def push(self, source: str, stamp_ns: int, item: Any) -> list[Any]:
            raise ValueError("not this one")

    join = make_policy(Refusing, SOURCES, by=True)
    with pytest.raises(ValueError, match="not this one"):
        join.push("a", 1, "a1", "x")
    assert join.explain()["a"].held == 0 and join.drain() == []


def test_one_object_pushed_twice_is_released_twice() -> None:
    join = ByKey(SOURCES, Latest)
    for stamp_ns in (1, 2, 3):
        join.push("a", stamp_ns, "same", "x")
    assert [r.stamp_ns for r in join.drain()] == [1, 2] and join.explain()["a"].held == 1


def test_a_policy_that_drains_and_refuses_in_its_own_way_is_asked() -> None:
    class Own(Latest):
        def drain(self) -> list[Released]:
            return [Released(r.source, r.stamp_ns, r.item, r.reason.upper()) for r in super().drain()]

        def spread_refused(self) -> SpreadRefused | None:
            return SpreadRefused("a", "b", 7)

    join = ByKey(SOURCES, Own)
    join.push("a", 1, "a1", "x")
    join.push("a", 2, "a2", "x")
    assert join.drain() == [Released("a", 1, "a1", "SUPERSEDED")] and join.spread_refused() == ("a", "b", 7)


# --- as users give it ---------------------------------------------------------------------------------------------


def test_named_joins_by_key() -> None:
    latest = make_policy("latest", SOURCES, by=True, max_held=7, min_interval_ms=5, overflow="error")
    assert isinstance(latest, ByKey) and (latest.max_keys, latest.max_held, latest.overflow) == (7, None, "error")
    exact = make_policy("exact", SOURCES, by=True, max_held=7)
    assert isinstance(exact, Exact) and (exact.on, exact.max_held) == ("key_and_time", 7)


@pytest.mark.parametrize(("on", "found"), [("time", "key_and_time"), ("key", "key"), ("key_and_time", "key_and_time")])
@pytest.mark.parametrize("ready", [True, False])
def test_an_exact_join_keeps_its_options_and_one_by_key_stays_what_it_is(on: Any, found: str, ready: bool) -> None:
    made: Any = partial(Exact, on=on, max_held=3, max_interval_ns=9, overflow="error")
    join = make_policy(made(SOURCES) if ready else made, SOURCES, by=True)
    assert isinstance(join, Exact)
    assert (join.on, join.max_held, join.max_interval_ns, join.overflow) == (found, 3, 9, "error")


@pytest.mark.parametrize("join", [Pairs, Pairs(SOURCES), lambda sources: Pairs(sources), lambda sources: Adapted(sources, Pairs(sources))])
def test_a_users_own_policy_serves_each_key_alone(join: Any) -> None:
    made = make_policy(join, SOURCES, by=True, max_held=5)
    assert isinstance(made, ByKey) and made.max_held == 5
    made.push("a", 1, "ax", "x")
    made.push("b", 1, "by", "y")
    assert made.advance(100) == []
    made.push("a", 1, "ax1", "x")
    made.push("b", 1, "bx", "x")
    assert items(made.advance(200)) == [("ax1", "bx")]


class Locked(Pairs):
    """Cannot be copied."""

    def __init__(self, sources: Sequence[str]) -> None:
        super().__init__(sources)
        self.lock = threading.Lock()


ONE = Latest(SOURCES)


@pytest.mark.parametrize(
    ("join", "options", "message"),
    [
        (Locked(SOURCES), {}, "a ready Locked cannot serve several keys, and cannot be copied .*: give join= its class"),
        (lambda sources: ONE, {}, "one Latest cannot serve several keys"),
        ("newest", {}, "'newest' is not known"),
        ("exact", {"min_interval_ms": 5}, "min_interval_ms does not work with join='exact'"),
        (Pairs, {"no_overlap": True}, "no_overlap does not work with a policy of your own"),
        (Latest(["a", "c"]), {}, "the join is of"),
        (lambda: None, {}, "cannot be made"),
        ("latest", {"max_held": 0}, "max_keys and max_held must be at least 1"),
        ("latest", {"overflow": "wait"}, "overflow='wait' is not known"),
        ("latest", {"on": "key"}, "on"),
    ],
)
def test_what_cannot_work_is_named(join: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_policy(join, SOURCES, by=True, **options)


def test_unknown_sources_and_what_makes_no_policy_are_named() -> None:
    join = ByKey(SOURCES, Latest)
    for call in (lambda: join.push("z", 1, None, "k"), lambda: join.watermark("z", 1), lambda: join.restore("z", 1, None, "k")):
        with pytest.raises(UnknownSource, match="'z' is not part of this join"):
            call()
    with pytest.raises(ConfigurationError, match="made 7 for the sources"):
        ByKey(SOURCES, lambda sources: 7)  # type: ignore[arg-type,return-value]
