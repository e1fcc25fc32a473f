"""What a broker's member gave back because its task stood still, while others settled it."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from tests import servers
from tests.waiting import until

from edgeserve.testing.transport.cases import drain, numbered, publish
from edgeserve.transport import connect, disconnect


@pytest.mark.parametrize("engine", ["nats", "pulsar"])
def test_what_another_settled_is_settled_when_nobody_else_is_left(engine: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{engine}_url")
    transport = connect(f"{url}/{uuid.uuid4().hex}" if engine == "nats" else servers.with_namespace(url))
    try:
        publish(transport, "a", numbered(1))
        one: Any = transport.subscribe(["a"], "g", ack_timeout_ms=30)
        drain(one, 1, settle=False)
        two = transport.subscribe(["a"], "g")
        until(lambda: not one._reception.attached)  # it has given the message back, and is given no more until it asks
        drain(two, 1)
        two.close()
        until(lambda: one.alone)
        assert one.receive(1, 0) == []
        until(lambda: one.floor("a") >= transport.end("a"))
    finally:
        disconnect(transport)
