"""Files of JSON lines: values as they are read by others, half lines, full disks, two writers."""

from __future__ import annotations

import datetime as dt
import errno
import json
import logging
import math
import os
import tempfile
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.disks import fill_up
from tests.sinks.reading import lines

from edgeserve.core.errors import ClosedError, ConfigurationError, DiskFull, StoreDamagedWarning, StoreVersion, UnsupportedType
from edgeserve.sinks import JsonLinesSink


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out.jsonl"


def write(path: Path, *values: Any) -> None:
    with JsonLinesSink(path) as sink:
        for value in values:
            sink(value)


def write_known(path: Path, *numbers: int) -> JsonLinesSink:
    """Writes numbers under ids that are theirs."""
    with JsonLinesSink(path) as sink:
        for number in numbers:
            sink.write(number, id_=id_of(number))
    return sink


@dataclass
class Place:
    name: str
    at: tuple[float, float]


class Reading(msgspec.Struct):
    place: Place
    raw: bytes


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, msgspec.Raw) else repr(value)  # the address is another in each process


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ({"b": True, "i": -3, "f": 0.1, "s": "ä\n", "l": [None, []]}, {"b": True, "i": -3, "f": 0.1, "s": "ä\n", "l": [None, []]}),
        (0, 0),
        ("", ""),
        (b"\x00\xff", "AP8="),
        ((1, 2), [1, 2]),
        ({3: "x"}, {"3": "x"}),
        ([math.nan, math.inf], [None, None]),
        (dt.datetime(2026, 1, 2, 3, 4, 5, 6, dt.UTC), "2026-01-02T03:04:05.000006Z"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (Decimal("1.10"), "1.10"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.array([[1, 2], [3, 4]], np.int16), [[1, 2], [3, 4]]),
        (np.array(["2026-01-02T03:04:05.000000006"], "M8[ns]"), ["2026-01-02T03:04:05.000000006"]),
        (np.array([b"\x00\xff"]), ["AP8="]),
        ({"x": [np.arange(2)]}, {"x": [[0, 1]]}),
        (Reading(Place("hall", (1.0, 2.0)), b"\x00\xff"), {"place": {"name": "hall", "at": [1.0, 2.0]}, "raw": "AP8="}),
        (msgspec.Raw(b'{"pretty":\n 1}'), {"pretty": 1}),
    ],
    ids=_shown,
)
def test_values_are_read_by_others(path: Path, value: Any, read: Any) -> None:
    write(path, value)
    assert lines(path) == [read]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values=st.lists(JSON, max_size=8))
def test_what_json_can_carry_is_read_as_it_was(values: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "out", *values)
        assert lines(Path(folder) / "out") == values


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1j, r"^1j \(complex\) cannot be written as JSON"),
        ({"a": [0, {"b": 1j}]}, r"^1j \(complex\) at \['a'\]\[1\]\['b'\] cannot"),
        (Place("x", (0.0, 1j)), r"\(complex\) at \.at\[1\] cannot"),
        ({"z": np.zeros(2, complex)}, r"\(ndarray\) at \['z'\] cannot be written as JSON \(of dtype complex128\)"),
        ({"v": np.longdouble(1)}, r"\(longdouble\) at \['v'\] cannot"),
        ({(1, 2): 3}, r"\(dict\) cannot"),
        ({"s": "\ud800"}, r"\(str\) at \['s'\] cannot"),
        (CIRCLE, r"\(list\).* cannot"),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value),
)
def test_what_json_cannot_carry_is_named_and_leaves_the_file_as_it_was(path: Path, value: Any, said: str) -> None:
    with JsonLinesSink(path) as sink:
        sink(1)
        with pytest.raises(UnsupportedType, match=said):
            sink.write(value, id_=id_of(1))
        sink.write(2, id_=id_of(1))
    assert lines(path) == [1, 2]


def test_what_comes_again_is_written_once(path: Path) -> None:
    write_known(path, 1, 2)
    sink = write_known(path, 1, 2, 3, 3)
    assert (sink.written, sink.duplicates) == (1, 3)
    assert lines(path) == [1, 2, 3]


def test_half_a_line_is_cut_off_and_written_when_it_comes_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_known(path, 1, 2, 300_000)
    for left in (5, 3, 1):  # of the last line, and of its newline
        os.truncate(path, len("1\n2\n") + left)
        with caplog.at_level(logging.WARNING, "edgeserve"):
            assert write_known(path, 1, 2, 300_000).duplicates == 2
        assert lines(path) == [1, 2, 300_000]
        assert f"cut off {left} bytes" in caplog.text


def test_half_a_line_longer_than_a_block_is_cut_off(path: Path) -> None:
    write(path, "a" * 200_000, "b" * 300_000)
    os.truncate(path, 400_000)
    write(path, "c")
    assert lines(path) == ["a" * 200_000, "c"]
    os.truncate(path, 100_000)
    write(path, "c")
    assert lines(path) == ["c"]


def test_what_was_taken_out_of_the_file_is_written_when_it_comes_again(path: Path) -> None:
    write_known(path, 1, 2, 3)
    os.truncate(path, len("1\n"))
    write_known(path, 1, 2, 3)
    assert lines(path) == [1, 2, 3]
    path.unlink()
    write_known(path, 1, 2, 3)
    assert lines(path) == [1, 2, 3]


def test_a_file_that_is_deleted_while_it_is_open_is_begun_anew(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with JsonLinesSink(path) as sink:
        sink.write(1, id_=id_of(1))
        path.unlink()
        sink.write(1, id_=id_of(1))  # known: it was written
        with caplog.at_level(logging.WARNING, "edgeserve"):
            sink.write(2, id_=id_of(2))
            sink.write(3, id_=id_of(3))
        assert caplog.text.count("was deleted while it was open") == 1
        sink.write(2, id_=id_of(2))
    assert lines(path) == [2, 3]


def test_a_deleted_file_that_cannot_be_begun_anew_is_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with JsonLinesSink(path) as sink:
        sink(1)
        for beside in list(path.parent.iterdir()):
            beside.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            for _ in range(2):
                with pytest.raises(DiskFull):
                    sink.write(2, id_=id_of(2))
        sink.write(2, id_=id_of(2))
        sink.write(2, id_=id_of(2))
    assert lines(path) == [2]


def test_a_file_of_somebody_else_is_gone_on_with_but_never_cut(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("0\n")
    write(path, 1)
    assert lines(path) == [0, 1]
    other = path.with_name("other.jsonl")
    other.write_text('{"whole": true}')
    with pytest.raises(ConfigurationError, match=r"other\.jsonl does not end with a newline"):
        write(other, 1)
    assert other.read_text() == '{"whole": true}'


def test_a_start_reads_the_same_whatever_the_size_of_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_known(path, *range(50))
    size = path.stat().st_size
    os.truncate(path, 3 << 30)
    with open(path, "ab") as file:
        file.write(b"\nhalf")
    read = 0
    pread = os.pread

    def counting(fd: int, size: int, at: int) -> bytes:
        nonlocal read
        found = pread(fd, size, at)
        read += len(found)
        return found

    monkeypatch.setattr(os, "pread", counting)
    assert write_known(path, *range(50), 7, 100).duplicates == 51
    assert 0 < read < 5_000_000
    with open(path, "rb") as file:
        assert file.read(size).count(b"\n") == 50
        file.seek(3 << 30)
        assert file.read() == b"\n100\n"


def test_the_newest_ids_are_known_and_take_no_more_room_than_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeserve.sinks.ids.SLOTS", 8)
    beside = path.with_name("out.jsonl.ids")
    write_known(path, 1)
    size = beside.stat().st_size
    write_known(path, *range(2, 30))
    assert write_known(path, *range(22, 30)).duplicates == 8
    assert write_known(path, 21).duplicates == 0
    assert beside.stat().st_size == size
    assert lines(path) == [*range(1, 30), 21]


def test_ids_that_are_damaged_are_begun_anew_with_a_warning(path: Path) -> None:
    write_known(path, 1)
    beside = path.with_name("out.jsonl.ids")
    whole = beside.read_bytes()
    beside.write_bytes(b"?" + whole[1:])
    with pytest.warns(StoreDamagedWarning, match=r"out\.jsonl\.ids: it holds no ids .* kept as out\.jsonl\.ids\.damaged"):
        write_known(path, 2)
    assert beside.with_name("out.jsonl.ids.damaged").read_bytes() == b"?" + whole[1:]
    assert write_known(path, 1, 2).duplicates == 1
    assert lines(path) == [1, 2, 1]


def test_one_damaged_id_is_forgotten_and_no_other(path: Path) -> None:
    write_known(path, 1, 2, 3)
    beside = path.with_name("out.jsonl.ids")
    raw = bytearray(beside.read_bytes())
    at = raw.index(id_of(2))
    raw[at] ^= 1
    beside.write_bytes(raw)
    assert write_known(path, 1, 3, 4).duplicates == 2
    assert write_known(path, 1, 3, 4).duplicates == 3


def test_ids_of_a_newer_version_are_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeserve.sinks.ids.VERSION", 2)
    write_known(path, 1)
    monkeypatch.undo()
    with pytest.raises(StoreVersion, match=r"out\.jsonl\.ids was written in format 2, this edgeserve reads up to 1"):
        write_known(path, 1)
    assert lines(path) == [1]


def test_a_full_disk_leaves_whole_lines_and_loses_none(small_disk: Path) -> None:
    path = small_disk / "out.jsonl"
    rows = [{"n": n, "text": "x" * 3_000} for n in range(40)]
    with JsonLinesSink(path) as sink:
        sink.write(rows[0], id_=id_of(0))
        ballast = fill_up(small_disk)
        full = 0
        for n, row in enumerate(rows):
            try:
                sink.write(row, id_=id_of(n))
            except DiskFull as exc:
                assert "no space left" in str(exc)
                assert lines(path) == rows[:n]
                full += 1
                ballast.unlink()
                sink.write(row, id_=id_of(n))
                if full < 3:
                    fill_up(small_disk)
        assert full == 3
    assert lines(path) == rows
    with JsonLinesSink(path) as sink:
        for n, row in enumerate(rows):
            sink.write(row, id_=id_of(n))
    assert sink.duplicates == len(rows)
    assert lines(path) == rows


def test_a_disk_that_is_full_from_the_start_is_named(small_disk: Path) -> None:
    fill_up(small_disk)
    with pytest.raises(DiskFull, match="no space left"):
        write(small_disk / "out.jsonl", 1)


def test_several_files_and_several_users_at_once(tmp_path: Path) -> None:
    one, two = (JsonLinesSink(tmp_path / name) for name in ("one", "two"))
    with one, two:
        with one:
            one("a")
        two("b")
        one("c")
    assert lines(tmp_path / "one") == ["a", "c"]
    assert lines(tmp_path / "two") == ["b"]


@pytest.mark.parametrize("path", [7, "", b"out", None], ids=repr)
def test_what_is_no_path_is_named(path: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"JsonLinesSink got .* it takes a path"):
        JsonLinesSink(path)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"JsonLinesSink '{tmp_path}' cannot be opened: .*directory"):
        write(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="pipe is not a regular file"):
        write(tmp_path / "pipe", 1)


def test_a_sink_that_is_not_open_says_what_to_do(path: Path) -> None:
    sink = JsonLinesSink(path)
    with pytest.raises(ClosedError, match="hand it to Materialize, or use it in a with statement"):
        sink(1)
    with sink:
        sink(1)
    sink.close()
    with pytest.raises(ClosedError):
        sink(2)
    with pytest.raises(ConfigurationError, match="id_ is 16 bytes, not 3"), sink:
        sink.write(1, id_=b"abc")
    assert lines(path) == [1]


def test_flush_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with JsonLinesSink(path) as sink:
        sink(1)
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
        sink.flush()
        assert path.stat().st_ino in synced
    assert json.loads(path.read_text()) == 1
