"""A member that leaves while its last results are not stored says so."""

from __future__ import annotations

import os
import signal

import pytest
from tests import servers

from edgeserve.core.errors import SendError, TransportError
from edgeserve.transport import Subscription, Transport, connect, disconnect
from edgeserve.transport.broker import member, membership


def at_work(transport: Transport) -> tuple[Subscription, int]:
    """A member that has settled a message, and where the next one is that it has in hand."""
    publisher = transport.publisher("in")
    publisher.publish([b"m", b"n"])
    publisher.flush()
    mine = transport.subscribe(["in"], "g")
    first, second = (position for _ in range(2) for _, position, *_ in mine.receive(1, 20_000))
    mine.settle({"in": [first]}, {"out": [b"result"]}, ids=[b"1" * 16])
    mine.flush()
    return mine, second


def test_who_leaves_before_its_last_results_are_stored_is_told(new_nats: servers.NewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = new_nats()
    monkeypatch.setattr(member, "_CLOSE_S", 0.3)
    monkeypatch.setattr(membership, "_ANSWER_S", 0.3)
    transport = connect(server.url)
    try:
        mine, second = at_work(transport)
        os.kill(server.pid, signal.SIGSTOP)
        mine.settle({"in": [second]}, {"out": [b"result"]}, ids=[b"2" * 16])
        with pytest.raises(SendError, match=r"'g' was left before all of its last results were stored"):
            mine.close()
    finally:
        os.kill(server.pid, signal.SIGCONT)
        disconnect(transport)


def test_what_was_raised_before_is_not_raised_again_by_leaving(new_nats: servers.NewServer) -> None:
    server = new_nats()
    transport = connect(f"{server.url}/?deadline_s=1")
    try:
        mine, second = at_work(transport)
        server.kill()
        mine.settle({"in": [second]}, {"out": [b"result"]}, ids=[b"2" * 16])
        with pytest.raises((SendError, TransportError)):
            mine.flush()
        mine.close()
    finally:
        disconnect(transport)
