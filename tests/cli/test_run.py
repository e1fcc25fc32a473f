"""`edgeserve run app.py`: every node a process, one command that starts and ends them all."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from pathlib import Path

import pytest

from .conftest import line_with, started

PIPELINE = """
import itertools, os, time
from edgeserve import Compute, DataSource, Materialize

NODE = {node!r}

def numbers():
    for i in itertools.count() if {endless!r} else range(5):
        yield i
        if {endless!r}:
            time.sleep(0.01)

def double(number):
    return 2 * number

def show(value):
    print("got", value, "in", os.getpid())

source = DataSource(numbers(), NODE, source_id="number", topic="in")
worker = Compute(double, NODE, topic_in="in", topic_out="out")
sink = Materialize(show, NODE, topic="out")
also_sink = sink
"""


@pytest.fixture
def app(tmp_path: Path, node: str):
    """`app(endless=False)` writes a pipeline of three nodes; `app("text")` a file with this text."""

    def write(text: str = PIPELINE, *, endless: bool = False) -> str:
        path = tmp_path / "app.py"
        path.write_text(text.format(node=node, endless=endless))
        return str(path)

    return write


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_sources_start_when_those_who_read_are_ready(edgeserve, app):
    text = """
from edgeserve import Compute, DataSource, Materialize

class Double:
    def setup(self):
        print("the task is ready")

    def __call__(self, number):
        return 2 * number

def numbers():
    print("the source begins")
    yield 1

source = DataSource(numbers(), {node!r}, source_id="number", topic="in")
worker = Compute(Double(), {node!r}, topic_in="in", topic_out="out")
sink = Materialize(print, {node!r}, topic="out")
"""
    result = edgeserve("run", app(text), "--until-end", "--json")
    assert result.returncode == 0, result.stderr
    said = [line["line"] for line in map(json.loads, result.stdout.splitlines()) if "line" in line]
    assert said.index("the task is ready") < said.index("the source begins")


def test_a_process_that_a_node_forks_before_it_is_ready_keeps_no_source_from_starting(edgeserve, app):
    text = """
import os, time
from edgeserve import Compute, DataSource, Materialize

class Double:
    def setup(self):
        if not os.fork():  # it has all that this process has open, until it is killed with it
            while os.getppid() == parent:
                time.sleep(0.05)
            os._exit(0)

    def __call__(self, number):
        return 2 * number

parent = os.getpid()
source = DataSource(iter([1]), {node!r}, source_id="number", topic="in")
worker = Compute(Double(), {node!r}, topic_in="in", topic_out="out")
sink = Materialize(print, {node!r}, topic="out")
"""
    result = edgeserve("run", app(text), "--until-end")
    assert result.returncode == 0, result.stderr
    assert "sink   | 2" in result.stdout


def test_nodes_run_in_processes_of_their_own_until_the_end(edgeserve, app):
    result = edgeserve("run", app(), "--until-end")
    assert result.returncode == 0, result.stdout + result.stderr
    first, *rest = result.stdout.splitlines()
    assert "source (DataSource), worker (Compute), sink (Materialize)" in first
    got = [line for line in rest if "got" in line]
    assert [line.split()[3] for line in got] == ["0", "2", "4", "6", "8"]
    assert all(line.startswith("sink   | got ") for line in got)
    assert "\x1b" not in result.stdout


def test_lines_as_json(edgeserve, app):
    result = edgeserve("run", app(), "--until-end", "--json")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [f["line"].split()[1] for f in found if f.get("node") == "sink"] == ["0", "2", "4", "6", "8"]
    assert found[-1] == {"event": "end", "stopped_by": None, "failures": [], "killed": []}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_cleanly(app, number):
    with started(app(endless=True)) as process:
        pid = int(line_with(process, "got 20 ").split()[-1])
        assert pid != process.pid
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        # A machine that is busy may take so long that it is said who is waited for.
        assert [line for line in err.splitlines() if not line.startswith("waiting for ")] == []
        assert not is_alive(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("engine", ["pulsar", "nats"])
def test_a_signal_ends_nodes_that_wait_for_a_broker(app, engine, number):
    pytest.importorskip(engine)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        url = f"{engine}://127.0.0.1:{silent.getsockname()[1]}"
        with started(app(f"from edgeserve import *\na = DataSource([1], {url!r}, source_id='a')\n")) as process:
            with silent.accept()[0]:
                process.send_signal(number)
                _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            assert "Traceback" not in err


STUCK = """
import itertools, threading, time
from edgeserve import Compute, DataSource

def numbers():
    for i in itertools.count():
        yield i
        time.sleep(0.01)

def stuck(number):
    print("in hand")
    threading.Event().wait()

source = DataSource(numbers(), {node!r}, source_id="number", topic="in")
worker = Compute(stuck, {node!r}, topic_in="in", topic_out="out")
"""


def test_a_second_signal_kills_what_is_still_waited_for(app):
    with started(app(STUCK), "--grace", "600") as process:
        line_with(process, "in hand")
        process.send_signal(signal.SIGINT)
        line = line_with(process, "waiting for", "stderr")
        assert "worker" in line and "Ctrl-C once more kills" in line
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT
        assert "had to be killed: worker" in err


def test_who_is_waited_for_and_who_was_killed_as_json(app):
    with started(app(STUCK), "--grace", "600", "--json") as process:
        line_with(process, "in hand")
        process.send_signal(signal.SIGTERM)
        waiting = json.loads(line_with(process, '"waiting"'))
        assert waiting["event"] == "waiting" and "worker" in waiting["nodes"]
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        end = json.loads(out.splitlines()[-1])
        assert (end["stopped_by"], end["failures"]) == ("SIGTERM", []) and "worker" in end["killed"]


def test_who_does_not_end_in_time_is_killed_and_the_status_says_so(app):
    with started(app(STUCK), "--grace", "0.1") as process:
        line_with(process, "in hand")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert "did not end in time and had to be killed: " in err and "worker" in err


def test_a_signal_that_comes_twice_at_once_is_one(app):
    with started(app(endless=True), "--grace", "600") as process:
        line_with(process, "got 20 ")
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        assert "killed" not in err


def test_a_node_that_fails_is_named_and_the_others_are_stopped(edgeserve, app):
    text = (
        PIPELINE
        + "\nclass Broken:\n    def setup(self):\n        raise RuntimeError('no camera')\n    def __call__(self, number):\n        pass\n"
    )
    text += "\nbroken = Compute(Broken(), NODE, topic_in='in', topic_out='elsewhere')\n"
    result = edgeserve("run", app(text, endless=True))
    assert result.returncode == 1
    assert "broken | RuntimeError: no camera" in result.stderr
    error, where, _ = result.stderr.splitlines()[-3:]
    assert error.startswith("error: broken failed (exit status 1)")
    assert where.endswith("app.py")


def test_a_node_whose_broker_refuses_it_says_so_in_three_lines(edgeserve, app):
    text = "from edgeserve import Materialize\nsink = Materialize(print, 'nats://127.0.0.1:1/x?colour=red', topic='out')\n"
    result = edgeserve("run", app(text))
    assert result.returncode == 1
    what, where, to_do, *_ = result.stderr.splitlines()
    assert what.startswith("sink | error: nats://127.0.0.1:1/x?colour=") and "knows token, creds" in what
    assert where.endswith("app.py") and where.startswith("sink | where: sink of ") and to_do.startswith("sink | to do: ")
    assert "Traceback" in edgeserve("run", app(text), "--verbose").stderr


def test_a_node_that_is_killed_is_named(app):
    with started(app(endless=True)) as process:
        pid = int(line_with(process, "got 20 ").split()[-1])
        os.kill(pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "error: sink failed (killed by SIGKILL)" in err


def test_nodes_end_when_the_command_is_killed(app):
    with started(app(endless=True)) as process:
        pid = int(line_with(process, "got 20 ").split()[-1])
        node = os.pidfd_open(pid)
        try:
            process.kill()
            assert select.select([node], [], [], 60)[0], "the node still runs"
        finally:
            os.close(node)


def test_nodes_that_would_not_see_each_other_are_refused(edgeserve, app):
    text = "from edgeserve import *\na = DataSource([1], 'memory://', source_id='a')\nb = Materialize(print, 'memory://', topic='src')\n"
    result = edgeserve("run", app(text))
    assert result.returncode == 1
    assert "memory:// is the memory of one process" in result.stderr


def test_a_node_alone_on_memory_runs_if_it_sends_and_is_refused_if_it_would_wait(edgeserve, app):
    text = "from edgeserve import *\na = DataSource([1], 'memory://', source_id='a')\n"
    assert edgeserve("run", app(text)).returncode == 0
    result = edgeserve("run", app("from edgeserve import *\nb = Materialize(print, 'memory://', topic='src')\n"))
    assert result.returncode == 1
    assert "b of app.py would wait for ever" in result.stderr


def test_a_file_without_nodes_is_told_so(edgeserve, app):
    result = edgeserve("run", app("x = 1\n"))
    assert result.returncode == 1
    assert result.stderr.splitlines()[0] == "error: no nodes in app.py"


RAISES = "def f():\n    return 1 / 0\n\nf()\n"


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        (RAISES, "ZeroDivisionError: division by zero", 2),
        ("x = 1\ndef f(:\n", "SyntaxError: ", 2),
        ("\n\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'", 3),
        ("import edgeserve\nedgeserve.DataSource([1], 'local://', source_id='')\n", "source_id must be", 2),
        ("import json\njson.loads('no')\n", "JSONDecodeError: ", 2),
        ("Dear reader,\nthis is no program.\n", "SyntaxError: ", 1),
    ],
)
def test_a_file_that_cannot_run_is_an_error_of_three_lines(edgeserve, app, text, what, line):
    path = app(text)
    result = edgeserve("run", path)
    assert result.returncode == 1
    error, where, to_do = result.stderr.splitlines()
    assert error.startswith(f"error: {what}")
    assert where == f"where: {path}:{line}"
    assert to_do.startswith("to do: correct it") and "--verbose" in to_do


def test_verbose_shows_the_traceback_of_a_file_that_raises(edgeserve, app):
    result = edgeserve("run", app(RAISES), "--verbose")
    assert result.returncode == 1
    assert 'app.py", line 2, in f' in result.stderr
    assert "importlib" not in result.stderr and "child.py" not in result.stderr and "cli/run.py" not in result.stderr
    assert result.stderr.splitlines()[-3].startswith("error: ZeroDivisionError")


def test_an_error_in_a_file_that_the_app_imports_is_found_there(edgeserve, app, tmp_path):
    (tmp_path / "helper.py").write_text("\nx = (\n")
    result = edgeserve("run", app("import helper\n"), "--json")
    assert json.loads(result.stderr)["error"]["where"] == f"{tmp_path}/helper.py:2"


def test_what_is_no_python_file_is_told_so(edgeserve, app, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    result = edgeserve("run", "notes.txt")
    assert result.returncode == 1
    assert result.stderr.splitlines()[:2] == [
        f"error: ImportError: {tmp_path}/notes.txt is not a Python file",
        f"where: {tmp_path}/notes.txt",
    ]
    (tmp_path / "binary.py").write_bytes(bytes(range(256)))
    result = edgeserve("run", "binary.py")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 3
    assert "binary.py" in result.stderr.splitlines()[1]


@pytest.mark.parametrize(
    ("text", "how"), [("raise SystemExit(0)", "status 0"), ("exit(3)", "status 3"), ("import os; os.kill(os.getpid(), 9)", "SIGKILL")]
)
def test_a_file_that_ends_its_process_is_told_so(edgeserve, app, text, how):
    result = edgeserve("run", app(text))
    assert result.returncode == 1
    error, _, _ = result.stderr.splitlines()
    assert error.startswith("error: app.py ") and how in error


def test_a_file_that_is_not_there_is_a_usage_error(edgeserve):
    result = edgeserve("run", "nothing.py")
    assert result.returncode == 2
    assert "nothing.py" in result.stderr


def test_nodes_in_a_list_are_found(edgeserve, app):
    text = (
        "from edgeserve import DataSource, Materialize\n"
        "sources = [DataSource([i], {node!r}, source_id=f's{{i}}', topic='in') for i in range(2)]\n"
        "sink = Materialize(print, {node!r}, topic='in')\n"
    )
    result = edgeserve("run", app(text), "--until-end")
    assert result.returncode == 0, result.stderr
    assert "sources[0] (DataSource), sources[1] (DataSource), sink (Materialize)" in result.stdout
