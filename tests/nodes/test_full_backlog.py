"""`backlog=` while the disk or the store is full: what waits is run or dropped, each message once, and what is dropped makes room."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.disks import fill_up
from tests.nodes.conftest import running
from tests.nodes.test_backlog import Slow, dropped_by_the_group, source
from tests.waiting import until

from edgeserve import Compute, Materialize

COUNT, HALF = 300, 50
SIZE = 30_000


def number(item: bytes) -> int:
    return int.from_bytes(item[:4], "big")


def items() -> Iterator[bytes]:
    for n in range(COUNT):
        yield n.to_bytes(4, "big") + bytes(SIZE)


@pytest.mark.parametrize("backlog", ["block", "drop_oldest", "latest"])
def test_on_a_full_disk_each_message_is_run_or_dropped_once(small_disk: Path, caplog: pytest.LogCaptureFixture, backlog: Any) -> None:
    node = f"local://{small_disk}/store?retention_mb=100"
    task, half, go_on = Slow(), threading.Event(), threading.Event()

    def stream() -> Iterator[bytes]:
        for n, item in enumerate(items()):
            if n == HALF:
                half.set()
                assert go_on.wait(60)
            yield item

    compute = Compute(task, node, topic_in="in", topic_out="out", group="g", backlog=backlog)
    with source(node, stream()) as sent, running(compute):
        next(sent)
        assert task.busy.wait(60)  # with the first one, before there is a newer one
        sending = threading.Thread(target=sent.run)
        sending.start()
        assert half.wait(60)
        ballast = fill_up(small_disk)
        go_on.set()
        until(lambda: "source 'a' waits, nothing is lost" in caplog.text)
        task.go_on.set()
        until(lambda: "worker1 waits, nothing is lost" in caplog.text)
        ballast.unlink()
        sending.join(60)
        assert not sending.is_alive()
    results = list[int]()
    with Materialize(lambda result: results.append(number(result)), node, topic="out") as sink:
        sink.run(until="end")
    run, counters = [number(item) for item in task.seen], compute.counters
    assert results == run == sorted({*run})
    dropped = {reason: counters[reason] for reason in ("overflow", "superseded") if counters[reason]}
    assert dropped.keys() == {"block": set(), "drop_oldest": {"overflow"}, "latest": {"superseded"}}[backlog]
    assert (run[0], run[-1], len(run) + sum(dropped.values())) == (0, COUNT - 1, COUNT)
    assert counters["received"] == counters["settled"] == COUNT
    assert dropped_by_the_group(node) == dropped


def test_what_is_dropped_makes_room_in_a_full_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four times as much is sent as the store holds, behind a message that its task keeps in hand."""
    node = f"local://{tmp_path}/store?size_mb=2&retention_mb=1"
    task = Slow()
    compute = Compute(task, node, topic_in="in", topic_out="out", group="g", backlog="latest")
    with source(node, items()) as sent, running(compute):
        next(sent)
        assert task.busy.wait(60)
        sent.run()
        until(lambda: compute.counters["superseded"] == COUNT - 2)
        task.go_on.set()
    assert [number(item) for item in task.seen] == [0, COUNT - 1]
