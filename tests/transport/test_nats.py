"""NATS JetStream, held to the contract of all engines."""

from __future__ import annotations

import uuid

import pytest

from edgeserve.testing.transport import TransportContract
from edgeserve.transport import connect, disconnect
from edgeserve.transport.base import GroupKind


class TestNats(TransportContract):
    @pytest.fixture
    def url(self, nats_url: str) -> str:
        """A prefix of its own."""
        return f"{nats_url}/{uuid.uuid4().hex}"


@pytest.mark.timeout(60)
def test_a_join_may_hold_more_than_a_server_lets_be_unacknowledged_otherwise(nats_url: str) -> None:
    count = 65_536 + 1_000
    transport = connect(f"{nats_url}/{uuid.uuid4().hex}")
    holder, publisher = transport.subscribe(["in"], "g", kind=GroupKind.FAILOVER), transport.publisher("in")
    for n in range(count):
        publisher.publish([b"%d" % n])
    received = 0
    while received < count:
        got = holder.receive(4096, 10_000)
        assert got, f"nothing comes after {received} messages in hand"
        received += len(got)
    disconnect(transport)
