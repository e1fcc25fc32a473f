"""What is derived of declarations: who reads and writes which topic, in which group; and what is refused, with its line."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, TypedDict
from uuid import UUID

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve import pipeline as room
from edgeserve.align import Exact, Latest
from edgeserve.core.errors import ConfigurationError
from edgeserve.pipeline import Graph, InvalidPipeline, Part, Pipeline
from edgeserve.sinks import JsonLinesSink, ParquetSink
from edgeserve.stage.keywords import check_keywords
from edgeserve.transport import connect, disconnect


def wiring(graph: Graph) -> dict[str, tuple[str, str, str]]:
    return {part.name: (part.topic_in, part.topic_out, part.group) for part in graph.parts}


def cameras(**keywords: Any) -> Pipeline:
    app = Pipeline("room")
    for name in ("cam1", "cam2"):
        app.add_source(name, range(3), event_time=int, **keywords)
    return app


def test_what_is_taken_together_shares_a_topic() -> None:
    app = cameras()
    app.add_task("detect", lambda cam1, cam2: cam1 + cam2, join="exact")
    app.add_sink("show", print, of="detect")
    app.add_sink("keep", print, of="detect")
    assert wiring(app.graph()) == {
        "cam1": ("", "room.cam1+cam2", ""),
        "cam2": ("", "room.cam1+cam2", ""),
        "detect": ("room.cam1+cam2", "room.detect", "detect"),
        "show": ("room.detect", "", "show"),
        "keep": ("room.detect", "", "keep"),
    }


def test_who_is_taken_alone_and_with_others_has_a_topic_of_its_own_and_a_relay() -> None:
    app = cameras()
    app.add_task("detect", lambda cam1, cam2: cam1 + cam2, join="exact")
    app.add_sink("raw", print, of="cam1")
    assert wiring(app.graph()) == {
        "cam1": ("", "room.cam1", ""),
        "cam1>detect": ("room.cam1", "room.cam1+cam2", "cam1>detect"),
        "cam2": ("", "room.cam1+cam2", ""),
        "detect": ("room.cam1+cam2", "room.detect", "detect"),
        "raw": ("room.cam1", "", "raw"),
    }


def test_what_is_given_is_taken() -> None:
    app = Pipeline("room")
    app.add_source("left", range(3), source_id="a", topic="frames")
    app.add_source("right", range(3), source_id="b")
    app.add_task("pair", lambda a, b: a, output_id="pairs", topic_out="results", group="workers", worker_id="w", replicas=2)
    app.add_sink("show", print, of="pairs", group="screen")
    assert wiring(app.graph()) == {
        "left": ("", "frames", ""),
        "right": ("", "frames", ""),
        "pair": ("frames", "results", "workers"),
        "show": ("results", "", "screen"),
    }
    nodes = app.look()
    assert list(nodes) == ["left", "right", "pair[0]", "pair[1]", "show"]
    assert [nodes[f"pair[{i}]"].wiring.sends for i in range(2)] == ["pairs", "pairs"]


def test_names_of_any_length_make_names_that_engines_take() -> None:
    app = Pipeline("p" * 44)
    sources = [f"source_{i:02}_{'x' * 34}" for i in range(6)]
    for name in sources:
        app.add_source(name, range(3))
    app.add_task("t" * 44, eval(f"lambda {', '.join(sources)}: 0"))
    app.add_task("u" * 44, eval(f"lambda {', '.join(sources[:5])}: 0"))
    topics = set()
    for part in app.graph().parts:
        check_keywords("Compute", topic_in=f"{part.topic_in or 'x'}.{part.group}.dead-letters")
        topics |= {part.topic_in, part.topic_out}
    assert len(topics - {""}) == 5 + 2 + 2


@st.composite
def graphs(draw: st.DrawFn) -> Pipeline:
    app = Pipeline("random")
    sent = [f"s{i}" for i in range(draw(st.integers(1, 4)))]
    for name in sent:
        app.add_source(name, range(3))
    for i in range(draw(st.integers(0, 5))):
        taken = draw(st.lists(st.sampled_from(sent), min_size=1, max_size=3, unique=True))
        app.add_task(f"t{i}", eval(f"lambda {', '.join(taken)}: 0"))
        sent.append(f"t{i}")
    for i in range(draw(st.integers(0, 3))):
        app.add_sink(f"k{i}", print, of=draw(st.lists(st.sampled_from(sent), min_size=1, max_size=2, unique=True)))
    return app


@given(graphs())
def test_on_a_topic_there_is_each_input_of_its_readers_once_and_nothing_else(app: Pipeline) -> None:
    parts = app.graph().parts
    seen: list[Part] = []
    for part in parts:
        if part.topic_in:
            writers = [writer.sends for writer in parts if writer.topic_out == part.topic_in]
            assert sorted(writers) == sorted(part.inputs)
            assert all(writer in seen for writer in parts if writer.topic_out == part.topic_in), "in the order of the stream"
        seen.append(part)
    groups = [(part.topic_in, part.group) for part in parts if part.topic_in]
    assert len(set(groups)) == len(groups)


def test_a_pipeline_runs_in_one_process() -> None:
    app = cameras()
    got: list[Any] = []

    @app.task(join="exact")
    async def add(cam1: int, cam2: int) -> int:
        return cam1 + cam2

    @app.task(sources=["add", "cam1"], join="exact")
    class Subtract:
        """Its parameters have names of their own."""

        def setup(self) -> None:
            self.ready = True

        def __call__(self, total: int, *, part: int) -> Iterator[int]:
            assert self.ready
            yield total - part
            yield -1

    app.add_sink("keep", got.append, of="Subtract")
    for node in app.nodes("memory://one-process").values():
        with node:
            node.run(until="end")
    assert got == [0, -1, 1, -1, 2, -1]


def test_a_relay_hands_on_what_it_takes_as_it_was_sent() -> None:
    app = Pipeline("relayed")
    moments = [np.arange(3), {"n": 1, (1, 2): {3.5}}, "text", b"bytes", 2.5, None, False]
    kept: dict[str, list[Any]] = {"alone": [], "together": []}

    def second(value: Any) -> int:
        return [str(each) for each in moments].index(str(value)) * 10**9

    app.add_source("a", moments, event_time=second, key=lambda value: str(value))
    app.add_source("b", moments, event_time=second)
    app.add_sink("alone", kept["alone"].append, of="a")
    app.add_task("pair", lambda a, b: [a, b], join="exact")
    app.add_sink("together", kept["together"].append, of="pair")
    for node in app.nodes("memory://relayed").values():
        with node:
            node.run(until="end")
    shown = [str(each) for each in moments if each is not None]
    assert [str(each) for each in kept["alone"]] == shown
    assert [[str(each) for each in pair] for pair in kept["together"]] == [[each, each] for each in shown]


@pytest.mark.parametrize("durability", ["origin", "broker"])
def test_a_relay_leaves_large_payloads_where_they_are_to_be(tmp_path: Path, durability: str) -> None:
    app = Pipeline("large", node=f"local://{tmp_path}/store")
    pictures = [np.full(100_000, n) for n in range(3)]
    got: list[Any] = []
    app.add_source("a", pictures, event_time=lambda picture: int(picture[0]), routing="lazy", durability=durability)
    app.add_source("b", range(3), event_time=int)
    app.add_task("pair", lambda a, b: int(a.sum()) - 100_000 * b, join="exact")
    app.add_sink("keep", got.append, of="pair")
    app.add_sink("alone", lambda a: got.append(len(a)), of="a")
    assert app.look()["a>pair"].wiring.sends == "a"
    with ExitStack() as stack:  # who is there before the sources is waited for
        nodes = {name: stack.enter_context(node) for name, node in app.nodes().items()}
        for node in nodes.values():
            node.run(until="end")
        relay: Any = nodes["a>pair"]
        assert (relay.counters["sent"], relay.counters["payload_gone"]) == (3, 0)
    assert sorted(got) == [0, 0, 0, 100_000, 100_000, 100_000]
    transport = connect(app.url)
    try:
        large = sum(len(frame) > 2_000 for topic in ("large.a", "large.a+b") for frame, _, _ in transport.read(topic))
        assert large == (0 if durability == "origin" else 2 * 3)
    finally:
        disconnect(transport)


def test_a_sink_of_several_gets_all_of_them() -> None:
    app = Pipeline("several")
    got: list[Any] = []

    @app.source()
    async def a() -> AsyncIterator[int]:
        yield 1

    app.add_source("b", [2])
    app.add_sink("all", got.append, of=["a", "b"])
    app.add_sink("one", got.append, of="b")
    for node in app.nodes("memory://several").values():
        with node:
            node.run(until="end")
    assert sorted(got) == [1, 2, 2]


def test_a_source_is_told_which_replica_it_is() -> None:
    app = Pipeline("parts")

    @app.source(replicas=3, args={"start": 10})
    def number(start: int, replica: int) -> Iterator[int]:
        yield start + replica

    assert [next(node) for node in app.nodes("memory://parts").values()] == [10, 11, 12]
    assert next(app.node("number[1]", "memory://parts")) == 11


def test_a_recording_brings_its_event_times_and_ids_along(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("t,v\n1,a\n2,b\n")
    from edgeserve.sources import CsvReplay

    app = Pipeline("recorded")
    got: list[Any] = []
    app.add_source("row", CsvReplay, args={"path": path, "speed": None})

    @app.task()
    def times(row: dict[str, str]) -> list[Any]:
        from edgeserve import context

        return [row["v"], context().event_ns]

    app.add_sink("keep", got.append, of="times")
    for _ in range(2):
        for node in app.nodes("memory://recorded").values():
            with node:
                node.run(until="end")
    assert got == [["a", 10**9], ["b", 2 * 10**9]]


def test_the_node_is_the_one_that_is_named_last(monkeypatch: pytest.MonkeyPatch) -> None:
    unsaid, said = Pipeline("unsaid"), Pipeline("said", node="memory://said")
    for app in (unsaid, said):
        app.add_source("a", [1])
    assert {app.look()["a"].url for app in (unsaid, said)} == {"local://", "memory://said"}
    monkeypatch.setenv("EDGESERVE_NODE", "memory://environment")
    assert {app.look()["a"].url for app in (unsaid, said)} == {"memory://environment", "memory://said"}
    assert {app.look("memory://named")["a"].url for app in (unsaid, said)} == {"memory://named"}


def test_places() -> None:
    app = Pipeline("placed")
    app.add_source("a", [1], place="roof")
    app.add_task("twice", lambda a: a, replicas=3, place=["roof", "cellar"])
    app.add_task("both", lambda a, twice: a, place="cellar")
    assert list(app.look(host="roof")) == ["a", "a>both", "twice[0]", "twice[2]"]
    assert list(app.look(host="cellar")) == ["twice[1]", "both"]
    with pytest.raises(room.UnknownName, match=r"nothing runs on the host 'rof'; did you mean 'roof'\?"):
        app.look(host="rof")
    app.add_sink("show", print, of="both")
    with pytest.raises(room.MissingValue, match="'show' has no place"):
        app.look(host="roof")


# --- what is refused ----------------------------------------------------------------------------------------------


def circle(app: Pipeline) -> None:
    app.add_task("one", lambda cam1, three: 0)
    app.add_task("two", lambda one: 0)
    app.add_task("three", lambda two: 0)


def refused(declare: Callable[[Pipeline], Any]) -> InvalidPipeline:
    app = cameras()
    with pytest.raises(InvalidPipeline) as caught:
        declare(app)
        app.graph()
    error = caught.value
    assert isinstance(error, ConfigurationError) and isinstance(error, ValueError)
    assert Path(error.where.file) == Path(__file__) and error.where.line > 0
    assert str(error) == f"{error.where}: {error.reason}; {error.suggestion}"
    return error


class Unfinished:
    pass


class Detector:
    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, cam1: int) -> float:
        return cam1 * self.threshold


REFUSED: list[tuple[type[InvalidPipeline], str, Callable[[Pipeline], Any]]] = [
    (room.UnknownKeyword, "takes no 'retrys'; did you mean 'retries'", lambda a: a.add_task("t", lambda cam1: 0, retrys=3)),
    (room.UnknownKeyword, "takes no 'event_tme'; did you mean 'event_time'", lambda a: a.source(event_tme=int)(cameras)),
    (room.UnknownKeyword, "takes no 'join'; it takes", lambda a: a.add_sink("s", print, of="cam1", join="exact")),
    (room.UnknownKeyword, "takes no 'node'", lambda a: a.add_task("t", lambda cam1: 0, node="local://")),
    (room.UnknownName, "takes 'cam3', which nothing sends; did you mean 'cam", lambda a: a.add_task("t", lambda cam3: 0)),
    (room.UnknownName, "takes 'zzz', which nothing sends; there is 'cam1', 'cam2'", lambda a: a.add_sink("s", print, of="zzz")),
    (
        room.UnknownName,
        "takes 't', which nothing sends; 't' sends 'seen': take that",
        lambda a: [a.add_task("t", lambda cam1: 0, output_id="seen"), a.add_sink("s", print, of="t")],
    ),
    (room.DuplicateName, "has the name of the source in line", lambda a: a.add_sink("cam1", print, of="cam2")),
    (room.DuplicateName, "both send 'cam1'", lambda a: a.add_task("t", lambda cam1: 0, output_id="cam1")),
    (room.DuplicateName, "as one group, 'g'", lambda a: [a.add_sink(n, print, of="cam1", group="g") for n in "ab"]),
    (
        room.DuplicateName,
        "where cam1 already goes",
        lambda a: [a.add_sink(n, print, of=of, topic="t") for n, of in (("a", "cam1"), ("b", "cam2"))],
    ),
    (
        room.DuplicateName,
        "the topic 'room.cam1', which is given, is that of what 'cam1' sends",
        lambda a: [a.add_task("t", lambda cam1: 0), a.add_task("u", lambda t: 0, topic_in="room.cam1")],
    ),
    (room.BadValue, "letters, digits, _ and -", lambda a: a.add_source("t[0]", [1])),
    (room.CyclicPipeline, "in a circle: one -> two -> three -> one|two -> three -> one -> two|three -> one -> two -> three", circle),
    (room.CyclicPipeline, "in a circle: t -> t", lambda a: a.add_task("t", lambda cam1, t: 0)),
    (room.BadValue, "replicas=-1; give how many", lambda a: a.add_task("t", lambda cam1: 0, replicas=-1)),
    (
        room.BadValue,
        "replicas=1001; give how many processes run it, an int from 1 to 1000",
        lambda a: a.add_sink("t", print, replicas=1001),
    ),
    (room.BadValue, "replicas=True", lambda a: a.add_task("t", lambda cam1: 0, replicas=True)),
    (room.BadValue, "place=3", lambda a: a.add_task("t", lambda cam1: 0, place=3)),
    (room.BadValue, "retries=-2: it is how often", lambda a: a.add_task("t", lambda cam1: 0, retries=-2)),
    (room.BadValue, "join='exactly'", lambda a: a.add_task("t", lambda cam1, cam2: 0, join="exactly")),
    (room.BadValue, "event_time= is a function", lambda a: a.add_source("t", [1], event_time=3)),
    (room.BadValue, "the stream must be|nothing that can be called|is neither", lambda a: a.add_source("t", 3, args={})),
    (
        room.BadValue,
        "the class Unfinished makes cannot be called with a message: it has no __call__",
        lambda a: a.add_task("t", Unfinished, sources="cam1"),
    ),
    (room.BadValue, "missing a required argument: 'threshold'", lambda a: a.add_task("t", Detector)),
    (room.BadValue, "unexpected keyword argument 'high'", lambda a: a.add_task("t", Detector, args={"threshold": 1, "high": 1})),
    (room.BadValue, r"task 't': args=\[1\] is no dict.*\{'path'", lambda a: a.add_task("t", Detector, args=[1])),
    (room.BadValue, r"source 't': args=\('a', 'b'\) is no dict", lambda a: a.add_source("t", cameras, args=("a", "b"))),
    (room.BadValue, "source 't': args='' is no dict", lambda a: a.source(name="t", args="")(cameras)),
    (room.BadValue, r"sink 't': args=\{1: 2\} is no dict", lambda a: a.add_sink("t", Detector, of="cam1", args={1: 2})),
    (room.BadValue, "parameter '\\*cams' names no source", lambda a: a.add_task("t", lambda *cams: 0)),
    (room.BadValue, "has the parameters a, b", lambda a: a.add_task("t", lambda a, b: 0, sources=["cam1"])),
    (room.BadValue, "name at least one input, and each once", lambda a: a.add_task("t", lambda a, b: 0, sources=["cam1", "cam1"])),
    (room.BadValue, "is no name that a parameter can have", lambda a: a.add_source("b-1", [1])),
    (room.BadValue, "sends 'class', which is no name that a parameter can have", lambda a: a.add_source("b", [1], source_id="class")),
    (room.BadValue, "source_id=3; give a name", lambda a: a.add_source("b", [1], source_id=3)),
    (room.BadValue, "is called with one value, and cannot be", lambda a: a.add_sink("s", lambda a, b: 0, of="cam1")),
    (room.BadValue, "nothing that can be called", lambda a: a.add_task("t", 3)),
    (room.BadValue, "called 'nnn.*at most 44 bytes", lambda a: a.add_source("n" * 45, [1])),
    (room.MissingValue, "has no name", lambda a: a.add_source("", [1])),
    (room.MissingValue, "has no name", lambda a: Pipeline("")),
    (room.MissingValue, "declares nothing", lambda a: Pipeline("empty").graph()),
    (room.MissingValue, "not known before it runs; say it: of=", lambda a: a.add_sink("s", print, args={})),
    (room.MissingValue, "not known before it runs; say it: sources=", lambda a: a.add_task("t", lambda: len, args={})),
]


@pytest.mark.parametrize(("kind", "said", "declare"), REFUSED, ids=[f"{kind.__name__}-{i}" for i, (kind, _, _) in enumerate(REFUSED)])
def test_what_cannot_run_is_refused_with_its_line(kind: type, said: str, declare: Callable[[Pipeline], Any]) -> None:
    error = refused(declare)
    assert type(error) is kind, error
    assert re.search(said, str(error)), error


def test_two_topics_for_the_same_messages_are_refused() -> None:
    def declare(app: Pipeline) -> None:
        app.add_source("cam3", [1], topic="x")
        app.add_task("t", lambda cam3: 0, topic_in="y")

    error = refused(declare)
    assert type(error) is room.BadValue and "'t' has topic_in='y', and 'cam3' 'x' for the same messages" in str(error)


NO_KEY = r"task 't' joins by the key in each message's header, and source 'cam1' sends none \(line \d+\); give it key=, or 't' a function"


@pytest.mark.parametrize(
    ("keywords", "refused"),
    [
        ({"by": True}, True),
        ({"by": True, "join": "exact"}, True),
        ({"join": Exact(["cam1", "cam2"], on="key")}, True),
        ({"by": int, "join": Exact(["cam1", "cam2"], on="key")}, False),
        ({"by": int}, False),
        ({"join": Exact(["cam1", "cam2"])}, False),
        ({}, False),
    ],
    ids=["by", "exact by", "on key", "on key by function", "by function", "on time", "latest"],
)
def test_a_join_by_the_key_in_the_header_needs_sources_that_have_one(keywords: dict[str, Any], refused: bool) -> None:
    for app, fails in ((cameras(), refused), (cameras(key=int), False)):
        app.add_task("t", lambda cam1, cam2: 0, **keywords)
        if not fails:
            app.graph()
            continue
        with pytest.raises(room.BadValue, match=NO_KEY):
            app.graph()


class Either:
    """A policy whose sets may lack an input."""

    def __init__(self, sources: Any) -> None:
        self.sources = sources

    def push(self, source: str, stamp_ns: int, item: Any) -> list[Any]:
        return []

    def advance(self, now_ns: int) -> list[Any]:
        return []

    def explain(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("first", "keyed", "refused"),
    [
        ({}, "", True),
        ({}, "cam1", True),
        ({}, "cam1 cam2", False),
        ({"by": int}, "", False),
        ({"by": True}, "cam1 cam2", False),
        ({"join": Either}, "cam1", False),
        ({"join": Either}, "", True),
    ],
)
def test_results_have_the_key_that_all_inputs_have(first: dict[str, Any], keyed: str, refused: bool) -> None:
    app = Pipeline("room")
    for name in ("cam1", "cam2"):
        app.add_source(name, range(3), key=int if name in keyed.split() else None)
    app.add_source("cam3", range(3), key=int)
    app.add_task("both", lambda cam1, cam2: 0, **first)
    app.add_task("same", lambda both: 0)
    app.add_task("t", lambda same, cam3: 0, by=True)
    if refused:
        with pytest.raises(room.BadValue, match=r"task 'same' sends none \(line \d+\); it hands on the key that all its inputs have"):
            app.graph()
    else:
        app.graph()


class Apart(JsonLinesSink):
    def __init__(self, path: str, replica: int) -> None:
        super().__init__(f"{path}.{replica}")


BOTH = "would write to .*, and one process at a time may; "


@pytest.mark.parametrize(
    ("sink", "keywords", "said"),
    [
        (JsonLinesSink, {"args": {"path": "out"}, "replicas": 2}, f"sink 't': its 2 replicas {BOTH}leave replicas out, or"),
        (ParquetSink, {"args": {"path": Path("out")}, "replicas": 2}, f"its 2 replicas {BOTH}"),
        (JsonLinesSink("out"), {"replicas": 2}, f"its 2 replicas {BOTH}"),
        (JsonLinesSink, {"args": {"path": "out"}, "replicas": 3, "place": ["roof", "cellar"]}, f"its 3 replicas {BOTH}"),
        (JsonLinesSink, {"args": {"path": "out"}, "replicas": 2, "place": ["roof", "cellar"]}, ""),
        (JsonLinesSink, {"args": {"path": "out"}}, ""),
        (Apart, {"args": {"path": "out"}, "replicas": 2}, ""),
        (lambda replica: JsonLinesSink(f"out.{replica}"), {"args": {}, "replicas": 2}, ""),
        (JsonLinesSink, {"args": {"path": "./other"}}, rf"sinks 't' and 'other' \(line \d+\) {BOTH}give each a path of its own"),
        (JsonLinesSink, {"args": {"path": "other"}, "place": "roof"}, ""),
    ],
    ids=[
        "class",
        "directory",
        "object",
        "three on two hosts",
        "two on two hosts",
        "one",
        "own path",
        "function",
        "two sinks",
        "another host",
    ],
)
def test_two_processes_do_not_write_to_one_file(sink: Any, keywords: dict[str, Any], said: str) -> None:
    app = cameras()
    app.add_sink("other", JsonLinesSink, of="cam1", args={"path": "other"})
    app.add_sink("t", sink, of="cam2", **keywords)
    if not said:
        app.graph()
        return
    with pytest.raises(room.BadValue, match=said):
        app.graph()


def test_replicas_of_a_sink_are_told_which_they_are(tmp_path: Path) -> None:
    app = Pipeline("apart")
    app.add_source("a", range(2))
    app.add_sink("keep", Apart, of="a", args={"path": f"{tmp_path}/out"}, replicas=2)
    source, *sinks = app.nodes("memory://apart").values()
    with source:
        source.run(until="end")
    for sink in sinks:
        with sink:
            next(sink)
    assert [Path(f"{tmp_path}/out.{i}").read_text() for i in range(2)] == ["0\n", "1\n"]


def test_the_line_is_that_of_the_declaration() -> None:
    app = Pipeline("lines")
    line = Path(__file__).read_text().splitlines().index("    @app.task(  # here") + 1

    @app.task(  # here
        replicas=2,
    )
    def t(nobody: int) -> int:
        return nobody

    with pytest.raises(room.UnknownName) as caught:
        app.graph()
    assert (Path(caught.value.where.file), caught.value.where.line) == (Path(__file__), line)


# --- types --------------------------------------------------------------------------------------------------------


@dataclass
class Frame:
    number: int


class View(msgspec.Struct):
    number: int


class Wide(View):
    more: int = 0


class Columns(TypedDict):
    number: int


class Colour(Enum):
    RED = 1


def yields(kind: Any) -> Callable[[], Any]:
    def stream() -> Any:
        return iter(())

    stream.__annotations__["return"] = kind
    return stream


def takes(kind: Any) -> Callable[[Any], Any]:
    def task(a: Any) -> Any:
        return a

    task.__annotations__["a"] = kind
    return task


@pytest.mark.parametrize(
    ("sent", "taken", "fits"),
    [
        (Iterator[int], int, True),
        (Iterator[int], str, False),
        (AsyncIterator[str], bytes, False),
        (Iterator[Frame], str, False),
        (Iterator[Frame], View, True),
        (Iterator[Frame], dict, True),
        (Iterator[Wide], View, True),
        (Iterator[int], float, True),
        (Iterator[bool], int, True),
        (Iterator[list], tuple, True),
        (Iterator[np.ndarray], dict, True),
        (Iterator[list], int, False),
        (Iterator[Frame], int, False),
        (Iterator[View], list, True),
        (Iterator[Columns], View, True),
        (Iterator[View], Columns, True),
        (Iterator[Columns], int, False),
        (Iterator[str], datetime, True),
        (Iterator[str], UUID, True),
        (Iterator[str], Decimal, True),
        (Iterator[Decimal], float, True),
        (Iterator[np.int64], int, True),
        (Iterator[int], "int | None", True),
        (Iterator[Colour], int, True),
        (Iterator[str], Colour, True),
        (Iterator["int | None"], str, False),
        (Iterator["int | str"], bytes, True),
        (Iterator[Any], bytes, True),
        (Iterator, bytes, True),
        (Any, bytes, True),
        (Iterator["NoSuchName"], bytes, True),  # noqa: F821
    ],
)
def test_annotations_that_contradict_each_other(sent: Any, taken: Any, fits: bool) -> None:
    app = Pipeline("types")
    app.add_source("a", yields(sent))
    app.add_task("t", takes(taken))
    if fits:
        app.graph()
        return
    with pytest.raises(room.TypeConflict, match=r"'t' takes 'a' as \w+, and source 'a' sends \w+ \(line \d+\); correct one"):
        app.graph()


def test_types_of_results_and_of_what_gates_make() -> None:
    def text(a: int) -> str:
        return str(a)

    def many(a: int) -> Iterator[str]:
        yield str(a)

    def pack(value: str) -> bytes:
        return value.encode()

    def app(**tasks: Any) -> Pipeline:
        made = Pipeline("types")
        made.add_source("a", yields(Iterator[int]))
        for name, (task, keywords) in tasks.items():
            made.add_task(name, task, **keywords)
        return made

    for produce in (text, many):
        app(one=(produce, {}), two=(takes(str), {"sources": "one"})).graph()
        with pytest.raises(room.TypeConflict):
            app(one=(produce, {}), two=(takes(bytes), {"sources": "one"})).graph()
        app(one=(produce, {"gate_out": pack}), two=(takes(bytes), {"sources": "one"})).graph()
        app(one=(produce, {}), two=(takes(bytes), {"sources": "one", "gate_in": pack})).graph()
        app(one=(produce, {}), two=(takes(bytes), {"sources": "one", "fetch": ["file:///srv/frames/"]})).graph()
    sink = app(one=(text, {}))
    sink.add_sink("show", takes(bytes), of="one")
    with pytest.raises(room.TypeConflict, match="sink 'show' takes 'one' as bytes"):
        sink.graph()


@pytest.mark.parametrize(
    ("keywords", "trigger", "interval_ms"),
    [
        ({}, "any", 0),
        ({"join": "latest", "min_interval_ms": 5}, "any", 5),
        ({"no_overlap": True}, "all", 0),
        ({"join": "exact"}, "all", 0),
        ({"join": Latest(["cam1", "cam2"], min_period_ns=2_000_000)}, "any", 2),
        ({"join": functools.partial(Latest, max_interval_ns=1)}, "any", 0),
        ({"join": Exact}, "all", 0),
        ({"by": True, "min_interval_ms": 5}, "any", 0),
    ],
    ids=["default", "latest", "no_overlap", "exact", "object", "partial", "class", "by"],
)
def test_what_starts_a_run_and_how_often(keywords: dict[str, Any], trigger: str, interval_ms: float) -> None:
    app = cameras(key=int)
    app.add_task("detect", lambda cam1, cam2: cam1 + cam2, **keywords)
    app.add_sink("raw", print, of="cam1")
    parts = {part.name: part for part in app.graph().parts}
    assert (parts["detect"].trigger, parts["detect"].min_interval_ms) == (trigger, interval_ms)
    assert (parts["cam1>detect"].trigger, parts["cam1>detect"].min_interval_ms) == ("any", 0), "a relay hands on all"
