"""`Latest`: sets and drops are those of an oracle that remembers everything; the period delays, and loses no last state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.align import JoinSet, Latest, Released
from edgeserve.core.errors import ConfigurationError, UnknownSource

INTERVAL_NS = 4

pushes = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), max_size=40)


def items(sets: Sequence[JoinSet]) -> list[dict[str, Any]]:
    return [{source: member.item for source, member in found.members.items()} for found in sets]


def oracle(sources: str, events: list[tuple[str, int]], no_overlap: bool) -> tuple[list[dict[str, int]], dict[int, str], set[int]]:
    """Sets in order, the reason of each released item, and what is held, by looking at the whole history at every step."""
    history: dict[str, list[tuple[int, int]]] = {source: [] for source in sources}  # (stamp, number), since the last set if no overlap
    sets: list[dict[str, int]] = []
    for number, (source, stamp_ns) in enumerate(events):
        history[source].append((stamp_ns, number))
        if max(history[source]) != (stamp_ns, number) or not all(history.values()):
            continue
        newest = {s: max(history[s]) for s in sources}
        if max(newest.values())[0] - min(newest.values())[0] <= INTERVAL_NS:
            sets.append({s: n for s, (_, n) in newest.items()})
            if no_overlap:
                history = {s: [] for s in sources}
    held = {max(seen)[1] for seen in history.values() if seen}
    used = {number for found in sets for number in found.values()}
    reasons = {n: "" if n in used else "superseded" for n in range(len(events)) if n not in held}
    return sets, reasons, held


@given(pushes, st.integers(1, 3), st.booleans())
def test_sets_and_drops_are_those_of_the_oracle(events: list[tuple[str, int]], width: int, no_overlap: bool) -> None:
    sources = "abc"[:width]
    events = [event for event in events if event[0] in sources]
    join = Latest(list(sources), max_interval_ns=INTERVAL_NS, no_overlap=no_overlap)
    sets: list[JoinSet] = []
    for number, (source, stamp_ns) in enumerate(events):
        sets += join.push(source, stamp_ns, number)
    expected_sets, reasons, held = oracle(sources, events, no_overlap)
    assert items(sets) == expected_sets
    assert all(list(found.members) == list(sources) for found in sets)
    assert all(events[member.item] == (source, member.stamp_ns) for found in sets for source, member in found.members.items())
    released = join.drain()
    assert len(released) == len({r.item for r in released}), "an item left twice"
    assert {r.item: r.reason for r in released} == reasons
    reports = join.explain()
    assert {events[number] for number in held} == {(s, r.newest_ns) for s, r in reports.items() if r.held}
    for source, report in reports.items():
        assert report.dropped == Counter(r.reason for r in released if r.source == source and r.reason)


@given(pushes, st.lists(st.integers(0, 3), max_size=40), st.booleans())
def test_with_a_period_starts_keep_their_distance_and_the_last_state_runs(
    events: list[tuple[str, int]], delays: list[int], no_overlap: bool
) -> None:
    period = 5
    free = Latest(["a", "b"], max_interval_ns=INTERVAL_NS)
    join = Latest(["a", "b"], max_interval_ns=INTERVAL_NS, min_period_ns=period, no_overlap=no_overlap)
    events = [event for event in events if event[0] != "c"]
    now, starts, sets, wanted = 1000, [], [], []
    for number, (source, stamp_ns) in enumerate(events):
        now += delays[number] if number < len(delays) else 1
        assert join.push(source, stamp_ns, number) == []
        wanted += items(free.push(source, stamp_ns, number))
        for found in join.advance(now):
            starts.append(now)
            sets.append(found)
    due = join.next_due_ns()
    if due is not None:
        assert join.advance(due - 1) == []
        sets += join.advance(due)
        starts.append(due)
    assert join.next_due_ns() is None and join.advance(now + 10 * period) == []
    assert all(later - earlier >= period for earlier, later in pairwise(starts))
    released = join.drain()
    held = sum(report.held for report in join.explain().values())
    assert len(released) == len({r.item for r in released}) and len(released) + held == len(events)
    used = {member.item for found in sets for member in found.members.values()}
    assert {r.item for r in released if not r.reason} <= used
    assert not {r.item for r in released if r.reason} & used
    if not no_overlap:
        assert all(found in wanted for found in items(sets))
        ran_without_period = {number for found in wanted for number in found.values()}
        assert {r.item for r in released if r.reason == "throttled"} == {r.item for r in released if r.reason} & ran_without_period


@given(pushes)
def test_an_older_item_never_replaces_a_newer_one(events: list[tuple[str, int]]) -> None:
    join = Latest(list("abc"), max_interval_ns=INTERVAL_NS)
    newest: dict[str, int] = {}
    for source, stamp_ns in events:
        join.push(source, stamp_ns, None)
        newest[source] = max(stamp_ns, newest.get(source, stamp_ns))
        assert join.explain()[source].newest_ns == newest[source]


@given(pushes, st.booleans())
def test_restored_state_never_triggers_and_goes_on(events: list[tuple[str, int]], no_overlap: bool) -> None:
    cut = len(events) // 2
    join = Latest(list("abc"), max_interval_ns=INTERVAL_NS, no_overlap=no_overlap)
    for number, (source, stamp_ns) in enumerate(events[:cut]):
        join.push(source, stamp_ns, number)
    gone = {r.item for r in join.drain()}
    restarted = Latest(list("abc"), max_interval_ns=INTERVAL_NS, no_overlap=no_overlap)
    for number, (source, stamp_ns) in enumerate(events[:cut]):
        if number not in gone:
            restarted.restore(source, stamp_ns, number)
    assert restarted.advance(10**18) == [] and restarted.next_due_ns() is None and restarted.drain() == []
    for number, (source, stamp_ns) in enumerate(events[cut:], cut):
        assert restarted.push(source, stamp_ns, number) == join.push(source, stamp_ns, number)


def test_restoring_the_same_source_twice_keeps_the_newer_and_knows_what_was_used() -> None:
    join = Latest(["a", "b"], min_period_ns=1)
    join.restore("a", 10, "used")
    join.restore("a", 5, "older", used=False)
    join.restore("b", 10, "fresh", used=False)
    assert join.next_due_ns() is None and join.advance(99) == []
    join.push("a", 11, "a1")
    join.push("b", 11, "b1")
    assert join.drain() == [
        Released("a", 5, "older", "superseded"),
        Released("a", 10, "used", ""),
        Released("b", 10, "fresh", "throttled"),
    ]


def test_a_throttled_tail_runs() -> None:
    join = Latest(["a", "b"], min_period_ns=100)
    join.push("b", 0, "b0")
    ran = []
    for number in range(10):
        assert join.push("a", number, number) == []
        ran += items(join.advance(1_000 + number))
    assert ran == [{"a": 0, "b": "b0"}]
    assert join.next_due_ns() == 1_100
    assert join.advance(1_099) == []
    assert items(join.advance(1_100)) == [{"a": 9, "b": "b0"}]
    assert join.advance(9_999) == []
    assert join.explain()["a"].dropped == {"throttled": 8}
    assert [r.reason for r in join.drain()] == [""] + 8 * ["throttled"]


def test_a_clock_set_back_delays_a_set_by_one_period_at_most() -> None:
    join = Latest(["a"], min_period_ns=100)
    join.push("a", 1, "a1")
    assert len(join.advance(1_000_000)) == 1
    join.push("a", 2, "a2")
    assert join.advance(500) == [] and join.next_due_ns() == 600
    assert len(join.advance(600)) == 1


def test_at_equal_event_time_the_later_arrival_replaces() -> None:
    join = Latest(["a", "b"])
    join.push("a", 5, "first")
    join.push("a", 5, "second")
    assert join.drain() == [Released("a", 5, "first", "superseded")]
    assert items(join.push("b", 5, "b")) == [{"a": "second", "b": "b"}]


def test_without_overlap_the_next_set_may_be_older_than_the_last() -> None:
    join = Latest(["a", "b"], max_interval_ns=4, no_overlap=True)
    join.push("a", 100, "a0")
    assert len(join.push("b", 100, "b0")) == 1
    join.push("a", 10, "a1")
    assert items(join.push("b", 12, "b1")) == [{"a": "a1", "b": "b1"}]


def test_a_spread_that_is_too_large_is_named() -> None:
    join = Latest(["camera", "lidar"], max_interval_ns=10)
    join.push("camera", 0, None)
    assert join.push("lidar", 60, None) == []
    assert join.push("camera", 45, None) == []
    assert join.spread_refused() == ("camera", "lidar", 15)
    assert join.spread_refused() is None
    report = join.explain()["camera"]
    assert report.nearest_miss_ns == 15
    assert "'lidar' was 15 ns ahead of 'camera'" in report.note
    assert len(join.push("camera", 50, None)) == 1
    assert join.spread_refused() is None


def test_a_waiting_set_is_given_up_when_its_spread_becomes_too_large() -> None:
    join = Latest(["a", "b"], max_interval_ns=10, min_period_ns=100)
    join.push("a", 0, "a0")
    join.push("b", 0, "b0")
    join.push("a", 50, "a1")
    assert join.next_due_ns() is None and join.advance(10**9) == []
    assert join.drain() == [Released("a", 0, "a0", "throttled")]


def test_explain_names_a_source_that_has_sent_nothing() -> None:
    join = Latest(["a", "b"])
    join.push("a", 1, None)
    join.watermark("b", 7)
    reports = join.explain()
    assert (reports["b"].held, reports["b"].note, reports["b"].watermark_ns) == (0, "no item of 'b' is held", 7)
    assert (reports["a"].held, reports["a"].note, reports["a"].watermark_ns) == (1, "", None)


def test_unknown_sources_and_options_are_named() -> None:
    join = Latest(["a", "b"])
    for call in (lambda: join.push("z", 1, None), lambda: join.watermark("z", 1), lambda: join.restore("z", 1, None)):
        with pytest.raises(UnknownSource, match="'z' is not part of this join; it joins 'a', 'b'"):
            call()
    with pytest.raises(ConfigurationError, match="min_period_ns=-1"):
        Latest(["a"], min_period_ns=-1)
    with pytest.raises(ConfigurationError, match="at least one source"):
        Latest([])
