"""The join of items with equal event time, equal key, or both, settled by watermarks."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import Any, Literal

from edgeserve.align.base import JoinSet, Member, Policy, Released, SourceReport, SpreadRefused, key_slot
from edgeserve.core.errors import ConfigurationError, JoinOverflow
from edgeserve.core.message import WATERMARK_END

_FAR = 2**64  # beyond every event time and watermark
_COMPACT_AT_LEAST = 4096
_REMEMBERED = 64  # unmatched items per source, their event times and values, for `explain`
_new = tuple.__new__  # a NamedTuple's own constructor costs twice as much, and this is once per message


class Exact(Policy):
    """Joins items of equal event time (`on='time'`), of equal key whose event times lie close enough together (`on='key'`), or of equal key
    and equal event time (`on='key_and_time'`): the join by event time within each key.

    Per value, each source has a first-in-first-out queue: its k-th item meets the k-th of the others. So the sets are the same
    whatever the order of arrival between sources; only `max_held` can change that, and a drop by it is counted.

    - An item older than its own source's watermark is dropped as 'late', at once.
    - An item is dropped as 'unmatched' once it is certain that it cannot be in a set: the watermark of a source that it lacks is above
      its event time (`on='key'`: above it by more than `max_interval_ns`), or (`on='key'`) the items at the head of the queues lie
      further apart than `max_interval_ns` and it is the oldest of them. Without watermarks nothing is dropped before `max_held`.
    - A lower watermark than the last one is ignored, but after `WATERMARK_END` it opens the source again (a new incarnation, which may
      go back in time). Until then every item of an ended source is late: tell the new watermark before the first new item.

    Args:
        sources: the source ids, in the order in which sets carry them.
        on: what must be equal. With 'key' and 'key_and_time', items without a key are dropped as 'unmatched'. Keys of different types are
            different.
        max_held: the most items held per source, whatever their keys. One more drops that source's oldest (by event time, among the heads
            of its queues) as 'overflow', or raises `JoinOverflow`.
        max_interval_ns: with `on='key'`, the largest spread (newest minus oldest event time) of a set.
        overflow: 'drop_oldest' or 'error'.

    Example:
        >>> join = Exact(["a", "b"])
        >>> join.push("a", 100, "a0"), join.push("a", 200, "a1")
        ([], [])
        >>> [s.members["a"].item + s.members["b"].item for s in join.push("b", 200, "b1")]
        ['a1b1']
        >>> join.watermark("b", 201)
        []
        >>> [(r.item, r.reason) for r in join.drain()]
        [('a0', 'unmatched')]
    """

    timed = False
    drops_late = True

    def __init__(
        self,
        sources: Sequence[str],
        *,
        on: Literal["time", "key", "key_and_time"] = "time",
        max_held: int = 10_000,
        max_interval_ns: int = 10_000_000_000,
        overflow: Literal["drop_oldest", "error"] = "drop_oldest",
    ) -> None:
        super().__init__(sources)
        if on not in ("time", "key", "key_and_time") or overflow not in ("drop_oldest", "error"):
            raise ConfigurationError(
                f"on={on!r}, overflow={overflow!r}: use on='time' or 'key' or 'key_and_time', overflow='drop_oldest' or 'error'"
            )
        if max_held < 1 or max_interval_ns < 0:
            raise ConfigurationError(f"max_held must be at least 1 and max_interval_ns not negative, got {max_held} and {max_interval_ns}")
        self.on = on
        self.max_held = max_held
        self.max_interval_ns = max_interval_ns
        self.overflow = overflow
        self._by_key, self._keyed = on == "key", on != "time"
        self._slack_ns = max_interval_ns if self._by_key else 0
        # Per value the head of each source's queue; what stands behind a head (rare) is in `_behind`.
        self._heads: dict[Hashable, dict[str, Member]] = {}
        self._behind: dict[tuple[Hashable, str], deque[Member]] = {}
        self._held = dict.fromkeys(self.sources, 0)
        self._width = len(self.sources)
        self._watermarks = dict.fromkeys(self.sources, -_FAR)
        # What is older than a source's reach can no longer be met by that source.
        self._reach = dict.fromkeys(self.sources, -_FAR)
        self._furthest = -_FAR
        # Per source the heads that wait for it, as (event time, serial, value); entries whose head has gone are skipped.
        self._waiting: dict[str, list[tuple[int, int, Hashable]]] = {source: [] for source in self.sources}
        self._others = {source: [heap for s, heap in self._waiting.items() if s != source] for source in self.sources}
        # Values that came since the last watermark: most are complete by the next one, and then never enter `_waiting`.
        self._fresh: list[Hashable] = []
        self._serial = 0
        self._compact_at = _COMPACT_AT_LEAST
        # Per source its heads by event time, kept only while the source overflows.
        self._oldest: dict[str, list[tuple[int, int, Hashable, Member]]] = {}
        self._restored = False
        self._dropped: dict[str, Counter[str]] = {source: Counter() for source in self.sources}
        self._without_key: Counter[str] = Counter()
        self._unmatched: dict[str, deque[tuple[int, Hashable]]] = {source: deque(maxlen=_REMEMBERED) for source in self.sources}
        self._nearest_miss: SpreadRefused | None = None

    def push(self, source: str, stamp_ns: int, item: Any, key: Hashable = None) -> list[JoinSet]:
        """Takes one item; returns the sets that it completes: none or one with `on='time'`.

        Raises:
            UnknownSource: the source is not part of this join.
            JoinOverflow: `overflow='error'` and the source holds `max_held` items already; the item was not taken.
        """
        try:
            if stamp_ns < self._watermarks[source]:
                self._drop(source, stamp_ns, item, "late")
                return []
        except KeyError:
            raise self._unknown(source) from None
        value: Hashable = stamp_ns
        if self._keyed:
            if key is None:
                self._without_key[source] += 1
                self._drop(source, stamp_ns, item, "unmatched", None)
                return []
            value = key if type(key) is str else (type(key), key)  # `_value`, written out: this runs once per message
            if not self._by_key:
                value = (stamp_ns, value)
        heads, member = self._heads.get(value), _new(Member, (stamp_ns, item))
        if heads is None:
            if self._furthest > stamp_ns:  # it is not late, so another source is past it
                self._drop(source, stamp_ns, item, "unmatched", value)
                return []
            if self._held[source] >= self.max_held or self._oldest or self._width == 1:
                return self._hold(source, value, member)
            self._heads[value] = {source: member}
            self._held[source] += 1
            self._fresh.append(value)
            if len(self._fresh) > _COMPACT_AT_LEAST:
                self._enter_fresh()
            return []
        if len(heads) + 1 < self._width or source in heads or (self._by_key and self._too_wide(heads, stamp_ns)):
            return self._hold(source, value, member)
        heads[source] = member
        self._held[source] += 1
        complete = self._use(heads)
        if self._behind:
            return [complete, *self._settle(value, self._promote_all(value, heads))]
        del self._heads[value]
        return [complete]

    def advance(self, now_ns: int) -> list[JoinSet]:
        """Settles what `restore` took back, once; returns the sets among it. This join has no timer."""
        sets: list[JoinSet] = []
        if self._restored:
            self._restored = False
            for value, heads in list(self._heads.items()):
                sets += self._settle(value, heads)
        return sets

    def watermark(self, source: str, watermark_ns: int) -> list[JoinSet]:
        """Drops what waits for `source` in vain; `WATERMARK_END` says that it has ended. Completes no set."""
        try:
            old = self._watermarks[source]
        except KeyError:
            raise self._unknown(source) from None
        if watermark_ns <= old and (old < WATERMARK_END or watermark_ns >= WATERMARK_END):
            return []
        self._watermarks[source] = watermark_ns
        self._reach[source] = reach = _FAR if watermark_ns >= WATERMARK_END else watermark_ns - self._slack_ns
        self._furthest = reach if reach > self._furthest else max(self._reach.values())
        self._enter_fresh()
        waiting = self._waiting[source]
        while waiting and waiting[0][0] < reach:
            value = heappop(waiting)[2]
            heads = self._heads.get(value)
            if heads is not None and source not in heads:
                self._settle(value, heads)
        return []

    def restore(self, source: str, stamp_ns: int, item: Any, key: Hashable = None, *, used: bool = True) -> None:
        """Takes back a held item, late or not. Nothing is settled before the next `advance`, so items and watermarks may come in any order.

        `used` does not matter: what a set used is not held. A set that restored items make among themselves was never returned to anyone
        who could say so, and `advance` returns it.
        """
        if source not in self._held:
            raise self._unknown(source)
        if self._keyed and key is None:
            self.push(source, stamp_ns, item)
            return
        self._restored = True
        self._insert(source, self._value(stamp_ns, key), Member(stamp_ns, item))

    def next_due_ns(self) -> int | None:
        """0 (at once) when `advance` has restored items to settle, else None."""
        return 0 if self._restored else None

    def is_empty(self) -> bool:
        """Whether it holds nothing."""
        return not self._heads and not self._restored

    def explain(self) -> dict[str, SourceReport]:
        """Per source what is held and dropped, what its oldest item lacks, and the nearest miss.

        `nearest_miss_ns` is, with `on='key'`, the smallest spread that was refused; else the smallest distance between items of two
        sources (and, with `on='key_and_time'`, of one key) that met nobody: those held and the last few dropped.
        """
        held: dict[str, list[int]] = {source: [] for source in self.sources}
        keys: dict[str, set[Hashable]] = {source: set() for source in self.sources}
        oldest: dict[str, tuple[int, dict[str, Member]]] = {}
        for value, heads in self._heads.items():
            for source, member in heads.items():
                held[source].append(member.stamp_ns)
                keys[source].add(self._key_in(value))
                if source not in oldest or member.stamp_ns < oldest[source][0]:
                    oldest[source] = (member.stamp_ns, heads)
        for (_, source), queue in self._behind.items():
            held[source] += [member.stamp_ns for member in queue]
        miss = self._nearest_miss if self._by_key else self._nearest_in_time()
        return {
            source: SourceReport(
                held=len(held[source]),
                oldest_ns=min(held[source], default=None),
                newest_ns=max(held[source], default=None),
                watermark_ns=None if self._watermarks[source] == -_FAR else self._watermarks[source],
                dropped=dict(self._dropped[source]),
                nearest_miss_ns=None if miss is None else miss.spread_ns,
                note=self._note(source, len(keys[source]), oldest[source][1] if source in oldest else None, miss),
            )
            for source in self.sources
        }

    def _nearest_in_time(self) -> SpreadRefused | None:
        """The closest two items of different sources, and of one key where keys count, that met nobody."""
        stamps: dict[Hashable, dict[str, set[int]]] = {}
        for value, heads in self._heads.items():
            for source, member in heads.items():
                stamps.setdefault(self._key_in(value), {}).setdefault(source, set()).add(member.stamp_ns)
        for source, unmatched in self._unmatched.items():
            for stamp_ns, value in unmatched:
                stamps.setdefault(self._key_in(value), {}).setdefault(source, set()).add(stamp_ns)
        misses = (SpreadRefused.nearest(of_key) for of_key in stamps.values())
        return min((miss for miss in misses if miss is not None), key=attrgetter("spread_ns"), default=None)

    def _value(self, stamp_ns: int, key: Hashable) -> Hashable:
        """What must be equal."""
        if not self._keyed:
            return stamp_ns
        return key_slot(key) if self._by_key else (stamp_ns, key_slot(key))

    def _key_in(self, value: Hashable) -> Hashable:
        """What of a value stands for the key; None with `on='time'`."""
        return value[1] if self.on == "key_and_time" and isinstance(value, tuple) else value if self._by_key else None

    def _note(self, source: str, keys: int, heads: dict[str, Member] | None, miss: SpreadRefused | None) -> str:
        parts = [f"{n} items had no key: stamp them with key= at the source" for n in (self._without_key[source],) if n]
        if keys and self._keyed:
            parts.append(f"keys with items held: {keys}")
        if heads is not None:
            marks = {s: self._watermarks[s] for s in self.sources if s not in heads}
            lacks = (f"{s!r} (watermark {'none yet' if mark == -_FAR else mark})" for s, mark in marks.items())
            parts.append(f"its oldest item lacks {', '.join(lacks)}")
        if miss is not None and source in miss[:2]:
            parts.append(f"nearest miss: {miss.newest!r} was {miss.spread_ns} ns ahead of {miss.oldest!r}")
        return "; ".join(parts)

    def _hold(self, source: str, value: Hashable, member: Member) -> list[JoinSet]:
        """Puts an item in its place, whatever is there; returns the sets that this completes."""
        heads = self._heads.get(value, {})
        completes = len(heads) + 1 == self._width and source not in heads and not self._too_wide(heads, member.stamp_ns)
        if self.overflow == "error" and self._held[source] >= self.max_held and not completes:
            raise JoinOverflow(
                f"the exact join holds {self.max_held} items of {source!r} that wait for {sorted(set(self.sources) - {source})}; "
                "raise max_held, use overflow='drop_oldest', or see explain() for what is missing"
            )
        heads = self._insert(source, value, member)
        sets: list[JoinSet] = []
        if heads[source] is member and not self._restored:
            alone = len(heads) == 1  # else the first of this event time has been entered for all that are still missing
            if len(heads) == self._width or (self._furthest > member.stamp_ns and (alone or self._by_key)):
                sets = self._settle(value, heads)
            elif alone or self._by_key:
                self._wait(value, heads, (member.stamp_ns,))
        while self._held[source] > self.max_held:
            sets += self._overflow(source)
        return sets

    def _insert(self, source: str, value: Hashable, member: Member) -> dict[str, Member]:
        """Puts an item at the end of its queue; returns the heads of its value."""
        heads = self._heads.setdefault(value, {})
        self._held[source] += 1
        if source in heads:
            self._behind.setdefault((value, source), deque()).append(member)
        else:
            self._place(source, value, heads, member)
        return heads

    def _settle(self, value: Hashable, heads: dict[str, Member]) -> list[JoinSet]:
        """Uses and drops the heads of one value until those left wait for a source that may still send what they lack."""
        sets = []
        while heads:
            if len(heads) < self._width:
                reach = self._reach_of_missing(heads)
                doomed = [source for source, member in heads.items() if member.stamp_ns < reach]
                if not doomed:
                    break
            elif self._too_wide(heads, next(iter(heads.values())).stamp_ns):
                doomed = [min(heads, key=lambda source: heads[source].stamp_ns)]
                self.refused = refused = SpreadRefused.of({source: member.stamp_ns for source, member in heads.items()})
                self._nearest_miss = min(self._nearest_miss or refused, refused, key=attrgetter("spread_ns"))
            else:
                sets.append(self._use(heads))
                self._promote_all(value, heads)
                continue
            for source in doomed:
                member = heads.pop(source)
                self._held[source] -= 1
                self._drop(source, member.stamp_ns, member.item, "unmatched", value)
                if self._behind:
                    self._promote(source, value, heads)
        if heads:
            self._wait(value, heads, {member.stamp_ns for member in heads.values()})
        else:
            del self._heads[value]
        return sets

    def _reach_of_missing(self, heads: dict[str, Member]) -> int:
        reach = -_FAR
        for source, reached in self._reach.items():
            if reached > reach and source not in heads:
                reach = reached
        return reach

    def _wait(self, value: Hashable, heads: dict[str, Member], stamps: Iterable[int]) -> None:
        """Enters heads of these event times with every source that the value lacks."""
        for stamp_ns in stamps:
            self._serial += 1
            for source, waiting in self._waiting.items():
                if source not in heads:
                    heappush(waiting, (stamp_ns, self._serial, value))
        if self._serial > self._compact_at:
            self._compact()

    def _enter_fresh(self) -> None:
        fresh, self._fresh = self._fresh, []
        found = self._heads.get
        for value in fresh:
            heads = found(value)
            if heads is None:
                continue
            if len(heads) > 1:
                self._wait(value, heads, {member.stamp_ns for member in heads.values()})
                continue
            for source, member in heads.items():
                self._serial = serial = self._serial + 1
                entry = (member[0], serial, value)
                for waiting in self._others[source]:
                    heappush(waiting, entry)
        if self._serial > self._compact_at:
            self._compact()

    def _compact(self) -> None:
        """Builds the queues of the waiting anew, without the entries whose heads have gone: else they grow without watermarks."""
        for waiting in self._waiting.values():
            waiting.clear()
        self._fresh.clear()
        self._compact_at = _FAR
        for value, heads in self._heads.items():
            self._wait(value, heads, {member.stamp_ns for member in heads.values()})
        # This costs as much as is held, so it comes again after as many new entries.
        self._compact_at = self._serial + max(_COMPACT_AT_LEAST, 2 * len(self._heads))

    def _overflow(self, source: str) -> list[JoinSet]:
        """Drops the oldest of the source's heads."""
        oldest = self._oldest.get(source)
        if oldest is None:
            # One pass over all that is held; from here on `_place` keeps it up to date.
            numbered = enumerate(self._heads.items(), -len(self._heads))
            oldest = [(heads[source].stamp_ns, n, value, heads[source]) for n, (value, heads) in numbered if source in heads]
            self._oldest[source] = oldest
            heapify(oldest)
        while True:
            stamp_ns, _, value, member = heappop(oldest)
            heads = self._heads.get(value, {})
            if heads.get(source) is member:
                break
        del heads[source]
        self._held[source] -= 1
        self._drop(source, stamp_ns, member.item, "overflow")
        self._promote(source, value, heads)
        return self._settle(value, heads)

    def _place(self, source: str, value: Hashable, heads: dict[str, Member], member: Member) -> None:
        heads[source] = member
        oldest = self._oldest.get(source)
        if oldest is not None:
            if len(oldest) > 2 * self.max_held:
                del self._oldest[source]  # mostly entries of what has gone: the source no longer overflows
            else:
                self._serial += 1
                heappush(oldest, (member.stamp_ns, self._serial, value, member))

    def _promote(self, source: str, value: Hashable, heads: dict[str, Member]) -> None:
        """Moves the next of a source's queue to its head."""
        queue = self._behind.get((value, source))
        if queue is not None:
            self._place(source, value, heads, queue.popleft())
            if not queue:
                del self._behind[value, source]

    def _promote_all(self, value: Hashable, heads: dict[str, Member]) -> dict[str, Member]:
        heads.clear()
        for source in self.sources:
            self._promote(source, value, heads)
        return heads

    def _use(self, heads: dict[str, Member]) -> JoinSet:
        """Makes a set of all heads and lets go of them."""
        held = self._held
        for source in heads:
            held[source] -= 1
        members = {source: heads[source] for source in self.sources}
        return _new(JoinSet, (members, True))

    def _too_wide(self, heads: dict[str, Member], stamp_ns: int) -> bool:
        if not self._by_key:
            return False
        oldest = newest = stamp_ns
        for member in heads.values():
            if member[0] < oldest:
                oldest = member[0]
            elif member[0] > newest:
                newest = member[0]
        return newest - oldest > self._slack_ns

    def _drop(self, source: str, stamp_ns: int, item: Any, reason: str, value: Hashable = None) -> None:
        self._dropped[source][reason] += 1
        if value is not None:
            self._unmatched[source].append((stamp_ns, value))
        self.leaving.append(_new(Released, (source, stamp_ns, item, reason)))


__all__ = ("Exact",)
