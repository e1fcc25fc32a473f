"""A large message whose parts were damaged is put aside by name, and is in nobody's way."""

from __future__ import annotations

import os
import uuid

import pytest

from edgeserve.testing.transport import drain, frames_of, publish
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.broker.envelope import wrap

DAMAGED = {
    "a wrong checksum": wrap([b"part"], 0)[:-1] + b"?",
    "a newer version": b"\xedB\xff" + wrap([b"part"], 0)[3:],
    "nothing in it": wrap([], 0),
}


@pytest.mark.parametrize("topics", [["a"], ["a", "b"]], ids=["one topic", "two topics"])
@pytest.mark.parametrize("part", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_message_with_a_damaged_part(nats_url: str, part: bytes, topics: list[str], caplog: pytest.LogCaptureFixture) -> None:
    transport = connect(f"{nats_url}/{uuid.uuid4().hex}")
    assert isinstance(transport, BrokerEngine)
    driver = transport.driver
    try:
        publish(transport, "a", [os.urandom(driver.max_bytes + 1)])
        count = sum(1 for _ in driver.scan("a.parts"))
        driver.delete_topic("a.parts")
        outlet = driver.outlet("a.parts")
        for _ in range(count):
            outlet.send(part, lambda at, error: None)
        publish(transport, "a", [b"next"])
        assert frames_of(drain(transport.subscribe(topics, "g"), 2)) == [b"", b"next"]
        assert "its parts on 'a.parts' are gone or damaged" in caplog.text
    finally:
        disconnect(transport)
