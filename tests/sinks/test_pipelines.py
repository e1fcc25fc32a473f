"""Sinks at the end of a pipeline: killed -9 with work unsettled, on a full disk, two at a time."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.disks import fill_up
from tests.sinks.reading import hidden, lines, made, rows, written
from tests.transport.children import Child
from tests.waiting import until

from edgeserve import DataSource, Materialize
from edgeserve.core.errors import DiskFull, FileBusy, UsedAfterFork
from edgeserve.sinks import JsonLinesSink, ParquetSink
from edgeserve.stage.deadletter import read_dead_letter
from edgeserve.transport import connect, disconnect

PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
from edgeserve import Materialize
from edgeserve.sinks import JsonLinesSink, ParquetSink
from edgeserve.transport.member import LogSubscription

node, folder, kind, at = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
reached = threading.Event()

def kill(*args, **rest):
    reached.wait()
    os.kill(os.getpid(), signal.SIGKILL)

def gate(row):
    if at.isdigit() and row["n"] >= int(at):
        reached.set()
        if row["n"] >= int(at) + 1000:
            threading.Event().wait()  # the kill is on its way
    return row

if at == "unsettled":
    reached.set()
    LogSubscription.settle = kill
else:
    threading.Thread(target=kill, daemon=True).start()
sink = JsonLinesSink(folder / "out.jsonl") if kind == "json" else ParquetSink(folder / "out", rows_per_file=700)
with Materialize(sink, node, topic="t", gate=gate) as node:
    node.run(until="end")
print(sink.duplicates, sink.written)
"""


def live(node: str, folder: Path, kind: str, at: object) -> subprocess.CompletedProcess[str]:
    """A process that takes what there is; `at`: the row at which it is killed, 'unsettled' or 'end'."""
    command = [sys.executable, "-c", PROGRAM, node, str(folder), kind, str(at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def send(node: str, values: Any) -> list[Any]:
    sent = list(values)
    with DataSource(sent, node, source_id="s", topic="t", send_window=10**9) as source:
        source.run()
    return sent


@pytest.fixture
def node(tmp_path: Path) -> str:
    return f"local://{tmp_path / 'store'}"


@pytest.mark.parametrize("forgets", [False, True], ids=["", "state-is-lost"])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_kills_at_random_moments(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, forgets: bool) -> None:
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    sent = send(node, ({"n": n, "text": "x" * chance.choice((0, 10, 5_000))} for n in range(12_000)))
    for number in range(4):
        killed = live(node, tmp_path, kind, 2_500 * number + chance.randrange(1_000))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if forgets:
            shutil.rmtree(tmp_path / "state")
    last = live(node, tmp_path, kind, "end")
    assert last.returncode == 0, last.stderr
    assert written(kind, tmp_path) == sent
    if kind == "parquet":
        assert hidden(tmp_path / "out") == [".ids"]


@pytest.mark.parametrize("forgets", [False, True], ids=["", "state-is-lost"])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_what_was_written_and_not_settled_is_known_when_it_comes_again(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, forgets: bool
) -> None:
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    sent = send(node, ({"n": n} for n in range(100)))
    assert live(node, tmp_path, kind, "unsettled").returncode == -signal.SIGKILL
    if forgets:
        shutil.rmtree(tmp_path / "state")
    last = live(node, tmp_path, kind, "end")
    assert last.returncode == 0, last.stderr
    duplicates, wrote = map(int, last.stdout.split())
    assert wrote < len(sent)
    assert duplicates == (len(sent) - wrote if forgets else 0)  # else the node knows, and does not hand it over
    assert written(kind, tmp_path) == sent


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_another_writer_is_refused_by_name_while_the_first_lives(tmp_path: Path, kind: str) -> None:
    program = "from edgeserve.sinks import *\nwith " + (
        "JsonLinesSink(url + '/out.jsonl')" if kind == "json" else "ParquetSink(url + '/out')"
    )
    with Child(program + " as sink:\n    sink({'n': 1})\n    say('open')\n    sys.stdin.readline()", str(tmp_path)) as child:
        assert child.line() == "open"
        name = "out.jsonl" if kind == "json" else "out"
        for _ in range(2):
            with pytest.raises(FileBusy, match=f"{tmp_path / name} is being written to by another sink"), made(kind, tmp_path):
                pass
        child.kill()
        with made(kind, tmp_path) as sink:
            sink({"n": 2})
            with pytest.raises(FileBusy), made(kind, tmp_path):
                pass
    assert written(kind, tmp_path) == [{"n": 1}, {"n": 2}]


def test_two_names_of_one_file_are_one_file(tmp_path: Path) -> None:
    with JsonLinesSink(tmp_path / "one") as sink:
        sink(1)
        os.link(tmp_path / "one", tmp_path / "two")
        with pytest.raises(FileBusy), JsonLinesSink(tmp_path / "two"):
            pass
    assert lines(tmp_path / "one") == [1]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_child_may_not_use_its_parent_s(tmp_path: Path, kind: str) -> None:
    with made(kind, tmp_path) as sink:
        sink({"n": 1})
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                sink({"n": 2})
            except UsedAfterFork:
                sink.close()
                status = 0
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        sink({"n": 3})
        with pytest.raises(FileBusy), made(kind, tmp_path):
            pass
    assert written(kind, tmp_path) == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_node_closes_its_sink_when_it_ends_and_may_be_made_again(node: str, tmp_path: Path, kind: str) -> None:
    sink = made(kind, tmp_path)
    for number in range(2):
        send(node, [{"n": number}])
        with Materialize(sink, node, topic="t") as end:
            assert next(end) is None
        assert written(kind, tmp_path) == [{"n": n} for n in range(number + 1)]


def test_one_stream_goes_to_several_sinks_and_several_streams_to_one(node: str, tmp_path: Path) -> None:
    sent = send(node, ({"n": n} for n in range(50)))
    one, two = JsonLinesSink(tmp_path / "one"), ParquetSink(tmp_path / "two", rows_per_file=20)
    nodes = [Materialize(sink, node, topic="t", group=group) for sink, group in ((one, "a"), (two, "b"))]
    for end in nodes:
        end.__enter__()
    threads = [threading.Thread(target=end.run, kwargs={"until": "end"}) for end in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for end in nodes:
        end.close()
    assert lines(tmp_path / "one") == rows(tmp_path / "two") == sent

    with DataSource([{"m": 1}], node, source_id="s", topic="other") as source:
        source.run()
    both = JsonLinesSink(tmp_path / "both")
    first, second = (Materialize(both, node, topic=topic, group="c") for topic in ("t", "other"))
    with first:
        with second:
            next(second)
        next(first)  # the other has closed it, and this one still uses it
    assert lines(tmp_path / "both") == [{"m": 1}, {"n": 0}]


def test_a_full_disk_is_waited_for_as_retries_say(node: str, small_disk: Path) -> None:
    sent = send(node, ({"n": n, "text": "x" * 5_000} for n in range(200)))
    sink = JsonLinesSink(small_disk / "out.jsonl")
    met = threading.Event()

    class Told:
        """Hands on, and tells of the first full disk."""

        setup, close = sink.setup, sink.close

        def __call__(self, row: Any) -> None:
            if row["n"] == 50 and not met.is_set():
                fill_up(small_disk)
            try:
                sink(row)
            except DiskFull:
                met.set()
                raise

    with Materialize(Told(), node, topic="t", retries=1000, retry_backoff_ms=1) as end:
        thread = threading.Thread(target=end.run, kwargs={"until": "end"})
        thread.start()
        assert met.wait(60)
        found = lines(small_disk / "out.jsonl")
        assert found == sent[: len(found)] and 50 <= len(found) < 200
        (small_disk / "ballast").unlink()
        thread.join(60)
        assert not thread.is_alive()
        assert end.counters["dead_letter"] == 0
    assert lines(small_disk / "out.jsonl") == sent


@pytest.mark.parametrize(
    ("kind", "bad", "reason", "said"),
    [
        ("json", np.zeros(1, complex), "dead_letter", "(ndarray) at ['n'] cannot be written as JSON"),
        ("parquet", "two", "schema", "column 'n' is int64 since the first rows, and this one has string"),
    ],
)
def test_what_cannot_be_written_becomes_a_dead_letter_and_the_rest_goes_on(
    node: str, tmp_path: Path, kind: str, bad: Any, reason: str, said: str
) -> None:
    send(node, [{"n": 0}, {"n": 1}, {"n": bad}, {"n": 3}])
    with Materialize(made(kind, tmp_path), node, topic="t") as end:
        end.run(until="end")
        assert end.counters[reason] == 1
    assert written(kind, tmp_path) == [{"n": 0}, {"n": 1}, {"n": 3}]
    transport = connect(node)
    (letter,) = (read_dead_letter(frame) for frame, _, _ in transport.read("t.materialize.dead-letters"))
    disconnect(transport)
    assert said in letter.error


def test_a_function_that_calls_a_sink_several_times_has_all_written(node: str, tmp_path: Path) -> None:
    send(node, [[1, 2], [3, 3]])
    with JsonLinesSink(tmp_path / "out") as sink:
        with Materialize(lambda values: [sink(value) for value in values] and None, node, topic="t") as end:
            end.run(until="end")
    assert lines(tmp_path / "out") == [1, 2, 3, 3]


def test_rows_whose_file_finds_no_room_wait_for_it(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ParquetSink(small_disk / "out", rows_per_file=1, max_age_s=0.05) as sink:
        found = os.statvfs(small_disk)
        with open(small_disk / "ballast", "wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, found.f_bavail * found.f_bsize - 3_000_000)
        with caplog.at_level(logging.WARNING, "edgeserve"):
            sink({"noise": os.urandom(2_000_000)})  # this much has room once
        assert "rows stay written ahead for now: [Errno 28]" in caplog.text
        assert rows(small_disk / "out") == []
        (small_disk / "ballast").unlink()
        until(lambda: rows(small_disk / "out"))
