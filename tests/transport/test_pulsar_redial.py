"""What does not come back by itself is opened anew: nothing is lost, put out of order, or taken from another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest
from tests.servers import with_namespace
from tests.waiting import until

from edgeserve.core.errors import Fenced, GroupBusy
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.driver import Entry, Inlet, Outlet
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.pulsar.driver import PulsarDriver
from edgeserve.transport.pulsar.ends import Dialled, PulsarOutlet

COUNT = 400
TIMEOUT_S = 30.0
Confirmed = SimpleQueue[tuple[int | None, Exception | None]]


@pytest.fixture
def driver(pulsar_url: str) -> Iterator[PulsarDriver]:
    transport = connect(with_namespace(pulsar_url))
    assert isinstance(transport, BrokerEngine) and isinstance(transport.driver, PulsarDriver)
    yield transport.driver
    disconnect(transport)


def as_dialled(end: Any) -> Dialled:
    assert isinstance(end, Dialled)
    return end


def send(outlet: Outlet, data: bytes) -> tuple[int | None, Exception | None]:
    """Waits for the answer."""
    answers: Confirmed = SimpleQueue()
    outlet.send(data, lambda at, error: answers.put((at, error)))
    return answers.get(timeout=TIMEOUT_S)


def beside(end: object) -> Callable[[], None]:
    """Dials again and again in a thread; returns what ends that, after twenty times at the least."""
    dialled = as_dialled(end)
    over, often = threading.Event(), threading.Event()

    def run() -> None:
        count = 0
        while not over.is_set():
            dialled.dial_again(though_connected=True)
            count += 1
            if count == 20:
                often.set()

    thread = threading.Thread(target=run)
    thread.start()

    def stop() -> None:
        assert often.wait(TIMEOUT_S)
        over.set()
        thread.join()

    return stop


def test_entries_on_their_way_are_sent_again_in_order_and_confirmed_once(driver: PulsarDriver) -> None:
    outlet = driver.outlet("t")
    answers: SimpleQueue[tuple[int, int | None, Exception | None]] = SimpleQueue()
    end = beside(outlet)
    for n in range(COUNT):
        outlet.send(b"%d" % n, lambda at, error, n=n: answers.put((n, at, error)))  # type: ignore[misc]
    found = [answers.get(timeout=TIMEOUT_S) for _ in range(COUNT)]
    end()
    assert [error for _, _, error in found if error] == []
    assert sorted(n for n, _, _ in found) == list(range(COUNT))
    stored = [(entry.at, int(entry.data)) for entry in driver.scan("t")]
    firsts = list(dict.fromkeys(n for _, n in stored))
    assert firsts == list(range(COUNT))
    assert {(at, n) for n, at, _ in found} <= set(stored)
    assert send(outlet, b"last")[1] is None and answers.empty()


def test_a_group_goes_on_where_it_was(driver: PulsarDriver) -> None:
    outlet = driver.outlet("t")
    inlet = driver.inlet("t", "g", "earliest", exclusive=False)
    ats = [send(outlet, b"%d" % n)[0] for n in range(COUNT)]
    seen: dict[int, int] = {}
    end = beside(inlet)
    while len(seen) < COUNT // 2:
        entry = inlet.poll(1.0)
        if entry is not None:
            seen[int(entry.data)] = entry.at
            inlet.acknowledge(entry)
    end()
    while len(seen) < COUNT:
        entry = inlet.poll(TIMEOUT_S)
        assert entry is not None
        seen[int(entry.data)] = entry.at
        inlet.acknowledge(entry)
    assert [seen[n] for n in range(COUNT)] == ats
    # What was acknowledged as the connection went may come once more, and is acknowledged then.
    while (again := inlet.poll(1.0)) is not None:
        inlet.acknowledge(again)
    until(lambda: driver.floor("t", "g") > max(seen.values()))


def test_a_tail_delivers_each_entry_once_and_in_order(driver: PulsarDriver) -> None:
    outlet = driver.outlet("t")
    came: SimpleQueue[Entry] = SimpleQueue()
    tail = driver.tail("t", None, came.put)
    end = beside(tail)
    for n in range(COUNT // 4):
        assert send(outlet, b"%d" % n)[1] is None
    assert [int(came.get(timeout=TIMEOUT_S).data) for _ in range(COUNT // 4)] == list(range(COUNT // 4))
    end()
    assert send(outlet, b"last")[1] is None
    assert came.get(timeout=TIMEOUT_S).data == b"last" and came.empty()
    tail.close()


def test_a_channel_is_heard_afterwards(driver: PulsarDriver) -> None:
    heard: SimpleQueue[bytes] = SimpleQueue()
    one, two = driver.channel("t", heard.put), driver.channel("t", lambda _: None)
    assert one is not None and two is not None
    for end in (one, two):
        as_dialled(end).dial_again(though_connected=True)
    two.say(b"word")
    assert heard.get(timeout=TIMEOUT_S) == b"word"


def test_a_fence_stays_with_its_holder(driver: PulsarDriver) -> None:
    outlet = driver.fenced_outlet("t")
    assert send(outlet, b"one")[1] is None
    as_dialled(outlet).dial_again()
    assert send(outlet, b"two")[1] is None
    assert [entry.data for entry in driver.scan("t")] == [b"one", b"two"]


def test_a_fence_is_not_taken_back_from_a_successor(driver: PulsarDriver) -> None:
    paused = driver.fenced_outlet("t")
    assert send(paused, b"one")[1] is None
    successor = driver.fenced_outlet("t")
    assert send(successor, b"two")[1] is None
    as_dialled(paused).dial_again()
    assert isinstance(send(paused, b"late")[1], Fenced)
    assert send(successor, b"three")[1] is None
    assert [entry.data for entry in driver.scan("t")] == [b"one", b"two", b"three"]


def test_who_was_told_that_the_fence_is_lost_does_not_take_it_again(driver: PulsarDriver) -> None:
    paused = driver.fenced_outlet("t")
    assert send(paused, b"one")[1] is None
    successor = driver.fenced_outlet("t")
    assert isinstance(send(paused, b"late")[1], Fenced)
    as_dialled(paused).dial_again()
    assert isinstance(send(paused, b"later")[1], Fenced)
    assert send(successor, b"two")[1] is None
    assert [entry.data for entry in driver.scan("t")] == [b"one", b"two"]


def test_who_takes_a_fence_before_anything_was_appended_is_refused_rather_than_believed(driver: PulsarDriver) -> None:
    outlet = driver.fenced_outlet("t")
    as_dialled(outlet).dial_again()
    assert isinstance(send(outlet, b"one")[1], Fenced)


def test_what_the_client_leaves_closed_is_opened_by_itself(driver: PulsarDriver) -> None:
    outlet, inlet = as_dialled(driver.outlet("t")), as_dialled(driver.inlet("t", "g", "earliest", exclusive=True))
    for end in (outlet, inlet):
        for each in end._opened():
            each.close()
    assert driver.trouble() is not None
    until(lambda: driver.trouble() is None)
    assert isinstance(outlet, Outlet) and send(outlet, b"one")[1] is None
    assert (entry := inlet.poll(TIMEOUT_S)) is not None and entry.data == b"one"  # type: ignore[attr-defined]


def test_who_cannot_come_back_keeps_nobody_else_from_it(driver: PulsarDriver) -> None:
    taken = as_dialled(driver.inlet("t", "g", "earliest", exclusive=True))
    others = [as_dialled(driver.outlet(f"t{n}")) for n in range(5)]
    thieves: list[Inlet] = []

    def steal() -> bool:
        for each in taken._opened():
            each.close()
        with suppress(GroupBusy):  # it was opened again already
            thieves.append(driver.inlet("t", "g", "earliest", exclusive=True))
        return bool(thieves)

    until(steal)
    for end in others:
        for each in end._opened():
            each.close()
    until(lambda: all(end.is_connected() for end in others))
    assert not taken.is_connected()
    thieves[0].close()
    until(taken.is_connected)


def test_an_end_that_is_closed_while_it_is_dialled_does_not_wait_for_that(driver: PulsarDriver) -> None:
    outlet = driver.outlet("t")
    begun, go = threading.Event(), threading.Event()
    assert isinstance(outlet, PulsarOutlet)
    make, made = outlet._make, SimpleQueue[Any]()

    def slowly() -> Any:
        begun.set()
        assert go.wait(TIMEOUT_S)
        made.put(producer := make())
        return producer

    outlet._make = slowly
    thread = threading.Thread(target=partial(outlet.dial_again, though_connected=True))
    thread.start()
    assert begun.wait(TIMEOUT_S)
    outlet.close()
    go.set()
    thread.join()
    assert not made.get().is_connected()


def test_an_end_that_was_closed_stays_closed(driver: PulsarDriver) -> None:
    outlet = as_dialled(driver.outlet("t"))
    outlet.close()
    outlet.dial_again()
    assert not outlet.is_connected() and driver.trouble() is None
