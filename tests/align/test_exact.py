"""`Exact`: the sets are those of an oracle that sees all input at once, whatever the order of arrival between sources."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.align import Exact, JoinSet, Released
from edgeserve.core.errors import ConfigurationError, EdgeServeError, JoinOverflow, UnknownSource
from edgeserve.core.message import WATERMARK_END

INTERVAL_NS = 3


@dataclass(frozen=True)
class Push:
    source: str
    stamp_ns: int
    key: str | None
    item: str


@dataclass(frozen=True)
class Mark:
    source: str
    watermark_ns: int


Event = Push | Mark
Script = dict[str, list[Event]]


@st.composite
def scripts(draw: st.DrawFn, most_sources: int = 3) -> Script:
    """What each source sends, in its own order: few event times and keys, so that they meet, and watermarks that may go back."""
    script: Script = {}
    for source in "abcd"[: draw(st.integers(1, most_sources))]:
        steps = draw(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["p", "q", None]), st.integers(0, 3)), max_size=14))
        script[source] = [
            Mark(source, stamp) if kind == 0 else Push(source, stamp, key, f"{source}{n}") for n, (stamp, key, kind) in enumerate(steps)
        ]
    return script


def interleaved(script: Script, order: Sequence[int]) -> list[Event]:
    """One order of arrival that keeps each source's own order."""
    queues = {source: deque(events) for source, events in script.items()}
    arrival: list[Event] = []
    choices = iter([*order, *[0] * sum(map(len, queues.values()))])
    while any(queues.values()):
        open_queues = [queue for queue in queues.values() if queue]
        arrival.append(open_queues[next(choices) % len(open_queues)].popleft())
    return arrival


def play(join: Exact, events: Sequence[Event]) -> list[JoinSet]:
    sets: list[JoinSet] = []
    for event in events:
        if isinstance(event, Push):
            sets += join.push(event.source, event.stamp_ns, event.item, event.key)
        else:
            sets += join.watermark(event.source, event.watermark_ns)
    return sets


def end(join: Exact) -> None:
    for source in join.sources:
        join.watermark(source, WATERMARK_END)


def items(sets: Sequence[JoinSet]) -> list[tuple[Any, ...]]:
    return sorted(tuple(member.item for member in found.members.values()) for found in sets)


def left(join: Exact, sets: Sequence[JoinSet]) -> list[Released]:
    """What has left the join: with its sets, which are all final, and otherwise."""
    assert all(found.final for found in sets)
    return [Released(s, m.stamp_ns, m.item, "") for found in sets for s, m in found.members.items()] + join.drain()


def oracle(script: Script, on: str) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """The sets, and every item's reason, from the whole input: late ones out, then the queues of each value from their heads on."""
    reasons: dict[str, str] = {}
    queues: dict[Any, dict[str, list[Push]]] = defaultdict(lambda: {source: [] for source in script})
    for source, events in script.items():
        watermark = -1
        for event in events:
            if isinstance(event, Mark):
                watermark = max(watermark, event.watermark_ns)
            elif event.stamp_ns < watermark:
                reasons[event.item] = "late"
            elif on == "key" and event.key is None:
                reasons[event.item] = "unmatched"
            else:
                queues[event.stamp_ns if on == "time" else event.key][source].append(event)
    sets = []
    for by_source in queues.values():
        while all(by_source.values()):
            heads = [queue[0] for queue in by_source.values()]
            oldest = min(heads, key=lambda event: event.stamp_ns)
            if max(event.stamp_ns for event in heads) - oldest.stamp_ns > INTERVAL_NS:
                by_source[oldest.source].pop(0)
                reasons[oldest.item] = "unmatched"
                continue
            sets.append(tuple(event.item for event in heads))
            for queue in by_source.values():
                reasons[queue.pop(0).item] = ""
        for queue in by_source.values():
            reasons |= {event.item: "unmatched" for event in queue}
    return sorted(sets), reasons


@given(scripts(), st.lists(st.integers(0, 5)), st.sampled_from(["time", "key"]))
def test_sets_and_drops_are_those_of_the_oracle(script: Script, order: list[int], on: Any) -> None:
    join = Exact(list(script), on=on, max_interval_ns=INTERVAL_NS)
    sets = play(join, interleaved(script, order))
    end(join)
    expected_sets, expected_reasons = oracle(script, on)
    assert items(sets) == expected_sets
    released = left(join, sets)
    assert len(released) == len({r.item for r in released}), "an item left twice"
    assert {r.item: r.reason for r in released} == expected_reasons
    for source, report in join.explain().items():
        assert report.held == 0
        assert report.dropped == Counter(r.reason for r in released if r.source == source and r.reason)


@given(scripts(), st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)), st.sampled_from(["time", "key"]))
def test_order_of_arrival_between_sources_does_not_change_the_sets(script: Script, one: list[int], other: list[int], on: Any) -> None:
    found = []
    for order in (one, other):
        join = Exact(list(script), on=on, max_interval_ns=INTERVAL_NS)
        sets = play(join, interleaved(script, order))
        end(join)
        found.append((items(sets), sorted(left(join, sets))))
    assert found[0] == found[1]


@given(scripts(), st.lists(st.integers(0, 5)))
def test_what_is_held_is_exactly_what_can_still_be_in_a_set(script: Script, order: list[int]) -> None:
    join = Exact(list(script))
    taken: dict[int, Counter[str]] = defaultdict(Counter)
    marks = dict.fromkeys(script, -1)
    for event in interleaved(script, order):
        play(join, [event])
        if isinstance(event, Mark):
            marks[event.source] = max(marks[event.source], event.watermark_ns)
        elif event.stamp_ns >= marks[event.source]:
            taken[event.stamp_ns][event.source] += 1
        held: Counter[str] = Counter()
        for stamp_ns, counts in taken.items():
            used = min(counts[source] for source in script)
            if not any(counts[source] == used and marks[source] > stamp_ns for source in script):
                held += Counter({source: counts[source] - used for source in script})
        assert {source: report.held for source, report in join.explain().items()} == {source: held[source] for source in script}


@given(scripts(), st.lists(st.integers(0, 5)), st.integers(1, 4), st.sampled_from(["time", "key"]))
def test_overflow_bounds_what_is_held_and_loses_nothing_silently(script: Script, order: list[int], max_held: int, on: Any) -> None:
    join = Exact(list(script), on=on, max_interval_ns=INTERVAL_NS, max_held=max_held)
    events = interleaved(script, order)
    sets: list[JoinSet] = []
    for event in events:
        sets += play(join, [event])
        assert all(report.held <= max_held for report in join.explain().values())
    end(join)
    released = left(join, sets)
    assert sorted(r.item for r in released) == sorted(event.item for event in events if isinstance(event, Push))
    assert sorted(r.item for r in released if not r.reason) == sorted(item for found in items(sets) for item in found)


@given(scripts(), st.lists(st.integers(0, 5)), st.integers(1, 4), st.sampled_from(["time", "key"]))
def test_overflow_as_an_error_takes_nothing(script: Script, order: list[int], max_held: int, on: Any) -> None:
    join = Exact(list(script), on=on, max_interval_ns=INTERVAL_NS, max_held=max_held, overflow="error")
    taken = []
    sets: list[JoinSet] = []
    for event in interleaved(script, order):
        before = join.explain()
        try:
            sets += play(join, [event])
        except JoinOverflow:
            assert join.explain() == before
            continue
        assert all(report.held <= max_held for report in join.explain().values())
        if isinstance(event, Push):
            taken.append(event.item)
    end(join)
    assert sorted(r.item for r in left(join, sets)) == sorted(taken)


@given(scripts(), st.lists(st.integers(0, 5)), st.integers(0, 20), st.sampled_from(["time", "key"]), st.booleans())
def test_restored_state_goes_on_as_if_nothing_had_happened(script: Script, order: list[int], cut: int, on: Any, marks_first: bool) -> None:
    events = interleaved(script, order)
    join = Exact(list(script), on=on, max_interval_ns=INTERVAL_NS)
    sets = play(join, events[:cut])
    gone = {r.item for r in left(join, sets)}
    restarted = Exact(list(script), on=on, max_interval_ns=INTERVAL_NS)
    marks = [Mark(s, report.watermark_ns) for s, report in join.explain().items() if report.watermark_ns is not None]
    if marks_first:
        play(restarted, marks)
    for event in events[:cut]:
        if isinstance(event, Push) and event.item not in gone:
            restarted.restore(event.source, event.stamp_ns, event.item, event.key)
    play(restarted, marks)
    assert restarted.advance(0) == [] and restarted.drain() == []
    assert {s: r.held for s, r in restarted.explain().items()} == {s: r.held for s, r in join.explain().items()}
    sets += play(restarted, events[cut:])
    assert items(sets) == oracle(script, on)[0]


def test_members_are_in_the_order_of_the_sources() -> None:
    join = Exact(["x", "a", "m"])
    for source in "max":
        sets = join.push(source, 5, source.upper())
    assert [list(found.members) for found in sets] == [["x", "a", "m"]]
    assert sets[0].members["m"].stamp_ns == 5 and sets[0].members["m"].item == "M"
    assert sets[0].final and join.drain() == []


def test_equal_values_pair_first_with_first() -> None:
    join = Exact(["a", "b"])
    for item in ("a0", "a1", "a2"):
        assert join.push("a", 7, item) == []
    assert items(join.push("b", 7, "b0")) == [("a0", "b0")]
    assert items(join.push("b", 7, "b1")) == [("a1", "b1")]
    assert join.explain()["a"].held == 1


def test_a_watermark_at_the_event_time_does_not_settle_it_yet() -> None:
    join = Exact(["a", "b"])
    join.push("a", 100, "a0")
    join.watermark("b", 100)
    assert join.drain() == []
    assert items(join.push("b", 100, "b0")) == [("a0", "b0")]
    join.push("a", 100, "a1")
    join.watermark("b", 101)
    assert [(r.item, r.reason) for r in join.drain()][-1] == ("a1", "unmatched")


def test_a_key_is_settled_only_beyond_the_interval() -> None:
    join = Exact(["a", "b"], on="key", max_interval_ns=10)
    join.push("a", 100, "a0", "k")
    join.watermark("b", 110)
    assert items(join.push("b", 110, "b0", "k")) == [("a0", "b0")]
    join.push("a", 100, "a1", "k")
    join.watermark("b", 111)
    assert join.drain()[-1] == Released("a", 100, "a1", "unmatched")


def test_a_lower_watermark_is_ignored_but_opens_an_ended_source_again() -> None:
    join = Exact(["a", "b"])
    join.watermark("b", 50)
    join.watermark("b", 20)
    assert join.explain()["b"].watermark_ns == 50
    join.push("b", 30, "late")
    join.watermark("b", WATERMARK_END)
    join.push("a", 60, "a0")
    join.push("b", 60, "after the end")
    assert [(r.item, r.reason) for r in join.drain()] == [("late", "late"), ("a0", "unmatched"), ("after the end", "late")]
    join.watermark("b", 10)
    assert join.push("a", 60, "a1") == []
    assert items(join.push("b", 60, "b1")) == [("a1", "b1")]


def test_the_oldest_by_event_time_is_dropped_on_overflow() -> None:
    join = Exact(["a", "b"], max_held=3)
    for stamp_ns in (40, 10, 30, 20, 50, 5):
        join.push("a", stamp_ns, stamp_ns)
    assert [(r.item, r.reason) for r in join.drain()] == [(10, "overflow"), (20, "overflow"), (5, "overflow")]
    assert join.explain()["a"].dropped == {"overflow": 3}
    assert items(join.push("b", 30, "b")) == [(30, "b")]


def test_a_full_source_still_completes_sets_when_overflow_is_an_error() -> None:
    join = Exact(["a", "b"], max_held=1, overflow="error")
    join.push("a", 1, "a1")
    with pytest.raises(JoinOverflow, match="max_held") as caught:
        join.push("a", 2, "a2")
    assert isinstance(caught.value, BufferError) and isinstance(caught.value, EdgeServeError)
    assert items(join.push("b", 1, "b1")) == [("a1", "b1")]
    assert join.push("a", 2, "a2") == []


def test_an_item_without_key_is_dropped_and_named() -> None:
    join = Exact(["a", "b"], on="key")
    join.push("a", 1, "a1")
    assert join.drain() == [Released("a", 1, "a1", "unmatched")]
    assert "no key" in join.explain()["a"].note


def test_keys_too_far_apart_are_refused_and_reported() -> None:
    join = Exact(["a", "b"], on="key", max_interval_ns=10)
    join.push("a", 0, "a0", "k")
    assert join.push("b", 15, "b0", "k") == []
    assert join.drain() == [Released("a", 0, "a0", "unmatched")]
    assert join.spread_refused() == ("a", "b", 15)
    assert join.spread_refused() is None
    assert join.explain()["b"].nearest_miss_ns == 15
    assert items(join.push("a", 20, "a1", "k")) == [("a1", "b0")]


def test_explain_says_what_is_lacking_and_how_near_it_was() -> None:
    join = Exact(["a", "b"])
    join.push("a", 100, "a0")
    join.push("b", 103, "b0")
    join.watermark("b", 90)
    reports = join.explain()
    assert (reports["a"].held, reports["a"].oldest_ns, reports["a"].newest_ns) == (1, 100, 100)
    assert reports["a"].nearest_miss_ns == 3
    assert "'b' (watermark 90)" in reports["a"].note and "3 ns" in reports["a"].note
    assert "'a' (watermark none yet)" in reports["b"].note


def test_a_set_that_only_restored_items_complete_is_left_to_advance() -> None:
    join = Exact(["a", "b"])
    join.restore("a", 1, "a0")
    join.restore("b", 1, "b0")
    assert join.push("a", 1, "a1") == [] and join.next_due_ns() == 0
    assert items(join.advance(0)) == [("a0", "b0")]
    assert join.advance(0) == [] and join.next_due_ns() is None


def test_nothing_is_settled_while_state_is_restored() -> None:
    join = Exact(["a", "b", "c"], on="key", max_interval_ns=3)
    join.restore("a", 10, "a0", "k")
    join.watermark("b", 100)
    assert join.push("c", 10, "c0", "k") == []
    join.restore("b", 10, "b0", "k")
    assert join.drain() == []
    assert items(join.advance(0)) == [("a0", "b0", "c0")]


def test_a_later_item_of_a_key_is_settled_by_its_own_event_time() -> None:
    join = Exact(["a", "b", "c"], on="key", max_interval_ns=3)
    join.push("a", 10, "a0", "k")
    join.push("b", 8, "b0", "k")
    join.watermark("c", 12)
    assert join.drain() == [Released("b", 8, "b0", "unmatched")]


def test_matched_keys_are_forgotten_without_any_watermark() -> None:
    class Key:
        pass

    alive: weakref.WeakSet[Key] = weakref.WeakSet()
    join = Exact(["a", "b"], on="key")
    for stamp_ns in range(20_000):
        key = Key()
        alive.add(key)
        join.push("a", stamp_ns, None, key)
        join.push("b", stamp_ns, None, key)
    assert len(alive) < 10_000


def test_unknown_sources_and_options_are_named() -> None:
    join = Exact(["a", "b"])
    for call in (lambda: join.push("z", 1, None), lambda: join.watermark("z", 1), lambda: join.restore("z", 1, None)):
        with pytest.raises(UnknownSource, match="'z' is not part of this join"):
            call()
    with pytest.raises(ConfigurationError, match="'time' or 'key'"):
        Exact(["a"], on="stamp")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="'drop_oldest' or 'error'"):
        Exact(["a"], overflow="block")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="max_held"):
        Exact(["a"], max_held=0)
    with pytest.raises(ConfigurationError, match="only once"):
        Exact(["a", "a"])
