"""The lines of a JSON-lines file, as they are written."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal, TypeAlias

import msgspec
from xxhash import xxh3_64_intdigest

from edgeserve.core._pack import MAX_DEPTH
from edgeserve.core.errors import BadRow, ConfigurationError
from edgeserve.sources.file_source import FileSource, Step
from edgeserve.sources.follower import Follower, Line, Spot, end_of
from edgeserve.sources.position import check_of
from edgeserve.sources.timer import Timer
from edgeserve.sources.times import time_ns

_log = logging.getLogger("edgeserve")

OnError: TypeAlias = Literal["skip", "raise"]

_decode = msgspec.json.Decoder().decode
_BOM = b"\xef\xbb\xbf"
_DEEP = f"it nests deeper than {MAX_DEPTH} levels, so it cannot be sent"


class JsonLinesTail(FileSource):
    """Follows a JSON-lines file: yields the value of each line as it is written, as Zeek and Suricata (EVE) write their logs.

    A line counts when it is whole. A file that is not there yet is waited for. When the file is rotated (another one takes its path), the
    rest of the old one is read first, then the new one from its start; when it is truncated in place, it is read from its start again.

    Args:
        path: the file.
        time: the field that has the time, for `event_time`: seconds since the epoch or ISO 8601 (without a time zone UTC is meant). A line
            without it is a broken one. None: lines need no time.
        from_start: begins with the first line. False: with the first one that is not whole when the tail is made.
        follow: goes on for ever. False: ends at the end of the file; a last line that no newline ends counts if it is valid.
        poll_s: how often it looks while there is nothing new, seconds.
        max_line_bytes: a longer line is a broken one; no more of it is ever held.
        on_error: what becomes of a broken line. 'skip': it is left out and counted, and the log names the first one of each file. 'raise':
            it is a `BadRow`; the next call goes on behind it.
        position: a file that keeps the place behind the last line that a `DataSource` has sent, so that a new start goes on there, also in
            a file that was rotated meanwhile. Where there is one, `from_start` has no say.
        timer: what tells the time and waits; tests hand in another.

    Attributes:
        skipped: how many broken lines were left out.

    Raises:
        ConfigurationError: the path is that of no file, or with `follow=False` there is none.
        BadRow: by `next()`, with `on_error='raise'`.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        ...     _ = file.write('{"ts": 1.5, "note": "a"}\\n{"ts": 2.0, "no')
        ...     file.flush()
        ...     list(JsonLinesTail(file.name, from_start=True, follow=False))
        [{'ts': 1.5, 'note': 'a'}]
    """

    _kind = "JsonLinesTail"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        time: str | None = None,
        from_start: bool = False,
        follow: bool = True,
        poll_s: float = 0.2,
        max_line_bytes: int = 8 << 20,
        on_error: OnError = "skip",
        position: str | os.PathLike[str] | None = None,
        timer: Timer | None = None,
    ) -> None:
        _check(time=time, from_start=from_start, follow=follow, poll_s=poll_s, max_line_bytes=max_line_bytes, on_error=on_error)
        super().__init__(path, start=Spot(), position=position, timer=timer)
        if not follow and not os.path.exists(self._path):
            raise ConfigurationError(f"{self._kind}: there is no file {self.path!r}; with follow=True it is waited for")
        begin = end_of(self._kind, self._path, max_line_bytes)
        self._cursor.place = Spot(begin.inode) if from_start else begin
        self._time, self._follow, self._poll_s, self._on_error = time, follow, poll_s, on_error
        self._follower = Follower(self._kind, self._path, max_line_bytes, self._cursor)
        self._max, self._pinned = max_line_bytes, False
        self._named: tuple[int, int] | None = None
        self.skipped = self._told = 0

    def _open(self, saved: tuple[Spot, str] | None) -> None:
        self._follower.close()
        self._follower.resume(*(saved or self._saving(self._cursor.place)))
        self._pinned = self._cursor.place.inode != 0

    def _ready(self) -> Step | None:
        while True:
            line = self._follower.line()
            if not self._pinned and self._cursor.place.inode:
                # The first file that is there: a new start is to begin with this one, whatever it is called by then.
                self._pinned = True
                self.commit()
            if line is None and not self._follow:
                line = self._follower.rest()
                if line is None:
                    self._closed = True
                    raise StopIteration
            if line is None:
                if self._wait(self._poll_s):
                    return None
                continue
            step = self._step(line)
            if step is not None:
                return step
            self._cursor.place = line.after

    def _step(self, line: Line) -> Step | None:
        """The line as an item; None: it is to be left out."""
        if line.too_long:
            self._broken(line, f"it has more than {self._max} bytes (max_line_bytes)")
            return None
        if not line.data.strip():
            return None
        try:
            item = _decode(line.data.removeprefix(_BOM) if line.begin.offset == 0 else line.data)
            if line.data.count(b"[") + line.data.count(b"{") > MAX_DEPTH and isinstance(item, (dict, list)) and _too_deep(item):
                raise BadRow(_DEEP)
            event_ns = None if self._time is None else self._event_ns(item, self._time)
        except RecursionError:
            self._broken(line, _DEEP)
            return None
        except ValueError as exc:  # what is no JSON, or no UTF-8, and BadRow
            self._broken(line, str(exc))
            return None
        if item is None:
            self._broken(line, "it is null, which is no example")
            return None
        return Step(item, event_ns, line, line.after)

    @staticmethod
    def _event_ns(item: Any, name: str) -> int:
        if not isinstance(item, dict) or name not in item:
            raise BadRow(f"it has no field {name!r}, which has the time")
        return time_ns(item[name])

    def _broken(self, line: Line, why: str) -> None:
        begin = line.begin
        where = f"byte {begin.offset}" if begin.line is None else f"line {begin.line + 1}"
        if self._on_error == "raise":
            self._cursor.place = line.after
            raise BadRow(f"{self.path}, {where}: {why}. With on_error='skip' such lines are left out")
        self.skipped += 1
        if self._named != (file := (begin.inode, begin.generation)):
            self._named = file
            self._told += 1
            _log.warning("%s, %s: %s. It is left out; others like it in this file are only counted", self.path, where, why)

    def _id(self, line: Line) -> bytes:
        # Of what it says, too: a file that was truncated, or has got a deleted one's number, has other lines at its offsets.
        begin = line.begin
        return b"%d:%d:%d:%x" % (begin.inode, begin.generation, begin.offset, xxh3_64_intdigest(line.data))

    def _saving(self, place: Spot) -> tuple[Spot, str]:
        return msgspec.structs.replace(place, tail=b""), check_of(place.tail)

    def _release(self) -> None:
        self._follower.close()
        if self.skipped > self._told:
            self._told = self.skipped
            _log.warning("%s: %d broken lines were left out", self.path, self.skipped)


def _too_deep(item: Any) -> bool:
    """Whether it nests deeper than what can be sent."""
    level = [item]
    for _ in range(MAX_DEPTH + 1):
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each) if isinstance(part, (dict, list))]
    return bool(level)


def _check(**given: Any) -> None:
    for name, (fits, must_be) in _CHECKS.items():
        if not fits(given[name]):
            raise ConfigurationError(f"JsonLinesTail: {name}={given[name]!r}: it is {must_be}")


def _number(value: Any, kinds: tuple[type[int] | type[float], ...]) -> bool:
    return not isinstance(value, bool) and isinstance(value, kinds) and 0 < value < float("inf")


_CHECKS: dict[str, tuple[Any, str]] = {
    "time": (lambda value: value is None or isinstance(value, str), "the name of a field, or None"),
    "from_start": (lambda value: isinstance(value, bool), "True or False"),
    "follow": (lambda value: isinstance(value, bool), "True or False"),
    "poll_s": (lambda value: _number(value, (int, float)), "a number of seconds above 0"),
    "max_line_bytes": (lambda value: _number(value, (int,)), "a number of bytes, an int of at least 1"),
    "on_error": (lambda value: value in ("skip", "raise"), "'skip' or 'raise'"),
}

__all__ = ("JsonLinesTail", "OnError")
