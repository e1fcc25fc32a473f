"""A join that holds an end, on an engine that settles what comes before it only later: as brokers do, whose acknowledging takes time."""

from __future__ import annotations

import threading

import pytest

from edgeserve import Compute, DataSource
from edgeserve.transport.member import LogSubscription


def test_an_end_is_looked_at_again_when_nothing_else_comes(embedded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A broker's delay, at will: a floor that is behind for as long as the test wants, and then where it is.
    floor, settled, asked = LogSubscription.floor, threading.Event(), threading.Event()

    def late_floor(self: LogSubscription, topic: str) -> int:
        asked.set()
        return floor(self, topic) if settled.is_set() else 0

    found: list[int] = []
    for source_id in ("a", "b"):
        with DataSource([1, 2, 3], embedded, source_id=source_id, topic="in", event_time=int) as source:
            source.run(until="end")
    monkeypatch.setattr(LogSubscription, "floor", late_floor)
    with Compute(lambda a, b: found.append(a), embedded, topic_in="in", topic_out="out", join="exact") as compute:
        running = threading.Thread(target=compute.run, args=("end",), daemon=True)
        running.start()
        assert asked.wait(30)
        settled.set()
        running.join(30)
        ended = not running.is_alive()
    assert (ended, found) == (True, [1, 2, 3])
