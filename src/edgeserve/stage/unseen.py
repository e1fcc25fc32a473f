"""Says what a node that runs until the end waits for, while it has received nothing of it: most often a name that nobody sends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

log = logging.getLogger("edgeserve")

FIRST_S, AGAIN_S = 5.0, 30.0


class Unseen:
    """One run's reminders.

    Args:
        who: the node, as the line begins.
        topic: where it waits.
        sources: those that it needs and has received nothing of, neither messages nor their end.
        clock: monotonic seconds.
    """

    def __init__(self, who: str, topic: str, sources: Callable[[], Sequence[str]], clock: Callable[[], float] = time.monotonic) -> None:
        self._who, self._topic, self._sources, self._clock = who, topic, sources, clock
        self._due = clock() + FIRST_S

    def look(self) -> None:
        """Called whenever the node is about to wait; logs when it is time to."""
        now = self._clock()
        if now < self._due:
            return
        self._due = now + AGAIN_S
        sources = ", ".join(map(repr, self._sources()))
        if sources:
            log.warning("%s waits: it runs until the end, and has received nothing of %s on topic %r yet", self._who, sources, self._topic)


__all__ = ("Unseen",)
