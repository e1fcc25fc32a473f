"""`edgeserve run --until-end` where topics still hold what earlier runs have left: an end among it is not the end of this run."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeserve import DataSource

from .conftest import Command

App = Callable[..., str]

# In the first run a node dies, at its first message, when all that feeds it has ended: its topic then holds messages and ends that its
# group has not settled. In the second run the sources begin when what was left has gone all the way, with its ends.
APP = """
import os, time
from pathlib import Path
from edgeserve import Compute, DataSource, Materialize
from edgeserve.transport import connect

NODE, HERE = {node!r}, Path({here!r})
RUN, DIES, RESULTS = int(os.environ["RUN"]), {dies!r}, {results}

def begins(name):
    (HERE / f"{{name}}.{{RUN}}").write_text(str(os.getpid()))

def await_end_of(name):
    while not (HERE / f"{{name}}.{{RUN}}").exists():
        time.sleep(0.01)
    pid = int((HERE / f"{{name}}.{{RUN}}").read_text())
    while Path(f"/proc/{{pid}}").exists():
        time.sleep(0.01)

def dies(*feeders):
    for name in feeders:
        await_end_of(name)
    os._exit(3)

def numbers(name):
    begins(name)
    if RUN == 2:
        while connect(NODE).topic_info("out").messages < RESULTS + 1:
            time.sleep(0.01)
        while not (HERE / "got").exists() or len((HERE / "got").read_text().split()) < RESULTS:
            time.sleep(0.01)
    yield from range(10 * RUN, 10 * RUN + RESULTS)

class Write:
    def __call__(self, value):
        if RUN == 1 and DIES == "sink":
            dies("worker")
        with open(HERE / "got", "a") as file:
            file.write(f"{{value}}\\n")

def stamp(value):
    return value

def source(name):
    return DataSource(numbers(name), NODE, source_id=name, topic="in", event_time=stamp, key=stamp)

sink = Materialize(Write(), NODE, topic="out")
"""

SINGLE = (
    APP
    + """
class Task:
    def setup(self):
        begins("worker")

    def __call__(self, a):
        if RUN == 1 and DIES == "worker":
            dies("a")
        return a

a = source("a")
worker = Compute(Task(), NODE, topic_in="in", topic_out="out")
"""
)

JOIN = (
    APP
    + """
class Task:
    def setup(self):
        begins("worker")

    def __call__(self, a, b):
        if RUN == 1 and DIES == "worker":
            dies("a", "b")
        assert a == b
        return a

a, b = source("a"), source("b")
workers = [
    Compute(Task(), NODE, f"w{{i}}", topic_in="in", topic_out="out", join="exact", output_id="pairs", {options}) for i in range({replicas})
]
"""
)


@pytest.fixture
def app(tmp_path: Path, node: str) -> App:
    """Writes an app."""

    def write(text: str, **fields: object) -> str:
        path = tmp_path / "app.py"
        path.write_text(text.format(**({"node": node, "here": str(tmp_path), "dies": "", "results": 3} | fields)))
        return str(path)

    return write


@pytest.mark.parametrize("dies", ["worker", "sink"])
@pytest.mark.parametrize(
    ("text", "fields"),
    [
        pytest.param(SINGLE, {}, id="one-parameter"),
        pytest.param(JOIN, {"replicas": 1, "options": ""}, id="two-parameters"),
        pytest.param(JOIN, {"replicas": 1, "options": "by=True, partitions=2"}, id="partitions"),
        pytest.param(JOIN, {"replicas": 2, "options": ""}, id="replicas"),
    ],
)
def test_an_end_that_a_failed_run_has_left_ends_no_node_of_the_next(
    edgeserve: Command, app: App, tmp_path: Path, text: str, fields: dict[str, object], dies: str
) -> None:
    path = app(text, dies=dies, **fields)
    first = edgeserve("run", path, "--until-end", env={"RUN": "1"})
    assert first.returncode == 1 and "exit status 3" in first.stderr, first.stdout + first.stderr
    second = edgeserve("run", path, "--until-end", env={"RUN": "2"})
    assert second.returncode == 0, second.stdout + second.stderr
    assert sorted((tmp_path / "got").read_text().split()) == ["10", "11", "12", "20", "21", "22"]


def test_sources_that_only_repeat_what_was_sent_before_end(edgeserve: Command, app: App) -> None:
    text = """
from edgeserve import Compute, DataSource, Materialize

source = DataSource(range(3), {node!r}, source_id="number", topic="in", message_id=int)
worker = Compute(lambda number: number, {node!r}, topic_in="in", topic_out="between")
after = Compute(lambda worker1: worker1, {node!r}, topic_in="between", topic_out="out")
sink = Materialize(lambda value: print("got", value), {node!r}, topic="out")
"""
    path = app(text)
    first, second = (edgeserve("run", path, "--until-end") for _ in range(2))
    assert (first.returncode, first.stdout.count("got")) == (0, 3), first.stderr
    assert (second.returncode, second.stdout.count("got")) == (0, 0), second.stderr


def test_a_recorded_topic_is_processed_without_its_sources(edgeserve: Command, app: App) -> None:
    text = """
from edgeserve import Compute, DataSource, Materialize

source = DataSource(range(3), {node!r}, source_id="number", topic="in")
"""
    assert edgeserve("run", app(text), "--until-end").returncode == 0
    text = """
from edgeserve import Compute, DataSource, Materialize

worker = Compute(lambda number: number, {node!r}, topic_in="in", topic_out="out")
sink = Materialize(lambda value: print("got", value), {node!r}, topic="out")
"""
    result = edgeserve("run", app(text), "--until-end")
    assert (result.returncode, result.stdout.count("got")) == (0, 3), result.stderr


def test_somebody_else_who_goes_on_sending_keeps_no_node_from_its_end(edgeserve: Command, app: App, node: str) -> None:
    text = """
from edgeserve import Compute, DataSource, Materialize

def source(name):
    return DataSource(range(3), {node!r}, source_id=name, topic="in", event_time=int, key=int)

a, b = source("a"), source("b")
worker = Compute(lambda a, b: a, {node!r}, topic_in="in", topic_out="out", join="exact", by=True, partitions=2)
sink = Materialize(lambda value: print("got", value), {node!r}, topic="out")
"""
    over = threading.Event()

    def send() -> None:
        with DataSource(itertools.count(), node, source_id="stranger", topic="in", key=int) as stranger:
            while not over.wait(0.02):
                next(stranger)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        result = edgeserve("run", app(text), "--until-end")
    finally:
        over.set()
        thread.join()
    assert (result.returncode, result.stdout.count("got")) == (0, 3), result.stderr
