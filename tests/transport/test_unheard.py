"""Whoever is alone in its group, as far as it has heard, does not take what it has not been given for settled."""

from __future__ import annotations

import threading
import uuid
from typing import cast

import pytest
from tests.servers import with_namespace

from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.driver import Entry
from edgeserve.transport.broker.member import BrokerSubscription
from edgeserve.transport.broker.membership import Membership


@pytest.fixture(params=["nats", pytest.param("pulsar", marks=pytest.mark.pulsar)])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "nats":
        return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"
    return with_namespace(request.getfixturevalue("pulsar_url"))


def test_what_lies_between_two_entries_may_have_been_given_to_who_was_not_heard_of_yet(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf, hears = list[Membership](), threading.Event()
    deliver, barrier = Membership._deliver, Membership.barrier

    def late(self: Membership, entry: Entry) -> None:
        if self in deaf:
            hears.wait()
        deliver(self, entry)

    def listen(self: Membership, *arguments: object) -> None:
        hears.set()
        barrier(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Membership, "_deliver", late)
    monkeypatch.setattr(Membership, "barrier", listen)
    transport = connect(url)
    try:
        first, publisher = cast(BrokerSubscription, transport.subscribe(["a"], "g")), transport.publisher("a")
        publisher.publish([b"0"])
        (one,) = first.receive(1, 10_000)
        first.settle({"a": [one[1]]})
        first.flush()
        hears.clear()
        deaf.append(first._places.of["a"])
        second = transport.subscribe(["a"], "g")
        second.receive(1, 0)  # from now on it is given entries
        missing, newest = None, -1
        for number in range(1, 100):
            publisher.publish([str(number).encode()])
            publisher.flush()
            found = None
            while not found:
                if found := second.receive(1, 20):
                    missing = missing or found[0][1]
                elif found := first.receive(1, 20):
                    newest = found[-1][1]
            if missing is not None and newest > missing:
                break
        assert missing is not None and newest > missing, "the broker gave no entry to the one and a later one to the other"
        assert hears.is_set() and not first.alone
        first.settle({"a": [newest]})
        assert first.floor("a") <= missing
    finally:
        hears.set()
        disconnect(transport)
