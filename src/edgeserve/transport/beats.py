"""Processes of one machine that stand still: each touches a file of its own every second, and looks whether others go on with theirs."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

BEAT_S = 1.0
SILENT_S = 3.0
_FORGET_S = 10.0


@dataclass(slots=True)
class _Other:
    """A process that is looked at: what was seen of it last, since when it has been the same, when it was asked for last."""

    path: str
    pid: int | None
    beat_ns: int
    spent: int | None
    since: float
    asked: float
    silent: bool = False


class Beats:
    """The beat of this process, and its look at others', in a thread of its own.

    A process stands still that has not beaten for three seconds in which this one has, and that has not run meanwhile as far as the system
    tells: a task that computes without letting other threads run misses beats, and is at work. Nothing is said of the time in which this
    process did not run itself.

    Args:
        path: the file to touch. It is made, and removed by `close`.
    """

    def __init__(self, path: str) -> None:
        self._path, self._pid = path, os.getpid()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._others: dict[str, _Other] = {}
        Path(path).touch(0o600)
        self._thread = threading.Thread(target=self._run, name="edgeserve-beat", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise

    def stands_still(self, path: str, pid: int | None) -> bool:
        """Whether the process that touches this file does, as far as is known; it is looked at from now on. `pid`: None where its number
        is one of another space of process ids."""
        now = time.monotonic()
        with self._lock:
            other = self._others.get(path)
            if other is None:
                self._others[path] = _Other(path, pid, _beat(path), _spent(pid), now, now)
                return False
            other.asked = now
            # What was true a moment ago need not be now.
            return other.silent and _beat(path) == other.beat_ns and _spent(pid) == other.spent

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(BEAT_S):
            try:
                Path(self._path).touch(0o600)
            except OSError:
                continue  # what keeps this one from it may keep the others
            before, looked = looked, time.monotonic()
            with self._lock:
                for path in [path for path, other in self._others.items() if looked - other.asked > _FORGET_S]:
                    del self._others[path]
                for other in self._others.values():
                    self._look(other, looked, slept=looked - before > 2 * BEAT_S)

    @staticmethod
    def _look(other: _Other, now: float, *, slept: bool) -> None:
        beat_ns, spent = _beat(other.path), _spent(other.pid)
        if slept or beat_ns != other.beat_ns or spent != other.spent:
            other.beat_ns, other.spent, other.since, other.silent = beat_ns, spent, now, False
        else:
            other.silent = beat_ns > 0 and now - other.since > SILENT_S - BEAT_S / 2

    def close(self) -> None:
        """Beats no more. Idempotent."""
        self._ended.set()
        if self._pid == os.getpid():
            self._thread.join()
            Path(self._path).unlink(missing_ok=True)


def _beat(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _spent(pid: int | None) -> int | None:
    """How long the threads of a process have run, ns; None where the system does not tell."""
    try:
        return None if pid is None else sum(int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    except (OSError, ValueError, IndexError):
        return None


__all__ = ("BEAT_S", "SILENT_S", "Beats")
