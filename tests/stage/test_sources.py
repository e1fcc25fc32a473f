"""What a member knows of a source while a broker brings again what was settled."""

from __future__ import annotations

from edgeserve.core.message import WATERMARK_END, Header, Kind
from edgeserve.stage.sources import SourceClock


def header(producer: str, number: int, kind: Kind = Kind.DATA) -> Header:
    mark = WATERMARK_END if kind is Kind.END else number
    return Header(bytes(15) + bytes([number]), "a", producer, number, number, 0, watermark_ns=mark, kind=int(kind))


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
