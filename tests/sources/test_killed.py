"""Sources that are killed (kill -9) and started again: downstream nothing is missing and nothing comes twice."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from subprocess import Popen

import pytest
from tests.nodes.test_processes import finish, notes, read, start, wait_for
from tests.waiting import until

from edgeserve.core.errors import UnknownTopic
from edgeserve.transport import connect, disconnect

PROGRAM = """
    import signal
    from edgeserve.sources import *

    def gate(item):
        number = int(item["n"])
        if once("first"):
            note("began", number)
        if number in {kills} and once(f"killed-{{number}}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == {last}:
            (root / "done").touch()
        return number

    stream = {stream}
    with DataSource(stream, node, source_id="rows", topic="dst", gate=gate,
                    event_time=stream.event_time, message_id=stream.message_id) as source:
        {run}
"""
STREAMS = {
    "csv": 'CsvReplay(root / "rows.csv", time="t", speed=None{position})',
    "parquet": 'ParquetReplay(root / "rows.parquet", time="t", speed=None, batch_rows=100{position})',
    "json": 'JsonLinesTail(root / "eve.json", time="t", from_start=True, follow=False{position})',
}


@pytest.fixture
def node(tmp_path: Path) -> str:
    return f"local://{tmp_path / 'store'}"


def program(kind: str, *, kills: tuple[int, ...], last: int = -1, position: bool = True, run: str = "source.run()") -> str:
    stream = STREAMS[kind].format(position=', position=root / "position"' if position else "")
    return PROGRAM.format(kills=kills, last=last, stream=stream, run=run)


def write(root: Path, kind: str, count: int) -> None:
    if kind == "csv":
        (root / "rows.csv").write_text("t,n\n" + "".join(f"{n / 8},{n}\n" for n in range(count)))
    elif kind == "json":
        (root / "eve.json").write_text("".join(json.dumps({"t": n / 8, "n": n}) + "\n" for n in range(count)))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"t": [n / 8 for n in range(count)], "n": list(range(count))}), root / "rows.parquet", row_group_size=700)


def sent(node: str) -> int:
    """How many messages are on the topic, repeated ones and ends too."""
    transport = connect(node)
    try:
        return transport.topic_info("dst").next
    finally:
        disconnect(transport)


@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_killed_source_sends_each_row_once(node: str, tmp_path: Path, kind: str, position: bool) -> None:
    write(tmp_path, kind, 3000)
    code = program(kind, kills=(0, 1, 700, 2999), position=position)
    assert [finish(start(node, tmp_path, code)) for _ in range(5)] == [-signal.SIGKILL] * 4 + [0]
    assert read(node, "dst") == list(range(3000))


@pytest.mark.parametrize("kind", STREAMS)
def test_a_new_start_sends_only_what_was_not_durable(node: str, tmp_path: Path, kind: str) -> None:
    """However much there was: repeats are known by id, but not for ever."""
    write(tmp_path, kind, 3000)
    run = """
        from edgeserve.stage import progress
        progress.COMMIT_EVERY_NS = 1 << 62
        for _ in range(2000):
            next(source)
        source.flush()
        while True:
            next(source)
    """
    assert finish(start(node, tmp_path, program(kind, kills=(2100,), run=run))) == -signal.SIGKILL
    before = sent(node)
    assert before >= 2000
    (tmp_path / "first").unlink()
    assert finish(start(node, tmp_path, program(kind, kills=()))) == 0
    assert notes(tmp_path, "began") == ["0", "2000"]
    assert sent(node) == before + 1000 + 1
    assert read(node, "dst") == list(range(3000))


def test_a_tail_that_is_killed_while_its_file_is_rotated(node: str, tmp_path: Path) -> None:
    path = tmp_path / "eve.json"
    numbers = iter(range(1000))

    def lines(count: int) -> None:
        with path.open("a") as file:
            file.writelines(json.dumps({"t": n, "n": n}) + "\n" for _, n in zip(range(count), numbers, strict=False))

    code = program("json", kills=(137, 420), last=999).replace("follow=False", "poll_s=0.01")
    lines(300)
    assert finish(start(node, tmp_path, code)) == -signal.SIGKILL
    lines(50)
    path.rename(tmp_path / "eve.json.1")
    lines(50)
    process = start(node, tmp_path, code)
    wait_for(tmp_path / "position", process)
    lines(100)
    assert finish(process) == -signal.SIGKILL
    lines(100)
    path.rename(tmp_path / "eve.json.2")
    lines(100)
    process = start(node, tmp_path, code)
    lines(300)
    wait_for(tmp_path / "done", process)
    process.terminate()
    assert finish(process) == 0
    # It was told to stop, which is no end: the source goes on another time.
    assert finish(start(node, tmp_path, program("json", kills=()))) == 0
    assert read(node, "dst") == list(range(1000))


def test_a_source_that_is_killed_from_outside_while_it_keeps_a_pace(node: str, tmp_path: Path) -> None:
    write(tmp_path, "csv", 300)
    code = program("csv", kills=()).replace("speed=None", "speed=10")
    for at in (50, 150):
        process = start(node, tmp_path, code)
        wait_for(tmp_path / "store", process)
        until(partial(_reached, node, at, process))
        process.kill()
        finish(process)
    assert finish(start(node, tmp_path, code)) == 0
    assert read(node, "dst") == list(range(300))


def _reached(node: str, count: int, process: Popen[str]) -> bool:
    assert process.poll() is None, process.communicate()[1]
    try:
        return sent(node) >= count
    except UnknownTopic:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_tail_that_waits(node: str, tmp_path: Path, number: int) -> None:
    write(tmp_path, "json", 5)
    process = start(node, tmp_path, program("json", kills=(), last=4).replace("follow=False", "poll_s=600"))
    wait_for(tmp_path / "done", process)
    process.send_signal(number)
    assert finish(process) == 0
    (tmp_path / "first").unlink()
    with (tmp_path / "eve.json").open("a") as file:
        file.write('{"t": 5, "n": 5}\n')
    assert finish(start(node, tmp_path, program("json", kills=()))) == 0
    assert notes(tmp_path, "began") == ["0", "5"]
    assert read(node, "dst") == list(range(6))
