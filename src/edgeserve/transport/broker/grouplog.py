"""A group's own log, as a pure state machine: who its members are, who leads, which ids are settled, what the members share.

Everything that members of a group must agree on goes to one topic beside the group's, `<topic>~<group>~group`, and every member follows
it. The broker's order is the truth: of two who take the lead in one epoch the first in the log has it. Members that are silent are taken
for dead by each observer for itself; what follows from it is written down again.

No I/O and no clock: records come in as they are stored, times are handed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import unquote

import msgspec

from edgeserve.core.errors import TransportError
from edgeserve.transport.base import GroupKind, merge_attributes
from edgeserve.transport.broker.envelope import MOST_FRAMES

IDS_KEPT = 131_072
MOST_IDS = 1 << 22
"""So many are kept at most, should the oldest entry never be settled: of a join, say, that holds its only message of a source for ever."""
ID_BYTES = 16
SNAPSHOT_EVERY_IDS = 16_384
SNAPSHOT_EVERY_RECORDS = 2_000
_REWRITTEN_IDS = 8_192
"""So few are written again with a snapshot, so that what lies between them can go."""
_LOG_END = "~group"
DECIDED = "\0decided:"
"""Attributes of this prefix say, by topic, where the newest decision of a complete settlement stands."""

Partial: TypeAlias = dict[str, dict[int, list[int]]]
"""topic to entry to the frames of it that are settled while others are not, as `runs` writes them."""


def runs(indexes: Iterable[int]) -> list[int]:
    """Indexes in short, for there may be hundreds of them in an entry of which one is left: 3, 4, 5, 6, 9 is 3, -4, 9."""
    found: list[int] = []
    for index in sorted(indexes):
        if found and found[-1] < 0 and index == found[-2] - found[-1]:
            found[-1] -= 1
        elif len(found) > 1 and found[-1] >= 0 and found[-2] >= 0 and index == found[-1] + 1 == found[-2] + 2:
            found[-1] = -3
        else:
            found.append(index)
    return found


def indexes_of(runs: Iterable[int]) -> set[int]:
    """The indexes that `runs` has written."""
    found: set[int] = set()
    first = 0
    for each in runs:
        if each < 0:
            found.update(range(first, first + min(-each, MOST_FRAMES)))
        else:
            found.add(each)
            first = each
    return found


class MemberState(msgspec.Struct, array_like=True):
    """What a member says of itself. `host` and `process` name it to others on its machine; `joined_at` is its record in the log; `version`
    is its task's."""

    kind: GroupKind
    signature: str
    host: str = ""
    process: str = ""
    joined_at: int = -1
    version: str = ""


class Joined(msgspec.Struct, tag="j", array_like=True):
    """A member comes. `start_at`: with which entry the group begins, should it be the first; `life`: of which topic, see `Entry`."""

    name: str
    member: MemberState
    start_at: int = 0
    life: str = ""


class Beat(msgspec.Struct, tag="b", array_like=True):
    """A member lives."""

    name: str


class Left(msgspec.Struct, tag="l", array_like=True):
    """A member goes; `worked` names entries that it had begun. Or it was found dead by `by`: it may have begun all up to `doubt`."""

    name: str
    by: str = ""
    worked: dict[str, list[int]] = {}
    doubt: dict[str, int] = {}


class Lead(msgspec.Struct, tag="e", array_like=True):
    """A member takes the lead; counts only when nobody else has taken this epoch."""

    name: str
    epoch: int


class Settled(msgspec.Struct, tag="s", array_like=True):
    """What a member has settled. `closed` names entries that `partial` named before and that are complete now.

    `epoch`: of the lead that it was settled under; counts only while that one stands. 0: nobody leads such a group.
    """

    name: str
    ids: bytes = b""
    attributes: dict[str, bytes] = {}
    partial: Partial = {}
    closed: dict[str, list[int]] = {}
    epoch: int = 0


class Checkpoint(msgspec.Struct, array_like=True):
    """Where a newcomer begins: a `Snapshot` stands at `at` and is of the log up to `upto`; ids are to be read after `ids_after`."""

    at: int
    upto: int
    ids_after: int


class Snapshot(msgspec.Struct, tag="z", array_like=True):
    """The state, ids left out, after the record at `upto`. `refused`: entries after `ids_after` whose ids don't count."""

    upto: int
    ids_after: int
    members: dict[str, MemberState]
    leader: str
    epoch: int
    start_at: int
    attributes: dict[str, bytes]
    partial: Partial
    worked: dict[str, list[int]]
    doubt: dict[str, int]
    marks: list[tuple[int, int, int]]
    refused: list[int] = []
    life: str = ""


Record: TypeAlias = Joined | Beat | Left | Lead | Settled | Snapshot


class Line(msgspec.Struct, array_like=True):
    """One entry of the log: records, and the newest checkpoint that their writer knew."""

    records: list[Record]
    checkpoint: Checkpoint | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Line).decode


def group_topic(topic: str, group: str) -> str:
    """The log of a group. A `~` of the group's name is escaped: the last one ends the topic's name, whatever that is."""
    return f"{topic}~{group.replace('%', '%25').replace('~', '%7E')}{_LOG_END}"


def is_group_topic(name: str) -> bool:
    """Whether a topic is the log of a group."""
    return name.endswith(_LOG_END) and "~" in name.removesuffix(_LOG_END)


def group_of(name: str, topic: str) -> str | None:
    """The group of `topic` whose log `name` is; None where it is something else."""
    group = unquote(name.removeprefix(f"{topic}~").removesuffix(_LOG_END))
    return group if name == group_topic(topic, group) else None


def encode_line(records: Iterable[Record], checkpoint: Checkpoint | None) -> bytes:
    """An entry of the log."""
    return _encode(Line(list(records), checkpoint))


def decode_line(what: str, data: bytes) -> Line:
    """The records of an entry; `TransportError` when it is none."""
    try:
        return _decode(data)
    except msgspec.DecodeError as exc:
        raise TransportError(f"the log of group {what} holds what is no record of it ({exc}): does another program write to it?") from exc


class GroupLog:
    """The state that the log describes.

    Attributes:
        members: in the order in which they came.
        leader, epoch: who leads since when; "" nobody.
        attributes: what members share.
        partial: see `Partial`.
        worked: topic to entries that a member had begun and not finished when it left.
        doubt: topic to the newest entry that a member may have begun before it died.
        checkpoint: the newest known.
        ids: where settled ids stand that were not taken by `take_ids` yet, and they, oldest first; less those that a newcomer isn't told.
        at: the last record that was applied.
        upto: up to which record the snapshot is that it began with; -1: none.
        start_at, life: the entry of the topic that the group began with (0: the first), and of which topic, should it be made again.
        known: whether the group has ever had a member.
        refused: entries with settlements of one that had lost the lead.
    """

    def __init__(self, me: str) -> None:
        self.me = me
        self.members: dict[str, MemberState] = {}
        self.leader, self.epoch = "", 0
        self.attributes: dict[str, bytes] = {}
        self.partial: Partial = {}
        self.worked: dict[str, list[int]] = {}
        self.doubt: dict[str, int] = {}
        self.checkpoint: Checkpoint | None = None
        self.ids: list[tuple[int, bytes]] = []
        self.at = self.upto = self._ids_after = -1
        self.start_at, self.life = 0, ""
        self.known = False
        self.refused: set[int] = set()
        self._told = False
        self._ids_upto = -1
        # The ids since the oldest mark, as long as they are few.
        self._recent: list[tuple[int, bytes]] | None = []
        self._ids_since = self._records_since = 0
        # Of the records since the last snapshot: (where it stands, how many ids it has).
        self._counts: list[tuple[int, int]] = []
        # Where the ids could begin: (record, ids between it and the next mark, newest entry of the topic by then).
        self._marks: list[tuple[int, int, int]] = [(-1, 0, -1)]

    # --- applying -----------------------------------------------------------------------------------------------

    def restore(self, snapshot: Snapshot, at: int) -> None:
        """Begins with a snapshot that stands at `at`; what comes after `snapshot.upto` is to be applied next."""
        self.members, self.leader, self.epoch = dict(snapshot.members), snapshot.leader, snapshot.epoch
        self.attributes, self.worked = dict(snapshot.attributes), {t: list(w) for t, w in snapshot.worked.items()}
        self.partial = {topic: dict(entries) for topic, entries in snapshot.partial.items()}
        self.doubt = dict(snapshot.doubt)
        self.start_at, self.life = snapshot.start_at, snapshot.life
        self.known, self.refused = True, set(snapshot.refused)
        self.checkpoint = Checkpoint(at, snapshot.upto, snapshot.ids_after)
        self.upto, self._ids_after = snapshot.upto, snapshot.ids_after

    def follow(self, before: GroupLog) -> None:
        """It is read from a snapshot on in place of one that has missed records: ids that were read before are not told again."""
        self.ids, self._told, self._ids_upto = list(before.ids), before._told, before.at

    def apply(self, line: Line, at: int, *, ids_only: bool = False) -> None:
        """Applies an entry of the log. `ids_only`: it is older than the snapshot."""
        for record in line.records:
            if type(record) is Settled:
                if not ids_only and record.epoch and record.epoch != self.epoch:
                    self.refused.add(at)
                if at in self.refused:
                    continue
                # A member's own ids are told only to one that has just come.
                if record.ids and at > self._ids_upto and (record.name != self.me or not self._told):
                    self.ids.append((at, record.ids))
                if not ids_only:
                    self._settled(record, at)
            elif not ids_only:
                self._member(record, at)
        if not ids_only:
            self._records_since += 1
        self.at = at

    def _settled(self, record: Settled, at: int) -> None:
        if record.ids:
            self._ids_since += len(record.ids) // ID_BYTES
            self._counts.append((at, len(record.ids) // ID_BYTES))
            if self._recent is not None:
                self._recent.append((at, record.ids))
                if self._ids_since > _REWRITTEN_IDS:
                    self._recent = None
        merge_attributes(self.attributes, record.attributes)
        for topic, entries in record.partial.items():
            self.partial.setdefault(topic, {}).update(entries)
        for topic, closed in record.closed.items():
            for entry in closed:
                self.partial.get(topic, {}).pop(entry, None)
            if topic in self.worked:
                self.worked[topic] = [at for at in self.worked[topic] if at not in closed]

    def _member(self, record: Record, at: int) -> None:
        if type(record) is Joined:
            record.member.joined_at = at
            self.members[record.name] = record.member
            if not self.known:
                self.start_at, self.life, self.known = record.start_at, record.life, True
        elif type(record) is Left:
            if self.members.pop(record.name, None) is not None:
                for topic, at_ in record.doubt.items():
                    self.doubt[topic] = max(at_, self.doubt.get(topic, -1))
                for topic, entries in record.worked.items():
                    self.worked[topic] = sorted({*self.worked.get(topic, ()), *entries})
            if self.leader == record.name:
                self.leader = ""
        elif type(record) is Lead:
            if record.epoch == self.epoch + 1 and record.name in self.members:
                self.leader, self.epoch = record.name, record.epoch
        elif type(record) is Snapshot:
            if self.checkpoint is not None and record.upto < self.checkpoint.upto:
                return  # of a member that stood still: what it is of may be gone
            self.checkpoint = Checkpoint(at, record.upto, record.ids_after)
            self.ids = [each for each in self.ids if each[0] > record.ids_after]
            self._marks = list(record.marks)
            # What came between the state it is of and where it stands is in none of its marks.
            self._counts = [each for each in self._counts if each[0] > record.upto]
            self._ids_since, self._records_since = sum(count for _, count in self._counts), 0
            recent, self._recent = self._recent, None
            if recent is not None and len(record.marks) == 1:
                self._recent = [each for each in recent if each[0] > record.upto]

    def forget(self, topic: str) -> list[int]:
        """Lets go of what was said of a topic's entries: it was made again, and its numbers mean others. Returns which these were."""
        entries = {*self.partial.pop(topic, ()), *self.worked.pop(topic, ())}
        self.doubt.pop(topic, None)
        # Nothing of what is stored now was there when these ids were settled.
        self._marks = [(at, count, -1) for at, count, _ in self._marks]
        return sorted(entries)

    # --- questions ----------------------------------------------------------------------------------------------

    def take_ids(self) -> list[bytes]:
        """The settled ids since the last call, oldest first; of this member's own only those from before it came."""
        body, self.ids, self._told = b"".join([ids for _, ids in self.ids]), [], True
        return [body[n : n + ID_BYTES] for n in range(0, len(body), ID_BYTES)]

    def shared(self) -> dict[str, bytes]:
        """What the members share by their own words."""
        return {name: value for name, value in self.attributes.items() if not name.startswith(DECIDED)}

    def left_out(self, at: int, life: str) -> bool:
        """Whether an entry of the topic is older than what the group began with."""
        return at < self.start_at and life == self.life

    def counts(self, at: int, epoch: int) -> bool:
        """Whether a settlement under the lead of an epoch, applied or older than the snapshot, counts; False where that is not known."""
        return at not in self.refused and (at > self._ids_after or epoch == self.epoch)

    def first_of(self, names: Iterable[str]) -> str:
        """Who of these came first; "" of none."""
        return min(names, key=lambda n: self.members[n].joined_at, default="")

    # --- checkpoints --------------------------------------------------------------------------------------------

    @property
    def wants_snapshot(self) -> bool:
        """Whether enough has happened since the last one."""
        return self._ids_since >= SNAPSHOT_EVERY_IDS or self._records_since >= SNAPSHOT_EVERY_RECORDS

    def snapshot(self, stored: int, unsettled: int) -> list[Record]:
        """The state as a record, after the ids where they are few.

        `stored`: the newest entry of the topic; `unsettled`: the oldest not settled.

        Ids are kept since the oldest unsettled entry was stored, at least the newest `IDS_KEPT` and at most some `MOST_IDS`.
        """
        at, count, before = self._marks[-1]
        marks = [*self._marks[:-1], (at, count + self._ids_since, before)]
        rewritten: list[Record] = []
        if self._recent is not None and sum(m[1] for m in marks) <= _REWRITTEN_IDS:
            if self._recent:
                rewritten = [Settled("", b"".join([ids for _, ids in self._recent]))]
            marks = []
        marks = [*(m for m in marks if m[1]), (self.at, 0, stored)]
        left = sum(m[1] for m in marks[1:])
        while len(marks) > 1 and left >= IDS_KEPT and (marks[1][2] < unsettled or left >= MOST_IDS):
            marks.pop(0)
            left -= marks[0][1]
        ids_after = marks[0][0]
        state = Snapshot(
            self.at,
            ids_after,
            self.members,
            self.leader,
            self.epoch,
            self.start_at,
            self.attributes,
            self.partial,
            self.worked,
            self.doubt,
            marks,
            sorted(each for each in self.refused if each > ids_after),
            self.life,
        )
        return [*rewritten, state]


__all__ = (
    "DECIDED",
    "ID_BYTES",
    "Beat",
    "Checkpoint",
    "GroupLog",
    "Joined",
    "Lead",
    "Left",
    "Line",
    "MemberState",
    "Partial",
    "Record",
    "Settled",
    "Snapshot",
    "decode_line",
    "encode_line",
    "group_of",
    "group_topic",
    "indexes_of",
    "is_group_topic",
    "runs",
)
