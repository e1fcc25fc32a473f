"""Trying again: bounded, with growing pauses, and not where trying again cannot help."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from edgeserve.core.errors import ClosedError, ConfigurationError, MessageError, MissingExtra, TooLarge, UnsupportedType
from edgeserve.core.metrics import Reason
from edgeserve.stage.control import Control

T = TypeVar("T")

LONGEST_BACKOFF_S = 10.0
_MOST_DOUBLINGS = 1_000  # a float ends soon after that
HOPELESS = (MessageError, UnsupportedType, ConfigurationError, MissingExtra, TooLarge)
"""The same input will meet the same error."""


class GaveUp(Exception):
    """The last attempt failed too."""

    def __init__(self, error: Exception, attempts: int) -> None:
        super().__init__(type(error).__name__)
        self.error, self.attempts = error, attempts

    @property
    def reason(self) -> str:
        """The counter of what is dropped for it."""
        return self.error.reason if isinstance(self.error, MessageError) else Reason.DEAD_LETTER


class GoesBack(ClosedError):
    """The node is to stop or close, and its message is neither done nor given up."""


def try_again(error: Exception, attempt: Callable[[], T], *, retries: int, backoff_s: float, control: Control) -> T:
    """Repeats `attempt`, which has just failed with `error`, up to `retries` times.

    Raises:
        GaveUp: with the last error.
        GoesBack: the node is to stop or close.
    """
    attempts = 1
    while True:
        if isinstance(error, GoesBack) and control.stopping():
            raise error  # it waited for a payload
        if attempts > retries or isinstance(error, HOPELESS):
            raise GaveUp(error, attempts) from error
        if not control.pause(min(backoff_s * 2 ** min(attempts - 1, _MOST_DOUBLINGS), LONGEST_BACKOFF_S)):
            raise GoesBack("the node was told to end while a task waited to be tried again: its message goes back") from error
        attempts += 1
        try:
            return attempt()
        except Exception as exc:
            error = exc


__all__ = ("HOPELESS", "LONGEST_BACKOFF_S", "GaveUp", "GoesBack", "try_again")
