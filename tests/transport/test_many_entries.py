"""A settlement whose results are several entries counts when the last of them is durable, and not before."""

from __future__ import annotations

import uuid
from typing import cast

import pytest

from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.driver import Done
from edgeserve.transport.broker.envelope import MOST_FRAMES
from edgeserve.transport.broker.member import BrokerSubscription
from edgeserve.transport.nats.outlet import NatsOutlet


def test_what_is_confirmed_before_the_rest_is_handed_over_settles_nothing(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = connect(f"{nats_url}/{uuid.uuid4().hex}")
    try:
        transport.publisher("a").publish([b"input"])
        member = cast(BrokerSubscription, transport.subscribe(["a"], "g"))
        (delivery,) = member.receive(1, 10_000)
        entries, settled = list[Done](), list[int]()

        def send(self: NatsOutlet, data: bytes, done: Done) -> None:
            if entries:
                member._settlements.record()  # as its thread may at any time
                settled.append(len(member._settlements._recorded))
            else:
                done(1, None)
            entries.append(done)

        with monkeypatch.context() as patched:
            patched.setattr(NatsOutlet, "send", send)
            member.settle({"a": [delivery[1]]}, {"out": [b"result"] * (MOST_FRAMES + 1)}, ids=[b"i" * 16])
        assert len(entries) == 2
        assert settled == [0] and len(member._settlements._waiting) == 1
        entries[1](2, None)
        member.flush()
        assert member.settled_ids() == [b"i" * 16]
    finally:
        disconnect(transport)
