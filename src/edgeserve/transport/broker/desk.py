"""What one member has of one topic: entries as the broker delivered them, cut into messages and put together again when they are done.

Pure: entries come in, messages go out, decisions come back, and what is to be acknowledged or given back is said. Thread-safe only where
noted: the driver's thread adds entries, everything else is the member's.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from edgeserve.transport.base import ClaimLost, Delivery
from edgeserve.transport.broker.driver import Entry, Inlet
from edgeserve.transport.broker.envelope import INDEX_BITS, INDEX_MASK
from edgeserve.transport.broker.flow import Standing

_REMEMBERED = 65_536


class Open(msgspec.Struct, eq=False):
    """An entry in this member's hands.

    Attributes:
        count: its frames.
        left: how many of them are not settled.
        again: how often they came before.
        inlet: where it came from last, and is acknowledged.
        next: the first frame that was not handed over yet.
        named: whether the group's log speaks of its frames one by one.
        away: frames given back that this member gets again; never changed in place, since nearly all entries share one.
        nacked: how often they were; likewise.
    """

    entry: Entry
    publish_ns: int
    frames: Sequence[bytes | memoryview]
    count: int
    left: int
    again: int = 0
    inlet: Inlet | None = None
    deadline: float = 0.0
    next: int = 0
    named: bool = False
    done: set[int] = msgspec.field(default_factory=set)
    away: frozenset[int] = frozenset()
    nacked: Mapping[int, int] = MappingProxyType({})

    def learn(self, done: Iterable[int]) -> None:
        """These frames are settled, as the group's log says."""
        self.done.update(done)
        self.named, self.left = True, self.count - len(self.done)

    @property
    def rests(self) -> bool:
        """Whether all that was handed over of it is settled."""
        return all(index in self.done or index in self.away for index in range(self.next))


class Desk:
    """The entries of one topic in one member's hands.

    Args:
        topic: its name.

    Attributes:
        last: the newest entry that has come; -1 none.
        inlet: where they come from.
        life: see `Entry`; of the newest.
        followed: how many others had come when this member began to be the only one; -1: it is not.
        settled, ask_at: below which entry the broker says that all is settled, and when it is asked again.
        gone: what went back whole, and has not come again.
        unsure_upto: entries up to this one may be unsettled without being here; -1: none.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.open: dict[int, Open] = {}
        self._ready: deque[Open] = deque()
        # What this member has settled, and does not know yet to count; and what it has finished: a broker may bring back either.
        self._settled: dict[int, Open] = {}
        self._finished: OrderedDict[int, None] = OrderedDict()
        # Messages given back of entries that others of are in hand: (when due, position).
        self._returned: list[tuple[float, int]] = []
        self.gone: set[int] = set()
        self.last = -1
        self.inlet: Inlet | None = None
        self.followed = self.unsure_upto = -1
        self.settled, self.ask_at = 0, float("-inf")
        self.life = ""
        # What was handed over before the topic began anew: its positions mean other messages now.
        self._outlived: set[int] = set()

    def begin_anew(self, life: str) -> bool:
        """Whether what comes is of a topic that was made again, with the numbers that others had; then those are forgotten. What of them
        is in a task's hands cannot be settled any more."""
        before, self.life = self.life, life
        if before in ("", life):
            return False
        for at, opened in self.open.items():
            in_hand = set(range(opened.next)) - opened.done - opened.away
            self._outlived |= {at << INDEX_BITS | index for index in in_hand}
        for held in (self.open, self._ready, self._settled, self._finished, self._returned, self.gone):
            held.clear()
        self.last = self.unsure_upto = -1
        self.settled, self.ask_at = 0, float("-inf")
        return True

    def add(self, opened: Open) -> bool:
        """Takes an entry in; False when it has to be acknowledged at once, because all of it is done or was before."""
        at = opened.entry.at
        if at > self.last:
            self.last = at
        self.gone.discard(at)
        held = self.open.get(at) or self._settled.get(at)
        if held is not None:
            # It came again over a new connection: the old one's token is worth nothing.
            held.entry, held.inlet = opened.entry, opened.inlet
            return True
        if at in self._finished or not opened.left:
            return False
        self.open[at] = opened
        ready = self._ready
        if ready and at < ready[-1].entry.at:
            # What went back elsewhere comes before what is newer; an entry that was begun is gone on with.
            begun = [ready.popleft()] if ready[0].next else []
            self._ready = deque([*begun, *sorted([*ready, opened], key=lambda each: each.entry.at)])
        else:
            ready.append(opened)
        return True

    @property
    def in_hand(self) -> bool:
        """Whether there are entries that are not settled, as far as this member knows."""
        return bool(self.open or self.gone)

    @property
    def ready(self) -> int:
        """How many entries wait to be handed over."""
        return len(self._ready)

    def next_due(self) -> float | None:
        """When the next message that was given back is due."""
        return min(self._returned)[0] if self._returned else None

    def take(self, most: int, now: float) -> list[Delivery]:
        """Up to `most` messages, in stored order as far as they came in it; redelivered ones first."""
        found: list[Delivery] = []
        ready, topic = self._ready, self.topic
        if self._returned:
            due = sorted(position for when, position in self._returned if when <= now)[:most]
            self._returned = [r for r in self._returned if r[1] not in due]
            for position in due:
                opened = self.open[position >> INDEX_BITS]
                index = position & INDEX_MASK
                opened.nacked = {**opened.nacked, index: opened.nacked.get(index, 0) + 1}
                opened.away -= {index}
                found.append((opened.frames[index], position, opened.publish_ns, opened.again + opened.nacked[index], topic))
        while ready and len(found) < most:
            opened = ready[0]
            if opened.count == 1 and not opened.done:  # as it comes where traffic is slow
                opened.next = 1
                ready.popleft()
                found.append((opened.frames[0], opened.entry.at << INDEX_BITS, opened.publish_ns, opened.again, topic))
                continue
            at, publish_ns, again, done = opened.entry.at << INDEX_BITS, opened.publish_ns, opened.again, opened.done
            begin, stop, frames = opened.next, min(opened.count, opened.next + most - len(found)), opened.frames
            for index in range(begin, stop):
                if index in done:
                    continue
                found.append((frames[index], at | index, publish_ns, again, topic))
            opened.next = stop
            if stop >= opened.count:
                ready.popleft()
        return found

    def stamp(self, deliveries: Iterable[Delivery], deadline: float) -> None:
        """Says until when what was just handed over is to be settled."""
        for delivery in deliveries:
            self.open[delivery[1] >> INDEX_BITS].deadline = deadline

    def stamp_unstamped(self, deadline: float) -> None:
        """The same for what was handed over while there was nobody else."""
        for opened in self.open.values():
            if opened.next and not opened.deadline and not opened.rests:
                opened.deadline = deadline

    def check(self, positions: Iterable[int]) -> None:
        """Raises `ClaimLost` when some of these are not in this member's hands."""
        lost = []
        for position in positions:
            opened = self.open.get(position >> INDEX_BITS)
            index = position & INDEX_MASK
            outlived = position in self._outlived
            if outlived or opened is None or index >= opened.next or index in opened.done or index in opened.away:
                lost.append(position)
        if lost:
            self._outlived.difference_update(lost)
            raise ClaimLost(self.topic, lost)

    def settle(self, positions: Sequence[int]) -> tuple[list[Open], list[Open]]:
        """Takes messages out of hand: (entries that are complete by that, entries that have some left)."""
        if len(positions) == 1 and self.open[at := positions[0] >> INDEX_BITS].count == 1:  # as it comes where traffic is slow
            only = self._settled[at] = self.open.pop(at)
            only.done.add(0)
            only.left = 0
            return [only], []
        touched: dict[int, Open] = {}
        for position in positions:
            at = position >> INDEX_BITS
            opened = touched.get(at)
            if opened is None:
                opened = touched[at] = self.open[at]
            opened.done.add(position & INDEX_MASK)
        complete, some = [], []
        for at, opened in touched.items():
            opened.left = opened.count - len(opened.done)
            if opened.left:
                some.append(opened)
                if opened.deadline and opened.rests:
                    opened.deadline = 0.0
            else:
                self._settled[at] = self.open.pop(at)
                complete.append(opened)
        return complete, some

    def finish(self, opened: Open) -> None:
        """An entry that was settled counts as that, and is acknowledged."""
        at = opened.entry.at
        if self._settled.get(at) is not opened:
            return  # of a topic that was made again
        del self._settled[at]
        self._finished[at] = None
        if len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)

    def give_back(self, positions: Iterable[int], due: float) -> list[Open]:
        """Gives messages back. Entries of which nothing else is in hand are returned, for others to have; of the rest the messages come
        again here."""
        entries: dict[int, set[int]] = {}
        for position in positions:
            entries.setdefault(position >> INDEX_BITS, set()).add(position & INDEX_MASK)
        gone = []
        for at, given in entries.items():
            opened = self.open[at]
            if len(given) == opened.left:
                gone.append(self.drop(at))
                continue
            opened.away |= given
            self._returned += [(due, at << INDEX_BITS | index) for index in given]
        return gone

    def drop(self, at: int) -> Open:
        """Lets go of an entry that another member may have from now on."""
        opened = self.open.pop(at)
        self.gone.add(at)
        if opened.next < opened.count:
            self._ready.remove(opened)
        self._returned = [r for r in self._returned if r[1] >> INDEX_BITS != at]
        return opened

    def drop_all(self) -> None:
        """Lets go of everything."""
        for at in list(self.open):
            self.drop(at)

    def overdue(self, now: float) -> list[int]:
        """Entries that were not settled in time."""
        return [at for at, opened in self.open.items() if opened.deadline and opened.deadline <= now and opened.next]

    def learn(self, done: Mapping[int, Iterable[int]], worked: Iterable[int]) -> None:
        """Others say which frames of entries they had settled, and which entries they had begun; it counts for what is still untouched."""
        for at, indexes in done.items():
            opened = self.open.get(at)
            if opened is not None and not opened.next and len(opened.done.union(indexes)) < opened.count:
                opened.learn(indexes)
        for at in worked:
            opened = self.open.get(at)
            if opened is not None and not opened.next:
                opened.again, opened.named = max(opened.again, 1), True

    def floor(self) -> int:
        """Every position below, of what has come to this member, is settled."""
        held = self.open.keys() | self.gone if self.gone else self.open
        return self.floor_of(min(held, default=self.last + 1))

    def standing(self) -> Standing:
        """What the only member with entries knows of them without asking the broker."""
        if self.last < 0 or self.unsure_upto >= 0:
            return Standing()
        return Standing(self.floor() >> INDEX_BITS, self.last, [*self.open, *self.gone])

    def forget_below(self, at: int) -> None:
        """Whatever went back of the entries below, others have settled it."""
        self.gone = {gone for gone in self.gone if gone >= at}

    def follow(self, came: int, unsure_upto: int) -> None:
        """This member is the only one: from now on nothing is settled or held elsewhere."""
        self.followed, self.unsure_upto = came, max(self.unsure_upto, unsure_upto)

    def floor_of(self, at: int, settled: Iterable[int] = ()) -> int:
        """The first position of an entry that is not settled. `settled`: of its frames, as the group's log says."""
        opened = self.open.get(at)
        done, count = ({*settled}, INDEX_MASK) if opened is None else (opened.done, opened.count)
        if not done:
            return at << INDEX_BITS
        return at << INDEX_BITS | next((index for index in range(count) if index not in done), 0)


__all__ = ("Desk", "Open")
