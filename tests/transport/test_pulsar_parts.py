"""Messages in parts on a Pulsar that keeps nothing but what somebody still needs, as it is shipped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.servers import with_namespace

from edgeserve.testing.transport import drain, publish
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.pulsar.driver import KEEP, PulsarDriver
from edgeserve.transport.pulsar.parts import Parts

LARGE = [os.urandom(6 << 20) for _ in range(2)]


@dataclass
class Stock:
    """A namespace without retention."""

    transport: BrokerEngine
    driver: PulsarDriver

    def restart_parts(self) -> None:
        """What a broker's restart does to the topic of parts: its ledger is closed, and goes when nobody needs it."""
        path = self.driver.admin.topic_path(self.driver.full("a.parts"))
        self.driver.admin.call(f"{path}/unload", "PUT")
        self.driver.newest("a.parts")  # it is loaded again
        self.driver.admin.call(f"{path}/trim", "POST")

    def wait_until_acknowledged(self, group: str, count: int) -> None:
        """An acknowledgement is on its way when a settle is durable."""
        entries = [entry.at for entry in self.driver.scan("a")]
        until = time.monotonic() + 10
        while self.driver.floor("a", group) <= entries[count - 1]:
            assert time.monotonic() < until

    @property
    def held(self) -> int:
        """How many parts are held for somebody."""
        floor = self.driver.admin.floor(self.driver.full("a.parts"), KEEP)
        return sum(entry.at >= floor for entry in self.driver.scan("a.parts"))

    def wait_until_held(self, count: int) -> None:
        """Letting go is an acknowledgement as well; a restart that came before it would undo it until the next look."""
        until = time.monotonic() + 10
        while self.held != count:
            assert time.monotonic() < until, self.held


@pytest.fixture
def stock(pulsar_url: str) -> Iterator[Stock]:
    transport = connect(with_namespace(pulsar_url))
    assert isinstance(transport, BrokerEngine)
    assert isinstance(transport.driver, PulsarDriver)
    driver = transport.driver
    nothing = {"retentionSizeInMB": 0, "retentionTimeInMinutes": 0}
    driver.admin.call(f"namespaces/{driver.settings.space}/retention", "POST", nothing)
    yield Stock(transport, driver)
    disconnect(transport)


def test_what_a_group_has_not_received_keeps_its_parts(stock: Stock) -> None:
    stock.transport.subscribe(["a"], "g").close()
    publish(stock.transport, "a", LARGE)
    stock.restart_parts()
    found = drain(stock.transport.subscribe(["a"], "g"), 2)
    assert [bytes(d[0]) for d in found] == LARGE


def test_parts_go_when_all_groups_have_settled_their_messages(stock: Stock) -> None:
    slow, fast = (stock.transport.subscribe(["a"], group) for group in ("slow", "fast"))
    publish(stock.transport, "a", [b"small", *LARGE], batch=1)
    drain(fast, 3)
    drain(slow, 2)
    stock.wait_until_acknowledged("fast", 3)
    stock.wait_until_acknowledged("slow", 2)
    parts, later_ns = Parts(stock.driver), time.time_ns() + 3600 * 10**9
    reading = stock.transport.read("a")
    next(reading)  # whoever only looks holds nothing

    parts.trim("a", time.time_ns())
    stock.restart_parts()
    assert stock.held == 4  # the message of a part this young may be on its way

    parts.trim("a", later_ns)
    stock.wait_until_held(2)
    stock.restart_parts()
    assert bytes(drain(slow, 1)[0][0]) == LARGE[1]

    stock.wait_until_acknowledged("slow", 3)
    parts.trim("a", later_ns)
    stock.wait_until_held(0)
    stock.restart_parts()
    assert list(stock.driver.scan("a.parts")) == []
