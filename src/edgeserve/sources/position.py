"""Where a source goes on after a restart: a small file of its own."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
from xxhash import xxh3_64_hexdigest

from edgeserve.core.errors import ConfigurationError

_log = logging.getLogger("edgeserve")
_T = TypeVar("_T")

VERSION = 1

TAIL_BYTES = 256
"""So much before a place in a file tells whether it is still the same file."""


class _Versioned(msgspec.Struct):
    version: int = msgspec.field(name="edgeserve_position")


class _Saved(_Versioned):
    source: str
    path: str
    place: msgspec.Raw
    check: str


class PositionFile:
    """The position of one source, written as a whole or not at all.

    Args:
        file: the file's path; its directory must be there.
        source: what the position is of, by name.
        path: the file that the source reads.

    Raises:
        ConfigurationError: there is no such directory, or what is there is no position of this source.
    """

    def __init__(self, file: str | os.PathLike[str], source: str, path: str) -> None:
        self._file = Path(os.path.abspath(file))
        self._source, self._path = source, os.fsencode(path).decode(errors="backslashreplace")
        self._failed = False
        if not self._file.parent.is_dir():
            raise ConfigurationError(f"{source}: position={str(file)!r}: {self._file.parent} is not a directory: create it first")

    def load(self, kind: type[_T]) -> tuple[_T, str] | None:
        """The place and what is to be found there; None: nothing was saved."""
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ConfigurationError(f"the position of {self._source} cannot be read: {exc}") from exc
        try:
            version = msgspec.json.decode(data, type=_Versioned).version
            if version != VERSION:
                raise self._refused(f"has version {version}, and this edgeserve reads version {VERSION}")
            saved = msgspec.json.decode(data, type=_Saved)
            place = msgspec.json.decode(saved.place, type=kind)
        except msgspec.MsgspecError as exc:
            raise self._refused(f"is damaged, or no position at all ({exc})") from exc
        if (saved.source, saved.path) != (self._source, self._path):
            raise self._refused(f"is that of {saved.source} of {saved.path!r}, not of {self._source} of {self._path!r}")
        return place, saved.check

    def save(self, place: Any, check: str) -> None:
        """Replaces what was saved. Where that fails the log says so, and what was saved stays."""
        data = msgspec.json.encode(_Saved(VERSION, self._source, self._path, msgspec.Raw(msgspec.json.encode(place)), check))
        fresh = self._file.with_name(self._file.name + ".new")
        try:
            fresh.write_bytes(data)
            fresh.replace(self._file)
            self._failed = False
        except OSError as exc:
            if not self._failed:
                self._failed = True
                _log.warning("%s cannot save its position, a new start goes on at an older one: %s", self._source, exc)

    def _refused(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"the position file {self._file} {why}: name another one, or remove it to begin anew")


def tail_of(file: BinaryIO, offset: int, length: int = TAIL_BYTES) -> bytes:
    """The last `length` bytes before `offset`, or as many as there are."""
    begin = max(offset - length, 0)
    file.seek(begin)
    data = b""
    while len(data) < offset - begin and (more := file.read(offset - begin - len(data))):
        data += more
    return data


def tail_after(tail: bytes, data: bytes) -> bytes:
    """The last `TAIL_BYTES` before the end of `data`, which follows `tail`."""
    return data[-TAIL_BYTES:] if len(data) >= TAIL_BYTES else (tail + data)[-TAIL_BYTES:]


def check_of(tail: bytes) -> str:
    """What a position says of the bytes before it."""
    return f"{len(tail)}:{xxh3_64_hexdigest(tail)}"


def checked_tail(file: BinaryIO, offset: int, check: str) -> bytes | None:
    """The bytes before `offset` if they are those that `check` was made of, else None."""
    length = check.partition(":")[0]
    tail = tail_of(file, offset, int(length) if length.isdecimal() else 0)
    return tail if check_of(tail) == check else None


__all__ = ("TAIL_BYTES", "VERSION", "PositionFile", "check_of", "checked_tail", "tail_after", "tail_of")
