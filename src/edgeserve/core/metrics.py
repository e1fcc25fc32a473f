"""Counters of what was dropped, and why: nothing is dropped in silence."""

from __future__ import annotations

from enum import StrEnum
from threading import Lock


class Reason(StrEnum):
    """Why a message was not used. `MessageError.reason` is one of these."""

    LATE = "late"
    THROTTLED = "throttled"
    SUPERSEDED = "superseded"
    UNMATCHED = "unmatched"
    OVERFLOW = "overflow"
    GATE = "gate"
    PAYLOAD_GONE = "payload_gone"
    NOT_ALLOWED = "not_allowed"
    DUPLICATE = "duplicate"
    FOREIGN = "foreign"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    NEWER = "newer"
    SCHEMA = "schema"
    UNKNOWN_SOURCE = "unknown_source"
    DEAD_LETTER = "dead_letter"


class Counters:
    """Counts by edge and reason. Thread-safe.

    Example:
        >>> drops = Counters()
        >>> drops.count(Reason.LATE, edge="camera1")
        >>> drops.count(Reason.LATE, 2)
        >>> drops.snapshot(), drops.snapshot("camera1")
        ({'late': 3}, {'late': 1})
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: dict[tuple[str, str], int] = {}

    def count(self, reason: str, n: int = 1, *, edge: str = "") -> None:
        """Adds `n` to what was dropped for `reason` on `edge` (a source id or a topic; "" for the node as a whole)."""
        slot = (edge, str(reason))
        with self._lock:
            self._counts[slot] = self._counts.get(slot, 0) + n

    def snapshot(self, edge: str | None = None) -> dict[str, int]:
        """Reason to count, of one edge or, without one, summed over all."""
        with self._lock:
            counts = list(self._counts.items())
        totals: dict[str, int] = {}
        for (of, reason), n in counts:
            if edge is None or of == edge:
                totals[reason] = totals.get(reason, 0) + n
        return totals

    def edges(self) -> dict[str, dict[str, int]]:
        """Edge to reason to count."""
        with self._lock:
            names = {edge for edge, _ in self._counts}
        return {edge: self.snapshot(edge) for edge in sorted(names)}


__all__ = ("Counters", "Reason")
