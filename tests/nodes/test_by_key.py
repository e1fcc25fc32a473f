"""`by=`: a join that runs per key."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.nodes.conftest import crash, drain, fresh, running

from edgeserve import Compute, DataSource, context
from edgeserve.align import Exact
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ConfigurationError, GroupConflict
from edgeserve.core.message import Kind
from edgeserve.core.payload import decode_value
from edgeserve.stage.deadletter import DeadLetter
from edgeserve.transport import Transport, connect, disconnect

# What is by key lies above the engines: two that are embedded, and one that is a broker.
node = pytest.fixture(params=["memory", "local", "nats"], name="node")(fresh)

Send = Callable[..., None]
Results = Callable[..., list[Any]]
DeadLetters = Callable[[str], list[DeadLetter]]
Reading = tuple[str, int]


def room(reading: Reading) -> str:
    return reading[0]


def number(reading: Reading) -> int:
    return reading[1]


def pair(a: Reading, b: Reading) -> tuple[Reading, Reading]:
    return a, b


@pytest.fixture
def keys(transport: Transport) -> Callable[..., list[Any]]:
    """The keys of what is on a topic now."""

    def _keys(topic: str = "dst") -> list[Any]:
        headers = [decode_frame(frame)[0] for frame, _, _ in transport.read(topic)]
        return [header.key for header in headers if header.kind == Kind.DATA]

    return _keys


def test_messages_of_different_keys_never_meet_and_results_carry_the_key(node: str, send: Send, keys: Callable[..., list[Any]]) -> None:
    send("a", [("hall", 1), ("attic", 2)], key=room)
    send("b", [("attic", 3), ("cellar", 4), ("hall", 5), ("attic", 6)], key=room)
    with Compute(pair, node, by=True) as compute:
        found = [next(compute) for _ in range(6)]
    assert found == [None, None, (("attic", 2), ("attic", 3)), None, (("hall", 1), ("hall", 5)), (("attic", 2), ("attic", 6))]
    assert keys() == ["attic", "hall", "attic"]


def test_the_next_stage_joins_by_the_key_of_the_sets(node: str, send: Send, results: Results) -> None:
    for source, shift in (("a", 0), ("b", 10)):
        send(source, [("hall", shift + 1), ("attic", shift + 2)], topic="in", key=room if source == "a" else None)
    send("c", [("attic", 5), ("hall", 6)], topic="pairs", key=room)
    with Compute(pair, node, topic_in="in", topic_out="pairs", output_id="pair", by=room) as first:
        for _ in range(4):
            next(first)
    with Compute(lambda pair, c: (pair[0][0], pair[1][1], c), node, topic_in="pairs", topic_out="out", by=True) as second:
        for _ in range(4):
            next(second)
    assert sorted(results("out")) == [("attic", 12, ("attic", 5)), ("hall", 11, ("hall", 6))]


def test_exact_within_keys(node: str, results: Results, keys: Callable[..., list[Any]]) -> None:
    def when(reading: Reading) -> int:
        return reading[1] % 10

    for source, readings in (("a", [("x", 1), ("y", 2), ("x", 3)]), ("b", [("y", 11), ("y", 12), ("x", 13), ("x", 19)])):
        with DataSource(readings, node, source_id=source, event_time=when, key=room) as ds:
            ds.run()
    with Compute(pair, node, join="exact", by=True) as compute:
        compute.run(until="end")
        assert (compute.counters["sent"], compute.counters["unmatched"]) == (2, 3)
    assert sorted(results()) == [(("x", 3), ("x", 13)), (("y", 2), ("y", 12))] and sorted(keys()) == ["x", "y"]


def test_a_message_without_key_is_dropped_and_explained(node: str, send: Send, results: Results) -> None:
    send("a", [("x", 1)])
    send("b", [("x", 2)], key=room)
    with Compute(pair, node, by=True) as compute:
        assert [next(compute), next(compute)] == [None, None]
        assert compute.counters["unmatched"] == 1
        explained = compute.explain()["sources"]
        assert explained["a"]["note"].startswith("1 items had no key: stamp them with key= at the source")
        assert "keys with items held: 1 of 1" in explained["b"]["note"]
    assert results() == []


@dataclass
class Shot:
    place: str
    number: int = 0


def test_a_function_gets_the_payload_as_the_parameter_is_annotated(node: str, send: Send, keys: Callable[..., list[Any]]) -> None:
    asked: list[tuple[str, Any]] = []
    told: list[dict[str, Any]] = []

    def place(shot: Any) -> int:
        asked.append((context().source_id, shot))
        return len(shot.place)

    def task(a: Shot, b: Shot) -> int:
        told.append(context().keys)
        return a.number + b.number

    send("a", [Shot("hall", 1), Shot("attic", 2)], key=lambda shot: "another")
    send("b", [Shot("cellar", 10), Shot("porch", 20)])
    with Compute(task, node, by=place) as compute:
        assert [next(compute) for _ in range(4)] == [None, None, None, 22]
    assert asked[0] == ("a", Shot("hall", 1)) and asked[2] == ("b", Shot("cellar", 10))
    assert keys() == [5] and told == [{"a": 5, "b": 5}]


def test_a_function_gets_what_the_gate_makes_of_a_payload(node: str, send: Send) -> None:
    send("a", [b"1 x", b"", b"2 y"])
    send("b", [b"3 y"])
    gated = Compute(lambda a, b: a + b, node, gate_in=lambda raw: raw.decode().split() or None, by=lambda words: words[1])
    with gated as compute:
        assert [next(compute) for _ in range(4)] == [None, None, None, ["2", "y", "3", "y"]]
        assert compute.counters["gate"] == 1


def test_what_a_function_cannot_tell_the_key_of_is_a_dead_letter(node: str, send: Send, dead_letters: DeadLetters) -> None:
    def by(value: dict[str, Any]) -> Any:
        return "\ud800" if value["key"] == "half" else value["key"]

    def task(a: dict[str, Any], b: dict[str, Any]) -> str:
        return f"{a['n']}{b['n']}"

    bad = [{"n": 0}, {"key": None}, {"key": 1.5}, {"key": True}, {"key": 2**70}, {"key": "half"}, "no dict"]
    send("a", [*bad, {"key": "x", "n": 1}])
    send("b", [{"key": "x", "n": 2}])
    with Compute(task, node, by=by) as compute:
        assert [next(compute) for _ in range(9)] == [None] * 8 + ["12"]
        assert (compute.counters["dead_letter"], compute.counters["schema"]) == (6, 1)
    letters = dead_letters("src.src->dst.dead-letters")
    assert [letter.reason for letter in letters] == ["dead_letter"] * 6 + ["schema"]
    assert letters[0].error == "KeyError: 'key'" and 'value["key"]' in letters[0].traceback
    assert [letter.error for letter in letters[1:4]] == [
        f"ConfigurationError: the function of by= returned {shown}: a key is a str, int or bytes; convert it there"
        for shown in ("None (NoneType)", "1.5 (float)", "True (bool)")
    ]
    assert "71 bits" in letters[4].error and "not valid Unicode" in letters[5].error and "does not fit the annotation" in letters[6].error


def test_an_error_with_a_reason_of_its_own_counts_as_a_dead_letter(node: str, send: Send) -> None:
    send("a", [b"\xff"])
    with Compute(lambda a, b: a, node, by=bytes.decode) as compute:
        assert next(compute) is None
        assert compute.counters["dead_letter"] == 1


def test_keys_of_different_types_are_different(node: str, send: Send, results: Results) -> None:
    send("a", [1, "1", b"1"], key=lambda value: value)
    send("b", [b"1", 1], key=lambda value: value)
    with Compute(lambda a, b: (a, b), node, by=True) as compute:
        for _ in range(5):
            next(compute)
    assert results() == [(b"1", b"1"), (1, 1)]


@pytest.mark.parametrize("by", [None, True])
def test_a_clock_that_is_set_back_stalls_no_join(monkeypatch: pytest.MonkeyPatch, by: Literal[True] | None) -> None:
    """The clock is a stand-in: a machine's own cannot be set for one test."""
    real, behind_ns, node = time.time_ns, [0], f"memory://{uuid.uuid4().hex}"
    monkeypatch.setattr(time, "time_ns", lambda: real() - behind_ns[0])
    with (
        DataSource(range(3), node, source_id="a", topic="src", key=lambda n: "same") as source,
        Compute(lambda a: a, node, min_interval_ms=50, by=by, timeout_ms=20_000) as compute,
    ):
        for n in range(3):
            next(source)
            source.flush()
            while (got := next(compute)) is None:
                pass  # it was taken, and its set waits
            assert got == n
            behind_ns[0] += 3_600 * 10**9


def test_min_interval_ms_counts_for_each_key(node: str, send: Send) -> None:
    send("a", [("x", 1), ("x", 2), ("y", 3), ("x", 4)], key=room)
    with Compute(lambda a: a, node, min_interval_ms=60_000, by=True, timeout_ms=5_000) as compute:
        found = [result for _ in range(4) if (result := next(compute)) is not None]
        assert found == [("x", 1), ("y", 3)]
        assert compute.explain()["sources"]["a"]["dropped"] == {"throttled": 1}


def test_what_all_keys_hold_is_bounded(node: str, send: Send) -> None:
    send("a", [(name, 1) for name in "xyz"], key=room)
    send("b", [(name, 2) for name in "xyz"], key=room)
    with Compute(pair, node, by=True, max_held=2) as compute:
        found = [result for _ in range(6) if (result := next(compute)) is not None]
        assert found == []  # each key of b makes room that the next one would have needed
        assert compute.counters["overflow"] == 4
        assert "keys were forgotten to make room: raise max_held" in compute.explain()["sources"]["a"]["note"]


class First:
    """A user's own policy: the first of each source."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources, self.held = sources, dict[str, Any]()

    def push(self, source: str, stamp_ns: int, item: Any) -> list[Any]:
        self.held.setdefault(source, SimpleNamespace(stamp_ns=stamp_ns, item=item))
        if len(self.held) < len(self.sources):
            return []
        held, self.held = self.held, {}
        return [SimpleNamespace(members=held)]

    def advance(self, now_ns: int) -> list[Any]:
        return []

    def explain(self) -> str:
        return "the first of each"


@pytest.mark.parametrize("join", [First, First(["a", "b"]), lambda sources: First(sources)], ids=["class", "ready", "function"])
def test_a_users_own_policy_runs_per_key(node: str, send: Send, join: Any) -> None:
    send("a", [("x", 1), ("y", 2), ("x", 3)])
    send("b", [("y", 4), ("x", 5)])
    with Compute(pair, node, join=join, by=room) as compute:
        assert [next(compute) for _ in range(5)] == [None, None, None, (("y", 2), ("y", 4)), (("x", 1), ("x", 5))]


def test_a_function_gives_a_join_on_the_key_its_keys(node: str) -> None:
    for source, readings in (("a", [("x", 1), ("y", 2)]), ("b", [("y", 4), ("x", 30)])):
        with DataSource(readings, node, source_id=source, event_time=number) as ds:
            ds.run()
    found: list[Any] = []
    with Compute(lambda a, b: found.append((a, b)), node, join=partial(Exact, on="key", max_interval_ns=5), by=room) as compute:
        compute.run(until="end")
    assert found == [(("y", 2), ("y", 4))]


def test_members_of_a_group_must_agree_on_the_key(node: str) -> None:
    options: dict[str, Any] = {"group": "g"}
    with Compute(pair, node, by=True, **options):
        with pytest.raises(GroupConflict, match="it has by=True, this one has nothing of the kind"), Compute(pair, node, **options):
            pass
        with pytest.raises(GroupConflict, match="it has by=True, this one has by=a function"), Compute(pair, node, by=room, **options):
            pass


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (lambda a: a, {"by": True}, "a task of the one parameter 'a' joins nothing: leave it out, or give min_interval_ms="),
        (pair, {"by": False}, "by=False: it is None, True for the key"),
        (pair, {"by": "room"}, "by='room': it is None, True for the key"),
        (pair, {"by": True, "join": "exact", "min_interval_ms": 5}, "min_interval_ms does not work with join='exact'"),
    ],
)
def test_what_cannot_work_is_refused(task: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Compute(task, "memory://refused", **options)


def test_sets_that_replicas_share_keep_the_key_of_a_function(node: str, keys: Callable[..., list[Any]]) -> None:
    told: list[dict[str, Any]] = []

    def task(a: Reading, b: Reading) -> int:
        told.append(context().keys)
        return a[1] + b[1]

    options: dict[str, Any] = {"group": "g", "topic_in": "in", "topic_out": "out", "output_id": "pair", "by": room, "join": "exact"}
    replicas = [Compute(task, node, f"w{n}", **options) for n in range(2)]
    readings = [(f"room {n % 7}", n) for n in range(70)]
    with running(*replicas):
        for source in "ab":
            with DataSource(readings, node, source_id=source, topic="in", event_time=number, key=lambda _: "another") as ds:
                ds.run()
    rooms = sorted(name for name, _ in readings)
    assert sorted(keys("out")) == rooms and sorted(told, key=str) == [{"a": name, "b": name} for name in rooms]


# --- crashes ------------------------------------------------------------------------------------------------------

MESSAGES = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 9)), max_size=25)
LIVES = st.lists(st.integers(0, 8), max_size=6)


def send_all(node: str, messages: list[tuple[str, str, int]]) -> None:
    options: dict[str, Any] = {"topic": "in", "event_time": number, "message_id": str, "key": room}
    for source, key, stamp in messages:
        with DataSource([(key, stamp)], node, source_id=source, **options) as ds:
            next(ds)


def compute_to(node: str, out: str, options: dict[str, Any]) -> Compute:
    return Compute(pair, node, topic_in="in", topic_out=out, timeout_ms=0, **options)


def delivered(node: str, topic: str) -> list[Any]:
    """Source id, key and value of each result, each there once. Not by a sink, whose journal takes some MB."""
    transport, found = connect(node), dict[bytes, Any]()
    try:
        for frame, _, _ in transport.read(topic):
            header, payload = decode_frame(frame)
            if header.kind == Kind.DATA:
                assert header.id not in found
                found[header.id] = header.source_id, header.key, decode_value(header.schema, payload)
    finally:
        disconnect(transport)
    return list(found.values())


@pytest.mark.filterwarnings("ignore::edgeserve.core.errors.SkewWarning")
@pytest.mark.parametrize("by", [True, room], ids=["header", "function"])
@pytest.mark.parametrize("options", [{"join": "exact"}, {"join": "latest"}, {"no_overlap": True}, {"max_time_diff_ms": 3e-6}], ids=str)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, lives=LIVES)
def test_the_sets_do_not_depend_on_crashes(
    options: dict[str, Any], by: Any, messages: list[tuple[str, str, int]], lives: list[int]
) -> None:
    node, options = f"memory://{uuid.uuid4().hex}", options | {"by": by}
    send_all(node, messages)
    for steps in lives:
        crash(compute_to(node, "cut", options), steps)
    with compute_to(node, "cut", options) as last:
        drain(last)
    with compute_to(node, "whole", options) as undisturbed:
        drain(undisturbed)
    found = delivered(node, "cut")
    assert found == delivered(node, "whole")
    assert all(source_id == "worker1" and key == value[0][0] == value[1][0] for source_id, key, value in found)
