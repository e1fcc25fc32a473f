"""The optional log of every step, one JSON object per line: what `log_path` and `log_filename` ask for."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from edgeserve.core.errors import ConfigurationError

_FLUSH_EVERY_S = 1.0


class StepLog:
    """Appends lines to `<log_path>/<log_filename>.<kind>`; ids are hexadecimal, times are ns since the epoch."""

    def __init__(self, path: str | os.PathLike[str], filename: str, kind: str) -> None:
        self._directory, self._name = Path(path), f"{filename}.{kind}"
        self._file: BinaryIO | None = None
        self._encode = msgspec.json.Encoder().encode
        self._lock = threading.Lock()
        self._flushed = time.monotonic()

    def open(self) -> None:
        """Opens the file: nodes do so when they connect, not when they are made."""
        if not self._directory.is_dir():
            raise ConfigurationError(f"log_path={str(self._directory)!r} is not a directory: create it first")
        self._file = (self._directory / self._name).open("ab")

    def write(self, **line: Any) -> None:
        """One line."""
        with self._lock:
            if self._file is None:
                return
            self._file.write(self._encode(line) + b"\n")
            now = time.monotonic()
            if now - self._flushed >= _FLUSH_EVERY_S:
                self._flushed = now
                self._file.flush()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def step_log(path: str | os.PathLike[str] | None, filename: str | None, fallback: str, kind: str) -> StepLog | None:
    """The log, or None when none is asked for.

    Raises:
        ConfigurationError: `log_path` or `log_filename` is of a type that names no file.
    """
    if path is not None and not (isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str)):
        raise ConfigurationError(f"log_path={path!r}: it is the path of a directory, a str or os.PathLike, not {type(path).__name__}")
    if filename is not None and not isinstance(filename, str):
        raise ConfigurationError(f"log_filename={filename!r}: it is the name of a file, a str, not {type(filename).__name__}")
    return None if path is None else StepLog(path, filename or fallback, kind)


__all__ = ("StepLog", "step_log")
