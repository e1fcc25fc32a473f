"""Lines of a file that grows, while others rotate it, truncate it, or have not made it yet."""

from __future__ import annotations

import io
import logging
import os
import re
from typing import NamedTuple

import msgspec

from edgeserve.core.errors import ConfigurationError
from edgeserve.sources.file_source import Cursor, open_file
from edgeserve.sources.position import TAIL_BYTES, checked_tail, tail_after, tail_of

_log = logging.getLogger("edgeserve")

CHUNK_BYTES = 256 * 1024


class Spot(msgspec.Struct, frozen=True, omit_defaults=True):
    """A place between two lines.

    Attributes:
        inode: of the file; 0: the first file that is there.
        generation: how often this file was truncated in place.
        offset: where in the file.
        line: how many lines are before it; None: nobody has counted them.
        tail: the last bytes before it.
    """

    inode: int = 0
    generation: int = 0
    offset: int = 0
    line: int | None = 0
    tail: bytes = b""


class Line(NamedTuple):
    """A line, with its end; empty where it is too long. `begin` and `after` are the places before and behind it."""

    data: bytes
    begin: Spot
    after: Spot
    too_long: bool


class Follower:
    """Reads lines behind a cursor, which others move. What is read and not yet behind the cursor is read again after an interruption.

    Args:
        kind: whose errors and warnings these are.
        path: the file.
        max_line_bytes: of what is longer only this much is ever held.
        cursor: where it is, a `Spot`.
    """

    def __init__(self, kind: str, path: str, max_line_bytes: int, cursor: Cursor) -> None:
        self._kind, self._path, self._max, self._cursor = kind, path, max_line_bytes, cursor
        self._file: io.FileIO | None = None
        # Files that have taken the path since, oldest first.
        self._later: tuple[io.FileIO, ...] = ()
        # What was read of the file from `_base` on. What lies between the cursor and that is the beginning of a line that is too long.
        self._buffer, self._base = b"", 0
        # The last bytes before the end of the buffer: they are there still if the file was not truncated.
        self._seen = b""
        self._refused = ""
        self._rotated = _names_of_rotated(os.path.basename(path))

    # --- where to begin -----------------------------------------------------------------------------------------

    def resume(self, spot: Spot, check: str) -> None:
        """Goes on at a place that was saved, whatever the file is called by now."""
        if not spot.inode:
            return
        file = self._find(spot.inode)
        if file is None:
            lost = f"and what it had behind byte {spot.offset}"
            _log.warning("%s of %s: the file that was read before is gone, %s", self._kind, self._path, lost)
            self._cursor.place = Spot()
            return
        tail = checked_tail(file, spot.offset, check)
        if tail is None:
            self._truncated()
            self._take(file, Spot(spot.inode, spot.generation + 1))
        else:
            self._take(file, msgspec.structs.replace(spot, tail=tail))

    def _find(self, inode: int) -> io.FileIO | None:
        """The file of that number: the one at the path, or one beside it, where rotating has moved it."""
        folder = os.path.dirname(os.path.realpath(self._path))
        try:
            paths = [self._path, *(entry.path for entry in os.scandir(folder) if entry.inode() == inode)]
        except OSError:
            return None
        for path in paths:
            try:
                file = open_file(self._kind, path)
            except (OSError, ConfigurationError):
                continue
            if os.fstat(file.fileno()).st_ino == inode:
                return file
            file.close()
        return None

    def _take(self, file: io.FileIO, spot: Spot) -> None:
        self._file, self._cursor.place, self._seen, self._buffer, self._base = file, spot, spot.tail, b"", spot.offset

    # --- lines --------------------------------------------------------------------------------------------------

    def line(self) -> Line | None:
        """The line behind the cursor; None: there is no whole one yet."""
        while True:
            if self._file is None and not self._open():
                return None
            if (line := self._buffered()) is not None:
                return line
            if self._fill():
                continue
            if not self._replaced():
                return None
            if self._fill():  # written before the first byte of the file that has taken its place
                continue
            if (line := self.rest()) is not None:
                return line
            self._switch()

    def rest(self) -> Line | None:
        """What is behind the cursor although no line ends there: the last line of a file that nobody writes to any more."""
        place: Spot = self._cursor.place
        if self._file is None or self._base + len(self._buffer) <= place.offset:
            return None
        return self._cut(place, max(place.offset - self._base, 0), len(self._buffer))

    def _buffered(self) -> Line | None:
        place: Spot = self._cursor.place
        begin = max(place.offset - self._base, 0)
        end = self._buffer.find(b"\n", begin)
        return None if end < 0 else self._cut(place, begin, end + 1)

    def _cut(self, place: Spot, begin: int, end: int) -> Line:
        data = self._buffer[begin:end]
        line = None if place.line is None else place.line + 1
        skipped = self._base > place.offset
        after = Spot(place.inode, place.generation, self._base + end, line, tail_after(b"" if skipped else place.tail, data))
        too_long = skipped or len(data) > self._max + 1  # with its end
        return Line(b"" if too_long else data, place, after, too_long)

    def _fill(self) -> bool:
        """Reads on, called when the buffer has no whole line; returns whether anything has changed."""
        file, place, seen = self._file, self._cursor.place, self._seen
        assert file is not None
        end = self._base + len(self._buffer)
        data = os.pread(file.fileno(), len(seen) + CHUNK_BYTES, end - len(seen))
        if data[: len(seen)] != seen:
            self._truncated()
            self._take(file, Spot(place.inode, place.generation + 1))
            return True
        fresh = data[len(seen) :]
        if not fresh:
            return False
        kept = self._buffer[max(place.offset - self._base, 0) :]
        if len(kept) > self._max:
            kept = b""
        buffer, base, tail = kept + fresh, end - len(kept), (seen + fresh)[-TAIL_BYTES:]
        self._buffer, self._base, self._seen = buffer, base, tail
        return True

    def _truncated(self) -> None:
        _log.warning("%s of %s: the file was truncated or written anew, and is read from its start", self._kind, self._path)

    # --- files --------------------------------------------------------------------------------------------------

    def _open(self) -> bool:
        """Opens the file at the path, if there is one."""
        try:
            file = open_file(self._kind, self._path)
        except FileNotFoundError:
            return False
        self._take(file, Spot(os.fstat(file.fileno()).st_ino))
        return True

    def _replaced(self) -> bool:
        """Whether another file has taken the path, and was written to: who wrote to this one has left it then."""
        newest = self._later[-1] if self._later else self._file
        assert newest is not None
        try:
            if not os.path.samestat(os.stat(self._path), os.fstat(newest.fileno())):
                file = open_file(self._kind, self._path)
                if os.path.samestat(os.fstat(file.fileno()), os.fstat(newest.fileno())):  # it was put back meanwhile
                    file.close()
                else:
                    self._later = (*self._later, *self._between(newest, file), file)
        except FileNotFoundError:
            pass
        except (OSError, ConfigurationError) as exc:
            if str(exc) != self._refused:
                self._refused = str(exc)
                _log.warning("%s of %s: the file that has taken its place cannot be read yet: %s", self._kind, self._path, exc)
        return len(self._later) > 1 or any(os.fstat(file.fileno()).st_size for file in self._later)

    def _between(self, older: io.FileIO, newer: io.FileIO) -> list[io.FileIO]:
        """Files that had the path between two others, and were moved away before anyone looked: they bear its name with a number or a date,
        and were written to after the older one."""
        known = {os.fstat(file.fileno()).st_ino for file in (self._file, *self._later, newer) if file is not None}
        since_ns = os.fstat(older.fileno()).st_mtime_ns
        found: list[tuple[int, io.FileIO]] = []
        with os.scandir(os.path.dirname(os.path.realpath(self._path))) as entries:
            paths = [entry.path for entry in entries if self._rotated.fullmatch(entry.name) and entry.inode() not in known]
        for path in paths:
            try:
                file = open_file(self._kind, path)
            except (OSError, ConfigurationError):
                continue
            written_ns = os.fstat(file.fileno()).st_mtime_ns
            if written_ns > since_ns:
                found.append((written_ns, file))
            else:
                file.close()
        return [file for _, file in sorted(found, key=lambda each: each[0])]

    def _switch(self) -> None:
        old, later = self._file, self._later
        spot = Spot(os.fstat(later[0].fileno()).st_ino)
        self._file, self._later, self._cursor.place, self._seen, self._buffer, self._base = later[0], later[1:], spot, b"", b"", 0
        assert old is not None
        old.close()

    def close(self) -> None:
        """Idempotent."""
        files, self._file, self._later = (self._file, *self._later), None, ()
        for file in files:
            if file is not None:
                file.close()


def _names_of_rotated(name: str) -> re.Pattern[str]:
    """What a rotation may have called a file: eve.json.1, eve.json-20260102, eve-2026.01.02.json; compressed ones are no lines."""
    stem, suffix = os.path.splitext(name)
    return re.compile(rf"(?!.*\.(?:gz|bz2|xz|zst|lz4|zip)$)(?:{re.escape(name)}[-._].*\d.*|{re.escape(stem)}[-._]\d.*{re.escape(suffix)})")


def end_of(kind: str, path: str, max_line_bytes: int) -> Spot:
    """The place where the file's last line that is not whole yet begins, or its end; the start of a file that is not there yet."""
    try:
        file = open_file(kind, path)
    except FileNotFoundError:
        return Spot()
    with file:
        status = os.fstat(file.fileno())
        offset, looked = status.st_size, 0
        while offset and looked <= max_line_bytes:
            chunk = tail_of(file, offset, min(CHUNK_BYTES, offset))
            if (found := chunk.rfind(b"\n")) >= 0:
                offset -= len(chunk) - found - 1
                break
            offset, looked = offset - len(chunk), looked + len(chunk)
        return Spot(status.st_ino, 0, offset, None if offset else 0, tail_of(file, offset))


__all__ = ("CHUNK_BYTES", "Follower", "Line", "Spot", "end_of")
