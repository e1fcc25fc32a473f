"""Messages that were sent twice, long ago: they stay duplicates while something older is unsettled."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest

from edgeserve import Compute, DataSource
from edgeserve.core.errors import ReceiveTimeout
from edgeserve.stage import direct, join
from edgeserve.stage.duplicates import RecentIds


def send(url: str, source_id: str, items: Iterable[int]) -> None:
    with DataSource(items, url, source_id=source_id, message_id=lambda i: i) as source:
        for _ in items:
            next(source)


def test_ids_are_known_while_an_older_input_is_in_another_member_s_hand(
    embedded: str, monkeypatch: pytest.MonkeyPatch, quiet_ms: int
) -> None:
    monkeypatch.setattr(direct, "RecentIds", lambda: RecentIds(generation=10))
    ran: list[int] = []
    in_hand, go_on = threading.Event(), threading.Event()

    def fast(a: int) -> None:
        ran.append(a)

    def slow(a: int) -> None:
        in_hand.set()
        assert go_on.wait(20)

    with Compute(slow, embedded) as one, Compute(fast, embedded, timeout_ms=quiet_ms) as two:
        send(embedded, "a", [0])
        thread = threading.Thread(target=next, args=(one,))
        thread.start()
        assert in_hand.wait(20)
        for at in range(1, 60, 5):
            send(embedded, "a", range(at, at + 5))
            for _ in range(5):
                next(two)
        send(embedded, "a", [1])
        with pytest.raises(ReceiveTimeout):
            while True:
                next(two)
        assert two.counters["duplicate"] == 1
        go_on.set()
        thread.join(20)
    assert ran == list(range(1, 61))


def test_what_a_join_holds_as_state_is_state_though_its_id_is_forgotten(
    embedded: str, monkeypatch: pytest.MonkeyPatch, quiet_ms: int
) -> None:
    class Forgetful(RecentIds):
        def update(self, ids: Iterable[bytes]) -> None:
            """All that was settled before was so long ago that it is forgotten."""

    def steps(compute: Compute) -> list[list[int]]:
        found = []
        with pytest.raises(ReceiveTimeout):
            while True:
                found.append(next(compute))
        return [f for f in found if f is not None]

    with Compute(lambda a, b: [a, b], embedded, timeout_ms=quiet_ms) as compute:
        send(embedded, "a", [1])
        send(embedded, "b", [1, 2])
        assert steps(compute) == [[1, 1], [1, 2]]
    monkeypatch.setattr(join, "RecentIds", Forgetful)
    with Compute(lambda a, b: [a, b], embedded, timeout_ms=quiet_ms) as compute:
        assert steps(compute) == []
        send(embedded, "b", [3])
        assert steps(compute) == [[1, 3]]
