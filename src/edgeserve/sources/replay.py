"""Rows of a file at the pace at which they were recorded, whatever the file's format."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from edgeserve.core.errors import BadRow, ConfigurationError
from edgeserve.sources.file_source import FileSource, Step
from edgeserve.sources.timer import Pace, Timer
from edgeserve.sources.times import SECOND

_log = logging.getLogger("edgeserve")


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """A place between two rows.

    Attributes:
        row: how many rows are before it, in this turn.
        offset: where in the file; 0: at its start. With `line`, how many lines are before it, for formats that have lines.
        turn: how often the file was replayed before (`loop=True`).
        first_ns: the time of the turn's first row; `newest_ns`: the newest time in it so far.
        shift_ns: how much is added to the times of this turn.
        tail: the last bytes before it.
    """

    row: int = 0
    offset: int = 0
    line: int = 0
    turn: int = 0
    first_ns: int | None = None
    newest_ns: int = 0
    shift_ns: int = 0
    tail: bytes = b""

    def behind(self, time_ns: int | None, offset: int = 0, line: int = 0, tail: bytes = b"") -> Place:
        """The place behind the next row. `time_ns`: its time; None: it has none that could be read."""
        first, newest = self.first_ns, self.newest_ns
        if time_ns is not None:
            newest = time_ns if first is None or time_ns > newest else newest
            first = time_ns if first is None else first
        return Place(self.row + 1, offset, line, self.turn, first, newest, self.shift_ns, tail)

    def again(self) -> Place:
        """The start of the next turn, whose first row follows the last one of this turn after a gap like those between its rows."""
        span = 0 if self.first_ns is None else self.newest_ns - self.first_ns
        period = span + span // (self.row - 1) if self.row > 1 else 0
        return Place(turn=self.turn + 1, shift_ns=self.shift_ns + (period or SECOND))


class Replay(FileSource):
    """Rows at their own pace: each is due as long after the first as it was recorded after it, divided by `speed`.

    Delays do not add up: a row that is late is handed out at once. So is one that is older than the one before it: order is the file's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        speed: float | None,
        loop: bool,
        position: str | os.PathLike[str] | None,
        timer: Timer | None,
    ) -> None:
        super().__init__(path, start=Place(), position=position, timer=timer)
        if not isinstance(loop, bool):
            raise ConfigurationError(f"{self._kind}: loop={loop!r}: it is True or False")
        self._pace = Pace(self._kind, speed)
        self._loop = loop

    def _ready(self) -> Step | None:
        if self._held is None:
            self._held = self._next_row()
        held = self._held
        assert held.event_ns is not None
        while (seconds := self._pace.seconds_until(held.event_ns, self._timer.monotonic_ns())) > 0:
            if self._wait(seconds):
                return None
        return held

    def _next_row(self) -> Step:
        while True:
            place: Place = self._cursor.place
            step = self._read(place)
            if step is not None:
                return step
            # Without a single row that has a time there would be no end of turns without any.
            if not self._loop or place.first_ns is None:
                self._closed = True
                raise StopIteration
            self._cursor.place = self._cursor.place.again()

    def _take_up(self, saved: tuple[Place, str], digest: str) -> bool:
        """Goes on at a saved place if the file is the one that it is of; tells if it is another."""
        place, of = saved
        if of == digest:
            self._cursor.place = place
        else:
            self._tell_other_file()
        return of == digest

    def _tell_other_file(self) -> None:
        _log.warning("%s of %s: not the file that was read before: it is replayed from its start", self._kind, self.path)

    def _bad(self, where: str, why: str, after: Place) -> BadRow:
        """The error of a row; the next call goes on behind it."""
        self._cursor.place = after
        return BadRow(f"{self.path}, {where}: {why}. Mend the row, or take it out")

    @abstractmethod
    def _read(self, place: Place) -> Step | None:
        """The row behind `place`; None: there is none."""


def index_of(kind: str, keyword: str, given: Any, width: int, names: Sequence[str] | None) -> int:
    """The index of a column that was given by name or index.

    Raises:
        ConfigurationError: there is no such column.
    """
    if isinstance(given, int) and not isinstance(given, bool):
        if 0 <= given < width:
            return given
        raise ConfigurationError(f"{kind}: {keyword}={given}: the file has the columns 0 to {width - 1}")
    if not isinstance(given, str):
        raise ConfigurationError(f"{kind}: {keyword}={given!r}: a column is given by its name, a str, or its index, an int")
    if names is None:
        raise ConfigurationError(f"{kind}: {keyword}={given!r}: with header=False columns have no names: give the index, 0 to {width - 1}")
    if names.count(given) != 1:
        how = "more than once" if given in names else "not"
        raise ConfigurationError(f"{kind}: {keyword}={given!r} is {how} among the file's columns: {', '.join(map(repr, names))}")
    return names.index(given)


def indexes_of(kind: str, given: Any, width: int, names: Sequence[str] | None) -> tuple[int, ...]:
    """The indexes of the columns that were asked for.

    Raises:
        ConfigurationError: one of them is not there, or no rows can be made of them.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or not given:
        raise ConfigurationError(f"{kind}: columns={given!r}: it is a list of columns, or None for all")
    return tuple(index_of(kind, "columns", each, width, names) for each in given)


__all__ = ("Place", "Replay", "index_of", "indexes_of")
