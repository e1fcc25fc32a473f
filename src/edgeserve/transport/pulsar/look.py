"""Reads what a topic holds now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pulsar

from edgeserve.transport.broker.driver import Entry
from edgeserve.transport.pulsar.ends import id_of, number_of, quietly

_RECEIVE_MS = 1_000
_VAIN = 10
"""So often a reader is waited for that says there is more, before another one is made: the next time twice as often."""


class Look:
    """A reader, which is made anew when it fails.

    Args:
        make: opens one that begins with an entry.
        start: of which this is the id.
        since_ns: from about this publish time on; None: from `start`.
    """

    def __init__(self, make: Callable[[Any], pulsar.Reader], start: Any, since_ns: int | None = None) -> None:
        self._make, self._start, self._since_ns = make, start, since_ns
        self._reader: pulsar.Reader | None = None
        self._last: int | None = None
        self._vain, self._most_vain = 0, _VAIN

    def open(self) -> pulsar.Reader:
        """The reader."""
        if self._reader is None:
            reader = self._make(self._start if self._last is None else id_of(self._last))
            if self._since_ns is not None and self._last is None:
                try:
                    reader.seek(max(0, self._since_ns // 1_000_000))
                except BaseException:
                    quietly(reader.close)
                    raise
            self._reader = reader
        return self._reader

    def next(self) -> Entry | None:
        """The next entry; None at the end.

        Raises:
            pulsar.PulsarException: to be tried again, or not.
        """
        try:
            reader = self.open()
            while reader.has_message_available():
                message = reader.read_next(_RECEIVE_MS)
                self._vain = 0
                at = number_of(message.message_id())
                if self._last is None or at > self._last:
                    self._last = at
                    return Entry(at, message.data(), stored_ns=message.publish_timestamp() * 1_000_000)
            return None
        except pulsar.PulsarException:
            # A large entry on a slow link is on its way for longer than one wait. But of what was trimmed meanwhile a reader says that it
            # is there, and never gives it: another one knows better.
            self._vain += 1
            in_vain = self._vain >= self._most_vain
            if in_vain:
                self._vain, self._most_vain = 0, 2 * self._most_vain
            if in_vain or (self._reader is not None and not self._reader.is_connected()):
                self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        reader, self._reader = self._reader, None
        if reader is not None:
            quietly(reader.close)


__all__ = ("Look",)
