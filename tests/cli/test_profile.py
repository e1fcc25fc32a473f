"""`edgeserve profile`: real pipelines, in processes of their own, and real connections."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import COMMAND, Command

from edgeserve.cli import links
from edgeserve.cli.output import CommandError
from edgeserve.cli.profile import Ran, others
from edgeserve.core.message import Header, TimeKind
from edgeserve.pipeline.costs import Costs, LinkCost, SourceCost, read_costs, write_costs
from edgeserve.pipeline.measure import Report, Sent, task_cost
from edgeserve.sources import CsvReplay

# What burns is counted on the burner's own clock, so that it is as much on a machine that is busy.
HEAD = """
import asyncio, itertools, os, subprocess, sys, threading, time
from edgeserve.pipeline import Pipeline
from edgeserve.sources import CsvReplay

app = Pipeline("yard")

def when(item):
    return item * 10**8

def burn(milliseconds):
    ends = time.thread_time_ns() + int(milliseconds * 1e6)
    while time.thread_time_ns() < ends:
        pass

"""


def written(folder: Path, text: str) -> str:
    path = folder / "app.py"
    path.write_text(HEAD + text)
    return str(path)


def measured(edgeserve: Command, folder: Path, text: str, *options: str) -> Costs:
    result = edgeserve("profile", written(folder, text), *options)
    assert result.returncode == 0, result.stdout + result.stderr
    return read_costs(folder / "costs.json")


def test_what_tasks_take_and_make(edgeserve: Command, tmp_path: Path) -> None:
    """In the function, in threads, in processes; without the first runs; in functions of every kind."""
    costs = measured(
        edgeserve,
        tmp_path,
        """
@app.source(event_time=when)
def a():
    yield from range(30)

@app.task()
def light(a: int) -> bytes:
    return bytes(1000)

class Heavy:
    def __init__(self, milliseconds):
        self.milliseconds, self.runs = milliseconds, 0

    def setup(self):
        self.model = b"x" * 150_000_000
        del self.model

    def __call__(self, a: "int"):
        self.runs += 1
        burn(300 if self.runs == 1 else 0)
        thread = threading.Thread(target=burn, args=(self.milliseconds,))
        thread.start()
        burn(self.milliseconds)
        thread.join()
        return "x" * 10

    def close(self):
        open("closed", "x").close()

app.add_task("heavy", Heavy, args={"milliseconds": 5})

@app.task()
def processes(a: int):
    subprocess.run([sys.executable, "-S", "-c", "import time\\nwhile time.process_time() < 0.02: pass"], check=True)

@app.task()
async def few(a):
    await asyncio.sleep(0)
    burn(1)
    return None if a % 2 else "even"

@app.task()
def many(light: bytes):
    for _ in range(3):
        burn(1)
        yield light[:500]

@app.sink()
def alarm(many):
    open("rung", "x").close()
""",
    )
    assert (costs.pipeline, costs.host, costs.links) == ("yard", os.uname().nodename, [])
    a = costs.sources["a"]
    assert (a.rate_hz, a.bytes, a.messages) == (pytest.approx(10), pytest.approx(1, abs=2), 30)
    tasks = costs.tasks
    assert {name: task.runs for name, task in tasks.items()} == dict.fromkeys(("light", "heavy", "processes", "few", "many"), 24)
    per_run = {"light": 1, "heavy": 1, "processes": 0, "few": 0.5, "many": 3}
    assert {name: task.outputs_per_run for name, task in tasks.items()} == per_run
    assert (tasks["light"].output_bytes, tasks["heavy"].output_bytes, tasks["many"].output_bytes) == (1000, 10, 500)
    assert 0.010 <= tasks["heavy"].cpu_s_quantiles["0.5"] <= tasks["heavy"].cpu_s_quantiles["0.99"] < 0.3
    assert tasks["processes"].cpu_s >= 0.020
    assert tasks["few"].cpu_s >= 0.001 and tasks["many"].cpu_s >= 0.003
    assert tasks["light"].cpu_s < tasks["heavy"].cpu_s
    assert tasks["light"].memory_bytes < 150e6 < tasks["heavy"].memory_bytes < tasks["light"].memory_bytes + 200e6
    assert (tmp_path / "closed").exists() and not (tmp_path / "rung").exists()


def test_joins_and_replicas_over_recorded_files_leave_nothing_behind(edgeserve: Command, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("t,v\n" + "".join(f"{t / 4},a{t}\n" for t in range(40)))
    (tmp_path / "temporary").mkdir()
    path = written(
        tmp_path,
        """
app.add_source("a", CsvReplay, args={"path": "live.csv", "position": "place"}, replicas=2, topic="of-a")

@app.source(event_time=lambda n: n * 5 * 10**8, topic="of-b")
def b():
    yield from range(40)

@app.source(event_time=lambda n: n * 10**9, replicas=2)
def c(replica):
    yield from range(replica, 20, 2)

@app.task(join="exact", replicas=2, log_path="logs")
def both(a, b):
    return a["v"]

@app.task(name="alone", sources="c", min_interval_ms=3_600_000, drop_if_older_than_ms=0.001)
def single(first):
    return first

app.add_sink("raw", print, of="a")
app.add_sink("other", print, of="b")
app.add_sink("show", print, of="both")
""",
    )
    before = {each.name for each in tmp_path.iterdir()}
    result = edgeserve("profile", path, "--in", "a=a.csv", "--warm-up", "0", "--json", env={"TMPDIR": str(tmp_path / "temporary")})
    assert result.returncode == 0, result.stdout + result.stderr
    costs = read_costs(tmp_path / "costs.json")
    said = json.loads(result.stdout.splitlines()[-1])
    assert (said["event"], said["costs"]["tasks"]["both"]["runs"]) == ("costs", costs.tasks["both"].runs)
    assert (costs.sources["a"].rate_hz, costs.sources["a"].messages) == (pytest.approx(4), 40)
    assert (costs.sources["b"].rate_hz, costs.sources["b"].messages) == (pytest.approx(2), 40)
    # Each of two processes at half a Hertz.
    assert (costs.sources["c"].rate_hz, costs.sources["c"].messages) == (pytest.approx(1), 20)
    # 20 times are common to both; of each of one or two processes the last run is left out. What goes by the clock does not.
    assert costs.tasks["both"].runs in (18, 19) and costs.tasks["both"].outputs_per_run == 1
    assert costs.tasks["alone"].runs == 19
    assert {each.name for each in tmp_path.iterdir()} - before <= {"costs.json", "__pycache__"}
    assert list((tmp_path / "temporary").iterdir()) == []


def test_live_sources_are_cut_after_so_many_messages(edgeserve: Command, tmp_path: Path) -> None:
    """Plain, async and those of this package, which do not note how far they were read. A relay between tasks counts as none."""
    (tmp_path / "c.csv").write_text("t,v\n" + "".join(f"{t / 100},c{t}\n" for t in range(40)))
    with CsvReplay(tmp_path / "c.csv", speed=None, position=tmp_path / "place") as replay:
        for _ in range(20):
            next(replay)
        replay.commit()
    place = (tmp_path / "place").read_bytes()
    costs = measured(
        edgeserve,
        tmp_path,
        """
@app.source(event_time=when)
def a():
    yield from itertools.count()

@app.source(event_time=when)
async def b():
    for n in itertools.count():
        yield n

@app.source()
def c():
    return CsvReplay("c.csv", loop=True, speed=None, position="place")

app.add_source("d", CsvReplay, args={"path": "c.csv", "speed": None, "position": "place"})

for name in "abcd":
    app.add_task("of_" + name, lambda item: item, sources=name)

app.add_task("ab", lambda a, b: a, join="exact")
""",
        "--messages",
        "30",
    )
    assert {name: source.messages for name, source in costs.sources.items()} == dict.fromkeys("abcd", 30)
    assert costs.sources["c"].rate_hz == pytest.approx(100, rel=0.01)
    assert {task.runs for task in costs.tasks.values()} == {24}
    assert (tmp_path / "place").read_bytes() == place


def test_a_pipeline_in_yaml_without_end_is_stopped_when_it_is_time(edgeserve: Command, tmp_path: Path) -> None:
    written(
        tmp_path,
        """
def numbers():
    yield from itertools.count()

def double(n):
    return 2 * n
""",
    )
    (tmp_path / "app.yaml").write_text(
        "pipeline: endless\nsources: {n: {stream: 'app.py:numbers'}}\ntasks: {double: {task: 'app.py:double', inputs: [n]}}\n"
    )
    result = edgeserve("profile", "app.yaml", "--seconds", "5", "--out", "other.json", "--host", "roof")
    assert result.returncode == 0, result.stdout + result.stderr
    costs = read_costs(tmp_path / "other.json")
    assert (costs.pipeline, costs.host) == ("endless", "roof")
    assert costs.tasks["double"].runs > 0 and costs.sources["n"].rate_hz > 0
    heads = [line.split() for line in result.stdout.splitlines() if "bytes" in line]
    assert heads == [
        ["source", "messages", "rate_hz", "bytes"],
        ["task", "runs", "cpu_ms", "p50", "p90", "p99", "memory_mib", "output_bytes", "outputs_per_run"],
    ]
    assert result.stdout.splitlines()[-1] == "written: other.json"


def test_few_messages_are_said_to_be_few(edgeserve: Command, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "app.add_source('a', [1, 2, 3], event_time=when)\napp.add_task('drop', lambda a: None)\n"
        "@app.task(retries=0)\ndef fails(a):\n    if a == 1:\n        raise ValueError('unlucky')\n    return a\n",
    )
    result = edgeserve("profile", path, "--warm-up", "0")
    assert result.returncode == 0, result.stderr
    for said in (
        "source 'a' sent only 3 messages, so its rate is a rough one: ",
        "task 'drop' was measured on only 2 runs, so its quantiles say little: ",
        "task 'drop' made no result, so the size of one is not known",
        "task 'fails' lost messages (1 dead_letter), so its figures are not those of a run where all is well",
    ):
        assert f"warning: {said}" in result.stderr


SOURCE = "app.add_source('a', range(20), event_time=when)\n"
T = "app.add_task('t', lambda a: a)\n"
TASK = SOURCE + T


@pytest.mark.parametrize(
    ("text", "options", "status", "said"),
    [
        (SOURCE, (), 1, "has no task to measure"),
        (TASK, ("--warm-up", "19"), 1, "task 't' had 20 runs, and the first 19 and the last of each process are left out"),
        (
            SOURCE + "app.add_source('b', range(50, 60), event_time=when)\napp.add_task('t', lambda a, b: a, join='exact')\n",
            (),
            1,
            "task 't' had no run: of its messages ",
        ),
        (SOURCE + "@app.task(retries=0)\ndef t(a):\n    raise ValueError('unlucky')\n", (), 1, "task 't' failed on 20 of 20 messages"),
        (SOURCE + "@app.task()\ndef t(a):\n    os._exit(3)\n", (), 1, "t failed (exit status 3)"),
        ("app.add_source('a', [1, 1], event_time=when)\n" + T, ("--warm-up", "0"), 1, "a rate takes two"),
        (
            "@app.source()\ndef a():\n    threading.Event().wait()\n    yield 1\n" + T,
            ("--seconds", "0.5"),
            1,
            "source 'a' sent no messages",
        ),
        ("app.add_source('a', [])\n" + T, ("--in", "a=lines.jsonl"), 1, "event_time needs the name of the field"),
        (TASK, ("--in", "b=lines.jsonl"), 2, "has no source 'b'"),
        (TASK, ("--in", "a=lines.txt"), 2, "nothing is known of how lines.txt is read"),
        (TASK, ("--out", "nowhere/costs.json"), 1, "there is no directory"),
        (TASK, ("--out", "lines.jsonl"), 1, "lines.jsonl is there already, and is no file of costs"),
        (TASK, ("--messages", "1"), 2, "--messages"),
        (TASK, ("--seconds", "0"), 2, "--seconds"),
        ("del app\n", (), 2, "no pipeline in app.py"),
        (T, (), 2, "takes 'a', which nothing sends"),
        (TASK, ("--listen",), 2, "leave out APP and --links"),
        (TASK, ("--links", "roof=there"), 2, "as HOST:PORT"),
        (TASK, ("--links", "roof=there:1"), 1, "no token is given"),
    ],
)
def test_what_cannot_be_measured_is_said_and_nothing_is_written(
    edgeserve: Command, tmp_path: Path, text: str, options: tuple[str, ...], status: int, said: str
) -> None:
    (tmp_path / "lines.jsonl").write_text("1\n2\n")
    (tmp_path / "lines.txt").touch()
    (tmp_path / "temporary").mkdir()
    env = {"TMPDIR": str(tmp_path / "temporary"), "EDGESERVE_PROFILE_TOKEN": ""}
    result = edgeserve("profile", written(tmp_path, text), *options, env=env)
    assert result.returncode == status, result.stdout + result.stderr
    assert said in result.stderr
    assert result.stderr.splitlines()[-1].startswith("to do: ")
    assert not (tmp_path / "costs.json").exists()
    assert (tmp_path / "lines.jsonl").read_text() == "1\n2\n"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_neither_app_nor_links_is_an_error(edgeserve: Command) -> None:
    result = edgeserve("profile")
    assert result.returncode == 2 and "Missing argument 'APP'" in result.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_is_interrupted_is_not_written(tmp_path: Path, number: signal.Signals, status: int) -> None:
    path = written(
        tmp_path,
        "app.add_source('a', itertools.count(), event_time=when)\n@app.task()\ndef t(a):\n    a or print('begun', flush=True)\n",
    )
    with subprocess.Popen(
        [COMMAND, "profile", path, "--seconds", "100"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any("begun" in line for line in process.stdout)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    assert not (tmp_path / "costs.json").exists()


def test_what_others_take_of_the_machine_is_what_is_neither_idle_nor_own() -> None:
    assert others((100.0, 50.0, 7.0), (120.0, 55.0, 17.0)) == pytest.approx(0.25)
    assert others((100.0, 50.0, 7.0), (100.0, 50.0, 7.0)) == 0


@pytest.mark.parametrize(
    ("kind", "every", "busy_ns", "disturbed", "said"),
    [
        (TimeKind.ARRIVAL, 1, 95, 0.0, "t may not have kept up, so a may have been held back below the rate of its own"),
        (TimeKind.DEVICE, 1, 95, 0.0, None),
        (TimeKind.ARRIVAL, 1, 80, 0.0, None),
        (TimeKind.DEVICE, 20, 95, 0.0, "source 'a' sent 100 messages, but of only 5 event times, so its rate is a rough one"),
        (TimeKind.ARRIVAL, 1, 80, 0.25, "the machine was too busy: other processes took 25% of its cores"),
    ],
)
def test_what_makes_figures_doubtful(kind: TimeKind, every: int, busy_ns: int, disturbed: float, said: str | None) -> None:
    sent, report = Sent(), Report("t", 11, [busy_ns] * 10, 1000, 1)
    for n in range(100):
        sent.add(Header(bytes(16), "a", "p", n, n // every, 0, time_kind=int(kind)))
    task = task_cost([report], [sent], 0)
    assert task is not None
    costs = Costs(pipeline="yard", sources={"a": SourceCost(rate_hz=1, bytes=1, messages=100)}, tasks={"t": task})
    ran = Ran("app.py", (), 0, {"a": {"p": sent}, "t": {"q": sent}}, {"t": [report]}, {"t": Counter()}, disturbed)
    doubts = list(ran.doubts(costs))
    assert len(doubts) == (said is not None) and all(doubt.startswith(str(said)) for doubt in doubts)


# --- links ------------------------------------------------------------------------------------------------------------

COSTS = Costs(pipeline="yard", sources={}, tasks={}, links=[LinkCost(ends=("roof", "gate"), bandwidth_bytes_s=1.0, latency_ms=1.0)])


@contextmanager
def listening(*options: str, token: str = "") -> Iterator[dict[str, Any]]:
    """A listener in a process of its own, and what it says first."""
    env = os.environ | {"EDGESERVE_PROFILE_TOKEN": token}
    with subprocess.Popen([COMMAND, "profile", "--listen", *options, "--json"], stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_links_are_measured_between_processes_and_kept(edgeserve: Command, tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", COSTS)
    with listening() as said:
        assert said["at"].startswith("127.0.0.1:")
        env = {"EDGESERVE_PROFILE_TOKEN": said["token"]}
        result = edgeserve("profile", "--host", "roof", "--links", f"cellar={said['at']}", "--links", f"gate={said['at']}", env=env)
        assert result.returncode == 0, result.stderr
        wrong = edgeserve("profile", "--links", f"cellar={said['at']}", env={"EDGESERVE_PROFILE_TOKEN": "guessed"})
        assert wrong.returncode == 1 and "it has another token" in wrong.stderr and f"where: {said['at']}" in wrong.stderr
    costs = read_costs(tmp_path / "costs.json")
    assert {link.ends for link in costs.links} == {("roof", "gate"), ("roof", "cellar")}
    # Through memory: more than a network of 10 Mbit/s, and sooner than from another continent.
    assert all(link.bandwidth_bytes_s > 1.25e6 and link.latency_ms < 100 for link in costs.links)
    again = measured(edgeserve, tmp_path, TASK)
    assert set(again.tasks) == {"t"} and again.links == costs.links


def test_links_alone_need_a_file_and_somebody_who_listens(edgeserve: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        at = f"127.0.0.1:{server.getsockname()[1]}"
    env = {"EDGESERVE_PROFILE_TOKEN": "t"}
    result = edgeserve("profile", "--links", f"cellar={at}", env=env)
    assert result.returncode == 1 and "there is no costs.json to write links to" in result.stderr
    write_costs(tmp_path / "costs.json", COSTS)
    result = edgeserve("profile", "--links", f"cellar={at}", env=env)
    assert result.returncode == 1 and "no answer" in result.stderr and f"where: {at}" in result.stderr
    assert read_costs(tmp_path / "costs.json") == COSTS


def test_who_has_given_a_token_is_not_shown_it() -> None:
    with listening("127.0.0.1:0", token="of my own") as said:
        assert "token" not in said
        links.measure(parsed(said["at"]), "of my own")


def parsed(at: str) -> links.Address:
    host, _, port = at.rpartition(":")
    return host, int(port)


def answered(peer: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := peer.recv(4096):
            got += chunk
    return got


def test_a_listener_lets_nobody_do_more_than_they_may_and_goes_on() -> None:
    with listening(token="secret") as said:
        at = parsed(said["at"])
        with socket.create_connection(at, timeout=60) as peer:
            peer.sendall(bytes(4096))
            assert answered(peer)[-1:] == b"0"
        with socket.create_connection(at, timeout=60) as peer:
            hello = peer.recv(4096)
            peer.sendall(links.proof(b"secret", hello[-32:]))
            assert peer.recv(1) == b"1"
            peer.sendall((2**28 + 1).to_bytes(8, "big"))
            assert answered(peer) == b""
        links.measure(at, "secret")


def test_a_listener_waits_for_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "KNOWN_S", 0.05)
    ready, address = threading.Event(), list[links.Address]()

    def tell(at: links.Address) -> None:
        address.append(at)
        ready.set()

    threading.Thread(target=links.listen, args=(("127.0.0.1", 0), "secret", tell), daemon=True).start()
    assert ready.wait(60)
    with socket.create_connection(address[0], timeout=60) as silent:
        assert answered(silent)[:10] == b"edgeserve "


def test_who_is_no_listener_is_told_from_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer).start()
        with pytest.raises(CommandError, match="it says b'HTTP"):
            links.measure(server.getsockname(), "secret")
