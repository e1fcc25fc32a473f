"""A log that grows: what counts as a line, what becomes of the file meanwhile, where a restart goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.sources.conftest import FakeTimer

from edgeserve.core._pack import pack
from edgeserve.core.errors import BadRow, ConfigurationError, UnsupportedType
from edgeserve.sources import JsonLinesTail, Source
from edgeserve.sources.follower import CHUNK_BYTES


class Log:
    """A log as its writer sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.written: list[int] = []
        self.rotated = 0

    def put(self, data: bytes | str) -> None:
        with self.path.open("ab") as file:
            file.write(data.encode() if isinstance(data, str) else data)

    def lines(self, count: int = 1) -> None:
        """Writes the next lines, one after the other."""
        for _ in range(count):
            self.put(self.next())

    def next(self) -> str:
        self.count += 1
        self.written.append(self.count)
        return json.dumps({"n": self.count}) + "\n"

    def rotate(self) -> None:
        self.rotated += 1
        self.path.rename(f"{self.path}.{self.rotated}")

    def truncate(self) -> None:
        os.truncate(self.path, 0)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "eve.json")


Tail = Callable[..., JsonLinesTail]


@pytest.fixture
def tail(log: Log, closing: Callable[[Source], Any]) -> Tail:
    """`tail(step, step)`: a tail in whose waits the steps happen, one each."""

    def _tail(*meanwhile: Callable[[], object], **options: Any) -> JsonLinesTail:
        found: JsonLinesTail = closing(JsonLinesTail(log.path, timer=FakeTimer(*meanwhile), **options))
        return found

    return _tail


def take(tail: JsonLinesTail, count: int) -> list[int]:
    return [next(tail)["n"] for _ in range(count)]


# --- lines --------------------------------------------------------------------------------------------------------


def test_lines_come_as_they_are_written(log: Log, tail: Tail) -> None:
    log.lines(2)
    found = tail(log.lines, lambda: log.lines(2))
    assert take(found, 3) == [3, 4, 5]
    assert found._timer.waits == [0.2, 0.2]


def test_from_start_begins_with_what_is_there(log: Log, tail: Tail) -> None:
    log.lines(2)
    assert take(tail(log.lines, from_start=True), 3) == [1, 2, 3]


def test_a_file_that_is_not_there_yet_is_waited_for(log: Log, tail: Tail) -> None:
    found = tail(lambda: None, lambda: None, lambda: log.put(b""), log.lines)
    assert take(found, 1) == [1]


def test_a_partial_line_is_waited_for(log: Log, tail: Tail) -> None:
    log.put('{"n"')
    found = tail(lambda: log.put(": "), lambda: log.put('7}\n{"n": 8'), lambda: log.put("}"), lambda: log.put("\n"))
    assert take(found, 2) == [7, 8]


def test_a_character_in_two_writes_is_whole(log: Log, tail: Tail) -> None:
    data = '{"n": "ä"}\n'.encode()
    assert take(tail(lambda: log.put(data[:8]), lambda: log.put(data[8:])), 1) == ["ä"]


def test_without_follow_it_ends_with_the_file(log: Log, tail: Tail) -> None:
    log.lines(2)
    log.put('\n  \n{"n": 3}')
    found = tail(from_start=True, follow=False)
    assert [item["n"] for item in found] == [1, 2, 3]
    assert list(found) == []
    log.put(',{"n": 4')
    assert [item["n"] for item in tail(from_start=True, follow=False)] == [1, 2]


def test_any_json_value_is_an_item(log: Log, tail: Tail) -> None:
    log.put('[1]\r\n"a"\n0\nfalse\n{"a": {"b": null}}\nnull\n')
    assert list(tail(from_start=True, follow=False)) == [[1], "a", 0, False, {"a": {"b": None}}]


# --- broken lines -------------------------------------------------------------------------------------------------


def test_broken_lines_are_left_out_and_named_once(log: Log, tail: Tail, caplog: pytest.LogCaptureFixture) -> None:
    log.lines(1)
    log.put(b'{"n": 2\n{"n": "\xff"}\n\x00\n')
    log.lines(1)
    with tail(from_start=True, follow=False) as found:
        assert [item["n"] for item in found] == [1, 2]
        assert found.skipped == 3
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert f"{log.path}, line 2: " in texts[0] and "It is left out" in texts[0]
    assert texts[1] == f"{log.path}: 3 broken lines were left out"


@pytest.mark.parametrize(
    "line",
    [
        b'{"n": "\xff\xfe"}',
        b"[" * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
        b'{"n": ' * 150 + b"0" + b"}" * 150,
        b"9" * 10_000,
        b'{"n": 1e999}',
        b'{"n": "\\ud800"}',
        b'{"n": NaN}',
        b"\x00" * 100,
    ],
    ids=["utf-8", "open", "deep", "too deep to send", "digits", "large", "surrogate", "nan", "zeros"],
)
@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_hostile_lines_are_broken_ones_and_what_follows_is_read(log: Log, tail: Tail, line: bytes, on_error: Any) -> None:
    log.put(b'{"n": 0}\n' + line + b'\n{"n": 1}\n')
    found = tail(from_start=True, follow=False, on_error=on_error)
    assert take(found, 1) == [0]
    if on_error == "raise":
        with pytest.raises(BadRow, match=rf"{log.path}, line 2: "):
            next(found)
    assert take(found, 1) == [1]
    assert found.skipped == (on_error == "skip")


@pytest.mark.parametrize(("levels", "sent"), [(100, True), (101, True), (102, False)])
def test_what_is_as_deep_as_can_be_sent_is_an_item(log: Log, tail: Tail, levels: int, sent: bool) -> None:
    log.put("[" * levels + "0" + "]" * levels + "\n")
    items = list(tail(from_start=True, follow=False))
    assert len(items) == sent
    if sent:
        pack(items[0])
    else:
        with pytest.raises(UnsupportedType):
            pack(json.loads(log.path.read_bytes()))


def test_a_byte_order_mark_is_no_part_of_the_first_line(log: Log, tail: Tail) -> None:
    log.put(b'\xef\xbb\xbf{"n": 1}\n{"n": 2}\n')
    assert take(tail(from_start=True, follow=False), 2) == [1, 2]


def test_each_file_s_first_broken_line_is_named(log: Log, tail: Tail, caplog: pytest.LogCaptureFixture) -> None:
    log.put("x\nx\n")

    def rotate() -> None:
        log.rotate()
        log.put("x\n")
        log.lines()

    found = tail(rotate, from_start=True)
    assert take(found, 1) == [1]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"{log.path}, line 1"] * 2


def test_a_broken_line_is_raised_and_the_next_call_goes_on(log: Log, tail: Tail) -> None:
    log.lines(1)
    log.put("{\n")
    log.lines(1)
    found = tail(from_start=True, follow=False, on_error="raise")
    assert take(found, 1) == [1]
    with pytest.raises(BadRow, match=rf"{log.path}, line 2: .*on_error='skip'"):
        next(found)
    assert take(found, 1) == [2]


def test_where_nobody_counted_lines_the_byte_is_named(log: Log, tail: Tail) -> None:
    log.put("12345\n")
    found = tail(lambda: log.put("{\n"), on_error="raise")
    with pytest.raises(BadRow, match="byte 6: "):
        next(found)


@pytest.mark.parametrize("limit", [20, 5_000, 2 * CHUNK_BYTES])
def test_a_line_that_is_too_long_is_named_and_never_held(log: Log, tail: Tail, limit: int) -> None:
    def long_line(size: int) -> str:
        return json.dumps({"n": 0, "text": "x" * (size - 20)}) + "\n"

    log.put(long_line(limit) + long_line(limit + 1) + long_line(limit + 5 * CHUNK_BYTES))
    log.put('{"n": 1}\n')
    found = tail(from_start=True, follow=False, max_line_bytes=limit)
    held = []
    fill = found._follower._fill

    def filling() -> bool:
        changed = fill()
        held.append(len(found._follower._buffer))
        return changed

    found._follower._fill = filling  # type: ignore[method-assign]
    assert [item["n"] for item in found] == [0, 1]
    assert found.skipped == 2
    assert max(held) <= limit + CHUNK_BYTES
    with pytest.raises(BadRow, match=rf"has more than {limit} bytes \(max_line_bytes\)"):
        list(tail(from_start=True, follow=False, max_line_bytes=limit, on_error="raise"))


def test_a_line_that_is_too_long_is_told_from_the_partial_one_at_the_end(log: Log, tail: Tail) -> None:
    log.put("1\n" + "x" * 3 * CHUNK_BYTES)

    def end() -> None:
        log.put("\n")
        log.lines()

    found = tail(end, max_line_bytes=100)
    assert take(found, 1) == [1]
    assert found.skipped == 1


# --- rotation -----------------------------------------------------------------------------------------------------


def test_a_rotated_file_is_read_to_its_end_first(log: Log, tail: Tail) -> None:
    def rotate() -> None:
        log.lines(2)
        log.rotate()
        log.lines(2)

    log.put(b"")
    found = tail(rotate, log.lines)
    assert take(found, 5) == [1, 2, 3, 4, 5]


def test_a_writer_that_has_not_let_go_of_the_old_file_is_read(log: Log, tail: Tail) -> None:
    """logrotate makes the new file before it tells the writer."""
    log.lines()
    old = log.path.open("ab")

    def rotate() -> None:
        log.rotate()
        log.put(b"")

    def late() -> None:
        old.write(b'{"n": 10}\n')
        old.flush()

    def turn() -> None:
        old.write(b'{"n": 11}\n')
        old.close()
        log.put('{"n": 12}\n')

    found = tail(rotate, late, turn, from_start=True)
    assert take(found, 4) == [1, 10, 11, 12]


def test_the_last_line_of_a_rotated_file_counts_without_its_end(log: Log, tail: Tail) -> None:
    def rotate() -> None:
        log.put('{"n": 1}')
        log.rotate()
        log.put('{"n": 2}\n{"n": 3')

    log.put(b"")
    found = tail(rotate, log.rotate, lambda: log.put('{"n": 4}\n'))
    assert take(found, 3) == [1, 2, 4]
    assert found.skipped == 1


def test_a_file_that_was_rotated_twice_between_two_lines_is_not_missed(log: Log, tail: Tail) -> None:
    """It was seen, empty, when it took the path."""

    def away() -> None:
        log.rotate()
        log.put(b"")

    def twice() -> None:
        log.lines()
        log.rotate()
        log.lines()

    log.lines()
    assert take(tail(away, twice, from_start=True), 3) == [1, 2, 3]


@pytest.mark.parametrize("names", [("{}.2", "{}.1"), ("{}-20260101", "{}-20260102"), ("eve-2026-01-01.json", "eve-2026-01-02.json")])
def test_files_that_were_rotated_away_unseen_are_read_in_order(log: Log, tail: Tail, names: tuple[str, str]) -> None:
    def at(second: int, path: Path) -> None:
        os.utime(path, (second, second))

    def rotate_often() -> None:
        log.lines()
        at(10, log.path)
        log.path.rename(log.path.with_name("old"))
        for second, name in zip((20, 30), names, strict=True):
            log.lines()
            at(second, log.path)
            log.path.rename(log.path.with_name(name.format(log.path.name)))
        for name in (f"{log.path.name}.3", f"{log.path.name}.bak", f"{log.path.name}.4.gz", "eve-all.json"):
            other = log.path.with_name(name)
            other.write_text('{"n": 99}\n')
            at(5 if name.endswith("3") else 40, other)
        log.lines()

    log.put(b"")
    found = tail(rotate_often, log.lines)
    assert take(found, 5) == [1, 2, 3, 4, 5]


def test_a_deleted_file_is_waited_for(log: Log, tail: Tail) -> None:
    log.lines()
    assert take(tail(log.path.unlink, lambda: None, log.lines, from_start=True), 2) == [1, 2]


def test_a_directory_in_its_place_is_named_once_and_waited_for(log: Log, tail: Tail, caplog: pytest.LogCaptureFixture) -> None:
    def put_directory() -> None:
        log.rotate()
        log.path.mkdir()

    def take_away() -> None:
        log.path.rmdir()
        log.lines()

    log.lines()
    assert take(tail(put_directory, lambda: None, take_away, from_start=True), 2) == [1, 2]
    assert caplog.text.count("cannot be read yet") == 1


@pytest.mark.parametrize("many", [1, 40])
def test_a_truncated_file_is_read_from_its_start(log: Log, tail: Tail, many: int, caplog: pytest.LogCaptureFixture) -> None:
    """Also when it has grown beyond where it was read before anyone looked."""

    def truncate() -> None:
        log.truncate()
        log.lines(many)

    log.lines(5)
    log.put('{"n": ')
    assert take(tail(truncate, from_start=True), 5 + many) == list(range(1, 6 + many))
    assert "was truncated" in caplog.text


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_to_the_file_each_line_comes_once_and_in_order(log: Log, closing: Callable[[Source], Any], seed: int) -> None:
    pick = random.Random(seed)

    def happen() -> None:
        for _ in range(pick.randrange(3)):
            what = pick.random()
            if what < 0.6:
                log.lines(pick.randrange(1, 60))
            elif what < 0.8:
                line = log.next()
                log.put(line[:3])
                log.put(line[3:])
            else:
                break
        else:
            if log.path.exists() and pick.random() < 0.3:
                log.rotate()
                log.lines(1)

    log.put(b"")
    tail = closing(JsonLinesTail(log.path, timer=FakeTimer(*[happen] * 60, lambda: tail.close())))
    found = [item["n"] for item in tail]
    assert found == log.written and found


# --- time, ids ----------------------------------------------------------------------------------------------------


def test_the_time_is_a_field(log: Log, tail: Tail) -> None:
    log.put('{"ts": 1258531221.486539}\n{"ts": "2009-11-24T21:27:09.534255+0000"}\n{"n": 1}\n{"ts": "soon"}\n3\n')
    found = tail(from_start=True, follow=False, time="ts")
    assert [found.event_time(item) for item in found] == [1258531221486539000, 1259098029534255000]
    assert found.skipped == 3


def test_without_a_field_there_is_no_time(log: Log, tail: Tail) -> None:
    log.lines()
    found = tail(from_start=True)
    item = next(found)
    with pytest.raises(ConfigurationError, match="time='ts'"):
        found.event_time(item)


def ids(tail: JsonLinesTail) -> list[bytes]:
    return [tail.message_id(item) for item in tail]


def test_ids_are_those_of_the_lines(log: Log, tail: Tail) -> None:
    log.put('{"n": 1}\n' * 3)
    found = ids(tail(from_start=True, follow=False))
    assert len(set(found)) == 3
    log.rotate()
    log.put('{"n": 1}\n{"n": 2}\n')
    assert not set(found) & set(ids(tail(from_start=True, follow=False)))


def test_ids_are_the_same_by_whichever_name_the_file_goes(log: Log, tail: Tail, tmp_path: Path) -> None:
    log.lines(3)
    expected = ids(tail(from_start=True, follow=False))
    first = tail(from_start=True, position=tmp_path / "position")
    assert [first.message_id(next(first))] == expected[:1]
    first.commit()
    first.close()
    log.rotate()
    log.lines()
    second = tail(follow=False, position=tmp_path / "position")
    assert ids(second)[:2] == expected[1:]


# --- a new start --------------------------------------------------------------------------------------------------


def restarted(log: Log, position: Path, count: int | None = None) -> list[int]:
    """The next `count` items of a new start, or all that are there."""
    with JsonLinesTail(log.path, position=position, follow=count is not None, timer=FakeTimer()) as tail:
        found = [item["n"] for item in tail] if count is None else take(tail, count)
        tail.commit()
        return found


def test_a_new_start_goes_on_behind_what_was_committed(log: Log, tail: Tail, tmp_path: Path) -> None:
    position = tmp_path / "position"
    first = tail(log.lines, position=position)
    log.lines(3)
    assert take(first, 2) == [1, 2]
    first.commit()
    assert take(first, 2) == [3, 4]
    first.close()
    assert restarted(log, position, 1) == [3]
    log.lines()
    assert restarted(log, position) == [4, 5]
    assert restarted(log, position) == []


def test_a_log_that_was_written_anew_with_the_same_last_line_is_another_one(log: Log, tmp_path: Path) -> None:
    position = tmp_path / "position"
    log.put('{"n": 1}\n{"n": 2}\n{"n": 0}\n')
    with JsonLinesTail(log.path, from_start=True, position=position) as tail:
        take(tail, 3)
        tail.commit()
    with log.path.open("r+b") as file:
        file.write(b'{"n": 3}\n{"n": 4}\n{"n": 0}\n{"n": 5}\n')
    assert restarted(log, position) == [3, 4, 0, 5]


def test_a_wait_behind_what_is_not_committed_is_broken_off_after_a_second(log: Log, tail: Tail, tmp_path: Path) -> None:
    """What comes next may be long in coming, and a kill would send again what was forgotten by then."""
    log.lines(1)
    found = tail(*[lambda: None] * 15, log.lines, from_start=True, position=tmp_path / "position")
    assert take(found, 1) == [1]
    assert next(found) is None
    assert sum(found._timer.waits) == pytest.approx(1)
    found.commit()
    assert take(found, 1) == [2]
    assert sum(found._timer.waits) > 2


def test_what_is_written_while_nobody_reads_is_not_missed(log: Log, tail: Tail, tmp_path: Path) -> None:
    """Although it had begun at the end, and nothing had come."""
    position = tmp_path / "position"
    log.lines(2)
    first = tail(lambda: first.wake(), position=position)
    assert next(first) is None
    first.close()
    log.lines(2)
    assert restarted(log, position) == [3, 4]


@pytest.mark.parametrize("made", [True, False])
def test_a_file_that_was_rotated_meanwhile_is_read_to_its_end(log: Log, tmp_path: Path, made: bool) -> None:
    position = tmp_path / "position"
    log.lines(3)
    with JsonLinesTail(log.path, from_start=True, position=position) as tail:
        take(tail, 1)
        tail.commit()
    log.rotate()
    if made:
        log.lines(2)
    else:
        log.put(b"")
    assert restarted(log, position) == [2, 3, 4, 5][: 4 if made else 2]


def test_the_first_file_is_known_again_before_anything_was_committed(log: Log, tail: Tail, tmp_path: Path) -> None:
    position = tmp_path / "position"
    first = tail(lambda: log.lines(2), position=position)
    assert take(first, 1) == [1]
    first.close()
    log.rotate()
    log.lines()
    assert restarted(log, position) == [1, 2, 3]


def test_a_file_that_is_gone_is_named(log: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    position = tmp_path / "position"
    log.lines(3)
    with JsonLinesTail(log.path, from_start=True, position=position) as tail:
        take(tail, 1)
        tail.commit()
    keep = tmp_path / "keep"
    keep.mkdir()
    log.path.rename(keep / "old")  # so that its number is not given to the next one
    log.lines(1)
    assert restarted(log, position) == [4]
    assert "the file that was read before is gone, and what it had behind byte 9" in caplog.text


@pytest.mark.parametrize("many", [1, 10])
def test_a_file_that_was_truncated_meanwhile_is_read_from_its_start(log: Log, tmp_path: Path, many: int) -> None:
    position = tmp_path / "position"
    log.lines(3)
    assert restarted(log, position) == []
    with JsonLinesTail(log.path, follow=False, from_start=True) as tail:
        old = ids(tail)
    log.truncate()
    log.lines(many)
    with JsonLinesTail(log.path, position=position, follow=False) as tail:
        assert not set(old) & set(ids(tail))
        tail.commit()
    log.lines(1)
    assert restarted(log, position) == [log.count]


# --- waking, closing, what is refused -----------------------------------------------------------------------------


def test_waking_gives_none(log: Log, tail: Tail) -> None:
    found = tail(lambda: found.wake(), log.lines)
    assert next(found) is None
    assert take(found, 1) == [1]


def test_closing_ends_a_wait_in_another_thread(log: Log) -> None:
    tail = JsonLinesTail(log.path, poll_s=1000)
    ended = threading.Event()

    def wait() -> None:
        assert list(tail) == []
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    tail.close()
    thread.join(20)
    assert ended.is_set()


def test_a_disk_that_fails_names_the_file_and_loses_no_line(log: Log, tail: Tail, monkeypatch: pytest.MonkeyPatch) -> None:
    log.lines(2)
    found = tail(from_start=True)

    def broken(*_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        with pytest.raises(OSError, match=f"{os.strerror(errno.EIO)}: '{log.path}'"):
            next(found)
    assert take(found, 2) == [1, 2]


def test_an_interrupted_wait_loses_no_line(log: Log, tail: Tail) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        log.put('{"n": 1}\n{"n"')
        raise Interrupted

    found = tail(interrupt, lambda: log.put(": 2}\n"))
    with pytest.raises(Interrupted):
        next(found)
    assert take(found, 2) == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"poll_s": 0},
        {"poll_s": float("nan")},
        {"max_line_bytes": 0},
        {"max_line_bytes": 1.5},
        {"on_error": "ignore"},
        {"follow": 1},
        {"from_start": None},
        {"time": 3},
    ],
)
def test_what_cannot_work_is_named(log: Log, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"JsonLinesTail: {next(iter(options))}="):
        JsonLinesTail(log.path, **options)


def test_what_is_no_file_is_named(log: Log, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no file"):
        JsonLinesTail(log.path, follow=False)
    with pytest.raises(ConfigurationError, match="no regular file"):
        JsonLinesTail(tmp_path)
    os.mkfifo(log.path)
    with pytest.raises(ConfigurationError, match="no regular file"):
        JsonLinesTail(log.path)
