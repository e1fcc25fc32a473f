"""A join per key: items of different keys never meet. Each key has a policy of its own, made when the key is first seen."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Literal, NamedTuple

from edgeserve.align.base import JoinSet, Policy, Released, SourceReport, SpreadRefused, key_slot
from edgeserve.core.errors import ConfigurationError, JoinOverflow
from edgeserve.core.message import WATERMARK_END

_COMPACT_AT_LEAST = 256
_BOUNDS = "max_held (of a ByKey made by hand also max_keys)"


class _Book:
    """An item that a key's policy holds, and whether a set has used it."""

    __slots__ = ("item", "stamp_ns", "used")

    def __init__(self, stamp_ns: int, item: Any, used: bool) -> None:
        self.stamp_ns, self.item, self.used = stamp_ns, item, used


class _Mark(NamedTuple):
    """A source's watermark. `opened` counts how often the source began anew after its end."""

    watermark_ns: int
    opened: int


class _Entry:
    """One key: its policy and what this holds.

    Attributes:
        held: per source, the books by the item's identity: a policy hands out the object that it was given.
        due_ns: when its policy wants to be told the time.
        told_ns: the time that it was told last.
        seen: which of the watermarks its policy knows.
        told: what it was told last, per source.
        missed: whether something of it was dropped or refused, so that its report says why.
    """

    __slots__ = ("due_ns", "held", "key", "missed", "policy", "seen", "slot", "told", "told_ns")

    def __init__(self, slot: Hashable, key: Hashable, policy: Policy, sources: Sequence[str]) -> None:
        self.slot, self.key, self.policy = slot, key, policy
        self.held: dict[str, dict[int, list[_Book]]] = {source: {} for source in sources}
        self.due_ns: int | None = None
        self.told_ns: int | None = None
        self.seen = 0
        self.told: dict[str, _Mark] = {}
        self.missed = False

    def books(self, source: str) -> Iterable[_Book]:
        """What it holds of a source."""
        return [book for books in list(self.held[source].values()) for book in books]


class ByKey(Policy):
    """Runs a policy of its own for each key: the sets of a key are those that the policy makes of this key's items alone.

    An item without a key is dropped as 'unmatched'. Keys of different types are different. Watermarks are of the sources and hold for
    every key; a policy that holds nothing learns them with its next item. Timers are each key's own: a `min_period_ns` counts per key.

    A key is forgotten when its policy is empty (`Policy.is_empty`). Beyond that the keys whose last item came the longest ago make room:
    what they hold is dropped as 'overflow', or as used where a set has used it, and their policies begin anew with the next item.

    Args:
        sources: the source ids, in the order in which sets carry them.
        make_policy: makes the policy of one key from the sources: a new one with each call.
        max_keys: the most keys that are remembered. One more forgets the key whose last item came the longest ago.
        max_held: the most items held per source, over all keys together; None: no bound but the policies' own. One more forgets the key
            whose last item of this source came the longest ago.
        overflow: 'drop_oldest', or 'error': an item beyond a bound raises `JoinOverflow` and is not taken.

    Raises:
        ConfigurationError: a bound is below 1, `overflow` is not known, or `make_policy` makes no policy of these sources, or makes the
            same one twice.

    Example:
        >>> from edgeserve.align import Latest
        >>> join = ByKey(["a", "b"], Latest)
        >>> join.push("a", 100, "a0", "x"), join.push("b", 101, "b0", "y")
        ([], [])
        >>> [s.members["a"].item + s.members["b"].item for s in join.push("b", 102, "b1", "x")]
        ['a0b1']
    """

    def __init__(
        self,
        sources: Sequence[str],
        make_policy: Callable[[Sequence[str]], Policy],
        *,
        max_keys: int = 65_536,
        max_held: int | None = None,
        overflow: Literal["drop_oldest", "error"] = "drop_oldest",
    ) -> None:
        super().__init__(sources)
        if overflow not in ("drop_oldest", "error"):
            raise ConfigurationError(f"overflow={overflow!r} is not known; use 'drop_oldest' or 'error'")
        if max_keys < 1 or (max_held is not None and max_held < 1):
            raise ConfigurationError(f"max_keys and max_held must be at least 1, got {max_keys} and {max_held}")
        self.max_keys, self.max_held, self.overflow = max_keys, max_held, overflow
        self._make = make_policy
        self._spare: Policy | None = self._first_policy()
        self.timed, self.takes_watermarks, self.drops_late = self._spare.timed, self._spare.takes_watermarks, self._spare.drops_late
        self.max_interval_ns: int | None = getattr(self._spare, "max_interval_ns", None)
        # A policy that a user has derived may answer these itself.
        self._own_drain = type(self._spare).drain is not Policy.drain
        self._own_spread = type(self._spare).spread_refused is not Policy.spread_refused
        # The key whose last item came the longest ago is the first; per source, among those that hold something of it.
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._holders: dict[str, OrderedDict[Hashable, _Entry]] = {source: OrderedDict() for source in self.sources}
        self._held = dict.fromkeys(self.sources, 0)
        self._marks: dict[str, _Mark] = {}
        self._seen = 0
        # (when, serial, entry); records of what is due at another time by now are skipped.
        self._timers: list[tuple[int, int, _Entry]] = []
        self._serial = 0
        self._now_ns: int | None = None
        self._dropped: dict[str, Counter[str]] = {source: Counter() for source in self.sources}
        self._without_key: Counter[str] = Counter()
        self._made_room = 0
        # Of keys that are forgotten: per source the nearest miss, and what was said of it.
        self._misses: dict[str, tuple[int, str]] = {}

    # --- what a policy does -------------------------------------------------------------------------------------

    def push(self, source: str, stamp_ns: int, item: Any, key: Hashable = None) -> list[JoinSet]:
        """Takes one item; returns the sets that its key's policy completes with it.

        Raises:
            UnknownSource: the source is not part of this join.
            JoinOverflow: `overflow='error'` and a bound is reached; the item was not taken.
        """
        if source not in self._held:
            raise self._unknown(source)
        if key is None:
            self._without_key[source] += 1
            self._let_go(source, stamp_ns, item, "unmatched")
            return []
        entry = self._enter(source, key)
        settled = [] if entry.seen == self._seen else self._catch_up(entry)
        self._book(entry, source, _Book(stamp_ns, item, False))
        try:
            found = entry.policy.push(source, stamp_ns, item, key)
        except BaseException:
            self._take(entry, source, stamp_ns, item)  # refused, so it is not held: the caller still has it
            raise
        if not found and (self._own_spread or entry.policy.refused is not None):
            self._refused_by(entry)
        sets = self._after(entry, settled + found if settled else found)
        self._keep_bound(source)
        return sets

    def advance(self, now_ns: int) -> list[JoinSet]:
        """Tells the time to the keys whose timers are due; returns the sets, those of the earliest timer first."""
        due = []
        # A clock that was set back is told to all that wait, since they may count from a time that is yet to come.
        until_ns = now_ns if self._now_ns is None or now_ns >= self._now_ns else None
        self._now_ns = now_ns
        while (next_ns := self.next_due_ns()) is not None and (until_ns is None or next_ns <= until_ns):
            entry = heappop(self._timers)[2]
            entry.due_ns = None
            due.append(entry)
        found = []
        for entry in due:
            entry.told_ns = now_ns
            found += self._after(entry, entry.policy.advance(now_ns))
        return found

    def watermark(self, source: str, watermark_ns: int) -> list[JoinSet]:
        """Remembers a source's watermark, and tells it to the keys that hold something; returns the sets this settles.

        A lower one than the last is ignored, but after `WATERMARK_END` it opens the source again.
        """
        if source not in self._held:
            raise self._unknown(source)
        old = self._marks.get(source)
        opens = old is not None and old.watermark_ns >= WATERMARK_END > watermark_ns
        if old is not None and watermark_ns <= old.watermark_ns and not opens:
            return []
        self._marks[source] = _Mark(watermark_ns, 0 if old is None else old.opened + opens)
        if not self.takes_watermarks:
            return []
        self._seen += 1
        holding = {slot: entry for holders in self._holders.values() for slot, entry in holders.items()}
        return [found for entry in holding.values() for found in self._after(entry, self._catch_up(entry))]

    def restore(self, source: str, stamp_ns: int, item: Any, key: Hashable = None, *, used: bool = True) -> None:
        """Takes back a held item, into its key's policy. Beyond a bound keys make room, also with `overflow='error'`."""
        if source not in self._held:
            raise self._unknown(source)
        if key is None:
            self.push(source, stamp_ns, item)
            return
        entry = self._enter(source, key, restores=True)
        if entry.seen != self._seen:
            self._catch_up(entry)
        self._book(entry, source, _Book(stamp_ns, item, used))
        entry.policy.restore(source, stamp_ns, item, key, used=used)
        self._after(entry, [])
        self._keep_bound(source)

    def next_due_ns(self) -> int | None:
        """The earliest time at which some key's policy has something to do, or None."""
        timers = self._timers
        while timers and timers[0][2].due_ns != timers[0][0]:
            heappop(timers)
        return timers[0][0] if timers else None

    def explain(self) -> dict[str, SourceReport]:
        """Per source the sums over the keys, how many keys hold something of it, and the nearest miss of any."""
        entries = list(self._entries.values())
        misses = dict(self._misses)
        for entry in entries:
            if entry.missed or any(entry.held.values()):
                _nearest(misses, entry)
        return {source: self._report(source, len(entries), misses.get(source)) for source in self.sources}

    def _report(self, source: str, keys: int, miss: tuple[int, str] | None) -> SourceReport:
        holders = list(self._holders[source].values())
        stamps = [book.stamp_ns for entry in holders for book in entry.books(source)]
        mark = self._marks.get(source)
        parts = [f"{n} items had no key: stamp them with key= at the source" for n in (self._without_key[source],) if n]
        parts.append(f"keys with items held: {len(holders)} of {keys}")
        if self._made_room:
            parts.append(f"{self._made_room} keys were forgotten to make room: raise {_BOUNDS}")
        if miss is not None:
            parts.append(miss[1])
        elif holders and (note := holders[0].policy.explain()[source].note):
            parts.append(f"key {holders[0].key!r}: {note}")
        return SourceReport(
            held=len(stamps),
            oldest_ns=min(stamps, default=None),
            newest_ns=max(stamps, default=None),
            watermark_ns=None if mark is None else mark.watermark_ns,
            dropped=dict(self._dropped[source]),
            nearest_miss_ns=None if miss is None else miss[0],
            note="; ".join(parts),
        )

    # --- keys ---------------------------------------------------------------------------------------------------

    def _first_policy(self) -> Policy:
        """A policy for the first key, if they can be made at all."""
        made = self._make(self.sources)
        if not isinstance(made, Policy) or set(made.sources) != set(self.sources):
            raise ConfigurationError(f"what makes the policy of each key made {made!r} for the sources {list(self.sources)!r}")
        if self._make(self.sources) is made:
            raise ConfigurationError(
                f"one {type(made).__name__} cannot serve several keys, and it was made once for all of them: make a new one with each call"
            )
        return made

    def _enter(self, source: str, key: Hashable, *, restores: bool = False) -> _Entry:
        """The entry of a key, which is the newest from now on."""
        slot = key_slot(key)
        entry = self._entries.get(slot)
        if self.overflow == "error" and not restores:
            if self.max_held is not None and self._held[source] >= self.max_held:
                raise self._full(f"{self.max_held} items of {source!r}")
            if entry is None and len(self._entries) >= self.max_keys:
                raise self._full(f"{self.max_keys} keys")
        if entry is not None:
            self._entries.move_to_end(slot)
            return entry
        while len(self._entries) >= self.max_keys:
            self._make_room(next(iter(self._entries.values())))
        policy, self._spare = self._spare or self._make(self.sources), None
        entry = self._entries[slot] = _Entry(slot, key, policy, self.sources)
        return entry

    def _full(self, what: str) -> JoinOverflow:
        return JoinOverflow(
            f"the join by key holds {what} already; raise {_BOUNDS}, use overflow='drop_oldest', or see explain() for what is missing"
        )

    def _keep_bound(self, source: str) -> None:
        if self.max_held is not None:
            while self._held[source] > self.max_held:
                self._make_room(next(iter(self._holders[source].values())))

    def _make_room(self, entry: _Entry) -> None:
        """Forgets a key with all that it holds."""
        entry.missed = True
        for source in self.sources:
            books = entry.books(source)
            entry.held[source].clear()
            self._holders[source].pop(entry.slot, None)
            for book in books:
                self._held[source] -= 1
                self._let_go(source, book.stamp_ns, book.item, "" if book.used else "overflow")
        self._made_room += 1
        self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        if entry.missed:
            _nearest(self._misses, entry)
        entry.due_ns = None
        del self._entries[entry.slot]

    def _catch_up(self, entry: _Entry) -> list[JoinSet]:
        """Tells a key's policy the watermarks that it does not know."""
        found: list[JoinSet] = []
        for source, mark in self._marks.items():
            told = entry.told.get(source)
            if told == mark:
                continue
            if told is not None and told.opened != mark.opened and told.watermark_ns < WATERMARK_END:
                found += entry.policy.watermark(source, WATERMARK_END)  # which it has slept through: else a lower one tells it nothing
            entry.told[source] = mark
            found += entry.policy.watermark(source, mark.watermark_ns)
        entry.seen = self._seen
        return found

    def _after(self, entry: _Entry, found: list[JoinSet]) -> list[JoinSet]:
        """Takes note of what a key's policy has done: its sets, what it has let go of, when it is due, whether it is empty."""
        policy = entry.policy
        for members, final in found:
            for source, member in members.items():
                if member is None:
                    continue
                if final:
                    self._take(entry, source, member.stamp_ns, member.item)
                else:
                    for book in entry.held[source].get(id(member.item), ()):
                        book.used = True
        if policy.leaving or self._own_drain:
            for source, stamp_ns, item, reason in policy.drain():
                self._take(entry, source, stamp_ns, item)
                self._let_go(source, stamp_ns, item, reason)
                if reason:
                    entry.missed = True
        due_ns = policy.next_due_ns()
        if due_ns is not None and entry.told_ns is not None and self._now_ns is not None and self._now_ns < entry.told_ns:
            due_ns = self._now_ns  # the clock was set back since: it may count from a time that is yet to come
        if due_ns != entry.due_ns:
            entry.due_ns = due_ns
            if due_ns is not None:
                self._set_timer(due_ns, entry)
        if due_ns is None and not any(entry.held.values()) and policy.is_empty():
            self._forget(entry)
        return found

    def _set_timer(self, due_ns: int, entry: _Entry) -> None:
        self._serial += 1
        heappush(self._timers, (due_ns, self._serial, entry))
        if len(self._timers) > _COMPACT_AT_LEAST + 2 * len(self._entries):
            newest = {id(timer[2]): timer for timer in sorted(self._timers) if timer[0] == timer[2].due_ns}
            self._timers = list(newest.values())
            heapify(self._timers)

    def _refused_by(self, entry: _Entry) -> None:
        refused: SpreadRefused | None = entry.policy.spread_refused()
        if refused is not None:
            self.refused = refused
            entry.missed = True

    # --- the books ----------------------------------------------------------------------------------------------

    def _book(self, entry: _Entry, source: str, book: _Book) -> None:
        entry.held[source].setdefault(id(book.item), []).append(book)
        self._held[source] += 1
        holders = self._holders[source]
        holders[entry.slot] = entry
        holders.move_to_end(entry.slot)

    def _take(self, entry: _Entry, source: str, stamp_ns: int, item: Any) -> None:
        """Takes an item off the books."""
        held = entry.held[source]
        books = held.get(id(item), [])
        for book in books:
            if book.stamp_ns == stamp_ns:
                break
        else:
            return  # a later set with it
        self._held[source] -= 1
        books.remove(book)
        if not books:
            del held[id(item)]
            if not held:
                del self._holders[source][entry.slot]

    def _let_go(self, source: str, stamp_ns: int, item: Any, reason: str) -> None:
        if reason:
            self._dropped[source][reason] += 1
        self.leaving.append(Released(source, stamp_ns, item, reason))


def _nearest(misses: dict[str, tuple[int, str]], entry: _Entry) -> None:
    """Notes what a key's policy says of its nearest miss, where that is the nearest."""
    for source, report in entry.policy.explain().items():
        found = report.nearest_miss_ns
        if found is not None and (source not in misses or found < misses[source][0]):
            misses[source] = (found, f"key {entry.key!r}: {report.note}")


__all__ = ("ByKey",)
