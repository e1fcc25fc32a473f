"""The exclusive consumer of a join, of which another member takes some."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, cast

import msgspec
import pytest
from tests.waiting import until

from edgeserve.transport.broker.driver import Outlet
from edgeserve.transport.nats import inlet as nats_inlet
from edgeserve.transport.nats.driver import NatsDriver
from edgeserve.transport.nats.inlet import NatsInlet
from edgeserve.transport.nats.settings import settings_from
from edgeserve.transport.url import parse


@pytest.fixture
def drivers(nats_url: str) -> Iterator[list[NatsDriver]]:
    """Two connections."""
    node = f"{nats_url}/{uuid.uuid4().hex}"
    made = [NatsDriver(settings_from(parse(node))) for _ in range(2)]
    yield made
    for driver in made:
        driver.close()


def send(outlet: Outlet, numbers: range) -> None:
    """Returns when all are stored."""
    stored = SimpleQueue[int | None]()
    for number in numbers:
        outlet.send(b"%d" % number, lambda at, _: stored.put(at))
    assert all(stored.get(timeout=30) is not None for _ in numbers)


def test_what_another_was_given_comes_again_in_order(drivers: list[NatsDriver]) -> None:
    mine, other = drivers
    outlet, inlet = mine.outlet("in"), cast(NatsInlet, mine.inlet("in", "g", "earliest", exclusive=True))
    send(outlet, range(5))
    found = [entry.data for _ in range(5) if (entry := inlet.poll(20)) is not None]
    stolen: list[bytes] = []
    came = threading.Event()

    async def steal() -> None:
        """As one asks that was the holder before, stood still, and does not know yet."""
        client: Any = await other._connection.up()

        async def take(message: Any) -> None:
            stolen.append(message.data)
            came.set()

        await client.subscribe("thief", cb=take)
        body = msgspec.json.encode({"batch": 3, "expires": 10**10})
        client.send(f"$JS.API.CONSUMER.MSG.NEXT.{inlet._stream}.{inlet.consumer}", body, "thief")
        await other._connection.sent()

    other._connection.call(steal)
    send(outlet, range(5, 30))
    assert came.wait(20)
    while len(set(found)) < 30:
        entry = inlet.poll(20)
        assert entry is not None
        found.append(entry.data)
    assert list(dict.fromkeys(found)) == [b"%d" % number for number in range(30)]
    assert stolen


def test_who_stood_still_asks_for_nothing_before_it_knows_that_it_is_still_the_one(drivers: list[NatsDriver]) -> None:
    one, other = (cast(NatsInlet, driver.inlet("in", "g", "earliest", exclusive=True)) for driver in drivers)
    connection = drivers[0]._connection
    asked = one._requests

    async def wake() -> None:
        one._seen = time.monotonic() - 4
        one._asked.clear()
        one._coming = 0
        one._pull()

    connection.call(wake)
    until(lambda: one._stopped)
    until(lambda: not one._attaching)
    assert one._requests == asked
    send(drivers[0].outlet("in"), range(20))
    assert [entry.data for _ in range(20) if (entry := other.poll(20)) is not None] == [b"%d" % number for number in range(20)]


def numbers_of(inlet: NatsInlet, count: int) -> list[int]:
    """The next entries."""
    found = [inlet.poll(20) for _ in range(count)]
    return [int(entry.data) for entry in found if entry is not None]


def test_what_a_dead_holder_had_comes_before_anything_newer_however_late_the_server_is(
    drivers: list[NatsDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_inlet, "_EXPIRED_S", (0.04, 5.0))  # for the first tries too short for the server
    first, second = drivers
    outlet, dead = second.outlet("in"), cast(NatsInlet, first.inlet("in", "g", "earliest", exclusive=True))
    send(outlet, range(400))
    had = [entry for _ in range(300) if (entry := dead.poll(20)) is not None]
    for entry in had[:200:2]:
        dead.acknowledge(entry)
    first._connection.call(dead.confirmed)
    dead.close()  # with some in hand, as by a kill: it says nothing
    successor = cast(NatsInlet, second.inlet("in", "g", "earliest", exclusive=True))
    send(outlet, range(400, 500))
    expected = [*range(1, 200, 2), *range(200, 500)]
    assert numbers_of(successor, len(expected)) == expected


def test_what_was_on_its_way_when_a_connection_ended_comes_before_anything_newer(drivers: list[NatsDriver]) -> None:
    mine, other = drivers
    outlet, inlet = mine.outlet("in"), cast(NatsInlet, mine.inlet("in", "g", "earliest", exclusive=True))
    send(outlet, range(5))
    assert numbers_of(inlet, 5) == list(range(5))
    came = SimpleQueue[bytes]()

    async def lose() -> None:
        """What comes goes to where nobody is, as to a connection that has just ended, and then there is another one."""
        assert inlet._subscription is not None
        await inlet._subscription.unsubscribe()
        client: Any = await other._connection.up()

        async def take(message: Any) -> None:
            came.put(message.data)

        await client.subscribe(f"{inlet._inbox}.*", cb=take)
        await other._connection.sent()

    mine._connection.call(lose)
    send(outlet, range(5, 10))
    assert [came.get(timeout=20) for _ in range(5)] == [b"%d" % number for number in range(5, 10)]
    mine._connection.soon(inlet.up)
    send(outlet, range(10, 20))
    found: list[int] = []
    while not set(range(20)) <= set(found):
        found += numbers_of(inlet, 1)
    assert list(dict.fromkeys(n for n in found if n >= 5)) == list(range(5, 20))


def test_what_is_settled_while_the_rest_comes_again_is_not_waited_for(drivers: list[NatsDriver]) -> None:
    driver = drivers[0]
    outlet, inlet = driver.outlet("in"), cast(NatsInlet, driver.inlet("in", "g", "earliest", exclusive=True))
    send(outlet, range(10))
    had = [entry for _ in range(10) if (entry := inlet.poll(20)) is not None]

    async def begin() -> None:
        info = await inlet._admin.consumer("in", "g")
        assert info is not None
        inlet._expect_again(info)

    driver._connection.call(begin)
    for entry in had:
        inlet.acknowledge(entry)
    send(outlet, range(10, 12))
    assert numbers_of(inlet, 2) == [10, 11]
