"""The contract of a join policy: pure decisions on (source, event time, item), no I/O, the clock handed in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Member(NamedTuple):
    """One source's part of a set: its event time in ns and the item that was pushed."""

    stamp_ns: int
    item: Any


class JoinSet(NamedTuple):
    """A completed set: `.members[source].stamp_ns` and `.item`."""

    members: dict[str, Member]


class Released(NamedTuple):
    """An item that the policy no longer holds. `reason` is "" when a set used it, else the counter of the drop."""

    source: str
    stamp_ns: int
    item: Any
    reason: str


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
    """A join policy. Every pushed item leaves exactly once through `drain()`, as used or as dropped with a reason."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)

    @abstractmethod
    def push(self, source: str, stamp_ns: int, item: Any, key: Any = None) -> list[JoinSet]:
        """Takes one item; returns the sets that it completes, in order."""

    @abstractmethod
    def advance(self, now_ns: int) -> list[JoinSet]:
        """Tells the time (wall clock, ns); returns the sets that a timer makes due."""

    def watermark(self, source: str, watermark_ns: int) -> list[JoinSet]:
        """Tells that `source` will send nothing older than `watermark_ns` any more; returns the sets this settles."""
        return []

    def restore(self, source: str, stamp_ns: int, item: Any, key: Any = None) -> None:
        """Takes back an item that was held before a restart and has already triggered: state, never a trigger."""
        self.push(source, stamp_ns, item, key)

    def next_due_ns(self) -> int | None:
        """The wall-clock time at which `advance` has something to do, or None."""
        return None

    @abstractmethod
    def drain(self) -> list[Released]:
        """The items released since the last call, in order."""

    @abstractmethod
    def explain(self) -> dict[str, SourceReport]:
        """Per source: what is held, what was dropped and why, and the nearest miss."""


__all__ = ("JoinSet", "Member", "Policy", "Released", "SourceReport")
