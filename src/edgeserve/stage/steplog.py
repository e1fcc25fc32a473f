"""The optional log of every step, one JSON object per line: what `log_path` and `log_filename` ask for."""

from __future__ import annotations

import logging
import os
import re
import threading
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from edgeserve.core.errors import ConfigurationError
from edgeserve.stage.linger import Linger

_log = logging.getLogger("edgeserve")

_FLUSH_EVERY_S = 0.1
_MOST_CHARACTERS = 100


class StepLog:
    """Appends lines to `<log_path>/<log_filename>.<kind>`; ids are hexadecimal, times are ns since the epoch.

    A thread writes what was gathered, a moment after the first line of it, so that a step costs no system call and a node that waits, or is
    killed while it does, has its steps in the file.
    """

    def __init__(self, path: str | os.PathLike[str], filename: str, kind: str) -> None:
        self._directory, self._name = Path(path), f"{filename}.{kind}"
        self._file: BinaryIO | None = None
        self._encode = msgspec.json.Encoder().encode
        self._lock = threading.Lock()
        self._failed = False
        self._linger: Linger

    def open(self) -> None:
        """Opens the file: nodes do so when they connect, not when they are made."""
        if not self._directory.is_dir():
            raise ConfigurationError(f"log_path={str(self._directory)!r} is not a directory: create it first")
        try:
            self._file = (self._directory / self._name).open("ab")
        except (OSError, ValueError) as exc:
            raise ConfigurationError(f"the log {self._name!r} cannot be opened in log_path={str(self._directory)!r}: {exc}") from exc
        self._linger = Linger(f"edgeserve-log-{self._name}", self._flush)
        self._linger.period_s = _FLUSH_EVERY_S

    def write(self, **line: Any) -> None:
        """One line."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(self._encode(line) + b"\n")
            except OSError as exc:
                self._complain(exc)
        if self._linger.asleep:
            self._linger.nudge()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            file, self._file = self._file, None
        if file is None:
            return
        self._linger.close()
        try:
            file.close()
        except OSError as exc:
            self._complain(exc)

    def _flush(self) -> bool:
        """In the thread; nothing is left then."""
        with self._lock:
            if self._file is not None:
                try:
                    self._file.flush()
                    self._failed = False
                except OSError as exc:
                    self._complain(exc)
        return False

    def _complain(self, error: OSError) -> None:
        """A step that is done is not done again because its line could not be written."""
        if not self._failed:
            self._failed = True
            _log.warning("lines are missing in the log %s: %s", self._directory / self._name, error)


def step_log(path: str | os.PathLike[str] | None, filename: str | None, fallback: str, kind: str) -> StepLog | None:
    """The log, or None when none is asked for.

    Raises:
        ConfigurationError: `log_path` or `log_filename` is of a type that names no file.
    """
    if path is not None and not (isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str)):
        raise ConfigurationError(f"log_path={path!r}: it is the path of a directory, a str or os.PathLike, not {type(path).__name__}")
    if filename is not None and not isinstance(filename, str):
        raise ConfigurationError(f"log_filename={filename!r}: it is the name of a file, a str, not {type(filename).__name__}")
    # A worker or a topic may be called what no file can be; whoever names a file means it.
    return None if path is None else StepLog(path, filename or re.sub(r"[/\0]", "_", fallback)[:_MOST_CHARACTERS], kind)


__all__ = ("StepLog", "step_log")
