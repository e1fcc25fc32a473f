"""Processes of one machine that stand still: each touches files every second, and the others look whether that goes on."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BEAT_S = 1.0
SILENT_S = 3.0


class Beats:
    """Touches files every second, from a thread of its own, for as long as there are any."""

    def __init__(self) -> None:
        self._paths: set[str] = set()
        self._heard = 0.0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, path: str) -> None:
        """From now on this one, too."""
        with self._lock:
            self._paths.add(path)
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(target=self._run, name="edgeserve-beat", daemon=True)
                self._thread.start()

    def remove(self, path: str) -> None:
        """No longer this one."""
        with self._lock:
            self._paths.discard(path)

    @property
    def heard(self) -> bool:
        """Whether this process's own beat went on of late: one that stood still itself does not know whether the others did."""
        return time.monotonic() - self._heard < 2 * BEAT_S

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            now_ns = time.time_ns()
            with self._lock:
                paths = list(self._paths)
            for path in paths:
                with suppress(OSError):
                    os.utime(path, ns=(now_ns, now_ns))
                    self._heard = time.monotonic()

    def close(self) -> None:
        """Touches nothing any more. Idempotent."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


@dataclass(slots=True)
class _Seen:
    beat_ns: int
    since: float
    looked: float
    spent: bytes


class Watch:
    """Tells which processes stand still: those whose beat this one has missed for three seconds, and that have not run meanwhile. A task
    that computes without letting other threads run misses beats, and is at work.

    Args:
        beats: this process's own.
    """

    def __init__(self, beats: Beats) -> None:
        self._beats = beats
        self._seen: dict[str, _Seen] = {}

    def stands_still(self, process: str, pid: int, path: str) -> bool:
        """To be asked about every second. `path`: any file that the process touches."""
        now = time.monotonic()
        try:
            beat_ns = os.stat(path).st_mtime_ns
        except OSError:
            return False
        seen = self._seen.get(process)
        if seen is None or seen.beat_ns != beat_ns or now - seen.looked > 2 * BEAT_S or not self._beats.heard:
            self._seen[process] = _Seen(beat_ns, now, now, _spent(pid))
            return False
        seen.looked = now
        if now - seen.since <= SILENT_S:
            return False
        if (spent := _spent(pid)) != seen.spent:
            self._seen[process] = _Seen(beat_ns, now, now, spent)
            return False
        return True

    def forget(self, process: str) -> None:
        """It is gone."""
        self._seen.pop(process, None)


def _spent(pid: int) -> bytes:
    """The processor time of a process, as the system tells it; b"" where it does not."""
    try:
        return b" ".join(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[11:13])
    except OSError:
        return b""


__all__ = ("BEAT_S", "SILENT_S", "Beats", "Watch")
