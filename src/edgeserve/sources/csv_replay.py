"""Rows of a CSV file, at the pace at which they were recorded."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from edgeserve.core.errors import BadRow, ConfigurationError
from edgeserve.sources.file_source import Step, open_file
from edgeserve.sources.position import check_of, checked_tail, tail_after
from edgeserve.sources.replay import Place, Replay, index_of, indexes_of
from edgeserve.sources.timer import Timer
from edgeserve.sources.times import time_ns

LONGEST_LINE = 16 << 20
_BOM = b"\xef\xbb\xbf"


class _Layout(NamedTuple):
    """How many fields a row has, which one is its time, what they are called, which are wanted."""

    width: int
    time: int
    names: tuple[str, ...] | None
    wanted: tuple[int, ...] | None


class CsvReplay(Replay):
    """Replays a CSV file: yields its rows as far apart as their times are.

    A row is a dict of str by column name; without a header a list. Each row is due as long after the first as it was recorded after it,
    divided by `speed`; delays do not add up. Rows keep the file's order: one that is older than the one before it comes at once.
    A file of any size is read line by line. UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        time: the column that has the times, by name or index: seconds since the epoch, or since anything, as a decimal number; or
            ISO 8601, where UTC is meant without a time zone.
        speed: how many times faster than recorded. None: as fast as the rows are taken.
        header: whether the first row names the columns.
        columns: which columns a row has, by name or index. None: all.
        loop: begins again at the end, for ever. Times go on: the file's length is added to them with each turn.
        position: a file that keeps the place behind the last row that a `DataSource` has sent, so that a new start goes on there.
        timer: what tells the time and waits; tests hand in another.

    Raises:
        ConfigurationError: the file cannot be read, or has no such column.
        BadRow: the first row cannot be read; or by `next()`: a row cannot be read, and the next call goes on behind it.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write("t,celsius\\n0,20.5\\n0.001,20.7\\n")
        ...     file.flush()
        ...     list(CsvReplay(file.name, time="t"))
        [{'t': '0', 'celsius': '20.5'}, {'t': '0.001', 'celsius': '20.7'}]
    """

    _kind = "CsvReplay"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        time: str | int = 0,
        speed: float | None = 1.0,
        header: bool = True,
        columns: Sequence[str | int] | None = None,
        loop: bool = False,
        position: str | os.PathLike[str] | None = None,
        timer: Timer | None = None,
    ) -> None:
        super().__init__(path, speed=speed, loop=loop, position=position, timer=timer)
        if not isinstance(header, bool):
            raise ConfigurationError(f"{self._kind}: header={header!r}: it is True or False")
        self._time, self._header, self._columns = time, header, columns
        self._file: io.BufferedReader | None = None
        self._reader: Iterator[list[str]] | None = None
        self._lines: _Lines
        self._layout: _Layout | None
        with self._opened() as file:
            self._layout = self._read_layout(file)

    def _opened(self) -> io.BufferedReader:
        try:
            return io.BufferedReader(open_file(self._kind, self._path))
        except FileNotFoundError as exc:
            raise ConfigurationError(f"{self._kind}: there is no file {self.path!r}") from exc

    def _read_layout(self, file: BinaryIO) -> _Layout | None:
        """What the first row says; None: the file is empty."""
        first = _first(csv.reader(_Lines(file, self.path, Place()), strict=True), self.path)
        if first is None:
            return None
        names = tuple(first) if self._header else None
        time = index_of(self._kind, "time", self._time, len(first), names)
        if self._columns is not None:
            return _Layout(len(first), time, names, indexes_of(self._kind, self._columns, len(first), names))
        for name in names or ():
            index_of(self._kind, "columns", name, len(first), names)  # one name, one value of a dict
        return _Layout(len(first), time, names, None)

    def _open(self, saved: tuple[Place, str] | None) -> None:
        self._release()
        file = self._file = self._opened()
        self._layout = self._read_layout(file)
        if saved is not None:
            place, check = saved
            tail = checked_tail(file, place.offset, check)
            if tail is None:
                self._tell_other_file()
            else:
                self._cursor.place = msgspec.structs.replace(place, tail=tail)

    def _reader_at(self, file: BinaryIO, place: Place) -> Iterator[list[str]]:
        file.seek(place.offset)
        self._lines = _Lines(file, self.path, place)
        reader = csv.reader(self._lines, strict=True)
        if place.offset == 0 and self._header:
            _first(reader, self.path)
        return reader

    def _read(self, place: Place) -> Step | None:
        file, layout = self._file, self._layout
        if file is None or layout is None:
            return None
        reader = self._reader or self._reader_at(file, place)
        # Until it is done: a read that is interrupted begins again at `place`.
        self._reader = None
        lines = self._lines
        line = lines.line + 1
        try:
            while (fields := next(reader, None)) == []:  # an empty line
                line = lines.line + 1
        except csv.Error as exc:
            raise self._bad(f"line {line}", str(exc), lines.behind(place, None)) from exc
        if fields is None:
            return None
        if len(fields) != layout.width:
            self._reader = reader
            raise self._bad(f"line {line}", f"{len(fields)} fields, not the {layout.width} of the first row", lines.behind(place, None))
        try:
            ns = time_ns(fields[layout.time])
        except BadRow as exc:
            self._reader = reader
            name = layout.time if layout.names is None else layout.names[layout.time]
            raise self._bad(f"line {line}", f"column {name!r}: {exc}", lines.behind(place, None)) from exc
        step = Step(self._item(fields, layout), ns + place.shift_ns, (place.turn, place.row, fields), lines.behind(place, ns))
        self._reader = reader
        return step

    def _item(self, fields: list[str], layout: _Layout) -> Any:
        names, wanted = layout.names, layout.wanted
        if names is None:
            return fields[:] if wanted is None else [fields[i] for i in wanted]
        return dict(zip(names, fields, strict=True)) if wanted is None else {names[i]: fields[i] for i in wanted}

    def _id(self, mark: tuple[int, int, list[str]]) -> bytes:
        # Of what it says, too: another file under the same name is no repetition.
        turn, row, fields = mark
        return b"%d:%d:%x" % (turn, row, xxh3_64_intdigest("\x1f".join(fields).encode()))

    def _saving(self, place: Place) -> tuple[Place, str]:
        return msgspec.structs.replace(place, tail=b""), check_of(place.tail)

    def _release(self) -> None:
        file, self._file, self._reader = self._file, None, None
        if file is not None:
            file.close()


class _Lines:
    """A file's lines for `csv.reader`, with the place behind the last one that it took."""

    __slots__ = ("_file", "_path", "_tail", "line", "offset")

    def __init__(self, file: BinaryIO, path: str, place: Place) -> None:
        self._file, self._path = file, path
        self.offset, self.line, self._tail = place.offset, place.line, place.tail

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(LONGEST_LINE)
        if not raw:
            raise StopIteration
        begin, self.offset, self.line = self.offset, self.offset + len(raw), self.line + 1
        self._tail = tail_after(self._tail, raw)
        if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
            while begin and raw and not raw.endswith(b"\n"):  # what is left of it is no row; without a first row there are none
                raw = self._file.readline(LONGEST_LINE)
                self.offset, self._tail = self.offset + len(raw), tail_after(self._tail, raw)
            raise csv.Error(f"a line of more than {LONGEST_LINE} bytes: this is no CSV file")
        try:
            return raw.removeprefix(_BOM).decode() if begin == 0 else raw.decode()
        except UnicodeDecodeError as exc:
            raise csv.Error(f"it is not UTF-8 ({exc.reason}); convert the file, for example: iconv -f LATIN1 -t UTF-8") from exc

    def behind(self, place: Place, time_ns: int | None) -> Place:
        """The place behind the row that begins at `place` and was taken last."""
        return place.behind(time_ns, self.offset, self.line, self._tail)


def _first(reader: Iterator[list[str]], path: str) -> list[str] | None:
    """The first row that is not empty."""
    try:
        return next(filter(None, reader), None)
    except csv.Error as exc:
        raise BadRow(f"{path}, its first row: {exc}") from exc


__all__ = ("CsvReplay",)
