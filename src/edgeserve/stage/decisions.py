"""The decision log of a join: which sets there were, which inputs were dropped and why, which are still held.

The log is the truth, acknowledgement only trims. One record per settlement goes to `<topic>.<group>.sets`, in the same transaction where
the engine has one, through a fence that only the join's holder has.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import msgspec

from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import CorruptMessage, MessageError
from edgeserve.core.message import Header, Kind
from edgeserve.stage.assignment import whole_of
from edgeserve.stage.control import Control
from edgeserve.stage.emit import Frames
from edgeserve.stage.linger import NO_ROOM
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.settle import REFUSED, Settlement, flattened, owned
from edgeserve.transport import Apart, Fence, Frame, Subscription


class Record(msgspec.Struct):
    """One record of the log.

    Attributes:
        sets: (set id, its members' ids) of each set whose results are published.
        drops: (id, reason) of each input that no set will use any more and that was dropped for a reason, and of each set that was not run.
        held: (position, id) of each input that has had its turn and may still be part of later sets: state after a restart.
    """

    sets: list[tuple[bytes, list[bytes]]]
    drops: list[tuple[bytes, str]]
    held: list[tuple[int, bytes]]


_DROPS, _HELD = "drops", "held"

Held: TypeAlias = Sequence[tuple[int, bytes]]
Drops: TypeAlias = Sequence[tuple[bytes, str]]
Decision: TypeAlias = tuple[bytes, list[bytes]]
Aside: TypeAlias = tuple[str, Frame]
Unit: TypeAlias = tuple[list[int], Sequence[bytes], Held, "Frame | Frames | None", Decision | None, Drops, Aside | None]
"""What one step has decided, appended as one object, so that a settlement never sees half of it:

- positions that nothing needs any more,
- ids of inputs that had their turn with this,
- (position, id) of those among them that are not acknowledged yet,
- results,
- (set id, member ids) of the set that ran,
- (id, reason) of what was dropped,
- (topic, frame) of a dead letter.
"""


LEFT: Sequence[bytes] = ()
"""In place of the ids of a unit: its position is of no set, and is settled without being counted. No list is equal to it."""


def unit(acks: list[int], ids: list[bytes], *, drops: Drops = (), aside: Aside | None = None) -> Unit:
    """The unit of a step that ran no set."""
    return acks, ids, (), None, None, drops, aside


def decision_topic(topic: str, group: str) -> str:
    """The decision log of a group's join. A dot of the group's name is escaped: the last one ends the topic's name, whatever that is."""
    return _of_the_join(topic, group, "sets")


def work_topic(topic: str, group: str) -> str:
    """Where the sets of a group's join wait for a replica."""
    return _of_the_join(topic, group, "work")


def roster_topic(topic: str, group: str) -> str:
    """Where the members of a join in several partitions find each other. Nothing is sent to it. `group`: the whole, or a partition's."""
    return _of_the_join(topic, whole_of(group)[0], "roster")


def _of_the_join(topic: str, group: str, what: str) -> str:
    return f"{topic}.{group.replace('%', '%25').replace('.', '%2E')}.{what}"


def read_decision(frame: bytes | memoryview) -> Record:
    """The record in a frame of the log.

    Raises:
        MessageError: the frame is none, or not a record's.
    """
    header, payload = decode_frame(frame)
    if header.kind != Kind.DECISION:
        raise CorruptMessage(f"a message from {header.source_id!r} stands in a decision log, where only records may")
    try:
        return msgspec.msgpack.decode(payload, type=Record)
    except msgspec.DecodeError as exc:
        raise CorruptMessage(f"a record of a decision log cannot be read: {exc}") from exc


def last_record(subscription: Subscription, topic: str) -> Record | None:
    """The newest record of a log that this member has just fenced, an empty one where nothing was decided; None when it cannot be read."""
    frame = subscription.newest_decision(topic)
    if frame is None:
        return Record([], [], [])
    try:
        return read_decision(bytes(frame))
    except MessageError:
        return None


def read_drops(attributes: Mapping[str, bytes]) -> Counter[str]:
    """What a group has dropped (`Record.drops` of a join, and what was shed), counted by reason: as its attributes say."""
    try:
        return Counter(msgspec.msgpack.decode(attributes.get(_DROPS, b"\x80"), type=dict[str, int]))
    except msgspec.DecodeError:
        return Counter()


def drops_attribute(totals: Mapping[str, int]) -> dict[str, bytes]:
    """What `read_drops` reads."""
    return {_DROPS: msgspec.msgpack.encode(dict(totals))}


def read_held(attributes: Mapping[str, bytes]) -> int | None:
    """How many inputs the holder of a group's join has in its hands, as it has said about a second ago; None when it has not."""
    try:
        return msgspec.msgpack.decode(attributes[_HELD], type=int) if _HELD in attributes else None
    except msgspec.DecodeError:
        return None


class Decisions(Settlement):
    """What the holder of a join has decided and not settled yet.

    Attributes:
        topic_out: where what it publishes goes: the results' topic, or that of sets which wait for a replica.
        drops: what the group's join has dropped so far; see `read_drops`.
        known: what the group is to know with what is settled.
    """

    def __init__(
        self,
        subscription: Subscription,
        fence: Fence,
        topic: str,
        topic_out: str,
        source_id: str,
        name: str,
        control: Control,
        payloads: Payloads,
    ) -> None:
        self.units: list[Unit] = []
        super().__init__(subscription, self.units, name, control, payloads)
        self.fence = fence
        self._topic, self.topic_out, self._results_to, self._source_id = topic, topic_out, topic_out, source_id
        self._encode = msgspec.msgpack.Encoder().encode
        self.held: dict[int, bytes] = {}
        self.drops = read_drops(subscription.attributes())
        self.known: Callable[[], dict[str, bytes]] = dict

    def _write(self, n: int) -> None:
        units = self.units[:n]
        acks, ids, held, frames, decided, dropped, asides = zip(*units, strict=True)
        produced = flattened(list(frames))
        shared = self.topic_out != self._results_to
        outputs: dict[str, list[Frame]] = {self.topic_out: Apart(produced) if shared else produced} if produced else {}
        for aside in asides if any(asides) else ():
            if aside is not None:
                outputs.setdefault(aside[0], []).append(aside[1])
        positions = list(chain.from_iterable(acks))
        sets = [decision for decision in decided if decision is not None]
        drops = list(chain.from_iterable(dropped))
        after = self._held_after(units) if self.held or any(held) else {}
        totals = self.drops
        if drops:
            totals = Counter(self.drops)
            totals.update(reason for _, reason in drops)
        decisions = [self._frame(Record(sets, drops, list(after.items())))] if sets or drops or after != self.held else []
        settled = list(chain.from_iterable(ids))
        # To acknowledge what others take, or have decided, is no decision: the log, which is kept until there is another one, would grow.
        fence = self.fence if decisions or settled or outputs else None
        try:
            self._subscription.settle(
                {self._topic: positions} if positions else {},
                outputs,
                ids=settled,
                decisions=decisions,
                fence=fence,
                attributes=self.known() | (drops_attribute(totals) if drops else {}),
            )
        except BaseException as exc:
            if not isinstance(exc, REFUSED):
                self._payloads.doubt(produced)
            # Large results are the task's own buffers: it may write to them again once this call has returned.
            self.units[:n] = [(*u[:3], owned(u[3]), *u[4:]) for u in units]
            raise
        if (files := self._payloads.files) is not None:
            kept = set(after.values())
            over = [id_ for id_ in chain(self.held.values(), settled) if id_ not in kept]
            (files.forget if shared else files.settled)(over)
        del self.units[:n]
        self.held, self.drops = after, totals
        if not shared:
            self.results += len(produced)
        self.settled += len(positions) - ids.count(LEFT)

    def give_up(self) -> None:
        """What is pending will not be settled by this member."""
        self._payloads.abandon(flattened([unit[3] for unit in self.units]))

    def say_held(self, count: int) -> None:
        """Tells the group how many inputs the join holds, for who asks; not while there is no room. No fence: nothing waits for it."""
        with contextlib.suppress(*NO_ROOM):
            self._subscription.settle({}, attributes={_HELD: self._encode(count)})

    def _held_after(self, units: list[Unit]) -> dict[int, bytes]:
        after = dict(self.held)
        for acks, _, held, *_ in units:
            after.update(held)
            for position in acks:
                after.pop(position, None)
        return after

    def _frame(self, record: Record) -> Frame:
        body = self._encode(record)
        now = time.time_ns()
        return encode_frame(Header(os.urandom(16), self._source_id, "", 0, now, now, "", len(body), kind=int(Kind.DECISION)), body)


__all__ = (
    "LEFT",
    "Decisions",
    "Record",
    "decision_topic",
    "drops_attribute",
    "last_record",
    "read_decision",
    "read_drops",
    "read_held",
    "roster_topic",
    "unit",
    "work_topic",
)
