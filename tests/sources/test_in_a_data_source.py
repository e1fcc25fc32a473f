"""Sources as the streams of a `DataSource`: waking, closing, commits, and the names of the research prototype."""

from __future__ import annotations

import json
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.sources.conftest import FakeTimer

from edgeserve import Compute, DataSource, Materialize
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ConfigurationError, UnsupportedType
from edgeserve.core.message import Header, Kind
from edgeserve.data_source import CodeSource, SimulateTimeSeries
from edgeserve.sources import CsvReplay, JsonLinesTail, Source, SystemTimer
from edgeserve.stage import progress
from edgeserve.transport import connect, disconnect


@pytest.fixture
def node() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def headers(node: str) -> Iterator[Callable[[], list[Header]]]:
    """`headers()`: what was sent to `src` so far."""
    transport = connect(node)
    yield lambda: [decode_frame(frame)[0] for frame, _, _ in transport.read("src")]
    disconnect(transport)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("t,a\n0,x\n0.5,y\n1,z\n")
    return path


class Counted(Source):
    """A source of numbers that notes what it is told."""

    def __init__(self, count: int = 10) -> None:
        self.count, self.taken = count, 0
        self.committed: list[int] = []
        self.closed = self.woken = 0

    def __next__(self) -> int:
        if self.taken == self.count:
            raise StopIteration
        self.taken += 1
        return self.taken

    def wake(self) -> None:
        self.woken += 1

    def commit(self) -> None:
        self.committed.append(self.taken)

    def close(self) -> None:
        self.closed += 1


def test_event_times_and_ids_travel(node: str, path: Path, headers: Callable[[], list[Header]]) -> None:
    for _ in range(2):
        replay = CsvReplay(path, time="t", timer=FakeTimer(patient=True))
        with DataSource(replay, node, source_id="rows", event_time=replay.event_time, message_id=replay.message_id) as source:
            source.run()
    sent = [header for header in headers() if header.kind == Kind.DATA]
    assert [header.event_ns for header in sent] == [0, 5 * 10**8, 10**9] * 2
    assert [header.id for header in sent[:3]] == [header.id for header in sent[3:]]
    seen: list[Any] = []
    with Materialize(seen.append, node, topic="src") as sink:
        sink.run(until="end")
    assert [row["a"] for row in seen] == ["x", "y", "z"]


def test_two_replays_meet_in_an_exact_join(node: str, path: Path) -> None:
    for name in ("left", "right"):
        replay = CsvReplay(path, time="t", columns=["a"], speed=None)
        with DataSource(replay, node, source_id=name, event_time=replay.event_time) as source:
            source.run()
    with Compute(lambda left, right: left["a"] + right["a"], node, join="exact", topic_out="pairs") as compute:
        compute.run(until="end")
    pairs: list[str] = []
    with Materialize(pairs.append, node, topic="pairs") as sink:
        sink.run(until="end")
    assert pairs == ["xx", "yy", "zz"]


# --- ending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["run", "next"])
def test_closing_the_node_ends_the_wait_of_a_tail(node: str, tmp_path: Path, headers: Callable[[], list[Header]], how: str) -> None:
    path = tmp_path / "eve.json"
    path.write_text('{"n": 1}\n')
    waits = threading.Event()

    class Telling(SystemTimer):
        def wait(self, seconds: float) -> bool:
            waits.set()
            return super().wait(seconds)

    tail = JsonLinesTail(path, from_start=True, poll_s=1000, timer=Telling())
    source = DataSource(tail, node, source_id="eve")
    returned: list[Any] = []

    def work() -> None:
        if how == "run":
            source.run()
        else:
            returned.extend([next(source), next(source)])

    thread = threading.Thread(target=work)
    thread.start()
    assert waits.wait(20)
    source.close()
    thread.join(20)
    assert not thread.is_alive()
    assert returned == ([] if how == "run" else [{"n": 1}, None])
    # It was closed, which is no end of the source.
    assert [header.kind for header in headers()] == [Kind.DATA]
    with pytest.raises(StopIteration):
        next(tail)


def test_a_closed_tail_is_the_end_of_its_source(node: str, tmp_path: Path, headers: Callable[[], list[Header]]) -> None:
    tail = JsonLinesTail(tmp_path / "eve.json", timer=FakeTimer(lambda: tail.close()))
    with DataSource(tail, node, source_id="eve") as source:
        source.run()
    assert [header.kind for header in headers()] == [Kind.END]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_wait_loses_no_row(node: str, path: Path, number: int) -> None:
    timer = FakeTimer(*[lambda: os.kill(os.getpid(), number)] * 2, patient=True)
    with DataSource(CsvReplay(path, time="t", timer=timer), node, source_id="rows") as source:
        for sent in (1, 1, 3):
            source.run()
            assert source.counters["sent"] == sent
        with pytest.raises(StopIteration):
            next(source)
    rows: list[Any] = []
    with Materialize(rows.append, node, topic="src") as sink:
        sink.run(until="end")
    assert [row["a"] for row in rows] == ["x", "y", "z"]


# --- commits ------------------------------------------------------------------------------------------------------


def test_what_is_durable_is_committed(node: str, headers: Callable[[], list[Header]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "COMMIT_EVERY", 3)
    stream = Counted(7)
    durable: list[int] = []
    monkeypatch.setattr(stream, "commit", lambda: durable.append(len(headers())))
    with DataSource(stream, node, source_id="a") as source:
        source.run()
        assert durable == [3, 6, 8]  # the last one with the end
    assert stream.closed == 1


def test_steps_flush_and_close_commit_too(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "COMMIT_EVERY", 3)
    stream = Counted()
    with DataSource(stream, node, source_id="a") as source:
        for _ in range(4):
            next(source)
        assert stream.committed == [3]
        source.flush()
        assert stream.committed == [3, 4]
        next(source)
    assert stream.committed == [3, 4, 5]


def test_an_item_that_cannot_be_sent_is_not_committed_before_the_next_one_is(node: str) -> None:
    def gate(number: int) -> Any:
        return object() if number in (2, 4) else number

    stream = Counted()
    with DataSource(stream, node, source_id="a", gate=gate) as source:
        next(source)
        with pytest.raises(UnsupportedType):
            next(source)
        source.flush()
        assert stream.committed == []
        next(source)
        source.flush()
        assert stream.committed == [3]
        with pytest.raises(UnsupportedType):
            next(source)
    assert stream.committed == [3]


def test_what_is_sent_is_committed_although_nothing_follows(node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail may wait for days, and a group forgets the ids of what came long ago."""
    monkeypatch.setattr(progress, "COMMIT_EVERY_NS", 1 << 62)
    path, position = tmp_path / "eve.json", tmp_path / "position"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    saved: list[bytes] = []

    def look() -> None:
        saved.append(position.read_bytes())
        monkeypatch.setattr(progress, "COMMIT_EVERY_NS", 0)  # the second is over
        if len(saved) == 20:
            source.close()
            tail.wake()

    tail = JsonLinesTail(path, from_start=True, position=position, timer=FakeTimer(*[look] * 20))
    source = DataSource(tail, node, source_id="eve")
    source.run()
    assert b'"offset"' not in saved[0] and b'"offset":18,' in saved[-1]


@pytest.mark.parametrize("where", ["gate", "stream"])
def test_a_step_that_is_cut_off_is_not_committed(node: str, where: str) -> None:
    """Ctrl-C in a loop of one's own: what was taken may not have been sent."""

    def cut(number: int, here: str) -> int:
        if where == here and number == 3:
            raise KeyboardInterrupt
        return number

    class Cut(Counted):
        def __next__(self) -> int:
            return cut(super().__next__(), "stream")

    stream = Cut()
    with pytest.raises(KeyboardInterrupt), DataSource(stream, node, source_id="a", gate=lambda number: cut(number, "gate")) as source:
        next(source)
        source.flush()
        next(source)
        next(source)
    assert stream.committed == [1]


def test_a_source_without_a_position_is_not_asked(node: str) -> None:
    stream = Counted(3)
    stream.resumable = False
    with DataSource(stream, node, source_id="a") as source:
        source.run()
    assert (stream.committed, stream.closed) == ([], 1)


# --- the prototype's names ----------------------------------------------------------------------------------------


def test_simulate_time_series_sends_the_values_at_their_pace(node: str, tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    path.write_text("10,a,1\n10.5,b,2\n11.5,c,3\n")
    with SimulateTimeSeries(str(path), node, "row") as source:
        timer = source._stream._timer = FakeTimer(patient=True)  # type: ignore[attr-defined, union-attr]
        begin = timer.now_ns
        found = [(values, (timer.now_ns - begin) / 1e9) for values in source]
    assert found == [(["a", "1"], 0), (["b", "2"], 0.5), (["c", "3"], 1.5)]


def test_simulate_time_series_takes_what_the_prototype_s_took(node: str, tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    path.write_text("0,a\n0,b\n")
    seen: list[Any] = []

    def gate(values: list[str]) -> str | None:
        return None if values == ["a"] else json.dumps(values)

    with SimulateTimeSeries(path, pulsar_node=node, source_id="row", gate=gate, topic="t") as source:
        assert [next(source), next(source)] == [None, '["b"]']
    with Materialize(seen.append, node, topic="t") as sink:
        next(sink)
    assert seen == ['["b"]']
    path.write_text("")
    with SimulateTimeSeries(path, node, "row") as source:
        assert list(source) == []
    with pytest.raises(ConfigurationError, match="SimulateTimeSeries: there is no file"):
        SimulateTimeSeries(tmp_path / "none.csv", node, "row")


def test_code_source_says_what_to_use_instead(node: str) -> None:
    assert issubclass(CodeSource, DataSource)
    with pytest.raises(ConfigurationError, match=r"nothing that arrives is executed.*Compute\(task"):
        CodeSource(["print(1)"], node)
    with pytest.raises(ConfigurationError, match="CodeSource"):
        CodeSource(["print(1)"], pulsar_node=node, gate=str.encode, topic="src")
