"""Nodes in processes of their own on `local://`: signals, forks, crashes at known places, a store that is full."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from edgeserve import Compute, DataSource, Materialize, context
from edgeserve.core.errors import UsedAfterFork
from edgeserve.transport import connect, disconnect
from edgeserve.transport.wake import SocketSwitchboard

PRELUDE = """
import os, sys, time
from pathlib import Path
from edgeserve import *
from edgeserve import context
node, root = sys.argv[1], Path(sys.argv[2])

def note(name, value):
    with open(root / name, "a") as file:
        file.write(f"{value}\\n")

def once(name):
    if (root / name).exists():
        return False
    (root / name).touch()
    return True
"""


@pytest.fixture
def node(tmp_path: Path) -> str:
    return f"local://{tmp_path / 'store'}"


def start(node: str, root: Path, program: str) -> subprocess.Popen[str]:
    """A Python process that runs `program`."""
    code = PRELUDE + textwrap.dedent(program)
    return subprocess.Popen([sys.executable, "-c", code, node, str(root)], text=True, stderr=subprocess.PIPE, env=dict(os.environ))


def finish(process: subprocess.Popen[str]) -> int:
    """Its exit status."""
    try:
        process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Returns when the file is there."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def notes(root: Path, name: str) -> list[str]:
    path = root / name
    return path.read_text().split("\n")[:-1] if path.exists() else []


def read(node: str, topic: str) -> list[Any]:
    found: list[Any] = []
    with Materialize(found.append, node, topic=topic, group="look") as sink:
        sink.run(until="end")
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_message_in_hand(node: str, tmp_path: Path, number: int) -> None:
    program = """
    def task(a):
        note("began", a)
        time.sleep(0.4)
        note("done", a)
        return a

    with Compute(task, node) as compute:
        compute.run()
    note("left", "cleanly")
    """
    with DataSource(range(3), node, source_id="a") as source:
        source.run()
    process = start(node, tmp_path, program)
    wait_for(tmp_path / "began", process)
    process.send_signal(number)
    assert finish(process) == 0
    assert (notes(tmp_path, "done"), notes(tmp_path, "left")) == (["0"], ["cleanly"])
    with Compute(lambda a: a, node) as compute:
        assert next(compute) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_waiting_source_and_a_waiting_sink(node: str, tmp_path: Path, number: int) -> None:
    source = """
    def stream():
        yield 1
        note("waits", 1)
        time.sleep(600)

    with DataSource(stream(), node, source_id="a", topic="dst") as source:
        source.run()
    """
    sink = """
    with Materialize(lambda x: note("sunk", x), node) as sink:
        sink.run()
    """
    first, second = start(node, tmp_path, source), start(node, tmp_path, sink)
    wait_for(tmp_path / "waits", first)
    wait_for(tmp_path / "sunk", second)
    for process in (first, second):
        process.send_signal(number)
    assert (finish(first), finish(second)) == (0, 0)


@pytest.mark.parametrize("parameters", ["a", "a, b"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_pause_before_a_retry_and_the_message_goes_back(node: str, tmp_path: Path, number: int, parameters: str) -> None:
    program = f"""
    def task({parameters}):
        note("tried", a)
        raise RuntimeError("not today")

    with Compute(task, node, retries=20, retry_backoff_ms=60_000) as compute:
        compute.run()
        note("put aside", compute.counters["dead_letter"])
    """
    for source_id in parameters.split(", "):
        with DataSource([1], node, source_id=source_id) as source:
            source.run()
    process = start(node, tmp_path, program)
    wait_for(tmp_path / "tried", process)
    process.send_signal(number)
    began = time.monotonic()
    assert finish(process) == 0 and time.monotonic() - began < 3
    assert notes(tmp_path, "put aside") == ["0"]
    with Compute({"a": lambda a: a, "a, b": lambda a, b: a}[parameters], node, timeout_ms=5000) as compute:
        assert 1 in (next(compute), next(compute) if parameters != "a" else None)


def test_a_signal_in_the_pause_of_a_sink_flags_what_comes_again(node: str, tmp_path: Path) -> None:
    program = """
    def sink(value):
        note("tried", value)
        raise RuntimeError("not today")

    with Materialize(sink, node, topic="dst", retries=20, retry_backoff_ms=60_000) as materialize:
        materialize.run()
    """
    with DataSource([1], node, source_id="a", topic="dst") as source:
        source.run()
    process = start(node, tmp_path, program)
    wait_for(tmp_path / "tried", process)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == 0
    with Materialize(lambda value: (value, context().redelivered), node, topic="dst", timeout_ms=5000) as materialize:
        assert next(materialize) == (1, True)


def test_ctrl_c_interrupts_a_waiting_next(node: str, tmp_path: Path) -> None:
    program = """
    with Compute(lambda a: a, node) as compute:
        note("waits", 1)
        try:
            next(compute)
        except KeyboardInterrupt:
            note("interrupted", 1)
    """
    process = start(node, tmp_path, program)
    wait_for(tmp_path / "waits", process)
    process.send_signal(signal.SIGINT)
    assert finish(process) == 0
    assert notes(tmp_path, "interrupted") == ["1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_node_that_waits_has_all_its_steps_in_its_log(node: str, tmp_path: Path, number: int) -> None:
    program = """
    with Materialize(lambda a: a, node, topic="src", log_path=root, log_filename="log") as sink:
        while True:
            next(sink)
    """
    with DataSource(range(5), node, source_id="a") as source:
        source.run()
    process = start(node, tmp_path, program)
    while process.poll() is None and len(notes(tmp_path, "log.destination")) < 5:
        time.sleep(0.02)
    process.send_signal(number)
    assert finish(process) == -number
    assert len(notes(tmp_path, "log.destination")) == 5


def test_a_log_that_cannot_be_written_says_so_once_and_stops_no_step(node: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.datasource").symlink_to("/dev/full")
    with DataSource(repeat(b"x", 1000), node, source_id="a", log_path=tmp_path) as source:
        source.run()
        assert source.counters["sent"] == 1000
    (line,) = caplog.messages
    assert "a.datasource" in line and "No space left" in line


def test_handlers_are_put_back(node: str) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with DataSource([1], node, source_id="a") as source:
        source.run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_use_after_fork_is_named(node: str) -> None:
    def child(source: DataSource, errors: Any) -> None:
        try:
            next(source)
        except UsedAfterFork as exc:
            errors.put(str(exc))
        source.close()

    cx = multiprocessing.get_context("fork")
    errors = cx.Queue()
    with DataSource([1, 2], node, source_id="a") as source:
        assert next(source) == 1
        process = cx.Process(target=child, args=(source, errors))
        process.start()
        assert "made by process" in errors.get(timeout=10)
        process.join(10)
        assert next(source) == 2


def test_a_killed_task_loses_and_repeats_nothing(node: str, tmp_path: Path) -> None:
    program = """
    def task(a):
        if a in (3, 40, 41) and once(f"died-{a}"):
            os._exit(9)
        return a

    with Compute(task, node) as compute:
        compute.run(until="end")
    """
    with DataSource(range(100), node, source_id="a") as source:
        source.run()
    assert [finish(start(node, tmp_path, program)) for _ in range(4)] == [9, 9, 9, 0]
    assert read(node, "dst") == list(range(100))


def test_a_killed_join_loses_and_mixes_nothing(node: str, tmp_path: Path) -> None:
    program = """
    def task(a, b):
        if a in (3, 40, 41) and once(f"died-{a}"):
            os._exit(9)
        return [a, b]

    with Compute(task, node, join="exact") as compute:
        compute.run(until="end")
    """
    for name in "ab":
        with DataSource(range(100), node, source_id=name, event_time=lambda i: i) as source:
            source.run()
    assert [finish(start(node, tmp_path, program)) for _ in range(4)] == [9, 9, 9, 0]
    assert read(node, "dst") == [[i, i] for i in range(100)]


def test_latest_goes_on_where_it_was_killed(node: str, tmp_path: Path) -> None:
    program = """
    def task(a, b):
        if b in (3, 40) and once(f"died-{b}"):
            os._exit(9)
        return [a, b]

    with Compute(task, node) as compute:
        compute.run(until="end")
    """
    for name, items in (("a", [7]), ("b", range(60))):
        with DataSource(items, node, source_id=name, event_time=lambda i: i) as source:
            source.run()
    assert [finish(start(node, tmp_path, program)) for _ in range(3)] == [9, 9, 0]
    assert read(node, "dst") == [[7, b] for b in range(60)]


def test_only_the_message_in_a_killed_sink_s_hand_comes_again(node: str, tmp_path: Path) -> None:
    program = """
    def final(x):
        note("sunk", f"{x} {context().redelivered}")
        if x in (3, 40) and once(f"died-{x}"):
            os._exit(9)

    with Materialize(final, node) as sink:
        sink.run(until="end")
    """
    with DataSource(range(60), node, source_id="a", topic="dst") as source:
        source.run()
    assert [finish(start(node, tmp_path, program)) for _ in range(3)] == [9, 9, 0]
    expected = []
    for i in range(60):
        expected += [f"{i} False"] + ([f"{i} True"] if i in (3, 40) else [])
    assert notes(tmp_path, "sunk") == expected


def test_a_full_store_is_waited_for_and_nothing_is_lost(tmp_path: Path) -> None:
    node = f"local://{tmp_path / 'store'}?size_mb=4"
    payload = b"x" * 20_000
    with Materialize(lambda data: len(data), node, topic="src"):
        pass  # its group holds what is sent from now on
    source = DataSource((payload for _ in range(400)), node, source_id="a")
    thread = threading.Thread(target=source.run, daemon=True)
    thread.start()
    seen: list[int] = []
    with source, Materialize(lambda data: seen.append(len(data)), node, topic="src") as sink:
        thread.join(1.0)
        assert thread.is_alive(), "8 MB fitted into a store of 4 MB"
        sink.run(until="end")
        thread.join(20)
    assert seen == [20_000] * 400


def test_a_source_that_is_held_back_ends_when_it_is_told_to(node: str, tmp_path: Path) -> None:
    program = """
    def stream():
        for n in range(1_000_000):
            if n == 600:
                (root / "held").touch()
            yield n

    with DataSource(stream(), node, source_id="a", send_window=100) as source:
        source.run()
    """
    with Materialize(lambda a: time.sleep(0.001 if a < 550 else 0.1), node, topic="src") as sink:
        thread = threading.Thread(target=sink.run, daemon=True)
        thread.start()
        source = start(node, tmp_path, program)
        wait_for(tmp_path / "held", source)
        threading.Event().wait(0.3)  # until it has sent that batch, and waits
        source.terminate()
        source.communicate(timeout=2)  # some of it is the interpreter's own end
        assert source.returncode == 0


def test_a_source_without_a_file_for_its_waiting_place_sends_each_message_once(
    node: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_file(board: SocketSwitchboard) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    transport = connect(node)
    group = transport.subscribe(["src"], "g")
    monkeypatch.setattr(SocketSwitchboard, "waker", no_file)
    with DataSource(range(30), node, source_id="a", send_window=8) as source:
        for _ in range(30):
            next(source)
            source.flush()
    assert transport.topic_info("src").next == 30
    assert "Too many open files" in caplog.text
    group.close()
    disconnect(transport)


def test_a_waiting_node_costs_nothing(node: str) -> None:
    with Compute(lambda a: a, node, timeout_ms=1500) as compute:
        before = time.process_time()
        with pytest.raises(TimeoutError):
            next(compute)
        assert context is not None
        assert time.process_time() - before < 0.15  # a busy wait takes ten times that


def test_a_signal_just_as_the_stream_returns_loses_nothing(node: str) -> None:
    begun = threading.Event()

    def interrupt() -> None:
        for _ in range(3):
            begun.wait()
            begun.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    # The signal comes while C code runs that does not look for signals: its handler runs when `next` has returned to the node.
    hashing = map(hashlib.sha256, repeat(bytes(30_000_000)))
    stream = zip(range(3), map(lambda _: begun.set(), repeat(None)), hashing, strict=False)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with DataSource(stream, node, source_id="a", gate=lambda item: item[0]) as source:
        for _ in range(4):
            source.run()
        interrupter.join(20)
        assert source.counters["sent"] == 3
    got: list[int] = []
    with Materialize(got.append, node, topic="src") as sink:
        sink.run(until="end")
    assert got == [0, 1, 2]
