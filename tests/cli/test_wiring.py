"""What is said of an app whose nodes do not fit together, and that nothing is said of one whose nodes do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeserve import Compute, DataSource, Materialize
from edgeserve.cli.run import find_nodes
from edgeserve.cli.wiring import Listed, feeders, mismatches

from .conftest import line_with, started

ROOT = Path(__file__).resolve().parents[2]
NODE = "local://somewhere"


def said(*, until_end: bool = False, **nodes: Any) -> list[str]:
    listed = [Listed(name, type(node).__name__, node.url, node.wiring) for name, node in nodes.items()]
    return mismatches(listed, "app.py", until_end=until_end)


def source(source_id: str, node: str = NODE, topic: str = "frames") -> DataSource:
    return DataSource([1], node, source_id=source_id, topic=topic)


def fuse(task: Any, node: str = NODE, **options: Any) -> Compute:
    return Compute(task, node, **({"topic_in": "frames", "topic_out": "fused"} | options))


def test_a_name_that_was_mistyped_is_one_line_that_suggests_the_other() -> None:
    (line,) = said(a=source("cam"), b=source("lidar"), fuse=fuse(lambda camera, lidar: None))
    assert line == (
        "parameter 'camera' of fuse: nothing in app.py sends it on topic 'frames' (sent there: 'cam', 'lidar'); did you mean 'cam'? "
        "It is right only if another program sends it"
    )


def test_of_a_run_until_the_end_it_is_said_who_waits() -> None:
    wait = ": with --until-end fuse waits until its end is there, for ever if none comes"
    for nodes in ({"a": source("cam"), "fuse": fuse(lambda camera: 0)}, {"a": source("a", topic="frame"), "fuse": fuse(lambda a: 0)}):
        (line,) = said(**nodes)
        assert said(**nodes, until_end=True) == [line + wait]


def test_no_name_is_suggested_that_has_its_own_parameter() -> None:
    (line,) = said(a=source("camera1"), fuse=fuse(lambda camera1, camera2: None))
    assert "parameter 'camera2' of fuse" in line and "did you mean" not in line


def test_names_that_are_not_alike_are_two_lines() -> None:
    unsent, untaken = said(a=source("left"), fuse=fuse(lambda camera: None))
    assert unsent.startswith("parameter 'camera' of fuse: nothing in app.py sends it on topic 'frames' (sent there: 'left'); this is right")
    assert untaken == (
        "source_id 'left' of a: no task in app.py takes it from topic 'frames' (taken there: 'camera'); "
        "fuse will put its messages aside as dead letters"
    )


def test_a_source_that_one_task_of_several_takes_is_right() -> None:
    assert said(a=source("a"), b=source("b"), one=fuse(lambda a: None), two=fuse(lambda b: None, topic_out="other")) == []
    (line,) = said(a=source("a"), one=fuse(lambda a, z: None), two=fuse(lambda z: None, topic_out="other"))
    assert line.startswith("parameter 'z' of one, two: ")


def test_the_results_of_a_task_have_its_output_id() -> None:
    first = {"camera": source("camera"), "detect": fuse(lambda camera: None, topic_out="found")}
    later: dict[str, Any] = {"topic_in": "found", "topic_out": "ranked"}
    assert said(**first, rank=fuse(lambda worker1: None, **later)) == []
    unsent, untaken = said(**first, rank=fuse(lambda boxes: None, **later))
    assert unsent.startswith("parameter 'boxes' of rank: ") and "(sent there: 'worker1')" in unsent
    assert untaken.startswith("output_id 'worker1' of detect: ")


def test_a_topic_that_nothing_sends_to_is_said_once_for_all_its_parameters() -> None:
    (line,) = said(a=source("a", topic="frame"), fuse=fuse(lambda a, b: None))
    assert line == (
        "topic_in 'frames' of fuse: nothing in app.py sends to it (wanted there: 'a', 'b'); did you mean 'frame'? "
        "It is right only if another program does"
    )


def test_the_same_topic_elsewhere_is_another_one_and_parameters_of_the_url_are_not_elsewhere() -> None:
    (line,) = said(a=source("a", "local://elsewhere"), fuse=fuse(lambda a: None))
    assert "nothing in app.py sends to it" in line
    assert said(a=source("a", "local://somewhere/?size_mb=5"), fuse=fuse(lambda a: None)) == []
    assert said(a=source("a", "nats://me:secret@server:4222"), fuse=fuse(lambda a: None, "nats://server:4222")) == []


def test_a_sink_takes_anything_and_a_topic_without_readers_is_for_others() -> None:
    sink = Materialize(print, NODE, topic="frames")
    assert said(sink=sink) == []
    assert said(a=source("a")) == []
    assert said(a=source("a"), sink=sink) == []
    assert said(a=source("a"), b=source("b"), fuse=fuse(lambda a: None), sink=sink) == []


def fed_by(**nodes: Any) -> dict[str, set[str]]:
    return feeders([Listed(name, type(node).__name__, node.url, node.wiring) for name, node in nodes.items()])


def test_a_node_is_fed_by_all_whose_messages_come_to_it() -> None:
    one, two = (fuse(lambda a: None, worker_id=f"w{i}", output_id="b") for i in range(2))
    nodes = {"one": one, "two": two, "a": source("a"), "other": source("other"), "away": source("a", "local://elsewhere")}
    found = fed_by(sink=Materialize(print, NODE, topic="fused"), inputs=Materialize(print, NODE, topic="frames"), **nodes)
    assert found == {
        "sink": {"one", "two", "a"},
        "inputs": {"a", "other"},
        "one": {"a"},
        "two": {"a"},
        "a": set(),
        "other": set(),
        "away": set(),
    }


def test_nodes_in_a_circle_do_not_feed_each_other() -> None:
    there = fuse(lambda a, back: None, worker_id="there")
    back = fuse(lambda there: None, worker_id="back", topic_in="fused", topic_out="frames")
    found = fed_by(a=source("a"), there=there, back=back, sink=Materialize(print, NODE, topic="fused"))
    assert found == {"a": set(), "there": {"a"}, "back": {"a"}, "sink": {"a", "there", "back"}}


def apps() -> Iterator[Any]:
    yield pytest.param((ROOT / "examples/network_security/app.py").read_text(), id="network_security")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for text in re.findall(r"^```python\n(# file: .*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            # Not a program that runs its nodes itself, nor the functions that a YAML file names.
            if re.search(r"(Pipeline|DataSource)\(", text) and not re.search(r"^with ", text, re.MULTILINE):
                yield pytest.param(text, id=path.name)


@pytest.mark.parametrize("text", [*apps()])
def test_nothing_is_said_of_the_examples(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples/network_security"))
    path = tmp_path / "app.py"
    path.write_text(text)
    found = find_nodes(path)
    assert len(found) > 2
    assert mismatches(found, path.name) == []


APP = """
from edgeserve import Compute, DataSource
camera = DataSource([1], {node!r}, source_id="cam", topic="frames")
fuse = Compute(lambda camera: camera, {node!r}, topic_in="frames", topic_out="fused")
"""


def test_run_warns_at_the_start(tmp_path: Path, node: str) -> None:
    path = tmp_path / "app.py"
    path.write_text(APP.format(node=node))
    with started(str(path)) as process:
        line = line_with(process, "parameter", "stderr")
        assert line.startswith("warning: parameter 'camera' of fuse: nothing in app.py sends it on topic 'frames'")
    with started(str(path), "--until-end") as process:
        line_until_end = line_with(process, "parameter", "stderr")
        assert line_until_end == line.rstrip() + ": with --until-end fuse waits until its end is there, for ever if none comes\n"
    with started(str(path), "--json") as process:
        event = json.loads(line_with(process, "parameter"))
        assert (event["event"], event["what"]) == ("warning", line.removeprefix("warning: ").rstrip())
