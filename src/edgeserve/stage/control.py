"""How a node's loop is told to stop, by a signal or from another thread."""

from __future__ import annotations

import threading

SLICE_MS = 150
"""The longest a node waits without looking whether it was told to stop."""


class Stopped(BaseException):
    """Raised inside a source's iterator when a signal ends `run()`. Not an Exception: a user's `except Exception` lets it through."""


class Control:
    """How a node's loop is told to stop.

    Attributes:
        stop: `run()` is to return after the message in hand.
        interruptible: nothing is in hand, so a signal may raise `Stopped`.
        closing: the node is being closed; waits end at once.
    """

    __slots__ = ("closing", "interruptible", "stop")

    def __init__(self) -> None:
        self.stop = self.interruptible = False
        self.closing = threading.Event()

    def stopping(self) -> bool:
        """Whether waits are to end."""
        return self.stop or self.closing.is_set()


__all__ = ("SLICE_MS", "Control", "Stopped")
