"""The ends of sources: which this member has read, which the group has recorded."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from edgeserve.transport import GROWS

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[str, int]).decode
_At: TypeAlias = tuple[str, int]
Entry: TypeAlias = tuple[str, int, str]
"""(topic, position, source) of an end."""

GRACE_S = 5.0
"""How long a member that finds all sources ended when it starts waits for one to begin again."""


class Ends:
    """The sources' end headers that this member holds, and what the group has recorded of others.

    An end is acknowledged only when everything before it is settled by the whole group, and then recorded where all members see it.
    What is to be written is asked for first (`recording`, `reopening`) and taken over when it is written: a store without room then
    loses nothing, the same is asked for again.

    Attributes:
        held: in the order of their positions.
        ids: of those that are held.
        ended: source to where it has ended, unless it has begun again since.
    """

    # Where a source has ended, and where it has begun again: two attributes that only grow, so that a member that was away for a while
    # and says late what it knew takes back neither.
    _END, _BEGUN = GROWS + "end:", GROWS + "begun:"

    def __init__(self, attributes: dict[str, bytes]) -> None:
        self.held: list[Entry] = []
        self.ids: dict[Entry, bytes] = {}
        self.ended: dict[str, _At] = {}
        # The newest end of each source that is recorded, also of those that have begun again since; where these have.
        self._recorded: dict[str, _At] = {}
        self._begun: dict[str, _At] = {}
        self.learn(attributes)
        self.at_start = bool(self.ended)
        self.opened = time.monotonic()

    def learn(self, attributes: dict[str, bytes]) -> None:
        """Takes over what other members have recorded."""
        for name, raw in attributes.items():
            name = name if name.startswith(GROWS) else GROWS + name  # as a store from before 0.1.0 has them
            for prefix, known in ((self._END, self._recorded), (self._BEGUN, self._begun)):
                if raw and name.startswith(prefix):  # an empty one, in such a store: that end was taken back
                    source, at = name.removeprefix(prefix), _decode(raw)
                    before = known.get(source, at)
                    known[source] = max(before, at) if before[0] == at[0] else at
                    self._look_whether_ended(source)

    def _look_whether_ended(self, source: str) -> None:
        end, begun = self._recorded.get(source), self._begun.get(source)
        if end is not None and (begun is None or begun[0] != end[0] or begun < end):
            self.ended[source] = end
        else:
            self.ended.pop(source, None)

    def hold(self, entry: Entry, id_: bytes) -> None:
        """Keeps an end until it can be recorded. One that came again is kept once."""
        if entry not in self.held:
            self.ids[entry] = id_
            insort(self.held, entry)

    def recording(self, source: str, topic: str, position: int) -> dict[str, bytes]:
        """The attribute that says that a source has ended."""
        return {self._END + source: _encode((topic, position))}

    def is_last(self, entry: Entry) -> bool:
        """Whether no later end of the same source is held: what came between the two is not settled when the first is."""
        return all(held <= entry or held[2] != entry[2] for held in self.held)

    def has_recorded(self, entry: Entry) -> bool:
        """Whether the end of its source is recorded, there or further on: it came again."""
        topic, position, source = entry
        recorded = self._recorded.get(source)
        return recorded is not None and recorded[0] == topic and position <= recorded[1]

    def written(self, entry: Entry, *, ended: bool) -> None:
        """An end that was held is acknowledged, and recorded if its source has `ended`."""
        topic, position, source = entry
        if ended:
            self._recorded[source] = (topic, position)
            self._look_whether_ended(source)
            self.at_start = False
        self.let_go(entry)

    def let_go(self, entry: Entry) -> None:
        """An end is no longer this member's to record."""
        if entry in self.held:
            self.held.remove(entry)
            del self.ids[entry]

    def reopening(self, source: str, topic: str, position: int) -> dict[str, bytes]:
        """The attribute that takes an end back, because the source has sent again; empty when it has not."""
        self.at_start = False
        ended = self.ended.get(source)
        if ended is None or ended[0] != topic or position < ended[1]:
            return {}
        return {self._BEGUN + source: _encode((topic, position))}

    def reopening_all(self) -> dict[str, bytes]:
        """The attributes that take all ends back, those that are held too: whoever reads them again knows that what follows has begun."""
        self.at_start = False
        ends = self.ended | {source: (topic, position) for topic, position, source in self.held}
        recorded = {self._END + source: _encode(end) for source, end in ends.items()}
        return recorded | {self._BEGUN + source: _encode(end) for source, end in ends.items()}

    def all_ended(self, sources: Iterable[str], *, at_once: bool = False) -> bool:
        """Whether all of `sources` have ended. `at_once`: also of who found it so and does not wait for one to begin again."""
        if self.held:
            return False
        if not at_once and self.at_start and time.monotonic() - self.opened < GRACE_S:
            return False
        return bool(self.ended) and all(source in self.ended for source in sources)


__all__ = ("GRACE_S", "Ends", "Entry")
