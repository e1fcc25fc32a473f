"""The contract of a join policy: pure decisions on (source, event time, item), no I/O, the clock handed in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

from edgeserve.core.errors import ConfigurationError, UnknownSource


class Member(NamedTuple):
    """One source's part of a set: its event time in ns and the item that was pushed."""

    stamp_ns: int
    item: Any


class JoinSet(NamedTuple):
    """A completed set: `.members[source].stamp_ns` and `.item`.

    `final`: its members are in this set alone and leave the policy with it, not through `drain()`.
    """

    members: dict[str, Member]
    final: bool = False


class Released(NamedTuple):
    """An item that the policy no longer holds. `reason` is "" when a set used it, else the counter of the drop."""

    source: str
    stamp_ns: int
    item: Any
    reason: str


class SpreadRefused(NamedTuple):
    """Two sources whose event times lie further apart than the join tolerates, and by how much they do."""

    oldest: str
    newest: str
    spread_ns: int

    @classmethod
    def of(cls, stamps: dict[str, int]) -> SpreadRefused:
        """The two ends of these event times by source."""
        oldest, newest = min(stamps, key=stamps.__getitem__), max(stamps, key=stamps.__getitem__)
        return cls(oldest, newest, stamps[newest] - stamps[oldest])

    @classmethod
    def nearest(cls, stamps: dict[str, set[int]]) -> SpreadRefused | None:
        """The closest pair of different event times of two sources, or None when there is none."""
        ordered = sorted((stamp, source) for source, of_source in stamps.items() for stamp in of_source)
        pairs = [cls(a[1], b[1], b[0] - a[0]) for a, b in pairwise(ordered) if a[1] != b[1] and a[0] != b[0]]
        return min(pairs, key=attrgetter("spread_ns"), default=None)


def key_slot(key: Hashable) -> Hashable:
    """What stands for a key in a dict, where 1, True and 1.0 are one otherwise, and the hashes of "1" and b"1" collide."""
    return key if type(key) is str else (type(key), key)


@dataclass(frozen=True)
class SourceReport:
    """What a policy knows of one source: for the question "why did my join not fire?"."""

    held: int
    oldest_ns: int | None
    newest_ns: int | None
    watermark_ns: int | None
    dropped: dict[str, int]
    nearest_miss_ns: int | None
    note: str


class Policy(ABC):
    """A join policy. Every pushed item leaves exactly once: with its final set, or through `drain()`, as used or dropped with a reason.

    Attributes:
        timed: whether a push may make `next_due_ns` other than None.
        takes_watermarks: whether a watermark may change what becomes of an item; else a policy per key is not told them.
        drops_late: whether an item older than its own source's watermark is dropped as late.
        refused: what `spread_refused` will return.
        leaving: what `drain` will return. The same list for as long as the policy lives: whoever pushes often looks here first.
    """

    timed = True
    takes_watermarks = True
    drops_late = False

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self.leaving: list[Released] = []
        self.refused: SpreadRefused | None = None
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise ConfigurationError(f"a join needs at least one source and each only once, got {list(self.sources)!r}")

    @abstractmethod
    def push(self, source: str, stamp_ns: int, item: Any, key: Any = None) -> list[JoinSet]:
        """Takes one item; returns the sets that it completes, in order."""

    @abstractmethod
    def advance(self, now_ns: int) -> list[JoinSet]:
        """Tells the time (wall clock, ns); returns the sets that a timer makes due."""

    def watermark(self, source: str, watermark_ns: int) -> list[JoinSet]:
        """Tells that `source` will send nothing older than `watermark_ns` any more; returns the sets this settles."""
        return []

    def restore(self, source: str, stamp_ns: int, item: Any, key: Any = None, *, used: bool = True) -> None:
        """Takes back an item that was held before a restart and has already triggered: state, never a trigger.

        `used` tells whether a set has used the item: it decides what the item is released as when it is replaced.
        """
        self.push(source, stamp_ns, item, key)

    def next_due_ns(self) -> int | None:
        """The wall-clock time at which `advance` has something to do, or None."""
        return None

    def is_empty(self) -> bool:
        """Whether it holds nothing and remembers nothing that later sets depend on, but for watermarks. False where that is not known."""
        return False

    def drain(self) -> list[Released]:
        """The items released since the last call, in order: "" for those that a set has used, else why they were dropped."""
        released = self.leaving[:]
        self.leaving.clear()
        return released

    @abstractmethod
    def explain(self) -> dict[str, SourceReport]:
        """Per source: what is held, what was dropped and why, and the nearest miss."""

    def spread_refused(self) -> SpreadRefused | None:
        """The last candidate set since the previous call that was refused because its event times lie too far apart."""
        refused, self.refused = self.refused, None
        return refused

    def _unknown(self, source: str) -> UnknownSource:
        return UnknownSource(f"source {source!r} is not part of this join; it joins {', '.join(map(repr, self.sources))}")


__all__ = ("JoinSet", "Member", "Policy", "Released", "SourceReport", "SpreadRefused", "key_slot")
