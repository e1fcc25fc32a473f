"""A group that begins at a time gets what is sent from then on, whatever the senders' clocks say."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
from tests.servers import with_namespace

from edgeserve.testing.transport import drain, frames_of, publish
from edgeserve.testing.transport.cases import numbered
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker import publisher
from edgeserve.transport.broker.driver import Driver, Entry
from edgeserve.transport.broker.envelope import wrap
from edgeserve.transport.broker.start import entry_since

S = 10**9


class SlowClock:
    """An hour behind."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time_ns(self) -> int:
        return time.time_ns() - 3600 * S


def check_slow_sender(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = connect(url)
    try:
        publish(transport, "a", numbered(2, "old"))
        transport.subscribe(["a"], "g", start=time.time_ns()).close()
        monkeypatch.setattr(publisher, "time", SlowClock())
        publish(transport, "a", numbered(2))
        member = transport.subscribe(["a"], "g", start=time.time_ns())
        publish(transport, "a", numbered(2, start=2))
        assert frames_of(drain(member, 4)) == numbered(4)
    finally:
        disconnect(transport)


def test_a_slow_clock_on_nats(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_slow_sender(f"{nats_url}/{uuid.uuid4().hex}", monkeypatch)


def test_a_slow_clock_on_pulsar(pulsar_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_slow_sender(with_namespace(pulsar_url), monkeypatch)


class Stored:
    """A topic with entries that were sent and stored at these seconds, and what is stored while it is looked at."""

    def __init__(self, times: Sequence[tuple[int, int]], new: int = 0) -> None:
        self._entries = [Entry(at, wrap([b""], sent * S), stored_ns=stored * S) for at, (sent, stored) in enumerate(times, 1)]
        self._new = new

    def last(self, topic: str) -> int | None:
        return len(self._entries) - self._new or None

    def scan(self, topic: str, *, since_ns: int) -> Iterator[Entry]:
        return (entry for entry in self._entries if entry.stored_ns >= since_ns - 2 * S)


@pytest.mark.parametrize(
    ("topic", "begins"),
    [
        (Stored([]), 0),
        (Stored([(10, 10), (90, 90)]), 3),
        (Stored([(99, 99), (100, 100), (101, 101)]), 2),
        (Stored([(99, 101), (100, 101)]), 2),  # the first one took long to be stored
        (Stored([(10, 99), (10, 103), (110, 110)]), 2),  # a slow clock's, stored since
        (Stored([(10, 10), (10, 101)], new=1), 2),  # came while the group was made
    ],
)
def test_where_a_group_begins_that_starts_at_100(topic: Stored, begins: int) -> None:
    assert entry_since(cast(Driver, topic), "a", 100 * S) == begins
