"""A member that has its group to itself takes what comes with wake-ups: never what may be another's, and never past a write that failed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from edgeserve.core.errors import DiskFull, StoreDamaged, StoreDamagedWarning
from edgeserve.transport import GroupKind, Subscription, connect, disconnect
from edgeserve.transport.engine import LogEngine
from edgeserve.transport.kv import Space
from edgeserve.transport.member import LogSubscription
from edgeserve.transport.place import Place
from edgeserve.transport.window import Window


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LogEngine]:
    engine = connect(f"local://{tmp_path / 'store'}")
    assert isinstance(engine, LogEngine)
    yield engine
    disconnect(engine)


@pytest.fixture
def join(engine: LogEngine) -> Iterator[Callable[..., Subscription]]:
    """Joins a group of topic a; leaves it when the test has ended."""
    with ExitStack() as members:

        def join(group: str = "g", kind: GroupKind = GroupKind.SHARED) -> Subscription:
            return members.enter_context(closing(engine.subscribe(["a"], group, kind=kind)))

        yield join


def take(member: Subscription, most: int = 64, timeout_ms: float = 100) -> list[int]:
    return [delivery[1] for delivery in member.receive(most, timeout_ms)]


def warm(engine: LogEngine, member: Subscription, most: int) -> None:
    """One after the other, until messages come with wake-ups."""
    for _ in range(3):
        engine.publisher("a").publish([b"m"])
        member.settle({"a": take(member, most)})


def test_what_comes_after_a_newcomer_is_taken_once_though_its_wake_up_is_late(
    engine: LogEngine, join: Callable[..., Subscription], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = join()
    warm(engine, first, 64)
    with monkeypatch.context() as late:

        def no_notify(addresses: Iterable[str], with_packet: bytes = b"") -> None:
            pass

        late.setattr(engine, "notify", no_notify)
        second = join()
    engine.publisher("a").publish([b"new"])
    taken = [take(first), take(second)]
    assert sorted(taken) == [[], [3]]


def test_a_claim_that_failed_is_not_skipped(engine: LogEngine, join: Callable[..., Subscription], monkeypatch: pytest.MonkeyPatch) -> None:
    member = join()
    assert isinstance(member, LogSubscription)
    warm(engine, member, 4)
    engine.publisher("a").publish([b"m"] * 20)
    take_packets = member._waker.drain
    take_packets()
    with monkeypatch.context() as full:

        def save(*_: Any) -> None:
            raise DiskFull("no space left")

        full.setattr(Place, "save", save)
        with pytest.raises(DiskFull):
            member.receive(32, 0)
    engine.publisher("a").publish([b"last"])
    assert take(member, 32) == list(range(3, 24))


def test_a_stand_by_does_not_wait_for_what_is_due_to_another(
    engine: LogEngine, join: Callable[..., Subscription], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, third = (join(kind=GroupKind.FAILOVER) for _ in range(3))
    engine.publisher("a").publish([b"m"] * 10)
    take(first)
    first.close()  # the second has not noticed yet that all of it is due to it
    looks = 0
    read = engine.kv.read

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return read()

    monkeypatch.setattr(engine.kv, "read", counted)
    assert take(third, timeout_ms=300) == []
    assert looks < 10


def test_a_group_that_nobody_works_for_costs_a_sender_no_memory(engine: LogEngine, join: Callable[..., Subscription]) -> None:
    join("gone").close()
    live = join("live")
    publisher: Any = engine.publisher("a", send_window=50)
    for _ in range(40):
        for _ in range(25):
            publisher.publish([b"m"])
        live.settle({"a": take(live, timeout_ms=0)})
    assert len(publisher._window._sent) <= 2 * 50 + 1


def test_settled_messages_behind_those_of_another_sender_do_not_hold_a_sender_back(
    engine: LogEngine, join: Callable[..., Subscription], monkeypatch: pytest.MonkeyPatch
) -> None:
    member = join()
    # As in a join: the messages of the one ahead wait for what the other has not sent yet.
    ahead, other = engine.publisher("a"), engine.publisher("a", send_window=50)
    ahead.publish([b"held"] * 10)
    waits: list[float] = []
    monkeypatch.setattr("edgeserve.transport.wake._SocketWaker.wait", lambda _, seconds: waits.append(seconds))
    for _ in range(20):
        other.publish([b"m"] * 10)
        member.settle({"a": [d[1] for d in member.receive(100, 0) if d[0] == b"m"]})
    assert waits == []


def test_a_sender_waits_until_enough_of_its_own_is_settled(engine: LogEngine, join: Callable[..., Subscription]) -> None:
    member, publisher = join(), engine.publisher("a", send_window=50)
    with ThreadPoolExecutor() as threads:
        sending = threads.submit(publisher.publish, [b"m"] * 100)
        got: list[int] = []
        while len(got) < 100:
            got += [d[1] for d in member.receive(100, 1000)]
        with pytest.raises(TimeoutError):
            sending.result(0.2)
        member.settle({"a": got[:40]})
        with pytest.raises(TimeoutError):
            sending.result(0.2)
        member.settle({"a": got[40:70]})
        sending.result(5)
    publisher.close()


def test_a_full_disk_while_a_sender_is_held_back_is_no_error_of_the_send(
    engine: LogEngine, join: Callable[..., Subscription], monkeypatch: pytest.MonkeyPatch
) -> None:
    member = join()
    publisher = engine.publisher("a", send_window=10)

    original, calls = engine.kv.write, count()

    def write(*arguments: Any) -> Any:
        if next(calls):  # the first is the publish itself
            raise DiskFull("no space left")
        return original(*arguments)

    with monkeypatch.context() as full:
        full.setattr(engine.kv, "write", write)
        publisher.publish([b"m"] * 20)
    assert take(member) == list(range(20))
    publisher.close()


def test_a_window_that_cannot_be_looked_at_is_no_error_of_the_send(
    engine: LogEngine, join: Callable[..., Subscription], monkeypatch: pytest.MonkeyPatch
) -> None:
    member, publisher = join(), engine.publisher("a", send_window=10)

    def look(*_: Any, **__: Any) -> Any:
        raise StoreDamaged("a group is damaged")

    monkeypatch.setattr(Window, "_look", look)
    for _ in range(5):
        publisher.publish([b"m"] * 10)
    assert take(member, 100) == list(range(50))


@pytest.mark.parametrize("trouble", ["full", "warning"])
def test_intact_messages_beside_damaged_ones_are_handed_over_whatever_happens(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    engine: Any = connect(f"memory://damaged-{trouble}")
    for n in range(3):
        engine.publisher("a").publish([b"m%d" % n])
    stored = engine.kv._data[Space.LOG]
    damaged = sorted(stored)[1]
    stored[damaged] = stored[damaged][:-1] + b"?"
    member = engine.subscribe(["a"], "g")
    if trouble == "full":
        save, failures = Place.settle, [DiskFull("no space left")]

        def full_at_first(self: Place, *args: Any) -> Any:
            if failures:
                raise failures.pop()
            return save(self, *args)

        monkeypatch.setattr(Place, "settle", full_at_first)
    with pytest.raises((DiskFull, StoreDamagedWarning)):
        member.receive(10, 0)
    assert [bytes(d[0]) for d in member.receive(10, 0)] == [b"m0", b"m2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert member.receive(10, 0) == []
    member.settle({"a": [0, 2]})
    assert member.floor("a") == 3
    disconnect(engine)


def test_ids_are_told_to_a_member_that_looks_again_after_older_ones_were_let_go(
    engine: LogEngine, join: Callable[..., Subscription], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeserve.transport.settled.IDS_KEPT", 256)
    ids = [n.to_bytes(16, "big") for n in range(4000)]
    idle, busy, publisher = join(), join(), engine.publisher("a", send_window=10**6)
    told = idle.settled_ids()
    for n in range(0, len(ids), 3):
        part = ids[n : n + 3]
        publisher.publish([b"m"] * len(part))
        busy.settle({"a": [d[1] for d in busy.receive(len(part), 1000)]}, ids=part)
        if n == 0:
            told += idle.settled_ids()
    kept = join().settled_ids()
    told += idle.settled_ids()
    assert set(kept) <= set(told)
