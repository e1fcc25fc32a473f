"""How far a source has come: what is stored where it went need not be sent again by a new start."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from edgeserve.sources.base import Source
from edgeserve.stage.linger import NO_ROOM

COMMIT_EVERY = 10_000
COMMIT_EVERY_NS = 1_000_000_000


class Progress:
    """Tells a source what may be forgotten.

    Args:
        source: the stream.
        send: hands one of its items over.
    """

    def __init__(self, source: Source, send: Callable[[Any], Any]) -> None:
        self._source, self._send = source, send
        self._count, self._since_ns = 0, monotonic_ns()
        self._refused = False

    def send(self, item: Any) -> Any:
        """Hands an item over."""
        self._count += 1
        # An item that cannot be sent is given up when the next one is: until then a new start tries it again.
        self._refused = True
        try:
            value = self._send(item)
        except NO_ROOM:
            self._refused = False  # it is kept, and sent when there is room
            raise
        self._refused = False
        return value

    def doubt(self) -> None:
        """A step was cut off (Ctrl-C, say): what it took may not have been handed over, and is tried again by a new start."""
        self._refused = True

    def due(self) -> bool:
        """Whether it is time to make durable what was handed over, and to commit it."""
        return self._count > 0 and (self._count >= COMMIT_EVERY or monotonic_ns() - self._since_ns >= COMMIT_EVERY_NS)

    def commit(self) -> None:
        """All that was handed over is durable."""
        if not self._refused:
            self._source.commit()
            self._count, self._since_ns = 0, monotonic_ns()


__all__ = ("COMMIT_EVERY", "COMMIT_EVERY_NS", "Progress")
