"""`edgeserve validate`, `graph` and `run` on pipelines: real processes on a store of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests import servers
from tests.cli.conftest import Command, line_with, started

from edgeserve.pipeline import schema

APP = """
import itertools, os, time
from edgeserve.pipeline import Pipeline

app = Pipeline("demo", node={node!r})

def numbers(step=1):
    open("{here}/ran", "a").close()
    for i in itertools.count() if {endless!r} else range(5):
        yield step * i
        if {endless!r}:
            time.sleep(0.01)

def when(number):
    return number

for name in ("left", "right"):
    app.add_source(name, numbers, event_time=when, message_id=when, place="roof")

@app.task(join="exact", replicas=2, place=["roof", "cellar"])
def pair(left: int, right: int) -> list:
    return [left, right, os.getpid()]

@app.sink(place="cellar")
def show(pair):
    print("got", pair[0], pair[1], "by", pair[2])

@app.sink(of="left", place="cellar")
def raw(value):
    print("raw", value)
"""

YAML = """
pipeline: demo
node: {node}
sources:
  left: {{stream: "parts.py:numbers", event_time: "parts.py:when", message_id: "parts.py:when"}}
  right: {{stream: "parts.py:numbers", event_time: "parts.py:when", message_id: "parts.py:when"}}
tasks:
  pair: {{task: "parts.py:pair", join: exact, replicas: 2}}
sinks:
  show: {{sink: "parts.py:show", of: pair}}
  raw: {{sink: "parts.py:raw", of: left}}
"""

App = Callable[..., str]


@pytest.fixture
def app(tmp_path: Path, node: str) -> App:
    """`app()` writes a pipeline in Python, `app(text)` another; `app(YAML)` one in YAML."""

    def write(text: str = APP, *, endless: bool = False, **more: str) -> str:
        fields = {"node": node, "here": str(tmp_path), "endless": endless, **more}
        path = tmp_path / ("app.yaml" if text == YAML else "app.py")
        if text == YAML:
            (tmp_path / "parts.py").write_text(APP.format(**fields))
        path.write_text(text.format(**fields))
        return str(path)

    return write


def got(lines: str) -> list[list[str]]:
    return [line.split("got ")[1].split()[:2] for line in lines.splitlines() if "got " in line]


@pytest.mark.parametrize("text", [APP, YAML], ids=["python", "yaml"])
def test_each_replica_runs_as_a_process_until_the_end(edgeserve: Command, app: App, text: str) -> None:
    result = edgeserve("run", app(text), "--until-end")
    assert result.returncode == 0, result.stdout + result.stderr
    names = "left (DataSource), left>pair (Compute), right (DataSource), pair[0] (Compute), pair[1] (Compute), show (Materialize), raw"
    assert names in result.stdout.splitlines()[0]
    assert sorted(got(result.stdout)) == [[str(i)] * 2 for i in range(5)]
    assert [line.split("| raw ")[1] for line in result.stdout.splitlines() if "| raw " in line] == [*"01234"]
    # A machine that is busy may take so long to start the sources that others say what they wait for.
    assert [line for line in result.stderr.splitlines() if " waits: " not in line] == []


def test_another_node_is_named_when_it_is_run(edgeserve: Command, app: App, tmp_path: Path) -> None:
    other = f"local://{tmp_path}/other"
    result = edgeserve("run", app(), "--until-end", "--node", other)
    assert (result.returncode, len(got(result.stdout))) == (0, 5), result.stderr
    topics = {each["topic"] for each in json.loads(edgeserve("topic", "list", "--node", other, "--json").stdout)}
    assert {"demo.left", "demo.left+right", "demo.pair"} <= topics
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("engine", ["pulsar", "nats"])
def test_names_that_are_derived_are_names_on_brokers(edgeserve: Command, app: App, engine: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{engine}_url")
    other = f"{url}/{uuid.uuid4().hex}" if engine == "nats" else servers.with_namespace(url)
    result = edgeserve("run", app(), "--until-end", "--node", other)
    assert result.returncode == 0, result.stderr
    assert sorted(got(result.stdout)) == [[str(i)] * 2 for i in range(5)]
    assert result.stdout.count("| raw ") == 5


def test_hosts_run_what_is_placed_on_them(app: App) -> None:
    path = app(endless=True)
    with ExitStack() as stack:
        cellar, roof = (stack.enter_context(started(path, "--host", host)) for host in ("cellar", "roof"))
        assert "pair[1] (Compute), show (Materialize), raw (Materialize)" in line_with(cellar, "running 3 nodes")
        assert "left (DataSource), left>pair (Compute), right (DataSource), pair[0] (Compute)" in line_with(roof, "running 4 nodes")
        line_with(cellar, "got 20 ")
        for process in (roof, cellar):
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, out + err


def test_a_host_that_is_none_is_an_error(edgeserve: Command, app: App) -> None:
    result = edgeserve("run", app(), "--host", "celar")
    assert result.returncode == 1
    assert result.stderr.splitlines()[0] == "error: nothing runs on the host 'celar'"
    assert result.stderr.splitlines()[2] == "to do: did you mean 'cellar'?"


def test_a_host_alone_does_not_know_when_others_have_ended(edgeserve: Command, app: App) -> None:
    result = edgeserve("run", app(), "--host", "cellar", "--until-end")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[0].startswith("error: --until-end with --host: one host does not know when those have ended")


def test_a_replica_that_is_killed_is_started_again_and_nothing_is_lost(app: App) -> None:
    with started(app(endless=True)) as process:
        seen, pids, victim, counted = set[int](), set[int](), 0, -1
        for line in process.stdout or ():
            if "got " not in line:
                continue
            number, pid = int(line.split("got ")[1].split()[0]), int(line.split()[-1])
            seen.add(number)
            pids.add(pid)
            if not victim and len(pids) == 2:
                victim = pid
                os.kill(victim, signal.SIGKILL)
                assert "failed (killed by SIGKILL) and is started again" in line_with(process, "pair[", "stderr")
            if len(pids) == 3 and counted < 0:
                counted = number + 100
            if 0 <= counted <= number:
                break
        else:
            raise AssertionError(f"it ended: {process.communicate()}")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
    seen |= {int(pair[0]) for pair in got(out)}
    assert seen == set(range(max(seen) + 1))


SOURCE = """
import itertools, os, time
from edgeserve.pipeline import Pipeline

app = Pipeline("again", node={node!r})

@app.source({known})
def number():
    open("{here}/pid", "w").write(str(os.getpid()))
    for i in itertools.count():
        yield i
        time.sleep(0.005)

@app.sink()
def show(number):
    print("got", number, flush=True)
"""


def kill_the_source(process: subprocess.Popen[str], tmp_path: Path) -> None:
    line_with(process, "got 20")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def numbers_got(process: subprocess.Popen[str]) -> list[int]:
    """What it prints until it ends. `communicate` would leave out what was read ahead."""
    return [int(line.split()[-1]) for line in process.stdout or () if "got " in line]


def test_a_source_that_tells_its_messages_apart_is_started_again_and_doubles_nothing(app: App, tmp_path: Path) -> None:
    with started(app(SOURCE, known="message_id=int")) as process:
        kill_the_source(process, tmp_path)
        line_with(process, "number failed (killed by SIGKILL) and is started again", "stderr")
        found = list[int]()
        while (newest := line_with(process, "got ")) and int(newest.split()[-1]) < 200:
            found.append(int(newest.split()[-1]))
        process.send_signal(signal.SIGINT)
        found += [int(newest.split()[-1]), *numbers_got(process)]
        assert process.wait(60) == 0
    assert found == list(range(21, 21 + len(found)))


def test_a_source_that_does_not_is_not_started_again_and_says_why(app: App, tmp_path: Path) -> None:
    with started(app(SOURCE, known="")) as process:
        kill_the_source(process, tmp_path)
        found, err = numbers_got(process), process.stderr.read() if process.stderr else ""
        assert process.wait(60) == 1
    assert found == list(range(21, 21 + len(found)))
    assert "is started again" not in err
    assert (
        "error: number failed (killed by SIGKILL), and is not started again: without message_id= or a stream with a position it may send "
        "once more what it has sent; all other nodes were stopped"
    ) in err.splitlines()


DIES = """
import os
from edgeserve.pipeline import Pipeline

app = Pipeline("dies", node={node!r})
app.add_source("a", range(3))

class Dies:
    def setup(self):
        if os.environ.get("EARLY"):
            raise RuntimeError("no camera")

    def __call__(self, a):
        os._exit(3)

app.add_task("dies", Dies)
"""


def test_a_node_that_fails_too_often_ends_all(edgeserve: Command, app: App) -> None:
    result = edgeserve("run", app(DIES), "--restarts", "1")
    assert result.returncode == 1
    assert result.stderr.count("dies failed (exit status 3) and is started again") == 1
    once = "error: dies failed (exit status 3), and is not started again: it has been, once (--restarts); all other nodes were stopped"
    assert once in result.stderr
    events = [json.loads(line) for line in edgeserve("run", app(DIES), "--restarts", "2", "--json").stdout.splitlines()]
    assert [event for event in events if event.get("event") == "restart"] == [
        {"event": "restart", "node": "dies", "how": "exit status 3"}
    ] * 2
    assert [failure["node"] for failure in events[-1]["failures"]] == ["dies"]


def test_a_node_that_never_was_ready_is_not_started_again(edgeserve: Command, app: App) -> None:
    result = edgeserve("run", app(DIES), env={"EARLY": "1"})
    assert result.returncode == 1
    assert result.stderr.count("RuntimeError: no camera") == 1 and "is started again" not in result.stderr
    assert "and is not started again: it failed before it was ready for the first time" in result.stderr


def test_nodes_without_a_pipeline_are_started_again_when_that_is_asked_for(edgeserve: Command, app: App) -> None:
    text = """
import os
from edgeserve import Compute, DataSource

a = DataSource([1], {node!r}, source_id="a", topic="in")
dies = Compute(lambda a: os._exit(3), {node!r}, topic_in="in", topic_out="out")
"""
    assert "started again" not in edgeserve("run", app(text)).stderr
    said = edgeserve("run", app(text), "--restarts", "2").stderr
    assert said.count("is started again") == 2
    assert "and is not started again: it has been, 2 times (--restarts)" in said


def test_an_interrupt_ends_all_in_order(edgeserve: Command, app: App, node: str) -> None:
    with started(app(YAML, endless=True)) as process:
        line_with(process, "got 20 ")
        shown = edgeserve("groups", "demo.left+right", "--node", node).stdout
        assert "pair-0@" in shown and "pair-1@" in shown
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        assert [line for line in err.splitlines() if not line.startswith("waiting for ")] == []


# --- validate and graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [APP, YAML], ids=["python", "yaml"])
def test_a_pipeline_that_can_run_is_valid_and_none_of_it_runs(edgeserve: Command, app: App, tmp_path: Path, text: str) -> None:
    path = app(text)
    result = edgeserve("validate", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{path} is a pipeline, 'demo': 2 sources, 1 relay, 1 task, 2 sinks, in 7 processes\n"
    document = json.loads(edgeserve("validate", path, "--json").stdout)
    assert document["valid"] is True and document["pipeline"] == "demo"
    assert not (tmp_path / "ran").exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["validate", "graph"])
def test_what_cannot_run_is_three_lines_and_status_2(edgeserve: Command, app: App, tmp_path: Path, command: str) -> None:
    path = app(YAML)
    Path(path).write_text(Path(path).read_text().replace("join: exact", "jion: exact"))
    result = edgeserve(command, path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "error: task 'pair' takes no 'jion'",
        f"where: {path}:8",
        "to do: did you mean 'join'?",
    ]
    error = json.loads(edgeserve(command, path, "--json").stderr)["error"]
    assert error["where"] == f"{path}:8"
    assert edgeserve("run", path).returncode == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "no pipeline in app.py"),
        ("1 / 0\n", "ZeroDivisionError"),
        (
            "from edgeserve.pipeline import Pipeline\na = Pipeline('a')\nb = Pipeline('b')\n",
            "app.py declares a, b: a file has one pipeline",
        ),
        (
            "from edgeserve import DataSource\nfrom edgeserve.pipeline import Pipeline\na = Pipeline('a')\n"
            "b = DataSource([1], 'local://', source_id='b')\n",
            "app.py declares a, b: a file has one pipeline",
        ),
        ("from edgeserve.pipeline import Pipeline\na = Pipeline('a')\n", "pipeline 'a' declares nothing"),
    ],
)
def test_a_file_that_declares_no_one_pipeline_is_not_valid(edgeserve: Command, app: App, text: str, said: str) -> None:
    result = edgeserve("validate", app(text))
    assert result.returncode == 2 and said in result.stderr.splitlines()[0], result.stderr
    assert len(result.stderr.splitlines()) == 3


def test_a_python_error_names_the_line_of_the_declaration(edgeserve: Command, app: App) -> None:
    text = "from edgeserve.pipeline import Pipeline\n\napp = Pipeline('a')\n\n@app.task(replicas=-1)\ndef t(a):\n    return a\n"
    path = app(text)
    result = edgeserve("validate", path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[:2] == ["error: task 't': replicas=-1", f"where: {path}:5"]


def test_node_and_host_are_for_pipelines(edgeserve: Command, app: App) -> None:
    path = app("from edgeserve import DataSource\na = DataSource([1], {node!r}, source_id='a')\n")
    for option in ("--node", "--host"):
        result = edgeserve("run", path, option, "local://x")
        assert result.returncode == 1 and "app.py declares no pipeline" in result.stderr.splitlines()[0]


def test_the_schema_is_written(edgeserve: Command) -> None:
    result = edgeserve("validate", "--schema")
    assert (result.returncode, json.loads(result.stdout)) == (0, json.loads(json.dumps(schema())))
    assert edgeserve("validate").returncode == 2


def test_the_graph_as_mermaid_json_and_svg(edgeserve: Command, app: App) -> None:
    path = app()
    shown = edgeserve("graph", path).stdout
    assert shown.splitlines() == [
        "flowchart LR",
        '    n0(["left · on roof"])',
        '    n1(("left>pair · on roof"))',
        '    n2(["right · on roof"])',
        '    n3["pair x 2 · on roof, cellar"]',
        '    n4[["show · on cellar"]]',
        '    n5[["raw · on cellar"]]',
        "    n0 --> n1",
        "    n0 --> n5",
        "    n1 --> n3",
        "    n2 --> n3",
        "    n3 --> n4",
    ]
    document = json.loads(edgeserve("graph", path, "--format", "json").stdout)
    assert document == json.loads(edgeserve("graph", path, "--json").stdout)
    assert {"from": "left>pair", "to": "pair", "topic": "demo.left+right"} in document["edges"]
    assert document["nodes"][3] == {
        "name": "pair",
        "kind": "task",
        "inputs": ["left", "right"],
        "sends": "pair",
        "stages": [],
        "topic_in": "demo.left+right",
        "topic_out": "demo.pair",
        "group": "pair",
        "replicas": 2,
        "places": ["roof", "cellar"],
        "trigger": "all",
        "min_interval_ms": 0.0,
        "lazy_bytes": 65536,
        "shares_sets": True,
    }
    picture = ET.fromstring(edgeserve("graph", path, "--format", "svg").stdout)
    name = "{http://www.w3.org/2000/svg}"
    boxes = [tuple(float(box.attrib[at]) for at in ("x", "y", "width", "height")) for box in picture.iter(f"{name}rect")]
    assert len(boxes) == 6 and len([*picture.iter(f"{name}path")]) == 5 + 1
    for i, (x, y, width, height) in enumerate(boxes):
        assert x + width <= float(picture.attrib["width"]) and y + height <= float(picture.attrib["height"])
        assert not any(x < a + c and a < x + width and y < b + d and b < y + height for a, b, c, d in boxes[:i]), "two lie on each other"
    texts = [text.text for text in picture.iter(f"{name}text")]
    assert "pair x 2" in texts and "left>pair" in texts
