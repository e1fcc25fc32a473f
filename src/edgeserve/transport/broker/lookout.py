"""A member's second thread, for what may take its time: a broker's admin API that does not answer must hold up no heartbeat."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edgeserve.core.errors import EdgeServeError

_log = logging.getLogger("edgeserve")

_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_CLOSE_S = 1.0


class _Chore:
    """`do` is left alone for a while after it has failed, longer each time."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do
        self.again = self.pause = 0.0

    def failed(self, now: float) -> None:
        self.pause = min(max(_PAUSE_S, 2 * self.pause), _LONGEST_PAUSE_S)
        self.again = now + self.pause


class Lookout:
    """Does its chores whenever it is woken.

    Args:
        what: for whom it is, for people.
        chores: what is done, one after the other.
        fail: told an error that is none of ours, and so was not expected; it ends the thread.
    """

    def __init__(self, what: str, *chores: Callable[[], None], fail: Callable[[Exception], None]) -> None:
        self._what, self._chores, self._fail = what, [_Chore(do) for do in chores], fail
        self._woken = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"edgeserve-lookout-{what}", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do. Does not wait for it."""
        self._woken.set()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._woken.wait()
                self._woken.clear()
                for chore in self._chores:
                    if not self._closed and time.monotonic() >= chore.again:
                        self._do(chore)
        except Exception as exc:
            self._fail(exc)

    def _do(self, chore: _Chore) -> None:
        try:
            chore.do()
            chore.pause = 0.0
        except EdgeServeError as exc:
            chore.failed(time.monotonic())
            if not self._closed:
                _log.warning("%s, again in %g s: %s", self._what, chore.pause, exc)

    def close(self) -> None:
        """Ends it. What it is at may outlast this, as long as a question to the broker does."""
        self._closed = True
        self._woken.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_S)


__all__ = ("Lookout",)
