"""Opens anew what does not come back though the broker answers.

Pulsar's client waits twice as long each time it has tried in vain, up to a minute, and it cannot be told not to: of a broker that was away
for half a minute, and is back, some of its users would hear much later than others.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable

from edgeserve.transport.pulsar.ends import Dialled
from edgeserve.transport.pulsar.errors import PASSES

_log = logging.getLogger("edgeserve")

_EVERY_S = 0.5
_PATIENCE_S = 1.5
"""So long the client is left to itself: it tries at once, and soon again."""


class Redial:
    """Looks after the ends of a connection.

    Args:
        answers: whether the broker does now.
        closed: set when the connection is.
        threads: where the thread is noted.
    """

    def __init__(self, answers: Callable[[], bool], closed: threading.Event, threads: weakref.WeakSet[threading.Thread]) -> None:
        self._answers, self._closed, self._threads = answers, closed, threads
        self._ends: weakref.WeakSet[Dialled] = weakref.WeakSet()
        self._away: weakref.WeakKeyDictionary[Dialled, float] = weakref.WeakKeyDictionary()
        self._failed: weakref.WeakKeyDictionary[Dialled, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, end: Dialled) -> None:
        """Until it is forgotten, or nobody has it any more."""
        with self._lock:
            self._ends.add(end)
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._run, name="edgeserve-redial", daemon=True)
                self._threads.add(self._thread)
                self._thread.start()

    def forget(self, end: Dialled) -> None:
        """It was closed."""
        with self._lock:
            self._ends.discard(end)

    @property
    def missed(self) -> bool:
        """Whether one that matters has no connection now."""
        with self._lock:
            ends = list(self._ends)
        return any(end.matters and not end.is_connected() for end in ends)

    def join(self, seconds: float) -> None:
        """Waits for the thread, which ends with the connection."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(seconds)

    def _run(self) -> None:
        while not self._closed.wait(_EVERY_S):
            late = self._late(time.monotonic())
            if late and self._answers():
                self._dial(late)

    def _late(self, now: float) -> list[Dialled]:
        """Those that have been away for too long."""
        with self._lock:
            ends = list(self._ends)
        away = [end for end in ends if not end.is_connected()]
        for end in set(self._away) - set(away):
            del self._away[end]
        return [end for end in away if now - self._away.setdefault(end, now) >= _PATIENCE_S]

    def _dial(self, ends: list[Dialled]) -> None:
        # First those that somebody waits for, and those that did not fail before.
        for end in sorted(ends, key=lambda end: (not end.matters, self._failed.get(end, 0))):
            if self._closed.is_set():
                return
            try:
                if not end.is_connected():
                    end.dial_again()
                self._failed.pop(end, None)
            except Exception as exc:
                self._failed[end] = self._failed.get(end, 0) + 1
                if isinstance(exc, PASSES):
                    _log.debug("an end of a connection does not open yet: %s", exc)
                    return  # each try takes its time, and those behind it would fail likewise
                if self._failed[end] == 1:
                    _log.warning("an end of a connection cannot be opened again, which is tried on: %s: %s", type(exc).__name__, exc)


__all__ = ("Redial",)
