"""A thread that writes a batch whose owner did not come back to it, and the patience with a store that is full."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edgeserve.core.errors import DiskFull, StoreFull
from edgeserve.stage.control import Control

log = logging.getLogger("edgeserve")

LINGER_NS = 1_000_000
"""A batch younger than this may wait for more."""

_PERIOD_S = 0.004
_IDLE_PERIODS = 5
_BACKOFF_S = (0.05, 1.0)
_LOG_EVERY_S = 10.0
_AFTER_STOP_S = 3.0

NO_ROOM = (StoreFull, DiskFull)


class Linger:
    """Calls `write` every few milliseconds while there is something to write, and costs nothing otherwise.

    Args:
        name: the thread's.
        write: writes what is old enough and says whether anything is left; takes its own lock.

    Attributes:
        period_s: how often. Each time costs the owner its hold on the interpreter, so an owner that writes in time itself makes it longer.
    """

    def __init__(self, name: str, write: Callable[[], bool]) -> None:
        self._name, self._write = name, write
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.asleep = True
        self.period_s = _PERIOD_S

    def nudge(self) -> None:
        """There is something to write. Callers look at `asleep` first: it is nearly always False when traffic is fast."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
        self.asleep = False
        self._wanted.set()

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        self._ended.set()
        self._wanted.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        while not self._ended.is_set():
            self._wanted.wait()
            self.asleep = False
            idle = 0
            while idle < _IDLE_PERIODS and not self._ended.wait(self.period_s):
                idle = 0 if self._write() else idle + 1
            self._wanted.clear()
            self.asleep = True
            # What came between the last look and here has seen `asleep` still False.
            if self._write():
                self.asleep = False
                self._wanted.set()


class Patience:
    """How a node behaves while its store has no room: it waits, says so now and then, and goes on when there is room.

    Attributes:
        troubled: whether there was no room the last time, so that `over` has something to say.
    """

    def __init__(self, what: str, control: Control) -> None:
        self._what, self._control = what, control
        self.troubled = False
        self._delay_s = _BACKOFF_S[0]
        self._logged = -_LOG_EVERY_S
        self._stopped_at: float | None = None

    def met(self, error: BaseException) -> float:
        """Notes the error; returns how many seconds to wait before the next try."""
        self.troubled = True
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            log.warning("%s waits, nothing is lost: %s", self._what, error)
        delay, self._delay_s = self._delay_s, min(self._delay_s * 2, _BACKOFF_S[1])
        return delay

    def wait(self, error: BaseException) -> bool:
        """Waits before the next try; False: no more tries, the node is closed, or was told to stop some seconds ago."""
        delay = self.met(error)
        if self._control.stop:
            now = time.monotonic()
            self._stopped_at = self._stopped_at or now
            if now - self._stopped_at > _AFTER_STOP_S:
                return False
        return not self._control.closing.wait(delay)

    def over(self) -> None:
        """There was room."""
        self._stopped_at = None
        if self.troubled:
            self.troubled = False
            self._delay_s = _BACKOFF_S[0]
            log.info("%s goes on", self._what)


__all__ = ("LINGER_NS", "NO_ROOM", "Linger", "Patience")
