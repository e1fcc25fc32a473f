"""The join of the newest item of every source, within a largest spread, at most once per period."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from edgeserve.align.base import JoinSet, Member, Policy, Released, SourceReport, SpreadRefused
from edgeserve.core.errors import ConfigurationError

_FAR = 2**64  # beyond every event time
_new = tuple.__new__  # a NamedTuple's own constructor costs twice as much, and this is once per message


class Latest(Policy):
    """Joins the newest item of each source: a set is complete when all sources are there and lie close enough together.

    Every push of a newer item makes a set, if one can be made. An older item never replaces a newer one; at equal event time the
    later arrival does. Which sets form depends on the order of arrival between the sources.

    Args:
        sources: the source ids, in the order in which sets carry them.
        max_interval_ns: the largest spread (newest minus oldest event time) of a set.
        min_period_ns: the least time between the starts of two sets, by the clock given to `advance`. When it is not 0, `push` only
            marks a set as waiting and `advance` returns it, so the newest state always runs in the end. The first set waits for nothing.
        no_overlap: every item is used in at most one set.

    Example:
        >>> join = Latest(["a", "b"], max_interval_ns=10)
        >>> join.push("a", 100, "a0")
        []
        >>> [s.members["a"].item + s.members["b"].item for s in join.push("b", 105, "b0")]
        ['a0b0']
    """

    takes_watermarks = False

    def __init__(
        self, sources: Sequence[str], *, max_interval_ns: int = 10_000_000_000, min_period_ns: int = 0, no_overlap: bool = False
    ) -> None:
        super().__init__(sources)
        if max_interval_ns < 0 or min_period_ns < 0:
            raise ConfigurationError(f"times must not be negative: max_interval_ns={max_interval_ns}, min_period_ns={min_period_ns}")
        self.max_interval_ns = max_interval_ns
        self.min_period_ns = min_period_ns
        self.no_overlap = no_overlap
        # Filled with None so that a copy of it has the members in the order of `sources`.
        self._held: dict[str, Member | None] = dict.fromkeys(self.sources)
        self._stamps: dict[str, int] = {}
        # A source's held stamp only ever grows, so the newest is exact, and the oldest is a lower bound until somebody needs it exactly.
        self._newest_ns = -_FAR
        self._oldest_ns = _FAR
        # Held items that no set has used yet, with the reason they are dropped for if they are replaced now.
        self._unused: dict[str, str] = {}
        self._waiting = False
        self._last_start_ns: int | None = None
        self._dropped: dict[str, Counter[str]] = {source: Counter() for source in self.sources}
        self._watermarks: dict[str, int] = {}
        self._nearest_miss: SpreadRefused | None = None

    def push(self, source: str, stamp_ns: int, item: Any, key: Any = None) -> list[JoinSet]:
        """Takes one item; returns the set it completes, if any (none with `min_period_ns`: see `advance`). `key` is not looked at."""
        # Written out, though `restore` shares its beginning: this runs once per message.
        held, unused = self._held, self._unused
        try:
            old = held[source]
        except KeyError:
            raise self._unknown(source) from None
        if old is not None:
            if stamp_ns < old[0]:
                self._release(source, stamp_ns, item, "superseded")
                return []
            if source in unused:
                self._release(source, old[0], old[1], unused[source])
            else:
                self.leaving.append(_new(Released, (source, old[0], old[1], "")))
        elif stamp_ns < self._oldest_ns:
            self._oldest_ns = stamp_ns
        held[source] = _new(Member, (stamp_ns, item))
        unused[source] = "superseded"
        stamps = self._stamps
        stamps[source] = stamp_ns
        if stamp_ns > self._newest_ns:
            self._newest_ns = stamp_ns
        if len(stamps) < len(held):
            return []
        if self._newest_ns - self._oldest_ns > self.max_interval_ns and self._too_wide():
            return []
        if self.min_period_ns:
            self._wait(source)
            return []
        if self.no_overlap:
            return [self._complete()]
        unused.clear()
        return [_new(JoinSet, (held.copy(), False))]

    def advance(self, now_ns: int) -> list[JoinSet]:
        """Returns the waiting set once `min_period_ns` has passed since the start of the one before."""
        if not self._waiting:
            return []
        last = self._last_start_ns
        # A clock that was set back must not stall the join for longer than one period.
        if last is not None and now_ns < last:
            self._last_start_ns = last = now_ns
        if last is not None and now_ns < last + self.min_period_ns:
            return []
        self._waiting = False
        self._last_start_ns = now_ns
        return [self._complete()]

    def watermark(self, source: str, watermark_ns: int) -> list[JoinSet]:
        """Noted for `explain`: this join does not wait for watermarks."""
        if source not in self._held:
            raise self._unknown(source)
        self._watermarks[source] = watermark_ns
        return []

    def restore(self, source: str, stamp_ns: int, item: Any, key: Any = None, *, used: bool = True) -> None:
        """Takes back a held item without making a set. With `no_overlap` what is held was never used, whatever `used` says."""
        if source not in self._held:
            raise self._unknown(source)
        used = used and not self.no_overlap
        old = self._held[source]
        if old is not None:
            if stamp_ns < old.stamp_ns:
                self._release(source, stamp_ns, item, "" if used else "superseded")
                return
            self._release(source, old.stamp_ns, old.item, self._unused.pop(source, ""))
        self._held[source] = Member(stamp_ns, item)
        self._stamps[source] = stamp_ns
        self._newest_ns, self._oldest_ns = max(self._newest_ns, stamp_ns), min(self._oldest_ns, stamp_ns)
        if not used:
            self._unused[source] = "superseded"

    def next_due_ns(self) -> int | None:
        """When `advance` will return the waiting set (0: at once), or None when none is waiting."""
        if not self._waiting:
            return None
        return 0 if self._last_start_ns is None else self._last_start_ns + self.min_period_ns

    def is_empty(self) -> bool:
        """Whether it holds nothing and no period has begun."""
        return not self._stamps and self._last_start_ns is None

    def explain(self) -> dict[str, SourceReport]:
        """Per source what is held and dropped; `nearest_miss_ns` is the smallest spread that was refused."""
        miss = self._nearest_miss
        notes: dict[str, str] = {source: f"no item of {source!r} is held" for source, member in self._held.items() if member is None}
        if miss is not None:
            spread = (
                f"nearest miss: {miss.newest!r} was {miss.spread_ns} ns ahead of {miss.oldest!r}, {self.max_interval_ns} ns are allowed"
            )
            notes |= {source: f"{notes[source]}; {spread}" if source in notes else spread for source in self.sources}
        return {
            source: SourceReport(
                held=int(member is not None),
                oldest_ns=self._stamps.get(source),
                newest_ns=self._stamps.get(source),
                watermark_ns=self._watermarks.get(source),
                dropped=dict(self._dropped[source]),
                nearest_miss_ns=None if miss is None else miss.spread_ns,
                note=notes.get(source, ""),
            )
            for source, member in self._held.items()
        }

    def _wait(self, source: str) -> None:
        """Marks what is held as waiting for the period: without it, a set would have used all of it now."""
        if self._waiting:
            self._unused[source] = "throttled"
        else:
            self._waiting = True
            self._unused = dict.fromkeys(self._unused, "throttled")

    def _complete(self) -> JoinSet:
        """Makes the set of all that is held."""
        members: Any = self._held.copy()
        self._unused.clear()
        if self.no_overlap:
            for source, member in members.items():
                self.leaving.append(_new(Released, (source, member[0], member[1], "")))
            self._held = dict.fromkeys(self.sources)
            self._stamps.clear()
            self._newest_ns, self._oldest_ns = -_FAR, _FAR
        return _new(JoinSet, (members, False))

    def _too_wide(self) -> bool:
        """Whether the spread, looked at exactly, is too large. If so the newest items make no set any more, and none waits."""
        stamps = self._stamps
        self._oldest_ns = min(stamps.values())
        if self._newest_ns - self._oldest_ns <= self.max_interval_ns:
            return False
        self.refused = refused = SpreadRefused.of(stamps)
        if self._nearest_miss is None or refused.spread_ns < self._nearest_miss.spread_ns:
            self._nearest_miss = refused
        self._waiting = False
        return True

    def _release(self, source: str, stamp_ns: int, item: Any, reason: str) -> None:
        if reason:
            self._dropped[source][reason] += 1
        self.leaving.append(_new(Released, (source, stamp_ns, item, reason)))


__all__ = ("Latest",)
