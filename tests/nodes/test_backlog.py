"""`backlog=`: what becomes of what waits for a slow task, and that nobody else is held back by what will not be run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.nodes.conftest import running
from tests.waiting import until

from edgeserve import Compute, DataSource, Materialize
from edgeserve.core.errors import ConfigurationError, GroupConflict
from edgeserve.stage.decisions import read_drops
from edgeserve.transport import connect, disconnect


class Slow:
    """Takes one message, and keeps it in hand until it is let go."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.busy, self.go_on = threading.Event(), threading.Event()

    def __call__(self, a: Any) -> Any:
        self.seen.append(a)
        self.busy.set()
        assert self.go_on.wait(60)
        return a


def source(node: str, values: Any, **options: Any) -> DataSource:
    return DataSource(values, node, **{"source_id": "a", "topic": "in"} | options)


def dropped_by_the_group(node: str) -> dict[str, int]:
    transport = connect(node)
    try:
        return dict(read_drops(transport.topic_info("in").groups["g"].attributes))
    finally:
        disconnect(transport)


@pytest.mark.parametrize(
    ("options", "kept", "reason"),
    [
        ({"backlog": "latest"}, [99], "superseded"),
        ({"backlog": "drop_oldest", "max_backlog": 5}, [95, 96, 97, 98, 99], "overflow"),
        ({"backlog": "drop_oldest"}, [*range(1, 100)], "overflow"),
    ],
    ids=str,
)
def test_the_newest_runs_next_and_the_others_are_settled_at_once(node: str, options: dict[str, Any], kept: list[int], reason: str) -> None:
    task, dropped = Slow(), 99 - len(kept)
    compute = Compute(task, node, topic_in="in", topic_out="out", group="g", **options)
    with source(node, range(100)) as sent, running(compute):
        next(sent)
        assert task.busy.wait(60)
        sent.run()
        # While the task has the first one in hand.
        until(lambda: compute.counters[reason] == dropped)
        task.go_on.set()
    assert task.seen == [0, *kept]
    assert compute.counters["sent"] == len(task.seen)
    assert compute.counters["received"] == compute.counters["settled"] == 100
    assert dropped_by_the_group(node) == ({reason: dropped} if dropped else {})


def test_the_newest_of_each_key_is_run(node: str) -> None:
    task = Slow()
    compute = Compute(task, node, topic_in="in", topic_out="out", group="g", backlog="latest")
    values = [("first", 0), *((key, n) for n in range(5) for key in ("x", "y"))]
    with source(node, values, key=lambda value: value[0]) as sent, running(compute):
        next(sent)
        assert task.busy.wait(60)
        sent.run()
        until(lambda: compute.counters["superseded"] == 8)
        task.go_on.set()
    assert task.seen == [("first", 0), ("x", 4), ("y", 4)]


@pytest.mark.parametrize(("backlog", "kept"), [("latest", 1), ("drop_oldest", 3)])
def test_a_sink_keeps_the_newest_of_each_source(node: str, backlog: Any, kept: int) -> None:
    function = Slow()
    options = {} if backlog == "latest" else {"max_backlog": kept}
    sink = Materialize(function, node, topic="in", group="g", backlog=backlog, **options)
    with source(node, range(20)) as a, source(node, range(100, 110), source_id="b") as b, running(sink):  # type: ignore[arg-type]
        next(a)
        assert function.busy.wait(60)
        next(b)
        a.run()
        b.run()
        until(lambda: sum(sink.counters[reason] for reason in ("superseded", "overflow")) == 19 + 10 - 2 * kept)
        function.go_on.set()
    assert sorted(function.seen) == [0, *range(20 - kept, 20), *range(110 - kept, 110)]


def test_what_will_not_be_run_holds_back_no_source_and_no_payload_waits_for_it(
    embedded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source with a window and a memory that are much too small, a slow group that sheds, and one that takes all."""
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "payloads"))
    slow, all_of_them = Slow(), list[int]()
    shedding = Compute(slow, embedded, topic_in="in", topic_out="out", group="slow", backlog="latest")
    quick = Compute(lambda a: all_of_them.append(int(a[0])), embedded, topic_in="in", topic_out="other", group="quick")
    frames = (np.full(70_000, n, np.uint8) for n in range(200))
    with source(embedded, frames, routing="lazy", send_window=4) as sent:
        if sent._payloads.writer is not None:
            sent._payloads.writer._limit_bytes = 8 * 81_920
        with running(shedding, quick):
            next(sent)
            assert slow.busy.wait(60)
            sent.run()  # while the slow one has the first in hand
            if sent._payloads.writer is not None:
                assert sent._payloads.writer.refused == 0
            until(lambda: shedding.counters["superseded"] == 198)
            slow.go_on.set()
    assert all_of_them == list(range(200))
    assert [int(a[0]) for a in slow.seen] == [0, 199]
    assert slow.seen[0].max() == 0 and slow.seen[1].min() == 199


def test_a_repeat_of_what_was_dropped_is_a_duplicate_and_takes_the_place_of_nothing(node: str) -> None:
    task = Slow()
    compute = Compute(task, node, topic_in="in", topic_out="out", group="g", backlog="latest")
    with running(compute):
        with source(node, range(4), message_id=int) as sent:
            next(sent)
            assert task.busy.wait(60)
            next(sent)
            next(sent)
        until(lambda: compute.counters["superseded"] == 1)
        # The first was killed, and its successor begins with what it has sent before.
        with source(node, [0, 1], message_id=int) as again:
            again.run()
        task.go_on.set()
    assert task.seen == [0, 2]
    assert (compute.counters["superseded"], compute.counters["duplicate"]) == (1, 2)


def test_foreign_messages_are_put_aside_and_not_shed(embedded: str) -> None:
    task = Slow()
    compute = Compute(task, embedded, topic_in="in", topic_out="out", group="g", backlog="latest", retries=0)
    with source(embedded, range(3)) as sent, running(compute):
        next(sent)
        assert task.busy.wait(60)
        transport = connect(embedded)
        publisher = transport.publisher("in")
        publisher.publish([b"nothing of ours"] * 2)
        with source(embedded, [7], source_id="stranger") as stranger:
            next(stranger)
        publisher.close()
        disconnect(transport)
        sent.run()
        task.go_on.set()
    assert task.seen == [0, 2]
    assert (compute.counters["foreign"], compute.counters["unknown_source"], compute.counters["superseded"]) == (2, 1, 1)


def test_what_waits_goes_back_when_the_node_is_closed(node: str) -> None:
    task = Slow()
    options: dict[str, Any] = {"topic_in": "in", "topic_out": "out", "group": "g", "backlog": "drop_oldest"}
    with source(node, range(10)) as sent:
        with Compute(task, node, **options) as first:
            task.go_on.set()
            next(sent)
            next(first)
            for _ in range(9):
                next(sent)
            sent.flush()
            until(lambda: len(first._stage._shedding._shelf) == 9)  # type: ignore[attr-defined]
        with pytest.raises(StopIteration):
            next(sent)
    with Compute(task, node, **options) as second:
        second.run(until="end")
    assert task.seen == list(range(10))


def test_replicas_share_what_comes_and_each_keeps_the_newest(node: str) -> None:
    tasks = Slow(), Slow()
    options: dict[str, Any] = {"topic_in": "in", "topic_out": "out", "group": "g", "output_id": "o", "backlog": "latest"}
    nodes = [Compute(task, node, worker_id=f"w{n}", **options) for n, task in enumerate(tasks)]
    with source(node, range(1_000)) as sent, running(*nodes):
        count = 0
        while not all(task.busy.is_set() for task in tasks):
            next(sent)
            sent.flush()
            count += 1
            tasks[count % 2].busy.wait(0.2)
        sent.run()
        for task in tasks:
            task.go_on.set()
    seen = [*tasks[0].seen, *tasks[1].seen]
    assert len(seen) == len({*seen}) and 999 in seen
    assert len(seen) + sum(each.counters["superseded"] for each in nodes) == 1_000


def test_a_join_keeps_the_newest_sets(node: str) -> None:
    task = Slow()

    def both(a: int, b: int) -> int:
        assert a == b
        task(a)
        return a

    compute = Compute(both, node, topic_in="in", topic_out="out", join="exact", group="g", backlog="drop_oldest", max_backlog=3)
    with running(compute), source(node, range(50), event_time=int) as a, source(node, range(50), source_id="b", event_time=int) as b:
        next(a), next(b)
        assert task.busy.wait(60)
        a.run()
        b.run()
        task.go_on.set()
    assert task.seen[0] == 0 and task.seen[-3:] == [47, 48, 49] and task.seen == sorted(task.seen)
    assert len(task.seen) + compute.counters["superseded"] == 50


def test_what_cannot_be_is_named() -> None:
    def make(**options: Any) -> Compute:
        return Compute(lambda a: a, "memory://n", **options)

    with pytest.raises(ConfigurationError, match="backlog='newest': it is 'all', 'block', 'drop_oldest' or 'latest'"):
        make(backlog="newest")
    with pytest.raises(ConfigurationError, match="max_backlog=5 goes with backlog='drop_oldest'; backlog='all' drops nothing"):
        make(max_backlog=5)
    with pytest.raises(ConfigurationError, match="backlog='latest' keeps the newest one"):
        Materialize(print, "memory://n", backlog="latest", max_backlog=1)
    for wrong in (0, -1, 2_001, 1.5, True, "5"):
        with pytest.raises(ConfigurationError, match="max_backlog="):
            make(backlog="drop_oldest", max_backlog=wrong)
    with pytest.raises(ConfigurationError, match=r"by= makes a join run per key.*newest of each key"):
        make(backlog="latest", by=True)


def test_members_of_a_group_agree_on_it(embedded: str) -> None:
    with Compute(lambda a: a, embedded, group="g", backlog="latest"):
        with pytest.raises(GroupConflict, match="backlog='latest'"), Compute(lambda a: a, embedded, group="g"):
            pass
        with Compute(lambda a: a, embedded, group="other"):
            pass
