"""The ids that a group has decided on, newest kept: what arrives with one of them is a duplicate."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping

log = logging.getLogger("edgeserve")

GENERATION = 131_072
MOST = 32 * GENERATION
"""So many ids (4.2 million, some 400 MB) a member remembers at most, however long an input stays unsettled."""


class RecentIds:
    """The ids since the oldest input that is not settled, at least the newest `generation`, at most the newest `most`.

    Forgetting is dropping a whole set: an ordered dict that forgets one by one costs as much as all the rest of a step.
    The hot loops read `new` and `old` themselves and call `turn()` once per batch.
    """

    __slots__ = ("_begun", "_olds", "_warned", "generation", "most", "new", "old")

    def __init__(self, ids: Iterable[bytes] = (), generation: int = GENERATION, most: int = MOST) -> None:
        self.new: set[bytes] = set()
        self.old: Container[bytes] = set()
        # Oldest first: the ids, and the positions by topic that had been read when the generation was full; None: not known yet.
        self._olds: deque[tuple[set[bytes], dict[str, int] | None]] = deque()
        self._begun = self._warned = False
        self.generation, self.most = generation, most
        self.update(ids)

    def __contains__(self, id_: bytes) -> bool:
        return id_ in self.new or id_ in self.old

    def __len__(self) -> int:
        return len(self.new) + sum(len(ids) for ids, _ in self._olds)

    def update(self, ids: Iterable[bytes]) -> None:
        """Adds ids, oldest first."""
        for id_ in ids:
            self.new.add(id_)
            if len(self.new) >= self.generation:
                self._begin()

    def discard(self, ids: Iterable[bytes]) -> None:
        """Forgets ids whose decision turned out not to be this member's."""
        for id_ in ids:
            self.new.discard(id_)
            for old, _ in self._olds:
                old.discard(id_)

    @property
    def wants_to_turn(self) -> bool:
        """Whether `turn` has something to do."""
        return self._begun or len(self.new) >= self.generation

    def turn(self, read: Mapping[str, int] | None = None, floor: Callable[[str], int] | None = None) -> None:
        """Begins a new generation when the current one is full, and forgets those that no unsettled input can be a duplicate of.

        Args:
            read: by topic, below which position messages have been read.
            floor: by topic, below which position all is settled; asked only when a generation has begun. None: all that was read is.
        """
        if len(self.new) >= self.generation:
            self._begin()
        if not self._begun:
            return
        self._begun = False
        point = dict(read or {})
        self._olds = deque((ids, point if known is None else known) for ids, known in self._olds)
        floors = {topic: floor(topic) for topic in point} if floor is not None and len(self._olds) > 1 else {}
        while len(self._olds) > 1 and all(floors.get(topic, at) >= at for topic, at in (self._olds[0][1] or {}).items()):
            self._olds.popleft()
        self._look_again()

    def _begin(self) -> None:
        self._olds.append((self.new, None))
        self.new, self._begun = set(), True
        while (len(self._olds) + 1) * self.generation > self.most:
            self._olds.popleft()
            if not self._warned:
                self._warned = True
                log.warning(
                    "an input has stayed unsettled for more than %d messages: of older ones the ids are forgotten, so that "
                    "those that were sent twice are taken for new ones",
                    self.most - self.generation,
                )
        self._look_again()

    def _look_again(self) -> None:
        self.old = self._olds[0][0] if len(self._olds) == 1 else _Any([ids for ids, _ in self._olds])


class _Any:
    """What is in any of several sets."""

    __slots__ = ("_sets",)

    def __init__(self, sets: list[set[bytes]]) -> None:
        self._sets = sets

    def __contains__(self, id_: object) -> bool:
        for ids in self._sets:  # a generator costs more than this loop
            if id_ in ids:
                return True
        return False


__all__ = ("GENERATION", "MOST", "RecentIds")
