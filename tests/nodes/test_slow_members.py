"""Members of a group that stand still for longer than their claims last: what others took over is theirs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import edgeserve
from edgeserve import Compute, DataSource, Materialize

COUNT = 16


class Ran:
    """What ran where; one member's first message waits until it is let go."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int, bool]] = []
        self.in_hand, self.go_on, self.others_done = threading.Event(), threading.Event(), threading.Event()

    def slow(self, a: int) -> None:
        self.ran.append(("slow", a, edgeserve.context().redelivered))
        if not self.go_on.is_set():
            self.in_hand.set()
            assert self.go_on.wait(20)

    def fast(self, a: int) -> None:
        self.ran.append(("fast", a, edgeserve.context().redelivered))
        if sum(who == "fast" for who, _, _ in self.ran) == COUNT:
            self.others_done.set()


def sink(task: Callable[[Any], Any], url: str) -> Materialize:
    return Materialize(task, url, topic="src", ack_timeout_ms=200)


def compute(task: Callable[[Any], Any], url: str) -> Compute:
    return Compute(task, url, ack_timeout_ms=200)


def send(url: str, *items: int) -> None:
    with DataSource(items, url, source_id="a") as source:
        for _ in items:
            next(source)


@pytest.mark.parametrize("make", [sink, compute])
@pytest.mark.parametrize("steps", [False, True])
def test_a_member_that_stood_still_leaves_to_others_what_they_took(embedded: str, make: Callable[..., Any], steps: bool) -> None:
    send(embedded, *range(COUNT))
    told = Ran()
    with make(told.slow, embedded) as slow, make(told.fast, embedded) as fast:

        def step() -> None:
            for _ in slow:
                pass

        threads = [threading.Thread(target=step if steps else slow.run)]
        threads[0].start()
        assert told.in_hand.wait(10)
        threads.append(threading.Thread(target=fast.run))
        threads[1].start()
        assert told.others_done.wait(10)
        told.go_on.set()
        fast.close()
        threads[1].join(10)
        # The one that stood still goes on with what comes now, and with nothing else.
        while not any(a == COUNT for _, a, _ in told.ran):
            send(embedded, COUNT)
            threading.Event().wait(0.05)
        slow.close()
        threads[0].join(10)
    ran = [(who, a) for who, a, _ in told.ran if a < COUNT]
    assert [a for who, a in ran if who == "slow"] == [0]
    assert Counter(a for _, a in ran) == Counter({a: 2 if a == 0 else 1 for a in range(COUNT)})
    assert [a for who, a, flagged in told.ran if who == "fast" and flagged and a == 0] == [0]


def test_a_lone_slow_member_keeps_what_it_has(embedded: str) -> None:
    send(embedded, *range(4))
    ran: list[tuple[int, bool]] = []

    def task(a: int) -> None:
        ran.append((a, edgeserve.context().redelivered))
        threading.Event().wait(0.03)

    with Compute(task, embedded, ack_timeout_ms=10) as node:
        for _ in range(4):
            next(node)
    assert ran == [(a, False) for a in range(4)]
