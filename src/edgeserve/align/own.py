"""A user's own join policy: a class with `push`, `advance` and `explain`, made into a full `Policy`."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from edgeserve.align.base import JoinSet, Member, Policy, Released, SourceReport
from edgeserve.core.errors import ConfigurationError, JoinOverflow


@runtime_checkable
class OwnPolicy(Protocol):
    """What a user's own policy must have. `watermark(source, watermark_ns)` and `next_due_ns()` are used when they are there.

    After a restart, what was held is pushed again and the sets that this makes are not run; nor is what they used held any longer.
    """

    def push(self, source: str, stamp_ns: int, item: Any) -> Iterable[Any] | None:
        """Takes one item (and `key=`, when it has that parameter); returns the completed sets, each with `.members[source]`."""

    def advance(self, now_ns: int) -> Iterable[Any] | None:
        """Returns the sets that the time makes due."""

    def explain(self) -> Any:
        """Says what is held and why nothing fires: a mapping by source, or any text."""


class Adapted(Policy):
    """Keeps the books for a user's own policy: which items it was given, which its sets have used, which are too many.

    A member of a returned set is released as used with the first set that it is in. Other items count as held, up to `max_held` per
    source; beyond that the first to arrive is dropped as 'overflow', or `JoinOverflow` is raised. An item is known by its identity, so
    the policy must hand out the object that it was given.

    Args:
        sources: the source ids, in the order in which sets carry them.
        own: the user's policy.
        max_held: the most items held per source.
        overflow: 'drop_oldest' or 'error'.
    """

    def __init__(
        self, sources: Sequence[str], own: OwnPolicy, *, max_held: int = 10_000, overflow: Literal["drop_oldest", "error"] = "drop_oldest"
    ) -> None:
        super().__init__(sources)
        if overflow not in ("drop_oldest", "error"):
            raise ConfigurationError(f"overflow={overflow!r} is not known; use 'drop_oldest' or 'error'")
        if max_held < 1:
            raise ConfigurationError(f"max_held must be at least 1, got {max_held}")
        self.own = own
        self.max_held = max_held
        self.overflow = overflow
        self._name = type(own).__name__
        self._takes_key = _check_shape(own, self._name)
        self._watermark: Callable[[str, int], Any] | None = getattr(own, "watermark", None)
        self.takes_watermarks = self._watermark is not None
        self._next_due: Callable[[], int | None] | None = getattr(own, "next_due_ns", None)
        # In order of arrival. The policy's reference keeps an item alive, and so does ours: an id stands for one object.
        self._held: dict[str, dict[int, list[Member]]] = {source: {} for source in self.sources}
        self._count = dict.fromkeys(self.sources, 0)
        self._watermarks: dict[str, int] = {}
        self._dropped: dict[str, Counter[str]] = {source: Counter() for source in self.sources}

    def push(self, source: str, stamp_ns: int, item: Any, key: Any = None) -> list[JoinSet]:
        """Hands one item to the user's policy; returns the sets it completes.

        Raises:
            ConfigurationError: what the policy returned are not sets; the message says what was wrong.
            JoinOverflow: `overflow='error'` and `max_held` items of the source are held; the item was not taken.
        """
        if source not in self._held:
            raise self._unknown(source)
        if self._count[source] >= self.max_held:
            self._make_room(source)
        self._held[source].setdefault(id(item), []).append(Member(stamp_ns, item))
        self._count[source] += 1
        given = {"key": key} if self._takes_key else {}
        try:
            returned = self.own.push(source, stamp_ns, item, **given)
        except Exception:
            self._take(source, item)  # refused, so it is not held: the caller still has it
            raise
        return self._sets(returned)

    def advance(self, now_ns: int) -> list[JoinSet]:
        """Tells the user's policy the time; returns the sets that are due."""
        return self._sets(self.own.advance(now_ns))

    def watermark(self, source: str, watermark_ns: int) -> list[JoinSet]:
        """Hands the watermark on, if the user's policy takes them."""
        if source not in self._held:
            raise self._unknown(source)
        self._watermarks[source] = watermark_ns
        return [] if self._watermark is None else self._sets(self._watermark(source, watermark_ns))

    def next_due_ns(self) -> int | None:
        """What the user's policy says, if it says it."""
        return None if self._next_due is None else self._next_due()

    def explain(self) -> dict[str, SourceReport]:
        """Our books per source, with what the user's policy says as the note."""
        said = self.own.explain()
        reports = {}
        for source in self.sources:
            note = said.get(source, "") if isinstance(said, Mapping) else said
            stamps = [member.stamp_ns for members in self._held[source].values() for member in members]
            theirs = note if isinstance(note, SourceReport) else None
            reports[source] = SourceReport(
                held=self._count[source],
                oldest_ns=min(stamps, default=None),
                newest_ns=max(stamps, default=None),
                watermark_ns=self._watermarks.get(source),
                dropped=dict(self._dropped[source]),
                nearest_miss_ns=theirs.nearest_miss_ns if theirs else None,
                note=theirs.note if theirs else str(note),
            )
        return reports

    def _make_room(self, source: str) -> None:
        if self.overflow == "error":
            raise JoinOverflow(
                f"{self._name} has put {self.max_held} items of {source!r} into no set; raise max_held or use overflow='drop_oldest'"
            )
        first = next(iter(self._held[source].values()))[0]
        self._take(source, first.item)
        self._dropped[source]["overflow"] += 1
        self.leaving.append(Released(source, first.stamp_ns, first.item, "overflow"))

    def _take(self, source: str, item: Any) -> Member | None:
        """Takes an item off the books; None when it was not on them (used by an earlier set, or overflowed)."""
        members = self._held[source].get(id(item))
        if members is None:
            return None
        member = members.pop(0)
        if not members:
            del self._held[source][id(item)]
        self._count[source] -= 1
        return member

    def _sets(self, returned: Iterable[Any] | None) -> list[JoinSet]:
        """Checks what the user's policy returned, and releases the members."""
        if returned is None:
            return []
        if not isinstance(returned, Iterable):
            raise ConfigurationError(f"{self._name} returned {type(returned).__name__} where a list of sets was expected")
        sets = [self._checked(found) for found in returned]
        for joined in sets:
            for source, member in joined.members.items():
                if self._take(source, member.item) is not None:
                    self.leaving.append(Released(source, member.stamp_ns, member.item, ""))
        return sets

    def _checked(self, found: Any) -> JoinSet:
        members = getattr(found, "members", None)
        if not isinstance(members, Mapping):
            raise ConfigurationError(f"a set that {self._name} returned is {type(found).__name__}, without a mapping .members by source")
        if set(members) != set(self.sources):
            raise ConfigurationError(f"a set that {self._name} returned has members of {sorted(members)}, expected {sorted(self.sources)}")
        try:
            return JoinSet({source: Member(members[source].stamp_ns, members[source].item) for source in self.sources})
        except AttributeError as exc:
            raise ConfigurationError(f"a member of a set that {self._name} returned lacks .stamp_ns or .item: {exc}") from exc


def _check_shape(own: Any, name: str) -> bool:
    """Refuses what cannot be a policy; says whether its `push` takes a key."""
    missing = [method for method in ("push", "advance", "explain") if not callable(getattr(own, method, None))]
    if missing:
        raise ConfigurationError(
            f"a join policy needs the methods push(source, stamp_ns, item), advance(now_ns) and explain(); "
            f"{name} lacks {', '.join(missing)}"
        )
    for method, arguments in (("push", ("source", 0, None)), ("advance", (0,)), ("explain", ())):
        try:
            inspect.signature(getattr(own, method)).bind(*arguments)
        except TypeError as exc:
            raise ConfigurationError(f"{name}.{method} cannot be called with {len(arguments)} arguments: {exc}") from exc
    return "key" in inspect.signature(own.push).parameters


__all__ = ("Adapted", "OwnPolicy")
