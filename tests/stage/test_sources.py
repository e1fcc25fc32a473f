"""What a member knows of a source while a broker brings again what was settled."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest

from edgeserve.core.message import WATERMARK_END, Header, Kind, TimeKind
from edgeserve.stage.sources import SourceClock, restored, telling


def header(producer: str, number: int, kind: Kind = Kind.DATA, time_kind: TimeKind = TimeKind.DEVICE) -> Header:
    mark = WATERMARK_END if kind is Kind.END else number
    id_ = bytes(15) + bytes([number])
    return Header(id_, "a", producer, number, number, 0, watermark_ns=mark, kind=int(kind), time_kind=int(time_kind))


def test_what_comes_again_of_an_ended_producer_promises_nothing_for_the_next_round() -> None:
    clock = SourceClock()
    assert clock.observe(header("first", 1), 1, 0) == 1
    assert clock.end(header("first", 2, Kind.END), 2)
    clock.ended = False  # a new round has begun, with a message of another source
    assert clock.observe(header("first", 1), 1, 0) is None
    assert clock.observe(header("second", 3), 3, 0) == 3


def test_an_end_that_comes_again_does_not_end_a_producer_that_has_sent_since() -> None:
    clock = SourceClock()
    clock.observe(header("only", 1), 1, 0)
    clock.end(header("only", 2, Kind.END), 2)
    clock.observe(header("only", 3), 3, 0)
    assert not clock.ended
    assert not clock.end(header("only", 2, Kind.END), 2)
    assert clock.end(header("only", 4, Kind.END), 4)


def test_what_is_stored_once_more_behind_an_end_is_no_new_beginning() -> None:
    clock = SourceClock()
    clock.observe(header("only", 1), 1, 0)
    assert clock.end(header("only", 2, Kind.END), 2)
    assert clock.observe(header("only", 1), 3, 0) is None
    assert clock.ended
    clock.ended = False  # a new round has begun, with a message of another source
    assert clock.observe(header("only", 1), 4, 0) is None
    assert not clock.end(header("only", 2, Kind.END), 5)
    assert clock.observe(header("only", 3), 6, 0) == 3
    assert not clock.end(header("only", 2, Kind.END), 7)
    assert not clock.ended
    assert clock.end(header("only", 4, Kind.END), 8)


def test_who_comes_next_knows_it_too_and_reads_an_end_that_is_not_settled() -> None:
    clock = SourceClock()
    clock.observe(header("only", 1), 1, 0)
    for _ in range(2):  # brought twice
        assert clock.end(header("only", 2, Kind.END), 2)
    before, after = (restored("a", telling("a", clock.told(upto))) for upto in (1, 2))
    assert before.end(header("only", 2, Kind.END), 2)
    assert after.observe(header("only", 1), 3, 0) is None
    assert not after.end(header("only", 2, Kind.END), 4)
    assert after.observe(header("only", 3), 5, 0) == 3
    assert after.end(header("only", 4, Kind.END), 6)


def test_an_end_that_is_recorded_tells_what_comes_again() -> None:
    clock = SourceClock()
    clock.observe(header("only", 1), 1, 0)
    clock.pass_end(header("only", 2, Kind.END), 2)
    assert clock.observe(header("only", 3), 3, 0) == 3
    assert not clock.end(header("only", 2, Kind.END), 4)
    assert clock.end(header("only", 4, Kind.END), 5)


def test_an_end_that_is_not_settled_is_not_told_however_many_follow() -> None:
    clock = SourceClock()
    for number, kind in ((1, Kind.DATA), (2, Kind.END), (3, Kind.DATA), (4, Kind.END)):
        (clock.end if kind is Kind.END else partial(clock.observe, published_ns=0))(header("only", number, kind), number)

    def promises_again(upto: int) -> list[int | None]:
        """What whoever comes next, and is told that all up to there is settled, takes from each message that is stored once more."""
        return [restored("a", telling("a", clock.told(upto))).observe(header("only", number), 4 + number, 0) for number in (1, 3)]

    assert promises_again(1) == [1, 3]
    assert promises_again(2) == [None, 3]
    assert promises_again(4) == [None, None]


def of(producer: str, number: int, kind: Kind = Kind.DATA) -> Header:
    return header(producer, number, kind, TimeKind.COMPUTED)


def test_what_a_replica_sends_again_behind_the_end_of_another_begins_nothing() -> None:
    clock = SourceClock()
    for position, (producer, number) in enumerate((("p", 1), ("q", 1), ("p", 2), ("q", 2))):
        clock.observe(of(producer, number), position, 0)
    assert clock.end(of("p", 3, Kind.END), 4)
    clock.observe(of("q", 2), 5, 0)
    assert clock.ended
    clock.observe(of("q", 3), 6, 0)
    assert not clock.ended


def test_what_a_version_before_has_told_of_producers_can_be_read() -> None:
    raw = msgspec.msgpack.encode([("only", 1, 2, 0, True)])
    clock = restored("a", {"producers:a": raw})
    assert clock.seen
    assert clock.observe(header("only", 3), 5, 0) == 3


@pytest.mark.parametrize("end_is_read_before", [False, True])
def test_who_comes_next_knows_what_the_replicas_have_sent_before_the_end_of_one(end_is_read_before: bool) -> None:
    first = SourceClock()
    for position, (producer, number) in enumerate((("p", 1), ("q", 1), ("p", 2), ("q", 2))):
        first.observe(of(producer, number), position, 0)
    if end_is_read_before:
        assert first.end(of("p", 3, Kind.END), 4)
        first.observe(of("q", 5), 6, 0)
    assert first.computed
    clock = restored("a", telling("a", first.known(3)))  # before the end is settled
    if end_is_read_before:
        clock.pass_end(of("p", 3, Kind.END), 4)
    else:
        assert clock.end(of("p", 3, Kind.END), 4)
        clock.observe(of("q", 2), 5, 0)
        assert clock.ended
    clock.observe(of("q", 5), 6, 0)
    assert not clock.ended
