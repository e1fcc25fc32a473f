"""Rows of a Parquet file, at the pace at which they were recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from xxhash import xxh3_128_hexdigest

from edgeserve.core.errors import BadRow, ConfigurationError, MissingExtra
from edgeserve.sources.file_source import Step, open_file
from edgeserve.sources.replay import Place, Replay, index_of, indexes_of
from edgeserve.sources.timer import Timer
from edgeserve.sources.times import SECOND, in_range, time_ns

_UNITS = {"s": SECOND, "ms": 1_000_000, "us": 1_000, "ns": 1}
_DAY = 86_400 * SECOND


class ParquetReplay(Replay):
    """Replays a Parquet file: yields its rows as far apart as their times are. Needs pyarrow, the extra `arrow`.

    A row is a dict of Python values by column name. Pace, order and `loop` are those of `CsvReplay`. The file is read row group by row
    group, `batch_rows` rows at a time. Of times in nanoseconds a row has the microseconds, as Python's datetime; its event time is exact.

    Args:
        path: the file.
        time: the column that has the times, by name or index: timestamps of any unit, with a time zone or without one (then UTC is meant),
            dates, numbers (seconds), or text as in `CsvReplay`.
        speed: how many times faster than recorded. None: as fast as the rows are taken.
        columns: which columns a row has, by name or index. None: all.
        batch_rows: how many rows are read at a time.
        loop: begins again at the end, for ever. Times go on: the file's length is added to them with each turn.
        position: a file that keeps the place behind the last row that a `DataSource` has sent, so that a new start goes on there.
        timer: what tells the time and waits; tests hand in another.

    Raises:
        MissingExtra: pyarrow is not installed.
        ConfigurationError: the file cannot be read, or has no such column.
        BadRow: by `next()`: a row has no time, and the next call goes on behind it; or a part of the file cannot be read, and the next call
            goes on with the next row group.
    """

    _kind = "ParquetReplay"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        time: str | int,
        speed: float | None = 1.0,
        columns: Sequence[str | int] | None = None,
        batch_rows: int = 4096,
        loop: bool = False,
        position: str | os.PathLike[str] | None = None,
        timer: Timer | None = None,
    ) -> None:
        super().__init__(path, speed=speed, loop=loop, position=position, timer=timer)
        if not isinstance(batch_rows, int) or isinstance(batch_rows, bool) or batch_rows < 1:
            raise ConfigurationError(f"{self._kind}: batch_rows={batch_rows!r}: it is a number of rows, an int of at least 1")
        self._time, self._columns, self._batch_rows = time, columns, batch_rows
        self._parquet: Any = None
        self._rows: Iterator[tuple[Any, Any]] | None = None
        try:
            self._open(None)
        finally:
            self._release()

    def _open(self, saved: tuple[Place, str] | None) -> None:
        self._release()
        pa, parquet = _pyarrow()
        try:
            with open_file(self._kind, self._path) as file:
                self._parquet = parquet.ParquetFile(self._path)
                self._digest = _footer_digest(file)
        except FileNotFoundError as exc:
            raise ConfigurationError(f"{self._kind}: there is no file {self.path!r}") from exc
        except (pa.ArrowException, OSError) as exc:
            raise ConfigurationError(f"{self._kind}: {self.path!r} cannot be read as a Parquet file: {exc}") from exc
        self._choose(pa, self._parquet.schema_arrow)
        if saved is not None:
            self._take_up(saved, self._digest)

    def _choose(self, pa: Any, schema: Any) -> None:
        names = tuple(schema.names)
        time = index_of(self._kind, "time", self._time, len(names), names)
        wanted = tuple(range(len(names))) if self._columns is None else indexes_of(self._kind, self._columns, len(names), names)
        for index in (*wanted, time):
            index_of(self._kind, "columns", names[index], len(names), names)  # one name, one value of a dict
        self._time_name, self._names = names[time], [names[index] for index in wanted]
        self._to_ns, self._as = _times(pa, self._kind, schema.field(time))
        self._plain = {name: plain for name in self._names if (plain := _in_microseconds(pa, schema.field(name).type)) is not None}

    def _rows_from(self, start: int) -> Iterator[tuple[Any, Any]]:
        """The rows behind the first `start`, each with its time as the file has it."""
        file, metadata, before = self._parquet, self._parquet.metadata, 0
        names = list(dict.fromkeys((*self._names, self._time_name)))
        for group in range(metadata.num_row_groups):
            behind = before + metadata.row_group(group).num_rows
            if start < behind:
                for batch in file.iter_batches(self._batch_rows, row_groups=[group], columns=names, use_threads=False):
                    skip = min(max(start - before, 0), batch.num_rows)
                    before += batch.num_rows
                    if skip < batch.num_rows:
                        yield from self._rows_of(batch.slice(skip))
            before = behind

    def _rows_of(self, batch: Any) -> Iterator[tuple[Any, Any]]:
        times = batch.column(self._time_name)
        if self._as is not None:
            times = times.cast(self._as)
        rows = batch.select(self._names)
        for name, plain in self._plain.items():
            index = rows.schema.get_field_index(name)
            rows = rows.set_column(index, name, rows.column(index).cast(plain, safe=False))
        try:
            return iter(list(zip(rows.to_pylist(), times.to_pylist(), strict=True)))
        except (ValueError, OverflowError):  # one of the values is none of Python's: the other rows are read all the same
            return (_one(rows, times, index) for index in range(batch.num_rows))

    def _read(self, place: Place) -> Step | None:
        if self._parquet is None:
            return None
        rows = self._rows or self._rows_from(place.row)
        # Until it is done: a read that is interrupted begins again at `place`.
        self._rows = None
        where = f"row {place.row + 1}"
        try:
            found = next(rows, None)
        except (OSError, ValueError, NotImplementedError) as exc:  # pyarrow's own errors are these, too
            why = f"what follows in its row group cannot be read: {exc}"
            raise self._bad(where, why, msgspec.structs.replace(place, row=self._group_end(place.row))) from exc
        if found is None:
            return None
        item, given = found
        if isinstance(item, _Unreadable):
            self._rows = rows
            raise self._bad(where, f"it has a value that Python has no type for: {item.error}", place.behind(None)) from item.error
        if given is None:
            self._rows = rows
            raise self._bad(where, f"column {self._time_name!r} is null, so the row has no time", place.behind(None))
        try:
            ns = self._to_ns(given)
        except BadRow as exc:
            self._rows = rows
            raise self._bad(where, f"column {self._time_name!r}: {exc}", place.behind(None)) from exc
        step = Step(item, ns + place.shift_ns, (place.turn, place.row, ns), place.behind(ns))
        self._rows = rows
        return step

    def _group_end(self, row: int) -> int:
        """How many rows there are up to the end of the row group in which `row` is."""
        metadata, end, group = self._parquet.metadata, 0, 0
        while end <= row:
            end += metadata.row_group(group).num_rows
            group += 1
        return end

    def _id(self, mark: tuple[int, int, int]) -> bytes:
        turn, row, ns = mark
        return b"%b:%d:%d:%d" % (self._digest.encode(), turn, row, ns)

    def _saving(self, place: Place) -> tuple[Place, str]:
        return place, self._digest

    def _release(self) -> None:
        file, self._parquet, self._rows = self._parquet, None, None
        if file is not None:
            file.close()


class _Unreadable(NamedTuple):
    """In place of a row."""

    error: Exception


def _one(rows: Any, times: Any, index: int) -> tuple[Any, Any]:
    """A row and its time."""
    try:
        return rows.slice(index, 1).to_pylist()[0], times[index].as_py()
    except (ValueError, OverflowError) as exc:
        return _Unreadable(exc), None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtra("ParquetReplay needs pyarrow: pip install 'edgeserve-streams[arrow]'") from exc
    return pyarrow, parquet


def _footer_digest(file: Any) -> str:
    """What tells the file from others: its footer says where each column's data lies, how large it is, and what its bounds are."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 8, 0))
    size = int.from_bytes(file.read(4), "little")
    file.seek(max(end - 8 - size, 0))
    return xxh3_128_hexdigest(file.read(size))


def _times(pa: Any, kind: str, field: Any) -> tuple[Callable[[Any], int], Any]:
    """What makes nanoseconds of the values of a time column, and as what type they are read (None: as they are)."""
    of, types = field.type, pa.types
    if types.is_timestamp(of):
        return _scaled(_UNITS[of.unit]), pa.int64()
    if types.is_date32(of):
        return _scaled(_DAY), pa.int32()
    if types.is_date64(of):
        return _scaled(1_000_000), pa.int64()
    held = of.value_type if types.is_dictionary(of) else of
    if any(fits(held) for fits in (types.is_integer, types.is_floating, types.is_decimal, types.is_string, types.is_large_string)):
        return time_ns, None
    raise ConfigurationError(f"{kind}: time={field.name!r} is a column of {of}: timestamps, dates, numbers (seconds) and text are times")


def _scaled(factor: int) -> Callable[[int], int]:
    def scaled(count: int) -> int:
        return in_range(count * factor, count)

    return scaled


def _in_microseconds(pa: Any, of: Any) -> Any:
    """The type to read a column as, where Python has nothing for its nanoseconds."""
    if pa.types.is_timestamp(of) and of.unit == "ns":
        return pa.timestamp("us", of.tz)
    if pa.types.is_duration(of) and of.unit == "ns":
        return pa.duration("us")
    return pa.time64("us") if of == pa.time64("ns") else None


__all__ = ("ParquetReplay",)
