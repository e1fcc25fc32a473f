"""Counters that speak: the log says when a node begins to drop messages, and how many it has dropped when it closes."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from edgeserve.core.metrics import Counters, Reason

log = logging.getLogger("edgeserve")

# Each is a keyword's own purpose: to whoever filters or throttles they are no news.
_ASKED_FOR = frozenset((Reason.GATE, Reason.THROTTLED))
_WORDS: dict[str, str] = {
    Reason.LATE: "they are older than their source's watermark, or than drop_if_older_than_ms",
    Reason.THROTTLED: "newer ones replace them within min_interval_ms",
    Reason.SUPERSEDED: "newer ones replace them before they could be used",
    Reason.UNMATCHED: "it is certain that no partners come for them, or they have no key for by=",
    Reason.OVERFLOW: "as many of this source wait as max_held (of a join, where no partners come for them) or max_backlog lets",
    Reason.GATE: "a gate returns None for them",
}
_MOST_EDGES = 5


class Drops(Counters):
    """A node's counters.

    Args:
        who: the node, as the lines begin.
        see: what of the node says more.
    """

    def __init__(self, who: str, see: str) -> None:
        super().__init__()
        self._who, self._see = who, see
        # What is put aside is told one by one by whoever does it; a duplicate is a message that was not dropped.
        self._said = set(map(str, Reason)) - set(_WORDS)

    def count(self, reason: str, n: int = 1, *, edge: str = "") -> None:
        super().count(reason, n, edge=edge)
        if reason not in self._said:
            self._said.add(reason)
            words = _WORDS.get(reason)
            log.log(_level((reason,)), "%s drops messages of %r (%s)%s", self._who, edge, reason, f": {words}" if words else "")

    def sum_up(self) -> None:
        """Says what was dropped, if anything was."""
        edges: dict[str, list[tuple[int, str]]] = {}
        for edge, reasons in self.edges().items():
            for reason, n in reasons.items():
                if reason != Reason.DUPLICATE:
                    edges.setdefault(reason, []).append((n, edge))
        if not edges:
            return
        totals = {reason: sum(n for n, _ in found) for reason, found in edges.items()}
        parts = [f"{reason} {totals[reason]:,} ({_of(edges[reason])})" for reason in sorted(totals, key=lambda r: -totals[r])]
        log.log(_level(totals), "%s dropped %s messages: %s; see %s", self._who, f"{sum(totals.values()):,}", ", ".join(parts), self._see)


def _level(reasons: Iterable[str]) -> int:
    return logging.INFO if _ASKED_FOR.issuperset(reasons) else logging.WARNING


def _of(found: list[tuple[int, str]]) -> str:
    """Whose messages they were: of one edge, or of each how many."""
    if len(found) == 1:
        return f"of {found[0][1]!r}"
    found.sort(reverse=True)
    named = ", ".join(f"{n:,} of {edge!r}" for n, edge in found[:_MOST_EDGES])
    return named + (f" and of {len(found) - _MOST_EDGES} more" if len(found) > _MOST_EDGES else "")


__all__ = ("Drops",)
