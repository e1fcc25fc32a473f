"""The ids that a group has decided on, newest kept: what arrives with one of them is a duplicate."""

from __future__ import annotations

from collections.abc import Iterable

GENERATION = 131_072


class RecentIds:
    """At least the newest `generation` ids, in two generations of sets.

    Forgetting is dropping a whole set: an ordered dict that forgets one by one costs as much as all the rest of a step.
    The hot loops read `new` and `old` themselves and call `turn()` once per batch.
    """

    __slots__ = ("generation", "new", "old")

    def __init__(self, ids: Iterable[bytes] = (), generation: int = GENERATION) -> None:
        self.new: set[bytes] = set()
        self.old: set[bytes] = set()
        self.generation = generation
        self.update(ids)

    def __contains__(self, id_: bytes) -> bool:
        return id_ in self.new or id_ in self.old

    def __len__(self) -> int:
        return len(self.new) + len(self.old)

    def update(self, ids: Iterable[bytes]) -> None:
        """Adds ids, oldest first."""
        for id_ in ids:
            self.new.add(id_)
            if len(self.new) >= self.generation:
                self.turn()

    def discard(self, ids: Iterable[bytes]) -> None:
        """Forgets ids whose decision turned out not to be this member's."""
        for id_ in ids:
            self.new.discard(id_)
            self.old.discard(id_)

    def turn(self) -> None:
        """Begins a new generation when the current one is full."""
        if len(self.new) >= self.generation:
            self.old, self.new = self.new, set()


__all__ = ("GENERATION", "RecentIds")
