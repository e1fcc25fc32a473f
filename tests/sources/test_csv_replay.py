"""CSV files as streams: what rows are, when they come, what is refused, where a restart goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.sources.conftest import FakeTimer

from edgeserve.core.errors import BadRow, ConfigurationError
from edgeserve.sources import CsvReplay, Source


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def _write(text: str | bytes, name: str = "rows.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return _write


def rows(path: Path, **options: Any) -> list[Any]:
    return list(CsvReplay(path, speed=None, **options))


def paced(path: Path, **options: Any) -> list[float]:
    """How long after the first each row came, seconds."""
    timer = FakeTimer(patient=True)
    begin = timer.now_ns
    return [(timer.now_ns - begin) / 1e9 for _ in CsvReplay(path, timer=timer, **options)]


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_is_a_dict_by_the_header(write: Callable[..., Path]) -> None:
    path = write('t,name\n0,a\n1,"b, ""c""\nd"\n')
    assert rows(path) == [{"t": "0", "name": "a"}, {"t": "1", "name": 'b, "c"\nd'}]


def test_without_a_header_a_row_is_a_list(write: Callable[..., Path]) -> None:
    assert rows(write("0,a\n1,b\n"), header=False) == [["0", "a"], ["1", "b"]]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_bytes_around_the_rows_are_no_part_of_them(write: Callable[..., Path], ending: str, bom: str, last: bool) -> None:
    text = bom + ending.join(["t,ü", "", "0,ä", "1,ö"]) + ending * last
    assert rows(write(text), time="t") == [{"t": "0", "ü": "ä"}, {"t": "1", "ü": "ö"}]


@pytest.mark.parametrize(
    ("columns", "expected"), [(["b"], {"b": "2"}), (["c", "a"], {"c": "3", "a": "1"}), ([0, "b"], {"t": "0", "b": "2"}), (None, None)]
)
def test_columns_choose_and_order(write: Callable[..., Path], columns: Any, expected: Any) -> None:
    assert rows(write("t,a,b,c\n0,1,2,3\n"), time="t", columns=columns) == [expected or {"t": "0", "a": "1", "b": "2", "c": "3"}]


def test_columns_of_a_file_without_a_header(write: Callable[..., Path]) -> None:
    assert rows(write("a,0,b\n"), header=False, time=1, columns=[2, 0]) == [["b", "a"]]


@pytest.mark.parametrize("text", ["", "\ufeff", "\n\n", "t,a\n", "t,a"])
def test_a_file_without_rows_ends(write: Callable[..., Path], text: str) -> None:
    path = write(text)
    assert rows(path) == []
    assert rows(path, time="t", loop=True) == []
    if not text.startswith("t"):
        assert rows(path, header=False, loop=True) == []


def test_a_file_is_not_read_before_it_is_needed(write: Callable[..., Path], closing: Callable[[Source], Any]) -> None:
    path = write("t\n" + "".join(f"{n}\n" for n in range(200_000)))
    replay = closing(CsvReplay(path, speed=None))
    assert [next(replay)["t"] for _ in range(3)] == ["0", "1", "2"]
    assert replay._file.tell() < 100_000


# --- pace ---------------------------------------------------------------------------------------------------------


def test_rows_come_as_far_apart_as_they_are(write: Callable[..., Path]) -> None:
    path = write("t\n100\n100.5\n100.5\n103\n")
    assert paced(path) == [0, 0.5, 0.5, 3]
    assert paced(path, speed=2) == [0, 0.25, 0.25, 1.5]
    assert paced(path, speed=0.5) == [0, 1, 1, 6]
    assert paced(path, speed=float("inf")) == paced(path, speed=None) == [0, 0, 0, 0]


def test_iso_times_have_a_pace_too(write: Callable[..., Path]) -> None:
    assert paced(write("t\n2026-01-01T00:00:00Z\n2026-01-01T02:00:01+02:00\n2026-01-01T00:01\n")) == [0, 1, 60]


def test_delays_do_not_add_up(write: Callable[..., Path]) -> None:
    timer = FakeTimer(patient=True)
    begin, came = timer.now_ns, []
    for row in CsvReplay(write("t\n0\n1\n2\n3\n4\n"), timer=timer):
        came.append((timer.now_ns - begin) / 1e9)
        timer.now_ns += {"0": 300_000_000, "1": 2_500_000_000}.get(row["t"], 0)
    assert came == [0, 1, 3.5, 3.5, 4]


def test_rows_out_of_order_come_at_once_and_in_the_file_s_order(write: Callable[..., Path]) -> None:
    path = write("t\n10\n12\n9\n11\n13\n")
    assert [row["t"] for row in rows(path)] == ["10", "12", "9", "11", "13"]
    assert paced(path) == [0, 2, 2, 2, 3]


def test_a_loop_goes_on_in_time(write: Callable[..., Path]) -> None:
    timer = FakeTimer(patient=True)
    begin = timer.now_ns
    found = []
    with CsvReplay(write("t,a\n5,x\n6,y\n7,z\n"), time="t", loop=True, timer=timer) as replay:
        for _ in range(7):
            row = next(replay)
            found.append((row["a"], replay.event_time(row), (timer.now_ns - begin) / 1e9))
    assert found == [(letter, (5 + n) * 10**9, n) for n, letter in enumerate("xyzxyzx")]


@pytest.mark.parametrize("text", ["t\n5\n", "t\n5\n5\n"])
def test_a_loop_of_one_moment_has_a_pace(write: Callable[..., Path], text: str) -> None:
    timer = FakeTimer(patient=True)
    with CsvReplay(write(text), loop=True, timer=timer) as replay:
        times = {replay.event_time(next(replay)) for _ in range(6)}
    assert {n % 10**9 for n in times} == {0} and len(times) == (6 if text.count("5") == 1 else 3)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("1,b,c", "3 fields, not the 2"),
        ("1", "1 fields, not the 2"),
        ("later,b", "column 't': 'later' is no time"),
        ('1,"b" c', "expected after"),
    ],
)
def test_a_bad_row_is_named_and_the_next_call_goes_on(
    write: Callable[..., Path], closing: Callable[[Source], Any], line: str, why: str
) -> None:
    path = write(f't,a\n0,"x\ny"\n{line}\n2,z\n')
    replay = closing(CsvReplay(path, time="t", speed=None))
    assert next(replay)["a"] == "x\ny"
    with pytest.raises(BadRow, match=rf"rows\.csv, line 4: .*{why}.*Mend the row"):
        next(replay)
    assert next(replay) == {"t": "2", "a": "z"}
    assert list(replay) == []


def test_what_is_not_utf_8_is_named(write: Callable[..., Path], closing: Callable[[Source], Any]) -> None:
    replay = closing(CsvReplay(write(b"t,a\n0,\xe4\n1,b\n"), speed=None))
    with pytest.raises(BadRow, match=r"line 2: it is not UTF-8.*iconv"):
        next(replay)
    assert next(replay)["a"] == "b"


@pytest.mark.parametrize("length", [100, 101, 250, 1000])
def test_a_line_without_an_end_in_sight_is_named_and_never_held(
    write: Callable[..., Path], closing: Callable[[Source], Any], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr("edgeserve.sources.csv_replay.LONGEST_LINE", 100)
    replay = closing(CsvReplay(write("t,a\n0,x\n" + "7" * (length - 2) + ",b\n1,y\nz,z\n"), speed=None))
    assert next(replay)["a"] == "x"
    with pytest.raises(BadRow, match="line 3: a line of more than 100 bytes: this is no CSV file"):
        next(replay)
    assert next(replay) == {"t": "1", "a": "y"}
    with pytest.raises(BadRow, match="line 5: "):
        next(replay)
    with pytest.raises(BadRow, match="first row: a line of more than 100 bytes"):
        CsvReplay(write("7" * length + "\n"))


def test_a_file_of_another_encoding_is_named_at_once(write: Callable[..., Path]) -> None:
    with pytest.raises(BadRow, match=r"rows\.csv, its first row: it is not UTF-8.*iconv"):
        CsvReplay(write("t,a\n0,b\n".encode("utf-16")))


def test_a_quote_that_is_never_closed_is_named(write: Callable[..., Path], closing: Callable[[Source], Any]) -> None:
    replay = closing(CsvReplay(write('t,a\n0,"b\n1,c\n'), speed=None))
    with pytest.raises(BadRow, match="line 2: unexpected end of data"):
        next(replay)
    assert list(replay) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"time": "when"}, "time='when' is not among the file's columns: 't', 'a'"),
        ({"time": 2}, "time=2: the file has the columns 0 to 1"),
        ({"time": -1}, "time=-1"),
        ({"time": True}, "time=True"),
        ({"time": "t", "header": False}, "columns have no names"),
        ({"columns": ["b"]}, "columns='b' is not among"),
        ({"columns": "a"}, "columns='a': it is a list"),
        ({"columns": []}, "it is a list"),
        ({"speed": 0}, "speed=0"),
        ({"speed": float("nan")}, "speed=nan"),
        ({"speed": -1}, "speed=-1"),
        ({"speed": "fast"}, "speed='fast'"),
        ({"header": None}, "header=None"),
        ({"loop": 1}, "loop=1"),
        ({"position": "/nowhere/at/all"}, "is not a directory"),
    ],
)
def test_what_cannot_work_is_named_at_once(write: Callable[..., Path], options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        CsvReplay(write("t,a\n0,b\n"), **options)


def test_a_column_that_is_there_twice_is_named(write: Callable[..., Path]) -> None:
    path = write("t,a,a\n0,1,2\n")
    with pytest.raises(ConfigurationError, match="'a' is more than once"):
        CsvReplay(path)
    assert rows(path, columns=["t"]) == [{"t": "0"}]
    assert rows(path, columns=["t", 2]) == [{"t": "0", "a": "2"}]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no file"):
        CsvReplay(tmp_path / "none.csv")
    with pytest.raises(ConfigurationError, match="no regular file"):
        CsvReplay(tmp_path)
    with pytest.raises(ConfigurationError, match="the path of a file"):
        CsvReplay(3)  # type: ignore[arg-type]


# --- ids and times ------------------------------------------------------------------------------------------------


def ids(path: Path, **options: Any) -> list[bytes]:
    replay = CsvReplay(path, speed=None, **options)
    return [replay.message_id(row) for row in replay]


def test_ids_are_those_of_the_rows(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("t,a\n0,x\n0,x\n1,y\n")
    found = ids(path)
    assert len(set(found)) == 3
    monkeypatch.chdir(path.parent)
    assert ids(Path("rows.csv")) == found
    assert ids(path, columns=["a"]) == found
    write("t,a\n0,x\n0,other\n1,y\n")
    assert [a == b for a, b in zip(ids(path), found, strict=True)] == [True, False, True]
    other = write("t,a\n0,x\n0,x\n1,y\n", name="other.csv")
    assert not set(ids(other)) & set(found)


def test_ids_of_a_loop_differ_from_turn_to_turn(write: Callable[..., Path]) -> None:
    path = write("t\n0\n1\n")
    with CsvReplay(path, speed=None, loop=True) as replay:
        found = [replay.message_id(next(replay)) for _ in range(6)]
    assert len(set(found)) == 6 and found[:2] == ids(path)


def test_the_time_of_another_item_is_refused(write: Callable[..., Path], closing: Callable[[Source], Any]) -> None:
    replay = closing(CsvReplay(write("t\n0\n1\n"), speed=None))
    with pytest.raises(ConfigurationError, match="not its last one"):
        replay.event_time({"t": "0"})
    first, second = next(replay), next(replay)
    assert replay.event_time(second) == 10**9
    for ask in (replay.event_time, replay.message_id):
        with pytest.raises(ConfigurationError, match=r"give DataSource the CsvReplay itself.*gate="):
            ask(first)


# --- waking and closing -------------------------------------------------------------------------------------------


def test_waking_ends_a_wait_and_loses_no_row(write: Callable[..., Path], closing: Callable[[Source], Any]) -> None:
    timer = FakeTimer(lambda: replay.wake(), patient=True)
    replay = closing(CsvReplay(write("t\n0\n60\n61\n"), timer=timer))
    assert [next(replay) for _ in range(4)] == [{"t": "0"}, None, {"t": "60"}, {"t": "61"}]


def test_closing_ends_a_wait_in_another_thread(write: Callable[..., Path]) -> None:
    replay = CsvReplay(write("t\n0\n1000000\n"))
    next(replay)
    ended = threading.Event()

    def wait() -> None:
        assert list(replay) == []
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    replay.close()
    thread.join(20)
    assert ended.is_set()
    replay.close()
    with pytest.raises(StopIteration):
        next(replay)


class Interrupted(BaseException):
    """As a signal would raise."""


def interrupt() -> None:
    raise Interrupted


def test_an_interrupted_wait_loses_no_row(write: Callable[..., Path]) -> None:
    timer = FakeTimer(interrupt, patient=True)
    replay = CsvReplay(write("t\n0\n60\n61\n"), timer=timer)
    assert next(replay) == {"t": "0"}
    with pytest.raises(Interrupted):
        next(replay)
    assert [row["t"] for row in replay] == ["60", "61"]


def test_an_interrupted_read_loses_no_row(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of a row of two lines."""
    replay = CsvReplay(write('t,a\n0,x\n1,"y\nz"\n2,w\n'), speed=None)
    assert next(replay)["a"] == "x"
    lines = type(replay._lines)
    taken, take = [], lines.__next__

    def taking(self: Any) -> str:
        taken.append(take(self))
        if taken == ['1,"y\n']:
            raise Interrupted
        return taken[-1]

    monkeypatch.setattr(lines, "__next__", taking)
    with pytest.raises(Interrupted):
        next(replay)
    assert [row["a"] for row in replay] == ["y\nz", "w"]


# --- positions ----------------------------------------------------------------------------------------------------


def taken(path: Path, position: Path, count: int | None = None, *, commit: bool = True, **options: Any) -> list[str]:
    """The letters of the next `count` rows, or of all, of a new start."""
    with CsvReplay(path, time="t", speed=None, position=position, **options) as replay:
        letters = [row["a"] for row in replay] if count is None else [next(replay)["a"] for _ in range(count)]
        if commit:
            replay.commit()
        return letters


def test_a_new_start_goes_on_behind_what_was_committed(write: Callable[..., Path], tmp_path: Path) -> None:
    path, position = write('\ufefft,a\n0,a\n1,"b\nb"\n2,c\n\n3,d\n4,e\n'), tmp_path / "position"
    assert taken(path, position, 2) == ["a", "b\nb"]
    assert taken(path, position, 2, commit=False) == ["c", "d"]
    assert taken(path, position, 1) == ["c"]
    assert taken(path, position) == ["d", "e"]
    assert taken(path, position) == []
    path.write_text(path.read_text() + "5,f\n")
    assert taken(path, position) == ["f"]


def test_ids_and_times_go_on_too(write: Callable[..., Path], tmp_path: Path) -> None:
    path, position = write("t,a\n0,a\n1,b\n2,c\n"), tmp_path / "position"
    expected = []
    with CsvReplay(path, speed=None, loop=True) as replay:
        for _ in range(8):
            row = next(replay)
            expected.append((replay.event_time(row), replay.message_id(row)))
    found = []
    for _ in range(4):
        with CsvReplay(path, speed=None, loop=True, position=position) as replay:
            for _ in range(2):
                row = next(replay)
                found.append((replay.event_time(row), replay.message_id(row)))
            replay.commit()
    assert found == expected


def test_the_pace_begins_anew_with_a_new_start(write: Callable[..., Path], tmp_path: Path) -> None:
    path, position = write("t,a\n0,a\n100,b\n101,c\n"), tmp_path / "position"
    taken(path, position, 1)
    assert paced(path, position=position) == [0, 1]


def test_a_bad_row_is_passed_by_a_commit(write: Callable[..., Path], tmp_path: Path) -> None:
    path, position = write("t,a\n0,a\nx,b\n2,c\n"), tmp_path / "position"
    with CsvReplay(path, speed=None, position=position) as replay:
        next(replay)
        with pytest.raises(BadRow, match="line 3"):
            next(replay)
        replay.commit()
    assert taken(path, position) == ["c"]


def test_another_file_is_replayed_from_its_start(write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, position = write("t,a\n0,a\n1,b\n2,c\n"), tmp_path / "position"
    taken(path, position, 2)
    for text in ("t,a\n0,a\n1,x\n2,y\n", "t,a\n0,z\n"):
        write(text)
        caplog.clear()
        assert taken(path, position, commit=False) == [line[-1] for line in text.split()[1:]]
        assert "not the file that was read before" in caplog.text


def test_another_file_with_the_same_last_row_is_another_one(write: Callable[..., Path], tmp_path: Path) -> None:
    path, position = write("t,a\n0,a\n1,b\n2,c\n"), tmp_path / "position"
    taken(path, position, 2)
    write("t,a\n0,z\n1,b\n2,c\n")
    assert taken(path, position) == ["z", "b", "c"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is damaged, or no position"),
        ("[]", "is damaged, or no position"),
        ('{"edgeserve_position": 2}', "has version 2"),
        ('{"edgeserve_position": 1, "source": "CsvReplay", "path": "/x", "place": {"row": "a"}, "check": ""}', "is damaged"),
        ('{"edgeserve_position": 1, "source": "CsvReplay", "path": "/x", "place": {}, "check": ""}', "is that of CsvReplay of '/x'"),
    ],
)
def test_what_is_no_position_of_this_source_is_named(write: Callable[..., Path], tmp_path: Path, text: str, why: str) -> None:
    path, position = write("t,a\n0,a\n"), tmp_path / "position"
    position.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"the position file .*position {why}.*remove it to begin anew"):
        taken(path, position)


def test_a_position_that_cannot_be_saved_stops_nothing(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, folder = write("t,a\n0,a\n1,b\n2,c\n"), tmp_path / "folder"
    folder.mkdir()
    with CsvReplay(path, speed=None, position=folder / "position") as replay:
        next(replay)
        replay.commit()
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
        caplog.set_level(logging.WARNING, logger="edgeserve")
        for _ in range(2):
            next(replay)
            replay.commit()
        assert caplog.text.count("cannot save its position") == 1
