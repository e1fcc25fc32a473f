"""Hosts that have not answered for so long that nobody waits for them any more."""

from __future__ import annotations

import threading
from collections.abc import Callable

from edgeserve.core.errors import FetchError

_TRIES = 12
"""So many times in `gone_after_s` one that is gone is asked whether it is back."""


class _Absent:
    """When it was first and last asked in vain, and when it may be asked again."""

    def __init__(self, since: float) -> None:
        self.since, self.last, self.again = since, since, 0.0
        self.why = ""


class Absences:
    """A host that is away for a while is waited for, as long as each payload may take: what it has is not lost. One that is gone for good
    would hold up a task for that long with each of its messages.

    Args:
        gone_after_s: after how long without an answer a host is taken to be gone.
        clock: in seconds.
    """

    def __init__(self, gone_after_s: float, clock: Callable[[], float]) -> None:
        self._gone_after_s, self._clock = gone_after_s, clock
        self._lock = threading.Lock()
        self._absent: dict[str, _Absent] = {}

    def patience(self, origin: str, deadline_s: float) -> float:
        """For how long it may be asked now.

        Raises:
            FetchError: it is taken to be gone, and is not asked now.
        """
        with self._lock:
            absent, now = self._absent.get(origin), self._clock()
            if absent is None or now - absent.last > self._gone_after_s or now - absent.since < self._gone_after_s:
                return deadline_s
            if now < absent.again:
                raise FetchError(
                    f"{origin} has not answered for {now - absent.since:.0f} s, and is asked again in {absent.again - now:.1f} s; "
                    f"the last time: {absent.why}"
                )
            pause_s = self._gone_after_s / _TRIES
            absent.again = now + pause_s
            return min(deadline_s, pause_s)

    def ended(self, origin: str, began: float, error: BaseException | None) -> None:
        """It was asked from then until now. `error`: why it did not answer; None: it did."""
        with self._lock:
            if error is None:
                self._absent.pop(origin, None)
                return
            absent = self._absent.get(origin)
            if absent is None or began - absent.last > self._gone_after_s:
                absent = self._absent[origin] = _Absent(began)
            absent.last, absent.why = self._clock(), str(error)


__all__ = ("Absences",)
