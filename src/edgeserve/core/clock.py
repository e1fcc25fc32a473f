"""Time as a parameter: nodes are handed a clock, so that tests and replay can hand them another."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What tells the time."""

    def now_ns(self) -> int:
        """Wall clock, ns since the Unix epoch; may be set back."""
        ...

    def monotonic_ns(self) -> int:
        """Never goes back; only differences mean something."""
        ...


class SystemClock:
    """The clock of this machine."""

    now_ns = staticmethod(time.time_ns)
    monotonic_ns = staticmethod(time.monotonic_ns)


__all__ = ("Clock", "SystemClock")
