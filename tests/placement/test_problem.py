"""A problem survives JSON, and one that makes no sense is refused by name."""

from __future__ import annotations

import json
from typing import Any

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


TASK = {"name": "t", "inputs": ("s",), "cpu_s": 0.01}
WRONG: list[tuple[dict[str, Any], type[InvalidProblem], str]] = [
    ({"nodes": ()}, MissingValue, "nodes: there are none"),
    ({"nodes": (Node(name="a"), Node(name="a"))}, DuplicateName, "two are called 'a'"),
    ({"nodes": (Node(name=""), Node(name="a"), Node(name="b"))}, MissingValue, "empty name"),
    ({"nodes": (Node(name="a", cores=-1), Node(name="b"))}, BadValue, r"nodes\['a'\].cores is -1"),
    ({"nodes": (Node(name="a", speed=0), Node(name="b"))}, BadValue, "positive"),
    ({"nodes": (Node(name="a", memory_bytes=float("nan")), Node(name="b"))}, BadValue, "finite"),
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
    ({"separate": (("t", "t"),)}, DuplicateName, "separate"),
    ({"version": 2}, UnsupportedProblemVersion, "version"),
]


@pytest.mark.parametrize(("change", "error", "says"), WRONG, ids=[says for _, _, says in WRONG])
def test_a_problem_that_makes_no_sense_is_refused(change: dict[str, Any], error: type[InvalidProblem], says: str) -> None:
    with pytest.raises(error, match=says):
        Problem(**{**PLAIN, **change})


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
    ],
)
def test_json_that_is_none_of_ours(text: str | bytes, error: type[InvalidProblem], says: str) -> None:
    with pytest.raises(error, match=says):
        Problem.from_json(text)


def test_an_error_of_content_keeps_its_name_through_json() -> None:
    text = Problem(**PLAIN).to_json().replace(b'"broker": "a"', b'"broker": "x"')
    with pytest.raises(UnknownName, match="broker"):
        Problem.from_json(text)


def test_nodes_that_no_link_reaches() -> None:
    from edgeserve.placement import evaluate

    problem = Problem(**{**PLAIN, "nodes": (*PLAIN["nodes"], Node(name="c"))})
    with pytest.raises(InvalidProblem, match="no way leads"):
        evaluate(problem, {"t": "a"})


@given(st.text(max_size=200))
def test_any_text_gives_a_named_error(text: str) -> None:
    with pytest.raises(EdgeServeError):
        Problem.from_json(text)
