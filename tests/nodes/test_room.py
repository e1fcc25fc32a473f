"""A store without room for a moment: what was to be written is still there when there is room again."""

from __future__ import annotations

from typing import Any

import pytest

from edgeserve import Compute, DataSource
from edgeserve.core.errors import DiskFull, Fenced, ReceiveTimeout
from edgeserve.transport import connect, disconnect
from edgeserve.transport.engine import LogEngine
from edgeserve.transport.member import LogSubscription


def task_of(parameters: int) -> Any:
    return (lambda a: a) if parameters == 1 else (lambda a, b: a + b)


def send_round(url: str, parameters: int, item: int) -> None:
    for name in "ab"[:parameters]:
        with DataSource([item], url, source_id=name, topic="in") as source:
            source.run()


def steps(compute: Compute) -> list[Any]:
    """Results until nothing comes any more, errors of a full disk left out."""
    found = []
    while True:
        try:
            found.append(next(compute))
        except DiskFull:
            pass
        except (ReceiveTimeout, StopIteration):
            return [f for f in found if f is not None]


@pytest.fixture
def no_room_for_attributes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """The next so many settlements that set attributes fail."""
    failures: list[None] = []
    settle = LogSubscription.settle

    def failing(self: LogSubscription, *args: Any, **rest: Any) -> None:
        if rest.get("attributes") and failures:
            failures.pop()
            raise DiskFull("no space left on device")
        settle(self, *args, **rest)

    monkeypatch.setattr(LogSubscription, "settle", failing)
    return failures


@pytest.mark.parametrize("parameters", [1, 2])
def test_an_end_outlives_a_full_disk(embedded: str, parameters: int, no_room_for_attributes: list[None], quiet_ms: int) -> None:
    send_round(embedded, parameters, 1)
    no_room_for_attributes.append(None)
    with Compute(task_of(parameters), embedded, worker_id="w", topic_in="in", topic_out="out", timeout_ms=quiet_ms) as compute:
        assert steps(compute) == [parameters]
        assert not no_room_for_attributes
        transport = connect(embedded)
        assert transport.topic_info("in").groups["in->out"].backlog == 0
        assert transport.topic_info("out").next == 2  # the result and the end
        disconnect(transport)


@pytest.mark.parametrize("parameters", [1, 2])
def test_an_end_that_is_taken_back_outlives_a_full_disk(
    embedded: str, parameters: int, no_room_for_attributes: list[None], quiet_ms: int
) -> None:
    send_round(embedded, parameters, 1)
    with Compute(task_of(parameters), embedded, worker_id="w", topic_in="in", topic_out="out", timeout_ms=quiet_ms) as compute:
        assert steps(compute) == [parameters]
        no_room_for_attributes.append(None)
        with DataSource([10], embedded, source_id="a", topic="in") as source:
            next(source)
            steps(compute)
            assert not no_room_for_attributes
            stage: Any = compute._stage
            assert "^begun:a" in (stage if parameters == 1 else stage._join)._subscription.attributes()


def test_a_join_comes_back_into_its_group_when_there_is_room_again(embedded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has lost the join, and the disk is full while it joins its group again: next() says so, and goes on the next time."""
    options: dict[str, Any] = {"topic_in": "in", "topic_out": "out", "join": "exact", "group": "g", "timeout_ms": 50}
    with Compute(task_of(2), embedded, worker_id="c", **options) as compute:
        for name in "ab":
            with DataSource([1, 2], embedded, source_id=name, topic="in", event_time=int) as source:
                source.run()
        settle, subscribe, failures = LogSubscription.settle, LogEngine.subscribe, [DiskFull("no space left on device"), Fenced("paused")]

        def fenced(self: LogSubscription, *args: Any, **rest: Any) -> None:
            if len(failures) == 2 and rest.get("decisions"):
                raise failures.pop()
            settle(self, *args, **rest)

        def full(self: LogEngine, *args: Any, **rest: Any) -> Any:
            if len(failures) == 1:
                raise failures.pop()
            return subscribe(self, *args, **rest)

        monkeypatch.setattr(LogSubscription, "settle", fenced)
        monkeypatch.setattr(LogEngine, "subscribe", full)
        assert sorted({*steps(compute)}) == [2, 4]
        assert not failures
