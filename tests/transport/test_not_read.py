"""An entry that cannot be read now, as the broker does not answer, is given to whoever asks next."""

from __future__ import annotations

import os
import uuid
from typing import Any

import pytest
from tests.servers import with_namespace

from edgeserve.core.errors import TransportError
from edgeserve.testing.transport import drain, publish
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.nats.admin import Admin


@pytest.mark.parametrize("engine", ["nats", "pulsar"])
@pytest.mark.parametrize("topics", [["a"], ["a", "b"]])
def test_a_message_whose_parts_cannot_be_fetched_comes_again(
    request: pytest.FixtureRequest, engine: str, topics: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = request.getfixturevalue(f"{engine}_url")
    transport = connect(with_namespace(server) if engine == "pulsar" else f"{server}/{uuid.uuid4().hex}")
    fetch, asked = BrokerEngine.fetch, []

    def once_away(self: BrokerEngine, *details: Any) -> bytes | memoryview:
        asked.append(details)
        if len(asked) == 1:
            raise TransportError("the broker is away")
        return fetch(self, *details)

    monkeypatch.setattr(BrokerEngine, "fetch", once_away)
    try:
        large = os.urandom(6 << 20)
        publish(transport, "a", [large])
        member = transport.subscribe(topics, "g")
        with pytest.raises(TransportError, match="away"):
            drain(member, 1)
        if len(topics) > 1:  # the thread that met it has ended with it
            member.close()
            member = transport.subscribe(topics, "g")
        assert bytes(drain(member, 1)[0][0]) == large
        assert len(asked) == 2
    finally:
        disconnect(transport)


def test_marks_that_cannot_be_read_keep_no_message(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: Any) -> dict[int, int]:
        raise TransportError("no right to read the stream")

    monkeypatch.setattr(Admin, "marks", refused)
    transport = connect(f"{nats_url}/{uuid.uuid4().hex}")
    try:
        publish(transport, "a", [b"1"])
        first = transport.subscribe(["a"], "g")
        drain(first, 1, settle=False)
        first.close()
        (again,) = drain(transport.subscribe(["a"], "g"), 1)
        assert bytes(again[0]) == b"1"
    finally:
        disconnect(transport)
