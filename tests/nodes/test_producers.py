"""A source with several producers, while the join changes hands: an end is the source's only when all of them have ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from tests.nodes.conftest import fresh
from tests.nodes.test_partitions import Reading, held, number, pair, readings, replica, room
from tests.waiting import until

from edgeserve import Compute, DataSource

node = pytest.fixture(params=["local", "nats"], name="node")(fresh)


def source(node: str, name: str, items: list[Reading]) -> DataSource:
    return DataSource(items, node, source_id=name, topic="in", event_time=number, key=room, message_id=number)


@contextmanager
def sent(node: str) -> Iterator[tuple[DataSource, DataSource, DataSource]]:
    """Two producers of `a`, one of `b`: the first twenty of each of `a`, and their partners."""
    with ExitStack() as stack:
        first, second, b = (
            stack.enter_context(source(node, name, items))
            for name, items in (("a", readings(0, 20)), ("a", readings(20, 40)), ("b", readings(0, 60)))
        )
        for producer, count in ((first, 20), (second, 20), (b, 40)):
            for _ in range(count):
                next(producer)
            producer.flush()
        yield first, second, b


def finish(first: DataSource, second: DataSource, b: DataSource, taken: Callable[[], object]) -> None:
    """The one that has not ended says nothing until the others' ends are taken."""
    first.run()
    b.run()
    until(taken)
    second.run()


def test_a_join_that_changes_hands_knows_who_has_not_ended(node: str, results: Callable[..., list[Any]]) -> None:
    """Nothing of the one that lives is left to be read when the next holder comes."""

    def join(name: str) -> Compute:
        return Compute(pair, node, worker_id=name, output_id="pair", topic_in="in", topic_out="out", join="exact", group="g")

    with sent(node) as (first, second, b):
        with join("one") as one:
            count = 0
            while count < 40:
                count += next(one) is not None
            one.flush()
        with join("two") as two:
            thread = threading.Thread(target=two.run, kwargs={"until": "end"})
            thread.start()
            finish(first, second, b, lambda: two.explain()["held"] == 20)
            thread.join(60)
            assert not thread.is_alive()
    assert sorted(results(topic="out")) == list(range(60))


def test_partitions_that_change_hands_agree_where_a_round_ends(node: str, results: Callable[..., list[Any]]) -> None:
    one, two = replica(node, pair, 0), replica(node, pair, 1)
    with sent(node) as (first, second, b), ExitStack() as stack:
        threads = []
        for each in (one, two):
            stack.enter_context(each)
            threads.append(threading.Thread(target=each.run, kwargs={"until": "end"}))
            threads[-1].start()
            until(lambda: one.counters["settled"] >= 80)
        until(lambda: len(held(two)) == 2 and len(held(one)) == 2)
        finish(first, second, b, lambda: one.explain()["held"] + two.explain()["held"] == 20)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert sorted(results(topic="out")) == list(range(60))
