"""A group's log: whoever comes late knows what those know who have followed from the start."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.core.errors import GroupBusy, GroupConflict, TransportError
from edgeserve.transport.base import GroupKind
from edgeserve.transport.broker import grouplog
from edgeserve.transport.broker.grouplog import (
    Beat,
    GroupLog,
    Joined,
    Lead,
    Left,
    Line,
    MemberState,
    Record,
    Settled,
    Snapshot,
    decode_line,
    encode_line,
    indexes_of,
    runs,
)
from edgeserve.transport.groups import refuse

SHARED = GroupKind.SHARED


def id_of(n: int) -> bytes:
    return n.to_bytes(16, "big")


def state_of(log: GroupLog) -> dict[str, Any]:
    """What members of a group must agree on."""
    partial = {topic: entries for topic, entries in log.partial.items() if entries}
    worked = {topic: entries for topic, entries in log.worked.items() if entries}
    members = {name: msgspec.to_builtins(member) for name, member in log.members.items()}
    return {
        "members": list(members.items()),
        "lead": (log.leader, log.epoch),
        "attributes": log.attributes,
        "partial": partial,
        "worked": worked,
        "doubt": log.doubt,
        "start": (log.start_at, log.life),
        "known": log.known,
    }


class Topic:
    """The log as stored, its writer who follows it from the start, and what is stored and settled on the group's topic meanwhile."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.writer = GroupLog("writer")
        self.ids: list[bytes] = []
        # For each id, the newest entry of the topic by the time it was settled.
        self.stored_at: list[int] = []
        self.stored, self.unsettled = -1, 0

    def write(self, *records: Record) -> None:
        self.lines.append(encode_line(records, self.writer.checkpoint))
        counts = [r for r in records if isinstance(r, Settled) and r.name and r.epoch in (0, self.writer.epoch)]
        self.writer.apply(decode_line("g", self.lines[-1]), len(self.lines) - 1)
        for record in counts:
            if record.ids:
                found = [record.ids[n : n + 16] for n in range(0, len(record.ids), 16)]
                self.ids += found
                self.stored_at += [self.stored] * len(found)

    def snapshot(self) -> None:
        self.write(*self.writer.snapshot(self.stored, self.unsettled))

    def newcomer(self) -> GroupLog:
        """One that comes now, as a member does it."""
        log = GroupLog("newcomer")
        checkpoint = decode_line("g", self.lines[-1]).checkpoint if self.lines else None
        begin, upto = 0, -1
        if checkpoint is not None:
            record = decode_line("g", self.lines[checkpoint.at]).records[-1]
            assert isinstance(record, Snapshot)
            log.restore(record, checkpoint.at)
            begin, upto = checkpoint.ids_after + 1, checkpoint.upto
        for at in range(begin, len(self.lines)):
            log.apply(decode_line("g", self.lines[at]), at, ids_only=at <= upto)
        return log


def random_record(choose: random.Random, topic: Topic) -> Record:
    name = f"m{choose.randrange(4)}"
    entries = {t: {choose.randrange(20): sorted(choose.sample(range(5), 2))} for t in ("a", "b") if choose.random() < 0.3}
    kind = choose.randrange(7)
    if kind == 0:
        return Joined(name, MemberState(SHARED, "sig"), choose.randrange(3), choose.choice(["", "life"]))
    if kind == 1:
        return Left(name, choose.choice(["", "m9"]), {t: list(e) for t, e in entries.items()}, {"a": choose.randrange(20)})
    if kind == 2:
        return Lead(name, topic.writer.epoch + choose.randint(0, 2))
    if kind == 3:
        return Beat(name)
    count = choose.randrange(12)
    ids = b"".join(id_of(len(topic.ids) + n) for n in range(count))
    closed = {t: [at for at in e if choose.random() < 0.5] for t, e in topic.writer.partial.items()}
    attributes = {f"k{choose.randrange(4)}": choose.randbytes(2)} if choose.random() < 0.3 else {}
    return Settled(name, ids, attributes, entries, closed, choose.choice([0, topic.writer.epoch, topic.writer.epoch + 1]))


def kept_short(ids_kept: int, snapshot_every: int, rewritten: int = 0) -> AbstractContextManager[object]:
    """The bounds of a log, small enough for a test."""
    bounds = {"IDS_KEPT": ids_kept, "SNAPSHOT_EVERY_IDS": snapshot_every, "_REWRITTEN_IDS": rewritten}
    return patch.multiple(grouplog, **bounds)


@given(st.integers(0, 2**32), st.integers(0, 120), st.sampled_from([0, 15, 1_000]))
def test_a_newcomer_knows_what_the_others_know(seed: int, length: int, rewritten: int) -> None:
    choose, topic = random.Random(seed), Topic()
    with kept_short(40, 12, rewritten):
        topic.write(Joined("writer", MemberState(SHARED, "sig"), 5))
        for _ in range(length):
            topic.stored += choose.randrange(3)
            if choose.random() < 0.5:
                topic.unsettled = choose.randint(topic.unsettled, topic.stored + 1)
            topic.write(random_record(choose, topic))
            if topic.writer.wants_snapshot and choose.random() < 0.7:
                if choose.random() < 0.3:
                    # Another record comes between what the snapshot is of and where it stands.
                    snapshot = topic.writer.snapshot(topic.stored, topic.unsettled)
                    topic.write(random_record(choose, topic))
                    topic.write(*snapshot)
                else:
                    topic.snapshot()
            if choose.random() < 0.1:
                _check_newcomer(topic)
        _check_newcomer(topic)


def _check_newcomer(topic: Topic) -> None:
    newcomer = topic.newcomer()
    assert state_of(newcomer) == state_of(topic.writer)
    assert newcomer.ids == topic.writer.ids  # which has taken none so far, as one that stands by
    kept = set(newcomer.take_ids())  # some stand there twice: where they were settled, and again with a snapshot
    assert kept == set(topic.ids[len(topic.ids) - len(kept) :])
    assert len(kept) >= min(len(topic.ids), 40)
    assert kept >= {id_ for id_, stored in zip(topic.ids, topic.stored_at, strict=True) if stored >= topic.unsettled}
    assert newcomer.take_ids() == []


def test_ids_of_long_ago_are_let_go() -> None:
    topic = Topic()
    with kept_short(40, 10):
        for n in range(100):
            topic.stored = topic.unsettled = n
            topic.write(Settled("m", b"".join(id_of(n * 10 + k) for k in range(10))))
            if topic.writer.wants_snapshot:
                topic.snapshot()
    assert 40 <= len(topic.newcomer().take_ids()) < 80
    assert 40 <= len(topic.writer.take_ids()) < 80


def test_ids_that_come_while_a_snapshot_is_written_are_counted() -> None:
    topic = Topic()
    with kept_short(40, 10):
        for n in range(100):
            topic.stored = topic.unsettled = n
            written = topic.writer.snapshot(n, n) if topic.writer.wants_snapshot else None
            topic.write(Settled("m", b"".join(id_of(n * 10 + k) for k in range(10))))
            if written is not None:
                topic.write(*written)
    assert 40 <= len(topic.newcomer().take_ids()) <= 80


def test_ids_since_the_oldest_unsettled_entry_are_kept() -> None:
    topic = Topic()
    topic.unsettled = 3
    with kept_short(40, 10):
        for n in range(100):
            topic.stored = n
            topic.write(Settled("m", b"".join(id_of(n * 10 + k) for k in range(10))))
            if topic.writer.wants_snapshot:
                topic.snapshot()
    assert topic.newcomer().take_ids()[-970:] == topic.ids[30:]


def test_ids_are_bounded_though_the_oldest_entry_is_never_settled() -> None:
    topic = Topic()
    with kept_short(40, 10), patch.object(grouplog, "MOST_IDS", 300):
        for n in range(100):
            topic.stored = n
            topic.write(Settled("m", b"".join(id_of(n * 10 + k) for k in range(10))))
            if topic.writer.wants_snapshot:
                topic.snapshot()
    assert 300 <= len(topic.newcomer().take_ids()) <= 350


@given(st.sets(st.integers(0, 60)))
def test_runs_tell_all_indexes(indexes: set[int]) -> None:
    assert indexes_of(runs(indexes)) == indexes
    assert len(runs(indexes)) <= len(indexes)


def test_of_an_entry_of_which_one_frame_is_left_little_is_said() -> None:
    assert runs(set(range(500)) - {250}) == [0, -250, 251, -249]
    assert runs([9, 3, 5, 4, 6]) == [3, -4, 9]


def test_a_quiet_log_stays_short() -> None:
    topic = Topic()
    topic.write(Joined("writer", MemberState(SHARED, "sig")))
    with patch.object(grouplog, "SNAPSHOT_EVERY_RECORDS", 20):
        for n in range(1_000):
            topic.stored = topic.unsettled = n
            topic.write(Settled("writer", id_of(n)) if n % 10 == 0 else Beat("writer"))
            if topic.writer.wants_snapshot:
                topic.snapshot()
    checkpoint = topic.writer.checkpoint
    assert checkpoint is not None and len(topic.lines) - checkpoint.ids_after < 50
    assert set(topic.newcomer().take_ids()) == set(topic.ids)


def test_what_was_settled_under_a_lead_that_has_passed_does_not_count() -> None:
    log = group("one", "two", "three")
    log.apply(Line([Lead("one", 1)]), 3)
    log.apply(Line([Settled("one", id_of(1), {"decided": b"1"}, {"a": {5: [0]}}, {}, 1)]), 4)
    log.apply(Line([Left("one", "two")]), 5)
    log.apply(Line([Settled("one", id_of(2), {"decided": b"2"}, {}, {}, 1)]), 6)  # nobody has taken over: it still counts
    log.apply(Line([Lead("two", 2)]), 7)
    log.apply(Line([Settled("one", id_of(3), {"decided": b"3"}, {"a": {6: [0]}}, {"a": [5]}, 1)]), 8)
    assert (log.attributes, log.partial, log.refused) == ({"decided": b"2"}, {"a": {5: [0]}}, {8})
    assert log.take_ids() == [id_of(1), id_of(2)]


# --- members --------------------------------------------------------------------------------------------------


def group(*names: str) -> GroupLog:
    log = GroupLog(names[0])
    for at, name in enumerate(names):
        log.apply(Line([Joined(name, MemberState(SHARED, "sig"), at + 1)]), at)
    return log


def test_logs_of_different_groups_have_different_names() -> None:
    pairs = [("cam", "left~eye"), ("cam~left", "eye"), ("cam", "left%7Eeye"), ("cam~left~eye", "group"), ("cam", "eye")]
    assert len({grouplog.group_topic(*pair) for pair in pairs}) == len(pairs)


def test_of_two_who_take_the_lead_in_one_epoch_the_first_has_it() -> None:
    log = group("one", "two")
    log.apply(Line([Lead("two", 1)]), 2)
    log.apply(Line([Lead("one", 1)]), 3)
    assert (log.leader, log.epoch) == ("two", 1)
    log.apply(Line([Left("two")]), 4)
    assert (log.leader, log.epoch) == ("", 1)
    log.apply(Line([Lead("one", 1)]), 5)
    assert log.leader == ""
    log.apply(Line([Lead("one", 2)]), 6)
    assert (log.leader, log.epoch) == ("one", 2)


def test_members_that_nobody_knows_neither_lead_nor_leave_traces() -> None:
    log = group("one")
    before = state_of(log)
    log.apply(Line([Lead("stranger", 1), Left("stranger", "", {"a": [1]}, {"a": 7}), Beat("stranger")]), 1)
    assert state_of(log) == before
    log.apply(Line([Settled("stranger", id_of(1), {"k": b"v"})]), 2)  # it was taken for dead, and what it wrote is there
    assert (log.take_ids(), log.attributes) == ([id_of(1)], {"k": b"v"})


def test_the_first_in_line_is_who_came_first() -> None:
    log = group("one", "two", "three")
    assert log.first_of(log.members) == "one"
    log.apply(Line([Left("one"), Joined("one", MemberState(SHARED, "sig"))]), 3)
    assert log.first_of(log.members) == "two"
    assert log.first_of([]) == ""


def test_a_group_begins_with_its_first_member() -> None:
    assert group("one", "two").start_at == 1


def test_entries_are_spoken_of_one_by_one_until_they_are_closed() -> None:
    log = group("one")
    log.apply(Line([Settled("one", b"", {}, {"a": {5: [0, 1], 6: [2]}})]), 1)
    log.apply(Line([Settled("one", b"", {}, {"a": {5: [0, 1, 2]}})]), 2)
    assert log.partial == {"a": {5: [0, 1, 2], 6: [2]}}
    log.apply(Line([Left("one", "", {"a": [5, 7]})]), 3)
    assert log.worked == {"a": [5, 7]}
    log.apply(Line([Settled("two", b"", {}, {}, {"a": [5, 7]})]), 4)
    assert (log.partial, log.worked) == ({"a": {6: [2]}}, {"a": []})


def test_own_ids_are_told_once_to_one_that_has_just_come() -> None:
    log = GroupLog("one")
    log.apply(Line([Settled("one", id_of(1)), Settled("two", id_of(2))]), 0)
    assert log.take_ids() == [id_of(1), id_of(2)]
    log.apply(Line([Settled("one", id_of(3)), Settled("two", id_of(4))]), 1)
    assert log.take_ids() == [id_of(4)]


def test_who_may_be_in_a_group_together() -> None:
    one = [("one", SHARED, "sig")]
    refuse(SHARED, "sig", one)
    refuse(GroupKind.FAILOVER, "other", [])
    with pytest.raises(GroupConflict, match="shared"):
        refuse(GroupKind.FAILOVER, "sig", one)
    with pytest.raises(GroupConflict, match=r"'one'.*sig.*other"):
        refuse(SHARED, "other", one)
    with pytest.raises(GroupBusy, match="'one'"):
        refuse(GroupKind.EXCLUSIVE, "sig", [("one", GroupKind.EXCLUSIVE, "sig")])


@given(st.binary(max_size=60))
def test_what_is_no_record_is_named(data: bytes) -> None:
    try:
        decode_line("g", data)
    except TransportError as exc:
        assert "group g" in str(exc)


@pytest.mark.parametrize("group", ["g", "in->out", "a~b", "50%", "%7E", "~group", "ä b"])
def test_the_name_of_a_log_tells_whose_it_is(group: str) -> None:
    name = grouplog.group_topic("t", group)
    assert grouplog.is_group_topic(name)
    assert (grouplog.group_of(name, "t"), grouplog.group_of(name, "t~x"), grouplog.group_of(name, "")) == (group, None, None)
    assert grouplog.group_of(grouplog.group_topic("t~x", group), "t") is None
    assert not grouplog.is_group_topic("t~group") and not grouplog.is_group_topic("t.parts")
