"""A disk that is full while replicas share the sets of a join: the holder writes them to a topic, and waits for room like any other."""

from __future__ import annotations

import multiprocessing as mp
import threading
from collections import Counter
from pathlib import Path

import pytest
from tests.disks import fill_up
from tests.nodes.conftest import running
from tests.nodes.test_replicas import replica
from tests.waiting import until

from edgeserve import DataSource, Materialize
from edgeserve.transport import connect, disconnect

COUNT = 100


def number(item: bytes) -> int:
    return int.from_bytes(item[:4], "big")


def pair(a: bytes, b: bytes) -> bytes:
    assert a == b
    return a[:10_000]


def _other(node: str) -> None:
    """A replica in a process of its own, which takes sets that the holder has made."""
    with replica(node, pair, 1) as compute:
        compute.run(until="end")


def test_shared_sets_wait_for_room(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = f"local://{small_disk}/store?retention_mb=100"
    go_on = threading.Event()

    def gate(item: bytes) -> bytes:
        go_on.wait(60)  # in the thread that makes sets
        return item

    transport = connect(node)
    holder, other = replica(node, pair, 0, gate_in=gate), mp.get_context("spawn").Process(target=_other, args=(node,))
    with running(holder):
        other.start()
        until(lambda: holder.explain()["shares_sets"])
        for name in "ab":
            items = [n.to_bytes(4, "big") + bytes(30_000) for n in range(COUNT)]
            with DataSource(items, node, source_id=name, topic="in", event_time=number) as source:
                source.run()
        ballast = fill_up(small_disk)
        go_on.set()
        until(lambda: "w0 waits, nothing is lost" in caplog.text)
        assert transport.topic_info("in.g.work").messages < COUNT
        ballast.unlink()
    other.join(60)
    assert other.exitcode == 0
    found = Counter[int]()
    with Materialize(lambda result: found.update([number(result)]), node, topic="out") as materialize:
        materialize.run(until="end")
    assert found == Counter(range(COUNT))
    assert transport.topic_info("in.g.work").messages >= COUNT  # all went that way
    disconnect(transport)
