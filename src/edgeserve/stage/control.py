"""How a node's loop is told to stop, by a signal or from another thread."""

from __future__ import annotations

import threading
import time

SLICE_MS = 150
"""The longest a node waits without looking whether it was told to stop."""


class Stopped(BaseException):
    """Raised inside a source's iterator when a signal ends `run()`. Not an Exception: a user's `except Exception` lets it through."""


class Control:
    """How a node's loop is told to stop.

    Attributes:
        stop: `run()` is to return after the message in hand.
        interruptible: nothing is in hand, so a signal may raise `Stopped`.
        told: a signal told it to stop: somebody waits for its end.
        closing: the node is being closed; waits end at once.
        upstream_over: set when the nodes of the same program that feed this one have ended. None: there are none, or nobody will say so.
    """

    __slots__ = ("closing", "interruptible", "stop", "told", "upstream_over")

    def __init__(self) -> None:
        self.stop = self.interruptible = self.told = False
        self.closing = threading.Event()
        self.upstream_over: threading.Event | None = None

    def pause(self, seconds: float) -> bool:
        """Waits so long; returns False, and at once, when the node is to stop or close."""
        # In slices: a signal's handler may not set an event that its own thread may be waiting for.
        ends_at = time.monotonic() + seconds
        while not self.stop and (rest := ends_at - time.monotonic()) > 0:
            if self.closing.wait(min(rest, SLICE_MS / 1000)):
                break
        return not self.stopping()

    def stopping(self) -> bool:
        """Whether waits are to end."""
        return self.stop or self.closing.is_set()

    def giving_up(self) -> bool:
        """Whether what a broker does not confirm may be given up, after a while."""
        return self.told


__all__ = ("SLICE_MS", "Control", "Stopped")
