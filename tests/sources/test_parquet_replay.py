"""Parquet files as streams."""

from __future__ import annotations

import datetime as dt
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.sources.conftest import FakeTimer

from edgeserve.core.errors import BadRow, ConfigurationError, MissingExtra
from edgeserve.sources import ParquetReplay

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DAY = 1_700_000_000 * 10**9


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def numbered(path: Path, count: int, group: int) -> Path:
    return write(path, {"t": [n / 2 for n in range(count)], "n": list(range(count))}, row_group_size=group)


def numbers(path: Path, **options: Any) -> list[int]:
    return [row["n"] for row in ParquetReplay(path, time="t", speed=None, **options)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.parquet"


def test_rows_come_at_their_pace(path: Path) -> None:
    timer = FakeTimer(patient=True)
    begin = timer.now_ns
    replay = ParquetReplay(numbered(path, 5, 2), time="t", speed=2, timer=timer)
    assert [(row, (timer.now_ns - begin) / 1e9, replay.event_time(row)) for row in replay] == [
        ({"t": n / 2, "n": n}, n / 4, n * 500_000_000) for n in range(5)
    ]


@pytest.mark.parametrize("batch_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("group", [1, 4, 50])
def test_all_rows_come_whatever_the_row_groups(path: Path, group: int, batch_rows: int) -> None:
    assert numbers(numbered(path, 20, group), batch_rows=batch_rows) == list(range(20))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([0, DAY // 10**9], pa.timestamp("s")), [0, DAY]),
        (pa.array([0, DAY // 10**6 + 1], pa.timestamp("ms", "UTC")), [0, DAY + 10**6]),
        (pa.array([0, DAY // 10**3 + 1], pa.timestamp("us", "+02:00")), [0, DAY + 1000]),
        (pa.array([0, DAY + 1], pa.timestamp("ns")), [0, DAY + 1]),
        (pa.array([0, 1], pa.date32()), [0, 86_400 * 10**9]),
        (pa.array([0, 86_400_000], pa.date64()), [0, 86_400 * 10**9]),
        (pa.array([0, 7], pa.int32()), [0, 7 * 10**9]),
        (pa.array([0.25, 1700000000.123456]), [250_000_000, DAY + 123_456_000]),
        (pa.array([Decimal("0.5"), Decimal("1.0")]), [500_000_000, 10**9]),
        (pa.array(["0.5", "1970-01-01T00:00:01Z"]), [500_000_000, 10**9]),
        (pa.array(["0.5", "1"]).dictionary_encode(), [500_000_000, 10**9]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_every_column_of_times_is_read(path: Path, values: Any, expected: list[int]) -> None:
    replay = ParquetReplay(write(path, {"a": [1, 2], "when": values}), time="when", speed=None, columns=["a"])
    assert [(row, replay.event_time(row)) for row in replay] == [({"a": 1}, expected[0]), ({"a": 2}, expected[1])]


def test_nanoseconds_are_python_s_microseconds_in_a_row(path: Path) -> None:
    columns = {
        "t": pa.array([1_500_000_001], pa.timestamp("ns", "UTC")),
        "naive": pa.array([1_999], pa.timestamp("ns")),
        "long": pa.array([1_000_001], pa.duration("ns")),
        "daily": pa.array([1_001], pa.time64("ns")),
    }
    replay = ParquetReplay(write(path, columns), time="t", speed=None)
    row = next(replay)
    assert row == {
        "t": dt.datetime(1970, 1, 1, 0, 0, 1, 500_000, tzinfo=dt.UTC),
        "naive": dt.datetime(1970, 1, 1, 0, 0, 0, 1),  # noqa: DTZ001  # as the file has it
        "long": dt.timedelta(milliseconds=1),
        "daily": dt.time(0, 0, 0, 1),
    }
    assert replay.event_time(row) == 1_500_000_001
    replay.close()


def test_a_row_without_a_time_is_named_and_the_next_call_goes_on(path: Path) -> None:
    write(path, {"t": pa.array([1, None, 2**62, 4], pa.int64()), "n": [0, 1, 2, 3]}, row_group_size=3)
    with ParquetReplay(path, time="t", speed=None) as replay:
        assert next(replay)["n"] == 0
        with pytest.raises(BadRow, match=r"rows\.parquet, row 2: column 't' is null"):
            next(replay)
        with pytest.raises(BadRow, match=r"row 3: column 't': .* is no time"):
            next(replay)
        assert next(replay)["n"] == 3
        assert list(replay) == []


def test_a_time_that_does_not_fit_into_nanoseconds_is_named(path: Path) -> None:
    write(path, {"t": pa.array([1, 2**50, 3], pa.timestamp("ms")), "n": [0, 1, 2]})
    with ParquetReplay(path, time="t", speed=None, columns=["n"]) as replay:
        assert next(replay) == {"n": 0}
        with pytest.raises(BadRow, match=r"row 2: .*64 bits"):
            next(replay)
        assert list(replay) == [{"n": 2}]


def test_a_value_that_python_has_no_type_for_costs_its_row_only(path: Path) -> None:
    late, bad = pa.array([1, 2, 2**50, 4], pa.timestamp("ms")), pa.array([b"a", b"\xff", b"c", b"d"])
    write(path, {"t": [0, 1, 2, 3], "late": late, "text": pa.StringArray.from_buffers(4, *bad.buffers()[1:])})
    with ParquetReplay(path, time="t", speed=None) as replay:
        assert next(replay)["text"] == "a"
        for row in (2, 3):
            with pytest.raises(BadRow, match=rf"rows\.parquet, row {row}: it has a value that Python has no type for"):
                next(replay)
        last = next(replay)
        assert (last["t"], last["text"], replay.event_time(last)) == (3, "d", 3 * 10**9)
        assert list(replay) == []


def test_a_damaged_row_group_is_named_and_the_next_one_read(path: Path) -> None:
    numbered(path, 6, 3)
    metadata = pq.ParquetFile(path).metadata
    first = metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    begin = min(first.dictionary_page_offset or first.data_page_offset, first.data_page_offset)
    data[begin : begin + 8] = b"\xff" * 8
    path.write_bytes(data)
    with ParquetReplay(path, time="t", speed=None) as replay:
        with pytest.raises(BadRow, match="row 1: what follows in its row group cannot be read"):
            next(replay)
        assert [row["n"] for row in replay] == [3, 4, 5]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"time": "when"}, "time='when' is not among the file's columns: 't', 'n', 'l'"),
        ({"time": "l"}, "time='l' is a column of list"),
        ({"time": 3}, "the columns 0 to 2"),
        ({"time": "t", "columns": ["x"]}, "columns='x'"),
        ({"time": "t", "batch_rows": 0}, "batch_rows=0"),
    ],
)
def test_what_cannot_work_is_named_at_once(path: Path, options: dict[str, Any], why: str) -> None:
    write(path, {"t": [0], "n": [0], "l": [[1]]})
    with pytest.raises(ConfigurationError, match=why):
        ParquetReplay(path, **options)


@pytest.mark.parametrize("content", [b"", b"t,n\n0,0\n", b"PAR1" + b"\xff" * 20 + b"PAR1"])
def test_what_is_no_parquet_file_is_named(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="cannot be read as a Parquet file"):
        ParquetReplay(path, time="t")
    path.unlink()
    with pytest.raises(ConfigurationError, match="there is no file"):
        ParquetReplay(path, time="t")


def test_without_pyarrow_the_error_says_how_to_install_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'edgeserve-streams\[arrow\]'"):
        ParquetReplay(path, time="t")


def test_an_empty_file_ends(path: Path) -> None:
    write(path, {"t": pa.array([], pa.int64()), "n": pa.array([], pa.int64())})
    assert numbers(path) == numbers(path, loop=True) == []


@pytest.mark.parametrize("before", [1, 3, 4, 7, 10])
def test_a_new_start_goes_on_behind_what_was_committed(path: Path, tmp_path: Path, before: int) -> None:
    numbered(path, 10, 4)
    expected = [(row["n"], replay.message_id(row)) for replay in [ParquetReplay(path, time="t", speed=None)] for row in replay]
    found = []
    with ParquetReplay(path, time="t", speed=None, batch_rows=3, position=tmp_path / "position") as replay:
        for _ in range(before):
            row = next(replay)
            found.append((row["n"], replay.message_id(row)))
        replay.commit()
    with ParquetReplay(path, time="t", speed=None, batch_rows=3, position=tmp_path / "position") as replay:
        found += [(row["n"], replay.message_id(row)) for row in replay]
    assert found == expected and len({id_ for _, id_ in found}) == 10


def test_another_file_is_replayed_from_its_start(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ParquetReplay(numbered(path, 10, 4), time="t", speed=None, position=tmp_path / "position") as replay:
        old = next(replay), replay.message_id(replay._handed.item)  # type: ignore[union-attr]
        replay.commit()
    numbered(path, 11, 4)
    with ParquetReplay(path, time="t", speed=None, position=tmp_path / "position") as replay:
        new = next(replay), replay.message_id(replay._handed.item)  # type: ignore[union-attr]
    assert new[0] == old[0] and new[1] != old[1]
    assert "not the file that was read before" in caplog.text
