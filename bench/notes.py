"""What processes of a bench leave behind for its judge: files of JSON lines, appended to by plain functions."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache(64)
def _opened(path: Path, _pid: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(path: Path, value: object) -> None:
    """Appends a line; a line is whole or not there."""
    os.write(_opened(path, os.getpid()), (json.dumps(value) + "\n").encode())


def lines(path: Path) -> list[Any]:
    """What was noted."""
    return Follower(path).new()


def last(path: Path) -> list[Any]:
    """The last thing that was noted, if there is any, without reading all."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        whole = file.read().rpartition(b"\n")[0]  # what is just being written may be there in part
        return [json.loads(line) for line in whole.splitlines()[-1:]]


class Follower:
    """Reads a file of notes while it grows; the file need not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def new(self) -> list[Any]:
        """What was noted since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                read = file.read()
        except FileNotFoundError:
            return []
        read = read[: read.rfind(b"\n") + 1]
        self._at += len(read)
        return [json.loads(line) for line in read.splitlines()]


__all__ = ("Follower", "last", "lines", "note")
