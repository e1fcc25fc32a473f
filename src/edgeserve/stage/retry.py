"""Trying again: bounded, with growing pauses, and not where trying again cannot help."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from edgeserve.core.errors import ClosedError, ConfigurationError, MessageError, MissingExtra, UnsupportedType
from edgeserve.core.metrics import Reason

T = TypeVar("T")

LONGEST_BACKOFF_S = 10.0
HOPELESS = (MessageError, UnsupportedType, ConfigurationError, MissingExtra)
"""The same input will meet the same error."""


class GaveUp(Exception):
    """The last attempt failed too."""

    def __init__(self, error: Exception, attempts: int) -> None:
        super().__init__(str(error))
        self.error, self.attempts = error, attempts

    @property
    def reason(self) -> str:
        """The counter of what is dropped for it."""
        return self.error.reason if isinstance(self.error, MessageError) else Reason.DEAD_LETTER


def try_again(error: Exception, attempt: Callable[[], T], *, retries: int, backoff_s: float, closing: threading.Event) -> T:
    """Repeats `attempt`, which has just failed with `error`, up to `retries` times.

    Raises:
        GaveUp: with the last error.
        ClosedError: the node is being closed; the message goes back.
    """
    attempts = 1
    while attempts <= retries and not isinstance(error, HOPELESS):
        if closing.wait(min(backoff_s * 2 ** (attempts - 1), LONGEST_BACKOFF_S)):
            raise ClosedError("the node was closed while a task waited to be tried again: its message goes back") from error
        attempts += 1
        try:
            return attempt()
        except Exception as exc:
            error = exc
    raise GaveUp(error, attempts) from error


__all__ = ("HOPELESS", "LONGEST_BACKOFF_S", "GaveUp", "try_again")
