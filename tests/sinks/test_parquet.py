"""Parquet files: rows and columns as they are read by others, files that appear whole, full disks, values that do not fit."""

from __future__ import annotations

import datetime as dt
import os
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.disks import fill_up
from tests.sinks.reading import hidden, rows
from tests.waiting import until

from edgeserve.core.errors import ConfigurationError, DiskFull, MissingExtra, PayloadMismatch, StoreDamagedWarning, UnsupportedType
from edgeserve.sinks import ParquetSink


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.parquet"))


def write(directory: Path, *values: Any, **options: Any) -> ParquetSink:
    """Writes values under the ids 1, 2, 3..."""
    with ParquetSink(directory, **options) as sink:
        for number, value in enumerate(values, 1):
            sink.write(value, id_=id_of(number))
    return sink


def leave_behind(directory: Path, *values: Any, **options: Any) -> None:
    """Writes values likewise, and leaves as a killed process does: before there is a file of them."""
    sink = ParquetSink(directory, max_age_s=None, **options)
    sink.setup()
    for number, value in enumerate(values, 1):
        sink.write(value, id_=id_of(number))
    sink._wal.close()
    sink._ids.close()


@dataclass
class Place:
    name: str
    floor: int = 0


class Reading(msgspec.Struct):
    celsius: float
    raw: bytes


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ({"b": True, "i": -3, "f": 0.1, "s": "ä", "y": b"\x00\xff"},) * 2,
        ({"when": dt.datetime(2026, 1, 2, 3, 4, 5, 6, dt.UTC), "day": dt.date(2026, 1, 2)},) * 2,
        ({"naive": dt.datetime(2026, 1, 2, 3, 4, 5, 6), "price": Decimal("1.10")},) * 2,  # noqa: DTZ001
        ({"inner": {"a": 1, "b": [1.5, None]}, "list": [{"x": "y"}]},) * 2,
        (Place("hall", 2), {"name": "hall", "floor": 2}),
        (Reading(21.5, b"\x00"), {"celsius": 21.5, "raw": b"\x00"}),
        ({"v": np.float32(0.5), "n": np.int8(3), "a": np.arange(3)}, {"v": 0.5, "n": 3, "a": [0, 1, 2]}),
        ({"image": np.arange(4, dtype=np.uint8).reshape(2, 2)}, {"image": [[0, 1], [2, 3]]}),
        ({"t": (1, 2)}, {"t": [1, 2]}),
    ],
    ids=repr,
)
def test_rows_are_read_by_others(tmp_path: Path, value: Any, read: Any) -> None:
    write(tmp_path, value, value)
    assert pq.read_table(tmp_path).to_pylist() == [read, read]


def test_a_float_stays_the_float_it_was(tmp_path: Path) -> None:
    write(tmp_path, {"v": float("nan")}, {"v": float("-inf")})
    found = [row["v"] for row in rows(tmp_path)]
    assert found[0] != found[0] and found[1] == float("-inf")


def test_tables_are_many_rows(tmp_path: Path) -> None:
    table = pa.table({"n": [2, 3], "s": ["x", None]})
    batch = pa.record_batch({"s": ["y"], "n": [4]})
    write(tmp_path, {"n": 1, "s": "w"}, table, batch, table.slice(0, 0), {"n": 5})
    assert rows(tmp_path) == [{"n": n, "s": s} for n, s in [(1, "w"), (2, "x"), (3, None), (4, "y"), (5, None)]]


def test_a_table_of_other_types_fits_if_its_values_do(tmp_path: Path) -> None:
    schema = pa.schema([("n", pa.int8()), ("s", pa.string())])
    with ParquetSink(tmp_path, schema=schema) as sink:
        sink(pa.table({"n": pa.array([1, 2], pa.int64())}))
        for table, said in [
            (pa.table({"n": [1, 1000]}), "column 'n' is int8"),
            (pa.table({"m": [1]}), "there is no column 'm': the columns are n, s"),
            (pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["n", "n"]), "two columns of one name"),
        ]:
            with pytest.raises(PayloadMismatch, match=said):
                sink(table)
    assert rows(tmp_path) == [{"n": 1, "s": None}, {"n": 2, "s": None}]


def test_files_are_made_of_so_many_rows_and_read_in_order(tmp_path: Path) -> None:
    with ParquetSink(tmp_path, rows_per_file=3) as sink:
        for n in range(7):
            sink({"n": n})
            assert len(files(tmp_path)) == (n + 1) // 3
        sink.flush()
        assert len(files(tmp_path)) == 3
    assert [pq.read_metadata(path).num_rows for path in files(tmp_path)] == [3, 3, 1]
    assert pq.read_table(tmp_path).to_pylist() == [{"n": n} for n in range(7)]
    assert hidden(tmp_path) == [".ids"]


def test_files_are_made_of_so_many_bytes(tmp_path: Path) -> None:
    with ParquetSink(tmp_path, bytes_per_file=10_000) as sink:
        for n in range(10):
            sink({"n": n, "text": "x" * 4_000})
        assert len(files(tmp_path)) == 3
    assert [row["n"] for row in rows(tmp_path)] == list(range(10))


def test_a_file_is_made_when_its_first_row_is_old_enough(tmp_path: Path) -> None:
    with ParquetSink(tmp_path, max_age_s=0.01) as sink:
        for n in range(2):
            sink({"n": n})
            until(lambda n=n: len(files(tmp_path)) == n + 1)
    assert rows(tmp_path) == [{"n": 0}, {"n": 1}]


def test_many_rows_are_few_row_groups(tmp_path: Path) -> None:
    with ParquetSink(tmp_path) as sink:
        for n in range(5_000):
            sink({"n": n})
    (path,) = files(tmp_path)
    assert pq.read_metadata(path).num_row_groups == 1
    assert pq.read_table(path)["n"].to_pylist() == list(range(5_000))


# --- columns ------------------------------------------------------------------------------------------------------


def test_the_first_rows_say_what_the_columns_are(tmp_path: Path) -> None:
    first = [
        {"a": None, "l": [], "d": {"x": None}},
        {"a": 1.5, "l": [1], "d": {"y": 1}, "money": Decimal("1.25")},
        {"b": "new", "a": 2, "money": Decimal("100.5"), "l": [2, None]},
    ]
    write(tmp_path, *first)
    assert rows(tmp_path) == [
        {"a": None, "l": [], "d": {"x": None, "y": None}, "money": None, "b": None},
        {"a": 1.5, "l": [1], "d": {"x": None, "y": 1}, "money": Decimal("1.25"), "b": None},
        {"a": 2.0, "l": [2, None], "d": None, "money": Decimal("100.50"), "b": "new"},
    ]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"x": 1}, {"x": "one"}, "column 'x' is int64 since the first rows, and this one has string: give ParquetSink a schema="),
        ({"x": 1}, {"x": 1.5}, "column 'x' is int64 since the first rows, and this one has double"),
        ({"x": {"y": [1]}}, {"x": {"y": ["a"]}}, r"column 'x\.y\[\]' is int64"),
        ({"x": 1}, {"x": 1, "y": 1j}, "column 'y': Arrow has no type for 1j|complex"),
        ({"x": 1}, {"x": 2**70}, "column 'x'"),
        ({"x": 1}, {"y": {}}, "column 'y' is struct<>, which a Parquet file cannot hold"),
    ],
)
def test_a_first_row_that_does_not_fit_is_named(tmp_path: Path, first: Any, second: Any, said: str) -> None:
    with ParquetSink(tmp_path) as sink:
        sink(first)
        with pytest.raises((PayloadMismatch, UnsupportedType), match=said):
            sink.write(second, id_=id_of(1))
        sink.write(first, id_=id_of(1))
    assert rows(tmp_path) == [first, first]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"n": "one"}, r"column 'n' is int64, and this row has 'one' \(str\)"),
        ({"n": 1.5}, r"column 'n' is int64, and this row has 1\.5 \(float\), which it would change"),
        ({"n": 1, "m": 2}, "there is no column 'm': the columns are n, inner, list"),
        ({"n": 1, "inner": {"b": 2}}, r"there is no column 'inner\.b'"),
        ({"n": 1, "list": [{"x": 1}, {"z": 2}]}, r"there is no column 'list\[\]\.z'"),
        ({"n": None}, "column 'n' is not nullable, and a row has no value for it"),
        ({}, "column 'n' is not nullable"),
    ],
    ids=repr,
)
def test_a_row_that_does_not_fit_the_schema_is_named(tmp_path: Path, row: Any, said: str) -> None:
    inner = pa.struct([("a", pa.int64())])
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False), ("inner", inner), ("list", pa.list_(pa.struct([("x", pa.int64())])))])
    with ParquetSink(tmp_path, schema=schema) as sink:
        with pytest.raises(PayloadMismatch, match=said):
            sink(row)
        sink({"n": 1, "inner": {"a": 2}, "list": [{"x": 3}]})
    assert pq.read_schema(files(tmp_path)[0]) == schema
    assert rows(tmp_path) == [{"n": 1, "inner": {"a": 2}, "list": [{"x": 3}]}]


@pytest.mark.parametrize(
    ("kind", "kept", "lost"),
    [
        (pa.int8(), 3.0, 3.5),
        (pa.int64(), Decimal(3), Decimal("3.5")),
        (pa.list_(pa.int64()), [1.0, 2], [1, 2.5]),
        (pa.list_(pa.int32()), np.array([1.0, 2.0]), np.array([1.0, 2.5])),
        (pa.struct([("a", pa.int64())]), {"a": None}, {"a": 0.1}),
        (pa.map_(pa.string(), pa.int64()), [("a", 1)], [("a", 1.5)]),
        (pa.float32(), 0.1, 1e39),
        (pa.float16(), 65504, 65520.0),
        (pa.date32(), dt.datetime(2026, 1, 2), dt.datetime(2026, 1, 2, 3)),  # noqa: DTZ001
        (pa.timestamp("s"), dt.datetime(2026, 1, 2, 3), dt.datetime(2026, 1, 2, 3, 0, 0, 1)),  # noqa: DTZ001
        (pa.timestamp("ms"), dt.datetime(2026, 1, 2, 3, 0, 0, 1000), dt.datetime(2026, 1, 2, 3, 0, 0, 1001)),  # noqa: DTZ001
        (pa.time32("s"), dt.time(1, 2, 3), dt.time(1, 2, 3, 4)),
        (pa.duration("ms"), dt.timedelta(milliseconds=1), dt.timedelta(microseconds=1)),
    ],
    ids=str,
)
def test_a_value_that_its_column_would_change_is_named(tmp_path: Path, kind: Any, kept: Any, lost: Any) -> None:
    """Arrow cuts it off without a word."""
    with ParquetSink(tmp_path, schema=pa.schema([("x", kind)])) as sink:
        with pytest.raises(PayloadMismatch, match=r"column 'x' is .*, which it would change"):
            sink({"x": lost})
        sink({"x": kept})
        sink({"x": None})
    assert pq.read_table(tmp_path).num_rows == 2


def test_a_table_whose_values_a_column_would_change_is_named(tmp_path: Path) -> None:
    with ParquetSink(tmp_path, schema=pa.schema([("x", pa.int64()), ("y", pa.string())])) as sink:
        with pytest.raises(PayloadMismatch, match=r"column 'x' is int64, and this row has 2\.5"):
            sink(pa.table({"x": [1.0, 2.5], "y": ["a", "b"]}))
        sink(pa.table({"x": [1.0, 2.0], "y": ["a", "b"]}))
    assert rows(tmp_path) == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]


def test_times_of_a_table_are_kept_or_named(tmp_path: Path) -> None:
    exact, finer = (pa.table({"t": pa.array([ns], pa.timestamp("ns"))}) for ns in (5_000, 5_001))
    with ParquetSink(tmp_path, schema=pa.schema([("t", pa.timestamp("us"))])) as sink:
        sink(exact)
        with pytest.raises(PayloadMismatch, match=r"column 't' is timestamp\[us\], and this table has timestamp\[ns\]: .*lose data"):
            sink(finer)
        nested = pa.table({"t": pa.array([[5_001]], pa.list_(pa.timestamp("ns")))})
        with pytest.raises(PayloadMismatch, match=r"column 't' is timestamp\[us\], and this"):
            sink(nested)
    with ParquetSink(tmp_path / "fine") as sink:
        sink(finer)
    assert pq.read_table(tmp_path / "fine")["t"].cast(pa.int64()).to_pylist() == [5_001]
    assert rows(tmp_path) == [{"t": dt.datetime(1970, 1, 1, 0, 0, 0, 5)}]  # noqa: DTZ001


def test_a_value_that_a_parquet_file_cannot_hold_is_named(tmp_path: Path) -> None:
    """It would be accepted, and no file could ever be made of it and of what came with it."""
    late = pa.table({"x": pa.array([2**62], pa.timestamp("s"))})
    for options in ({}, {"schema": late.schema}):
        with ParquetSink(tmp_path / str(len(options)), **options) as sink:  # type: ignore[arg-type]
            for bad in (late, pa.table({"x": late["x"].take([0, None])})):
                with pytest.raises(PayloadMismatch, match=r"column 'x' is timestamp\[s\], and a Parquet file cannot hold .*overflow"):
                    sink(bad)
            sink(pa.table({"x": pa.array([7], pa.timestamp("s"))}))
        assert rows(sink.path) == [{"x": dt.datetime(1970, 1, 1, 0, 0, 7)}]  # noqa: DTZ001
    inner = pa.struct([pa.field("a", pa.int64(), nullable=False)])
    with ParquetSink(tmp_path / "inner", schema=pa.schema([("x", inner)])) as sink:
        with pytest.raises(PayloadMismatch, match=r"column 'x' is .*, and a Parquet file cannot hold .*non-nullable"):
            sink({"x": {"a": None}})
        sink({"x": {"a": 1}})
    assert rows(sink.path) == [{"x": {"a": 1}}]


def test_a_row_of_a_known_shape_is_asked_no_less(tmp_path: Path) -> None:
    with ParquetSink(tmp_path) as sink:
        for value in ({"n": 1}, {"n": 2}, {"n": None}):
            sink(value)
        for bad in ({"n": 2**70}, {"n": "x"}, {"n": 1.5}):
            with pytest.raises((PayloadMismatch, UnsupportedType), match="column 'n'"):
                sink(bad)
        sink({"n": 3, "m": 1.5})
        sink({"n": 4})
        sink({"n": 5, "m": 2.5})
    assert rows(tmp_path) == [{"n": n, "m": m} for n, m in [(1, None), (2, None), (None, None), (3, 1.5), (4, None), (5, 2.5)]]


def test_a_refused_row_adds_no_column(tmp_path: Path) -> None:
    with ParquetSink(tmp_path) as sink:
        sink({"n": 1})
        with pytest.raises(PayloadMismatch, match="a Parquet file cannot hold"):
            sink(pa.table({"n": [2], "late": pa.array([2**62], pa.timestamp("s"))}))
    assert rows(tmp_path) == [{"n": 1}]


def test_the_columns_are_fixed_by_the_first_file(tmp_path: Path) -> None:
    with ParquetSink(tmp_path, rows_per_file=1) as sink:
        sink({"n": 1})
        with pytest.raises(PayloadMismatch, match="no column 'm'"):
            sink({"n": 1, "m": 2})
    with ParquetSink(tmp_path) as sink:
        with pytest.raises(PayloadMismatch, match="no column 'm'"):
            sink({"n": 1, "m": 2})
        sink({"n": 2})
    assert pq.read_table(tmp_path).to_pylist() == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("value", [1, "row", [1], [{"n": 1}], {1: 2}, pa.array([1])], ids=lambda value: str(value).replace("\n", ""))
def test_what_is_no_row_is_named(tmp_path: Path, value: Any) -> None:
    with ParquetSink(tmp_path) as sink, pytest.raises(UnsupportedType, match=r"is no row: .* gate=|a key that is not a str"):
        sink(value)


@pytest.mark.parametrize(
    "options",
    [{"rows_per_file": 0}, {"bytes_per_file": 1.5}, {"max_age_s": 0}, {"max_age_s": float("nan")}, {"schema": {"n": "int"}}],
    ids=repr,
)
def test_arguments_that_cannot_work_are_named(tmp_path: Path, options: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"ParquetSink.*{next(iter(options))}"), ParquetSink(tmp_path, **options):
        pass


def test_a_schema_that_parquet_has_not_is_named(tmp_path: Path) -> None:
    schema = pa.schema([("n", pa.int64()), ("u", pa.month_day_nano_interval())])
    with pytest.raises(ConfigurationError, match="column 'u' is month_day_nano_interval, which a Parquet file cannot hold"):
        write(tmp_path, schema=schema)


def test_without_pyarrow_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'edgeserve-streams\[arrow\]'"), ParquetSink(tmp_path):
        pass


# --- what a killed process leaves -----------------------------------------------------------------------------------


def test_rows_that_a_dead_process_has_left_become_a_file_at_the_next_start(tmp_path: Path) -> None:
    leave_behind(tmp_path, {"n": 1}, pa.table({"n": [2, 3]}), {"n": 4, "m": None})
    assert files(tmp_path) == []
    assert write(tmp_path, {"n": 1}, pa.table({"n": [2, 3]}), {"n": 4}).duplicates == 3
    assert rows(tmp_path) == [{"n": n, "m": None} for n in (1, 2, 3, 4)]
    assert hidden(tmp_path) == [".ids"]


def test_they_keep_their_columns_when_the_next_start_has_others(tmp_path: Path) -> None:
    leave_behind(tmp_path, {"n": 1}, schema=pa.schema([("n", pa.int8())]))
    write(tmp_path, {"n": 1}, {"s": "x"}, schema=pa.schema([("s", pa.string())]))
    assert [pq.read_schema(path).names for path in files(tmp_path)] == [["n"], ["s"]]
    assert rows(tmp_path) == [{"n": 1}, {"s": "x"}]


def test_half_a_row_is_written_when_it_comes_again(tmp_path: Path) -> None:
    leave_behind(tmp_path, {"n": 1}, {"n": 2})
    (wal,) = tmp_path.glob(".part-*.wal")
    os.truncate(wal, wal.stat().st_size - 1)
    assert write(tmp_path, {"n": 1}, {"n": 2}).duplicates == 1
    assert rows(tmp_path) == [{"n": 1}, {"n": 2}]


def test_rows_that_are_damaged_are_named_and_kept_aside(tmp_path: Path) -> None:
    leave_behind(tmp_path, {"n": 1}, {"n": 2, "text": "spoilt"}, {"n": 3})
    (wal,) = tmp_path.glob(".part-*.wal")
    raw = wal.read_bytes().replace(b"spoilt", b"SPOILT")
    wal.write_bytes(raw)
    with pytest.warns(StoreDamagedWarning, match=r"wal is damaged after 1 rows: .*checksum.* kept as \.part-\d+\.damaged"):
        write(tmp_path)
    assert rows(tmp_path) == [{"n": 1}]
    assert wal.with_suffix(".damaged").read_bytes() == raw
    assert write(tmp_path, {"n": 1}, {"n": 2}, {"n": 3}).duplicates == 1


def test_what_comes_again_is_known_when_its_file_was_taken_away(tmp_path: Path) -> None:
    write(tmp_path, {"n": 1}, {"n": 2}, rows_per_file=1)
    for path in files(tmp_path):
        path.unlink()
    assert write(tmp_path, {"n": 1}, {"n": 2}, {"n": 3}).duplicates == 2
    assert rows(tmp_path) == [{"n": 3}]


# --- full disks -----------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_row_and_shows_no_half_file(small_disk: Path) -> None:
    directory = small_disk / "out"
    values = [{"n": n, "noise": os.urandom(3_000)} for n in range(60)]
    full = 0
    with ParquetSink(directory, rows_per_file=20) as sink:
        for number, value in enumerate(values):
            if number % 25 == 10:
                ballast = fill_up(small_disk)
            try:
                sink.write(value, id_=id_of(number))
            except DiskFull as exc:
                assert "no space left" in str(exc)
                full += 1
                assert rows(directory) == values[: number // 20 * 20]
                ballast.unlink()
                sink.write(value, id_=id_of(number))
    assert full >= 2
    assert rows(directory) == values


def test_rows_of_a_sink_that_ends_on_a_full_disk_become_a_file_at_the_next_start(small_disk: Path) -> None:
    directory = small_disk / "out"
    values = [{"n": n, "noise": os.urandom(3_000)} for n in range(30)]
    sink = ParquetSink(directory)
    with pytest.raises(DiskFull, match="no space left"), sink:
        for number, value in enumerate(values, 1):
            sink.write(value, id_=id_of(number))
        ballast = fill_up(small_disk)
    assert files(directory) == []
    ballast.unlink()
    assert write(directory, *values).duplicates == 30
    assert rows(directory) == values
