"""A join that holds an end, on an engine that settles what comes before it only later: as brokers do, whose acknowledging takes time."""

from __future__ import annotations

import threading

import pytest

from edgeserve import Compute, DataSource
from edgeserve.core.errors import ReceiveTimeout
from edgeserve.transport.member import LogSubscription


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A broker's delay, at will: a floor that is behind until this is set, and then where it is."""
    floor, settled = LogSubscription.floor, threading.Event()
    monkeypatch.setattr(LogSubscription, "floor", lambda self, topic: floor(self, topic) if settled.is_set() else 0)
    return settled


def send(node: str, *readings: int) -> None:
    for source_id in ("a", "b"):
        with DataSource(readings, node, source_id=source_id, topic="in", event_time=int) as source:
            source.run(until="end")


def test_an_end_is_looked_at_again_when_nothing_else_comes(
    embedded: str, monkeypatch: pytest.MonkeyPatch, settled: threading.Event
) -> None:
    late_floor, asked = LogSubscription.floor, threading.Event()

    def told(self: LogSubscription, topic: str) -> int:
        asked.set()
        return late_floor(self, topic)

    found: list[int] = []
    send(embedded, 1, 2, 3)
    monkeypatch.setattr(LogSubscription, "floor", told)
    with Compute(lambda a, b: found.append(a), embedded, topic_in="in", topic_out="out", join="exact") as compute:
        running = threading.Thread(target=compute.run, args=("end",), daemon=True)
        running.start()
        assert asked.wait(30)
        settled.set()
        running.join(30)
        ended = not running.is_alive()
    assert (ended, found) == (True, [1, 2, 3])


def test_next_waits_no_longer_for_the_next_round_than_it_was_told_to(embedded: str, settled: threading.Event) -> None:
    """The engine does not say that the round before is settled, so the message that begins the next one has to wait."""
    send(embedded, 1)
    send(embedded, 2)
    with Compute(lambda a, b: (a, b), embedded, topic_in="in", topic_out="out", join="exact", timeout_ms=300) as compute:
        assert [next(compute) for _ in range(2)] == [None, (1, 1)]
        with pytest.raises(ReceiveTimeout, match="timeout_ms=300"):
            next(compute)
        settled.set()
        assert [next(compute) for _ in range(2)] == [None, (2, 2)]
