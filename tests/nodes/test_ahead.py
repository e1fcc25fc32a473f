"""Of two sources of a join one is ahead: it is held back, on every engine, and no pair is lost to the bound of what a join holds."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from edgeserve import Compute, DataSource

COUNT = 12_000


def test_the_faster_source_waits_for_the_slower(node: str) -> None:
    found: list[int] = []
    begun = threading.Event()

    def pair(fast: int, slow: int) -> None:
        found.append(fast)
        assert fast == slow

    def slow_ones() -> list[int]:
        begun.wait()
        return list(range(COUNT))

    def send(source_id: str, numbers: object) -> None:
        with DataSource(numbers, node, source_id=source_id, topic="in", event_time=int) as source:
            source.run(until="end")

    def fast_ones() -> Iterator[int]:
        for number in range(COUNT):
            yield number
            if number == COUNT // 4:
                begun.set()

    with Compute(pair, node, topic_in="in", topic_out="out", join="exact", max_held=COUNT * 3 // 4) as compute:
        fast = threading.Thread(target=send, args=("fast", fast_ones()))
        slow = threading.Thread(target=lambda: send("slow", slow_ones()))
        fast.start()
        slow.start()
        compute.run(until="end")
        fast.join()
        slow.join()
        assert (len(found), compute.counters["overflow"]) == (COUNT, 0)
