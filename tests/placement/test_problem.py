"""A problem survives JSON, and one that makes no sense is refused by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.placement.instances import cluster, small

from edgeserve.core.errors import EdgeServeError
from edgeserve.placement import (
    BadValue,
    CyclicGraph,
    DuplicateName,
    InvalidProblem,
    Link,
    MissingValue,
    Node,
    Problem,
    Sink,
    Source,
    Task,
    UnknownName,
    UnsupportedProblemVersion,
    Weights,
    evaluate,
)

PLAIN: dict[str, Any] = {
    "nodes": (Node(name="a"), Node(name="b", zone="eu")),
    "links": (Link(name="l", ends=("a", "b"), bandwidth_bytes_s=1e6),),
    "broker": "a",
    "sources": (Source(name="s", node="a", rate_hz=1, bytes=10),),
    "tasks": (Task(name="t", inputs=("s",), cpu_s=0.01),),
    "sinks": (Sink(name="out", input="t", node="b"),),
}


@given(st.integers(0, 10_000))
def test_json_gives_the_same_problem_back(seed: int) -> None:
    problem = small(seed)
    assert Problem.from_json(problem.to_json()) == problem
    assert Problem.from_json(problem.to_json().decode()) == problem


def test_json_of_a_cluster_and_its_version() -> None:
    problem = cluster(1, nodes=60, tasks=12)
    assert Problem.from_json(problem.to_json()) == problem
    assert json.loads(problem.to_json())["version"] == 1


def test_what_has_its_default_is_left_out() -> None:
    plain = json.loads(Problem(**PLAIN).to_json())
    assert plain["nodes"][0] == {"name": "a"} and "routes" not in plain


def large(tasks: int, **changes: Any) -> str:
    """A chain of tasks, as JSON."""
    chain = [
        {"name": f"t{k}", "inputs": [f"t{k - 1}" if k else "s"], "cpu_s": 0.01, "memory_bytes": 1, "trigger": "any"} for k in range(tasks)
    ]
    plain = msgspec.to_builtins(Problem(**PLAIN))
    return json.dumps({**plain, "tasks": chain, "sinks": [{"name": "out", "input": "t0", "node": "b"}], **changes}, indent=2)


TASK = {"name": "t", "inputs": ("s",), "cpu_s": 0.01}
WRONG: list[tuple[dict[str, Any], type[InvalidProblem], str]] = [
    ({"nodes": ()}, MissingValue, "nodes: there are none"),
    ({"nodes": (Node(name="a"), Node(name="a"))}, DuplicateName, "two are called 'a'"),
    ({"nodes": (Node(name=""), Node(name="a"), Node(name="b"))}, MissingValue, "empty name"),
    ({"nodes": (Node(name="a", cores=-1), Node(name="b"))}, BadValue, r"nodes\['a'\].cores is -1"),
    ({"nodes": (Node(name="a", speed=0), Node(name="b"))}, BadValue, "positive"),
    ({"nodes": (Node(name="a", memory_bytes=float("nan")), Node(name="b"))}, BadValue, "is nan: give a number from 0"),
    ({"nodes": (Node(name="a", max_utilisation=1.0), Node(name="b"))}, BadValue, "below 1"),
    ({"broker": "bb"}, UnknownName, "did you mean 'b'"),
    ({"links": (Link(name="l", ends=("a", "c"), bandwidth_bytes_s=1),)}, UnknownName, "no node 'c'"),
    ({"links": (Link(name="l", ends=("a", "b"), bandwidth_bytes_s=0),)}, BadValue, "bandwidth_bytes_s is 0"),
    ({"links": (Link(name="l", ends=("a", "a"), bandwidth_bytes_s=1),)}, BadValue, "connects two nodes"),
    ({"sources": (Source(name="s", node="a", rate_hz=float("inf"), bytes=1),)}, BadValue, "rate_hz is inf"),
    ({"sources": (Source(name="t", node="a", rate_hz=1, bytes=1),)}, DuplicateName, "two are called 't'"),
    ({"sources": (Source(name="any", node="a", rate_hz=1, bytes=1),)}, DuplicateName, "trigger"),
    ({"sources": (Source(name="s", node="a", rate_hz=1, bytes=1, stays_in="mars"),)}, UnknownName, "no zone 'mars'"),
    ({"sources": (Source(name="s", node="a", rate_hz=1, bytes=1, stays_in="eu"),)}, BadValue, "make them one"),
    ({"tasks": (Task(name="t", inputs=(), cpu_s=0.01),)}, MissingValue, "inputs"),
    ({"tasks": (Task(name="t", inputs=("x",), cpu_s=0.01),)}, UnknownName, "no stream 'x'"),
    ({"tasks": (Task(name="t", inputs=("s", "s"), cpu_s=0.01),)}, DuplicateName, "inputs"),
    ({"tasks": (Task(**TASK, trigger="x"),)}, UnknownName, "use 'any', 'all'"),
    ({"tasks": (Task(**TASK, replicas_min=2),)}, BadValue, "replicas_max"),
    ({"tasks": (Task(**TASK, accelerators={"gpu": 1}),)}, UnknownName, "no accelerator 'gpu'"),
    ({"tasks": (Task(**TASK, stays_in=""),)}, BadValue, "move the sink"),
    ({"tasks": (Task(name="t", inputs=("s", "u"), cpu_s=0), Task(name="u", inputs=("t",), cpu_s=0))}, CyclicGraph, "t -> u -> t"),
    ({"tasks": (Task(name="t", inputs=("t",), cpu_s=0),)}, CyclicGraph, "t -> t"),
    ({"sinks": ()}, MissingValue, "sinks"),
    ({"sinks": (Sink(name="out", input="u", node="b"),)}, UnknownName, "no stream 'u'"),
    ({"pins": {"x": ("a",)}}, UnknownName, "no task 'x'"),
    ({"pins": {"t": ()}}, MissingValue, "no node is named"),
    ({"pins": {"t": ("a", "c")}}, UnknownName, r"pins\['t'\]: there is no node 'c'; add it to `nodes`, or name one of a, b"),
    ({"tasks": (Task(**TASK, accelerators={"tpu": 1}),)}, UnknownName, "give it to a node in its `accelerators`$"),
    ({"nodes": (Node(name="a", speed=1e-30), Node(name="b"))}, BadValue, "positive number from 1e-18"),
    ({"nodes": (Node(name="a", cores=10**400), Node(name="b"))}, BadValue, "a number from 0 to 1e.18"),
    ({"nodes": (Node(name="a", cores=10**5000), Node(name="b"))}, BadValue, "thousands of digits"),
    ({"nodes": (Node(name="a" * 2000), Node(name="b"))}, BadValue, "has 2000 characters"),
    ({"broker": "b" * 10_000_000}, UnknownName, r"no node 'b{10,40}\.\.\.b{10,40}'"),
    ({"separate": (("t", "t"),)}, DuplicateName, "separate"),
    ({"version": 2}, UnsupportedProblemVersion, "version"),
]


@pytest.mark.parametrize(("change", "error", "says"), WRONG, ids=[says for _, _, says in WRONG])
def test_a_problem_that_makes_no_sense_is_refused(change: dict[str, Any], error: type[InvalidProblem], says: str) -> None:
    with pytest.raises(error, match=says):
        Problem(**{**PLAIN, **change})


MISTYPED: list[tuple[Any, dict[str, Any], str]] = [
    (Node, {"name": 3}, r"Node\(3\).name is 3: .*`str`, got `int`"),
    (Node, {"name": "a", "cores": 1.5}, r"Node\('a'\).cores is 1.5: .*type int"),
    (Node, {"name": "a", "cores": True}, r"Node\('a'\).cores is True: "),
    (Node, {"name": "a", "cores": "two"}, "cores is 'two'"),
    (Node, {"name": "a", "memory_bytes": 10**400}, "memory_bytes is 10+...0+: Number out of range; give a value of type float"),
    (Node, {"name": "a", "memory_bytes": "4 GB"}, "memory_bytes is '4 GB'"),
    (Node, {"name": "a", "accelerators": {"gpu": 0.5}}, "accelerators is .*dict"),
    (Node, {"name": "a", "accelerators": ["gpu"]}, "accelerators is"),
    (Link, {"name": "l", "ends": "ab", "bandwidth_bytes_s": 1}, "ends is 'ab'"),
    (Link, {"name": "l", "ends": ("a", "b", "c"), "bandwidth_bytes_s": 1}, "length 2, got 3"),
    (Source, {"name": "s", "node": None, "rate_hz": 1, "bytes": 1}, "node is None"),
    (
        Task,
        {"name": "t", "inputs": "cam", "cpu_s": 1},
        r"Task\('t'\).inputs is 'cam': .*give a value of type tuple\[str, \.\.\.\], as \('cam',\)",
    ),
    (Task, {"name": "t", "inputs": ("s",), "cpu_s": "1"}, "cpu_s is '1'"),
    (Task, {"name": "t", "inputs": ("s",), "cpu_s": 1, "replicas_max": 2.0}, "replicas_max is 2.0"),
    (Sink, {"name": "o", "input": ("t",), "node": "a"}, "input is"),
    (Weights, {"bytes": None}, "Weights.bytes is None"),
    (Problem, {**PLAIN, "nodes": None}, "Problem.nodes is None: .*tuple"),
    (Problem, {**PLAIN, "nodes": Node(name="a")}, r"Problem.nodes is Node.*tuple\[Node, \.\.\.\]"),
    (Problem, {**PLAIN, "nodes": PLAIN["tasks"]}, "Problem.nodes is .*got `Task`"),
    (Problem, {**PLAIN, "broker": PLAIN["nodes"][0]}, "Problem.broker is"),
    (Problem, {**PLAIN, "pins": {"t": "a"}}, "Problem.pins is .*got `str`"),
    (Problem, {**PLAIN, "pins": ["t"]}, "Problem.pins is"),
    (Problem, {**PLAIN, "colocate": ("t",)}, "Problem.colocate is .*got `str`"),
    (Problem, {**PLAIN, "header_bytes": "200"}, "Problem.header_bytes is '200'"),
    (Problem, {**PLAIN, "version": True}, "Problem.version is True"),
]


@pytest.mark.parametrize(("kind", "fields", "says"), MISTYPED, ids=[f"{kind.__name__}-{n}" for n, (kind, _, _) in enumerate(MISTYPED)])
def test_a_value_of_the_wrong_type_is_refused_where_it_is_given(kind: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadValue, match=says):
        kind(**fields)


def test_what_means_the_same_is_taken_and_written_as_what_it_means() -> None:
    lists: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value for name, value in PLAIN.items()}
    lists["tasks"] = [Task(name="t", inputs=["s"], cpu_s=np.float64(0.01), replicas_max=np.int64(1))]  # type: ignore[arg-type]
    problem = Problem(**lists, pins={"t": ["a"]})
    assert problem == Problem(**PLAIN, pins={"t": ("a",)}) == Problem.from_json(problem.to_json())
    given = {"gpu": 1}
    node = Node(name="a", accelerators=given)
    given["gpu"] = -1
    assert node.accelerators == {"gpu": 1}, "what was checked stays as it was"


def test_what_cannot_be_written_is_refused_by_name() -> None:
    problem = Problem(**{**PLAIN, "nodes": (Node(name="a", zone="\ud800"), Node(name="b"))})
    with pytest.raises(BadValue, match="lone surrogate"):
        problem.to_json()


def test_two_wishes_that_exclude_each_other() -> None:
    tasks = (Task(**TASK), Task(name="u", inputs=("t",), cpu_s=0))
    with pytest.raises(InvalidProblem, match="drop one of the two wishes"):
        Problem(**{**PLAIN, "tasks": tasks, "colocate": (("t", "u"),), "separate": (("t", "u"),)})


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ('{"nodes": [', InvalidProblem, "no JSON"),
        (b"\xff\xfe", InvalidProblem, "no JSON"),
        ('{"version": 9}', UnsupportedProblemVersion, "upgrade edgeserve"),
        ("{}", MissingValue, "`nodes`"),
        ('{"nodes": [{"name": "a", "cores": "two"}]}', BadValue, r"\$.nodes\[0\].cores"),
        ('{"nodes": [{"name": "a", "core": 2}]}', BadValue, "core"),
        ('{"nodes": [{"name": "a", "speed": NaN}]}', InvalidProblem, "NaN"),
        ('{"nodes": [{"name": "a", "speed": 1e999}]}', BadValue, r"\$\.nodes\[0\].speed"),
        ('{"nodes": [{"name": "a", "cores": 1.5}]}', BadValue, r"\$\.nodes\[0\].cores"),
        ('{"nodes":\n [{"name": "a",}]}', InvalidProblem, "line 2, column 16: this is no JSON"),
        ('{"nodes":\n\n [{"name":', InvalidProblem, "line 3, column 11: .*truncated"),
        ("", InvalidProblem, "line 1, column 1: "),
        (b'{"broker":\n "\xff"}', InvalidProblem, "line 2, column 3: .*invalid start byte"),
        ("\n\ud800", InvalidProblem, "line 2, column 1: .*surrogates"),
        ('{"nodes": [{"name": "a", "memory": 2}]}', BadValue, r"did you mean `memory_bytes`\?"),
        ('{"links": [{"name": "l", "ends": ["a", "b"], "latency": 2}]}', BadValue, r"did you mean `latency_ms`\?"),
        ('{"node": []}', BadValue, r"did you mean `nodes`\?"),
        ('{"nodes": [{"name": "a", "memory_bytes": "2GB"}]}', BadValue, r"\$\.nodes\[0\].memory_bytes"),
        ('{"pins": {"t": "a"}}', BadValue, r"\$\.pins"),
        ('{"x": ' + "[" * 100_000, InvalidProblem, "nested too deep"),
        ("[" * 10_000_000, BadValue, "got `array`"),
        ('{"' + "x" * 10_000_000 + '": 1}', BadValue, "unknown field `x{10,100}...`"),
        (None, InvalidProblem, "the JSON is a NoneType"),
        ({"nodes": []}, InvalidProblem, "the JSON is a dict"),
    ],
)
def test_json_that_is_none_of_ours(text: Any, error: type[InvalidProblem], says: str) -> None:
    with pytest.raises(error, match=says):
        Problem.from_json(text)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"broker": "b" * 5}, UnknownName, "broker: there is no node"),
        ({"sinks": [{"name": "out", "input": "t9", "node": "c"}]}, UnknownName, r"sinks\['out'\].node: there is no node 'c'"),
        ({"nodes": [{"name": "a", "cores": -1}, {"name": "b"}]}, BadValue, r"nodes\['a'\].cores is -1"),
        ({"nodes": [{"name": "a"}, {"name": "b"}, {"name": "b"}]}, DuplicateName, "nodes: two are called 'b'"),
        ({"sources": [{"name": "s", "node": "x", "rate_hz": 1, "bytes": 1}]}, UnknownName, r"sources\['s'\].node: there is no node 'x'"),
        ({"sources": [{"name": "r", "node": "a", "rate_hz": 1, "bytes": 1}]}, UnknownName, r"tasks\['t0'\].inputs: there is no stream 's'"),
    ],
)
def test_wrong_content_of_json_keeps_its_name(changes: dict[str, Any], error: type[InvalidProblem], says: str) -> None:
    with pytest.raises(error, match=says):
        Problem.from_json(large(3, **changes))


def test_ten_megabytes_of_json() -> None:
    text = large(70_000)
    assert len(text) > 10_000_000
    assert len(Problem.from_json(text).tasks) == 70_000
    circle = text.replace('"s"\n      ]', '"t69999"\n      ]', 1)
    with pytest.raises(CyclicGraph, match=r"t0 -> t69999 -> .* -> t0; take") as caught:
        Problem.from_json(circle)
    assert len(str(caught.value)) < 300
    with pytest.raises(InvalidProblem, match=f"line {text[:-3].count(chr(10)) + 1}, column "):
        Problem.from_json(text[:-3])


def test_an_error_of_content_keeps_its_name_through_json() -> None:
    text = Problem(**PLAIN).to_json().replace(b'"broker": "a"', b'"broker": "x"')
    with pytest.raises(UnknownName, match="broker"):
        Problem.from_json(text)


def test_nodes_that_no_link_reaches() -> None:
    problem = Problem(**{**PLAIN, "nodes": (*PLAIN["nodes"], Node(name="c"))})
    with pytest.raises(InvalidProblem, match="no way leads"):
        evaluate(problem, {"t": "a"})


def test_rates_beyond_what_can_be_counted() -> None:
    tasks = (Task(name="t", inputs=("s",), cpu_s=0, outputs_per_run=1e12), Task(name="u", inputs=("t",), cpu_s=0, outputs_per_run=1e12))
    with pytest.raises(BadValue, match=r"tasks\['u'\].outputs_per_run: results come at 1e\+24 Hz"):
        evaluate(Problem(**{**PLAIN, "tasks": tasks}), {"t": "a", "u": "a"})


@given(st.text(max_size=200))
def test_any_text_gives_a_named_error(text: str) -> None:
    with pytest.raises(EdgeServeError):
        Problem.from_json(text)
