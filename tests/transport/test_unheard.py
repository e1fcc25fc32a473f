"""Whoever is alone in its group, as far as it has heard, does not take what it has not been given for settled."""

from __future__ import annotations

import uuid
from typing import cast

import pytest
from tests.servers import with_namespace

from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.broker.envelope import INDEX_BITS


@pytest.fixture(params=["nats", pytest.param("pulsar", marks=pytest.mark.pulsar)])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "nats":
        return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"
    return with_namespace(request.getfixturevalue("pulsar_url"))


def test_what_lies_between_two_entries_may_have_been_given_to_who_was_not_heard_of_yet(url: str) -> None:
    engine = cast(BrokerEngine, connect(url))
    try:
        member, publisher = engine.subscribe(["a"], "g"), engine.publisher("a")
        publisher.publish([b"0"])
        (first,) = member.receive(1, 10_000)
        member.settle({"a": [first[1]]})
        # Receives for the group without being in its log: as one whose word is still on its way.
        unheard = engine.driver.inlet("a", "g", "earliest", exclusive=False)
        missing, newest = None, first[1]
        for number in range(1, 60):
            publisher.publish([str(number).encode()])
            publisher.flush()
            while True:
                if (entry := unheard.poll(0.05)) is not None:
                    missing = missing or entry.at << INDEX_BITS
                    break
                if found := member.receive(8, 50):
                    newest = found[-1][1]
                    member.settle({"a": [delivery[1] for delivery in found]})
                    break
            if missing is not None and newest > missing:
                break
        assert missing is not None and newest > missing, "the broker gave no entry to the one and a later one to the other"
        member.flush()
        assert member.alone
        assert member.floor("a") <= missing
        unheard.close()
    finally:
        disconnect(engine)
