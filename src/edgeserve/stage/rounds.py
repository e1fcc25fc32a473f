"""How far the partitions of a join are: all end a round together."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from edgeserve.stage.ends import GRACE_S

if TYPE_CHECKING:
    from edgeserve.stage.partition import Partition

_encode = msgspec.msgpack.Encoder().encode


class Rounds:
    """How far the partitions are, as the roster says: all end a round together.

    A partition that has come to the last source's end says where that is, and waits. When all are there the first one publishes the end and
    says so, and they go on. So no result of a round stands behind its end, and none of the next before it.

    Attributes:
        published: where the last round has ended.
        open: whether another has begun since.
    """

    _AT, _PUBLISHED, _OPEN = "at:", "published", "open"

    def __init__(self, partitions: int, attributes: dict[str, bytes]) -> None:
        self._at: list[int | None] = [None] * partitions
        self.published: int | None = None
        self.open = False
        self.learn(attributes)
        # Whoever finds a round ended when it comes waits for another to begin, as with any source.
        self._waits_until = 0.0 if self.published is None else time.monotonic() + GRACE_S

    def learn(self, attributes: dict[str, bytes]) -> None:
        """Takes over what the roster says."""
        before = self.published
        self._at = [_position(attributes.get(f"{self._AT}{number}")) for number in range(len(self._at))]
        self.published = _position(attributes.get(self._PUBLISHED))
        self.open = bool(attributes.get(self._OPEN))
        if self.published != before:
            self._waits_until = 0.0

    def all_are_at(self, position: int) -> bool:
        """Whether all partitions but the first are there."""
        return all(at == position for at in self._at[1:])

    def news(self, partition: Partition) -> dict[str, bytes]:
        """What the roster does not say yet of a partition. Nothing, when it is another member's by now."""
        news = dict[str, bytes]()
        if not partition.join.leads:
            return news
        at, ended_at, published = partition.reached, partition.join.ended_at, partition.join.round_ended_at
        if at is not None and self._at[partition.number] != at:
            news[f"{self._AT}{partition.number}"] = _encode(at)
        if partition.number == 0:
            if published is not None and self.published != published:
                news[self._PUBLISHED] = _encode(published)
            if self.open != (ended_at is None):
                news[self._OPEN] = b"1" if ended_at is None else b""
        return news

    def ended(self, held: Iterable[Partition], *, at_once: bool = False) -> bool:
        """Whether all partitions have ended: these, and those of others. `at_once`: also of who found it so and does not wait for another
        round to begin."""
        published = self.published
        return (
            published is not None
            and not self.open
            and (at_once or time.monotonic() >= self._waits_until)
            and all(partition.join.ended_at == published for partition in held)
        )


def _position(encoded: bytes | None) -> int | None:
    return None if encoded is None else msgspec.msgpack.decode(encoded, type=int)


__all__ = ("Rounds",)
