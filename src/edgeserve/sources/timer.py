"""When rows are due, and the wait until then. The clock is a parameter: tests and simulations hand in another."""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress
from numbers import Real
from typing import Protocol

from edgeserve.core.errors import ConfigurationError

_LONGEST_S = 3600.0


class Timer(Protocol):
    """What tells the time, and waits."""

    def monotonic_ns(self) -> int:
        """Never goes back; only differences mean something."""
        ...

    def wait(self, seconds: float) -> bool:
        """Waits at most so long; returns True, and at once, when `wake` was called since it last did."""
        ...

    def wake(self) -> None:
        """Ends a wait in another thread, or else the next one."""
        ...


class SystemTimer:
    """The time of this machine."""

    monotonic_ns = staticmethod(time.monotonic_ns)

    def __init__(self) -> None:
        # No Event: a signal's handler that raises could leave its inner lock taken. This is one call each way.
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def wait(self, seconds: float) -> bool:
        """Waits at most so long, and at most an hour; returns True, and at once, when `wake` was called since it last did."""
        return self._asleep.acquire(timeout=min(max(seconds, 0.0), _LONGEST_S))

    def wake(self) -> None:
        """Ends a wait in another thread, or else the next one."""
        with suppress(RuntimeError):  # it was called before, and nobody has waited since
            self._asleep.release()


class Pace:
    """When events are due that are to come as far apart as they happened, divided by `speed`.

    All is counted from the first one, so that no delay adds to the next.
    """

    def __init__(self, what: str, speed: float | None) -> None:
        if speed is not None and (not isinstance(speed, Real) or isinstance(speed, bool) or not speed > 0):
            raise ConfigurationError(
                f"{what}: speed={speed!r}: it is how many times faster than recorded, a number above 0, or None for no pauses at all"
            )
        self._speed = None if speed is None or math.isinf(speed) else float(speed)
        self._begin: tuple[int, int] | None = None

    def seconds_until(self, event_ns: int, now_ns: int) -> float:
        """How long until an event is due, at `now_ns` of a monotonic clock; 0 or less: it is."""
        if self._speed is None:
            return 0.0
        if self._begin is None:
            self._begin = event_ns, now_ns
        first_ns, began_ns = self._begin
        return ((event_ns - first_ns) / self._speed - (now_ns - began_ns)) / 1e9


__all__ = ("Pace", "SystemTimer", "Timer")
