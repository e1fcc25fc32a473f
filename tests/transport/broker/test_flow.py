"""A sender that is ahead of a join waits for it, and never for long for one that stands still."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker import flow
from edgeserve.transport.broker.driver import Channel, Driver
from edgeserve.transport.broker.flow import Restraint, Standing, Teller

WINDOW = 100


class _Air(Channel):
    """A channel within this process: what is said is heard by all, at once."""

    def __init__(self, ears: list[Callable[[bytes], None]], hear: Callable[[bytes], None]) -> None:
        self._ears, self._hear = ears, hear
        ears.append(hear)

    def say(self, data: bytes) -> None:
        for hear in list(self._ears):
            hear(data)

    def close(self) -> None:
        if self._hear in self._ears:
            self._ears.remove(self._hear)


class _Broker:
    def __init__(self) -> None:
        self.ears: list[Callable[[bytes], None]] = []

    def channel(self, topic: str, hear: Callable[[bytes], None]) -> Channel | None:
        return _Air(self.ears, hear)


@pytest.fixture
def broker() -> Driver:
    return cast(Driver, _Broker())


class _Sender:
    """Sends entries of ten messages; each is stored at once, at even numbers: odd ones are another sender's."""

    def __init__(self, broker: Driver, size: int = 10) -> None:
        self.size = size
        self.restraint = Restraint(broker, "in", WINDOW, lambda: 0)
        self.entries = 0
        self.stop = threading.Event()

    def send(self, entries: int) -> None:
        for _ in range(entries):
            self.restraint.sent(2 * self.entries, self.size)
            self.entries += 1
            self.restraint.wait(self.size, self.stop.is_set)

    def in_the_background(self, entries: int) -> threading.Thread:
        thread = threading.Thread(target=self.send, args=(entries,))
        thread.start()
        return thread


def _until(condition: Callable[[], Any]) -> None:
    for _ in range(2_000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came to that")


def _teller(broker: Driver, standing: Callable[[], Standing]) -> Teller:
    teller = Teller(broker, "in", "g", standing)
    _until(lambda: cast(_Broker, broker).ears)
    return teller


def test_a_sender_waits_while_a_join_has_too_much_of_it(broker: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_FIRST_S", 1e9)
    monkeypatch.setattr(flow, "_STALL_S", 1e9)
    floor = [-1]
    teller = _teller(broker, lambda: Standing(floor[0]))
    sender = _Sender(broker)
    sending = sender.in_the_background(40)
    _until(lambda: sender.entries == 11)
    teller.tell([1, 3, 5])  # the other's: that frees nothing
    assert sender.entries == 11
    teller.tell([0, 2, 4])
    _until(lambda: sender.entries == 14)
    floor[0] = 20  # what was said of 6 to 18 got lost
    teller.tell([])
    _until(lambda: sender.entries == 21)
    sender.stop.set()
    sending.join()


def test_what_is_settled_before_the_sender_knows_that_it_is_stored_counts(broker: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_FIRST_S", 1e9)
    teller = _teller(broker, Standing)
    sender = _Sender(broker)
    sender.send(3)  # by then it has asked
    teller.tell([*range(6, 200, 2)])
    sender.send(60)
    sender.stop.set()


@pytest.mark.parametrize("moves", [False, True])
def test_a_join_that_stands_still_holds_nobody_for_long(broker: Driver, monkeypatch: pytest.MonkeyPatch, moves: bool) -> None:
    monkeypatch.setattr(flow, "_STALL_S" if moves else "_FIRST_S", 0.01)
    monkeypatch.setattr(flow, "_FIRST_S" if moves else "_STALL_S", 1e9)
    teller = _teller(broker, Standing)
    sender = _Sender(broker)
    sender.send(3)
    if moves:
        teller.tell([0])
    sender.send(100)
    assert sender.entries == 103


def test_without_a_join_nobody_waits(broker: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_ANSWER_S", 0.01)
    sender = _Sender(broker)
    sender.send(100)
    cast(_Broker, broker).ears[0](b"not ours")
    sender.send(100)


def test_a_join_that_has_gone_holds_nobody(broker: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_FIRST_S", 1e9)
    monkeypatch.setattr(flow, "_GONE_S", 0.01)
    _teller(broker, Standing).tell([])
    sender = _Sender(broker)
    sender.send(100)
    sender.restraint.close()
    sender.restraint.close()


def test_a_join_that_moves_for_others_only_stands_still(broker: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_FIRST_S", 1e9)
    monkeypatch.setattr(flow, "_STALL_S", 0.3)
    teller = _teller(broker, Standing)
    sender = _Sender(broker)
    sender.send(3)
    teller.tell([0])
    sending = sender.in_the_background(100)
    others = iter(range(1, 10_000, 2))

    def over() -> bool:
        teller.tell([next(others)])
        return not sending.is_alive()

    try:
        _until(over)
    finally:
        sender.stop.set()
        sending.join()
    assert sender.entries == 103


@pytest.mark.parametrize("kept", [0, 1])
def test_nobody_waits_for_a_single_entry(broker: Driver, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """A join that keeps the newest message keeps its entry open, until the next message comes."""
    monkeypatch.setattr(flow, "_FIRST_S", 1e9)
    monkeypatch.setattr(flow, "_STALL_S", 1e9)
    teller = _teller(broker, Standing)
    sender = _Sender(broker, 512)
    sender.send(kept)
    sending = sender.in_the_background(20 - kept)
    try:
        for n in range(1, 20):
            _until(lambda n=n: sender.entries == n + 1)  # type: ignore[misc]
            teller.tell([2 * (n - 1)])
        _until(lambda: not sending.is_alive())
    finally:
        sender.stop.set()
        sending.join()


def test_what_a_join_has_stood_still_with_holds_nobody_when_it_moves(broker: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_FIRST_S", 0.01)
    teller = _teller(broker, Standing)
    sender = _Sender(broker)
    sender.send(12)
    monkeypatch.setattr(flow, "_FIRST_S", 1e9)
    monkeypatch.setattr(flow, "_STALL_S", 1e9)
    teller.tell([0])
    sending = sender.in_the_background(20)
    _until(lambda: sender.entries == 22)  # a window of them, and then it waits again
    teller.tell([2])
    assert sender.entries == 22
    sender.stop.set()
    sending.join()


def test_what_got_lost_is_made_good_by_what_a_join_says_is_open(broker: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its floor may stand for ever, at a message of a source that has sent once."""
    monkeypatch.setattr(flow, "_FIRST_S", 1e9)
    monkeypatch.setattr(flow, "_STALL_S", 1e9)
    standing = [Standing(0, 0, [0])]
    teller = _teller(broker, lambda: standing[0])
    sender = _Sender(broker)
    sending = sender.in_the_background(40)
    _until(lambda: sender.entries == 11)
    standing[0] = Standing(0, 16, [0, 3])
    teller.tell([])
    _until(lambda: sender.entries == 19)
    sender.stop.set()
    sending.join()


def test_a_join_that_comes_has_only_what_it_says_is_open(broker: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_FIRST_S", 1e9)
    monkeypatch.setattr(flow, "_STALL_S", 1e9)
    sender = _Sender(broker)
    sender.send(15)
    _teller(broker, lambda: Standing(0, 28, [0])).tell([])
    sending = sender.in_the_background(40)
    _until(lambda: sender.entries == 25)
    sender.stop.set()
    sending.join()


class _Refusing(_Broker):
    """Refuses a channel, or is away, or takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.tries = 0
        self.refuses = self.away = False
        self.gave = 0
        self.go_on = threading.Event()

    def trouble(self) -> str | None:
        return "away" if self.away else None

    def channel(self, topic: str, hear: Callable[[bytes], None]) -> Channel | None:
        self.tries += 1
        if self.refuses:
            raise TransportError("not here")
        if self.away:
            return None
        assert self.go_on.wait(20)
        self.gave += 1
        return super().channel(topic, hear)


def test_a_channel_that_is_refused_is_gone_on_without(caplog: pytest.LogCaptureFixture) -> None:
    broker = _Refusing()
    broker.refuses = True
    teller = Teller(cast(Driver, broker), "in", "g", Standing)
    sender = _Sender(cast(Driver, broker))
    sender.send(100)
    teller.tell([])
    _until(lambda: broker.tries == 2)
    teller.close()
    sender.restraint.close()
    assert sorted(record.getMessage() for record in caplog.records) == [
        "a join of topic 'in' cannot hold back who sends to it: not here",
        "group 'g' cannot hold back who sends to topic 'in': not here",
    ]


def test_a_channel_opens_when_the_broker_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_AGAIN_S", 0.001)
    broker = _Refusing()
    broker.away = True
    teller = Teller(cast(Driver, broker), "in", "g", Standing)
    sender = _Sender(cast(Driver, broker))
    sender.send(100)
    broker.go_on.set()
    broker.away = False
    _until(lambda: len(broker.ears) == 2)
    teller.close()
    sender.restraint.close()
    assert broker.ears == []


def test_who_sends_does_not_wait_for_a_channel_that_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_OPEN_S", 0.01)
    monkeypatch.setattr(flow, "_CLOSE_S", 0.01)
    broker = _Refusing()
    sender = _Sender(cast(Driver, broker))
    sender.send(100)
    sender.restraint.close()
    broker.go_on.set()
    _until(lambda: broker.gave == 1 and broker.ears == [])
    assert broker.ears == []
