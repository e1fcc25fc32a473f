"""`partitions=`: a join by key that several replicas hold, each a part of it."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.nodes.conftest import fresh, running
from tests.waiting import until

from edgeserve import Compute, DataSource, Materialize, context
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ConfigurationError, GroupConflict, JoinOverflow, ReceiveTimeout
from edgeserve.core.message import Kind
from edgeserve.stage.assignment import partition_of
from edgeserve.stage.deadletter import DeadLetter
from edgeserve.stage.exchange import Offer
from edgeserve.transport import Transport

# What is by key lies above the engines: an embedded one, and a broker.
node = pytest.fixture(params=["local", "nats"], name="node")(fresh)

Results = Callable[..., list[Any]]
DeadLetters = Callable[[str], list[DeadLetter]]
Reading = tuple[str, int]
PARTITIONS = 4
KEYS = 20


def room(reading: Reading) -> str:
    return reading[0]


def number(reading: Reading) -> int:
    return reading[1]


def readings(first: int, count: int) -> list[Reading]:
    return [(f"room {n % KEYS}", n) for n in range(first, first + count)]


def send(node: str, count: int, names: str = "ab", first: int = 0) -> None:
    for name in names:
        options: dict[str, Any] = {"event_time": number, "key": room, "message_id": number}
        with DataSource(readings(first, count), node, source_id=name, topic="in", **options) as source:
            source.run()


def pair(a: Reading, b: Reading) -> int:
    assert a == b
    return a[1]


def replica(node: str, task: Callable[..., Any], index: int, **options: Any) -> Compute:
    options = {"join": "exact", "by": True, "output_id": "pair", "partitions": PARTITIONS, "group": "g"} | options
    return Compute(task, node, worker_id=f"w{index}", topic_in="in", topic_out="out", **options)


def held(*replicas: Compute) -> list[int]:
    return sorted(n for each in replicas for n in each.explain()["partitions"]["held"])


def shared_out(*replicas: Compute) -> None:
    """Waits until everybody has a share."""
    until(lambda: held(*replicas) == [1, 2, 3, 4] and all(each.explain()["partitions"]["held"] for each in replicas))


@pytest.mark.parametrize(
    ("node", "by"), [("memory", True), ("local", True), ("nats", True), ("pulsar", True), ("local", room)], indirect=["node"]
)
def test_each_replica_joins_its_keys_in_their_order_and_each_set_runs_once(node: str, by: Any, results: Results) -> None:
    ran: list[list[Reading]] = [[], [], []]

    def task(index: int) -> Callable[..., int]:
        def one(a: Reading, b: Reading) -> int:
            ran[index].append(a)
            return pair(a, b)

        return one

    replicas = [replica(node, task(n), n, by=by) for n in range(3)]
    with running(*replicas):
        shared_out(*replicas)
        send(node, 300)
    assert sorted(results(topic="out")) == list(range(300))
    keys = [set(map(room, some)) for some in ran]
    assert all(keys) and sum(map(len, keys)) == KEYS  # nobody runs another's key
    for some in ran:
        for key in set(map(room, some)):
            numbers = [n for name, n in some if name == key]
            assert numbers == sorted(numbers)


def test_one_replica_holds_all_partitions_and_a_sink_gets_one_end(node: str, transport: Transport) -> None:
    send(node, 60)
    with replica(node, pair, 0) as compute:
        compute.run(until="end")
        assert held(compute) == [1, 2, 3, 4]
        assert compute.counters["sent"] == 60 and compute.counters["received"] == 120
    found: list[int] = []
    with Materialize(found.append, node, topic="out") as sink:
        sink.run(until="end")
    assert sorted(found) == list(range(60))
    kinds = [decode_frame(frame)[0].kind for frame, _, _ in transport.read("out")]
    assert kinds == [Kind.DATA] * 60 + [Kind.END]


def test_next_goes_from_set_to_set(node: str) -> None:
    with replica(node, lambda a, b: (a, b), 0, timeout_ms=10_000) as compute:
        send(node, 4)
        assert sorted(next(compute) for _ in range(4)) == [(reading, reading) for reading in readings(0, 4)]


def test_nothing_came_in_time(node: str) -> None:
    with replica(node, pair, 0, timeout_ms=20) as compute, pytest.raises(ReceiveTimeout, match="saw no set of in within timeout_ms=20"):
        next(compute)


def test_a_newcomer_takes_its_share_and_nothing_is_lost_on_the_way(node: str, results: Results) -> None:
    first, second = (replica(node, pair, n) for n in range(2))
    options: dict[str, Any] = {"source_id": "b", "topic": "in", "event_time": number, "key": room}
    with running(first):
        send(node, 60, "a")
        with DataSource(readings(0, 60), node, **options) as other:
            for _ in range(20):
                next(other)
            with second:
                shared_out(first, second)
                thread = threading.Thread(target=second.run)
                thread.start()
                for _ in range(20):
                    next(other)
                until(lambda: len(results(topic="out")) == 40)
            thread.join(60)
            until(lambda: held(first) == [1, 2, 3, 4])
            other.run()
    assert sorted(results(topic="out")) == list(range(60))


def test_what_is_held_is_state_for_who_comes_next(node: str, results: Results) -> None:
    for name, first in (("a", 0), ("b", 0), ("b", KEYS)):  # the same keys: each meets what was held of the other source
        with DataSource(readings(first, 4), node, source_id=name, topic="in", event_time=number, key=room) as source:
            for _ in range(4):
                next(source)
        with replica(node, lambda a, b: [a[1], b[1]], 0, join="latest", timeout_ms=10_000) as compute:
            for _ in range(0 if name == "a" else 4):
                next(compute)
            until(lambda: compute.explain()["held"] == (4 if name == "a" else 8))  # noqa: B023
    assert sorted(results(topic="out")) == sorted([[n, n] for n in range(4)] + [[n, KEYS + n] for n in range(4)])


def test_what_everybody_sees_is_decided_once(node: str, dead_letters: DeadLetters, transport: Transport) -> None:
    """A gate that drops, a function of by= that fails, a strange source, a frame that is none, a message without key."""
    asked: list[str] = []
    busy = threading.Lock()

    def gate(reading: Any) -> Any:
        assert busy.acquire(blocking=False)  # one at a time, though there are several partitions
        asked.append(context().source_id)
        busy.release()
        return None if reading[1] == 1 else reading

    for name in "abc":
        with DataSource([("x", 0), ("y", 1), (1.5, 2)], node, source_id=name, topic="in", event_time=number) as source:
            source.run()
    publisher = transport.publisher("in")
    publisher.publish([b"no frame"])
    publisher.flush()
    publisher.close()
    with replica(node, lambda a, b: a, 0, by=lambda reading: reading[0], gate_in=gate) as compute:
        assert next(compute) == ("x", 0)
        until(lambda: transport.topic_info("in").groups["g#1of4"].backlog == 0)
    counted = {name: compute.counters[name] for name in ("gate", "dead_letter", "unknown_source", "foreign")}
    assert counted == {"gate": 2, "dead_letter": 2, "unknown_source": 3, "foreign": 1}
    assert Counter(letter.reason for letter in dead_letters("in.g.dead-letters")) == Counter(
        {"dead_letter": 2, "unknown_source": 3, "foreign": 1}
    )
    assert "a" in asked and "b" in asked


def test_a_message_without_key_is_dropped_once(node: str) -> None:
    with DataSource([("x", 0)], node, source_id="a", topic="in", event_time=number) as source:
        source.run()
    with replica(node, pair, 0) as compute:
        until(lambda: compute.counters["unmatched"])
        assert compute.explain()["sources"]["a"]["dropped"] == {"unmatched": 1}


def test_a_set_that_keeps_failing_names_its_inputs(node: str, dead_letters: DeadLetters, results: Results) -> None:
    def task(a: Reading, b: Reading) -> int:
        if a[1] == 3:
            raise ValueError("not three")
        return a[1]

    send(node, 6)
    with replica(node, task, 0, retries=1, retry_backoff_ms=1) as compute:
        compute.run(until="end")
    (letter,) = dead_letters("in.g.dead-letters")
    assert (letter.source_ids, letter.attempts, letter.topic) == (["a", "b"], 2, "in") and "not three" in letter.error
    assert sorted(results(topic="out")) == [0, 1, 2, 4, 5]


def test_on_error_raise_goes_on_with_the_next_set(node: str, results: Results) -> None:
    def task(a: Reading, b: Reading) -> int:
        if a[1] % 3 == 0:
            raise ValueError(f"not {a[1]}")
        return a[1]

    send(node, 9)
    errors = []
    with replica(node, task, 0, retries=0, on_error="raise", timeout_ms=2_000) as compute:
        for _ in range(9):
            try:
                next(compute)
            except ValueError as exc:
                errors.append(str(exc))
        compute.flush()
        assert sorted(results(topic="out")) == [1, 2, 4, 5, 7, 8]
    assert sorted(errors) == ["not 0", "not 3", "not 6"]


def test_a_set_that_was_interrupted_is_run_again(node: str, results: Results) -> None:
    interrupted: list[int] = []

    def task(a: Reading, b: Reading) -> int:
        if not interrupted:
            interrupted.append(a[1])
            raise KeyboardInterrupt
        return a[1]

    send(node, 5)
    with replica(node, task, 0) as compute:
        with pytest.raises(KeyboardInterrupt):
            next(compute)
        compute.run(until="end")
    assert sorted(results(topic="out")) == list(range(5))


def test_what_next_has_returned_is_durable_after_flush(node: str, results: Results) -> None:
    with replica(node, pair, 0, timeout_ms=10_000) as compute:
        send(node, 10)
        for count in range(1, 11):
            next(compute)
            compute.flush()
            assert len(results(topic="out")) == count


def test_an_error_of_a_join_reaches_who_runs_the_task(node: str) -> None:
    send(node, 50, "a")
    with replica(node, pair, 0, max_held=2, overflow="error") as compute, pytest.raises(JoinOverflow):
        compute.run()


def test_another_round_after_the_end(node: str, results: Results) -> None:
    found: list[int] = []
    for first in (0, 10):
        send(node, 10, first=first)
        with running(*(replica(node, pair, n) for n in range(2))):
            pass
        with Materialize(found.append, node, topic="out") as sink:
            sink.run(until="end")
    assert sorted(found) == sorted(results(topic="out")) == list(range(20))


def test_rounds_end_together_however_far_apart_partitions_are(node: str, transport: Transport) -> None:
    """What is of a round stands before its end, and what is of the next behind it."""
    behind = threading.Event()

    def slow(a: Reading, b: Reading) -> int:
        if _partition(a[0]) == 0 and a[1] == 0:
            behind.wait(60)
        return a[1]

    keys = [next(f"room {n}" for n in range(100) if _partition(f"room {n}") == number) for number in range(PARTITIONS)]
    held_up, other = replica(node, slow, 0, partitions=PARTITIONS), replica(node, slow, 1, partitions=PARTITIONS)
    with running(held_up, other):
        shared_out(held_up, other)
        for first in (0, 10):
            for name in "ab":
                items = [(key, first) for key in keys]
                with DataSource(items, node, source_id=name, topic="in", event_time=number, key=room, message_id=str) as source:
                    source.run()
        # Those of the round that are of other partitions come, and no more.
        until(lambda: len([frame for frame, _, _ in transport.read("out")]) >= PARTITIONS - len(held(held_up)))
        behind.set()
    found = [decode_frame(frame) for frame, _, _ in transport.read("out")]
    rounds = ["end" if header.kind == Kind.END else header.event_ns for header, _ in found]
    assert rounds == [0] * PARTITIONS + ["end"] + [10] * PARTITIONS + ["end"]


@pytest.mark.parametrize("node", ["local"], indirect=True)
def test_who_holds_no_partition_stays_for_the_next_round(node: str, results: Results) -> None:
    send(node, 8)
    with running(replica(node, pair, 0, partitions=2)):
        pass
    with DataSource(readings(8, 4), node, source_id="a", topic="in", event_time=number, key=room) as source:
        next(source)
        replicas = [replica(node, pair, n, partitions=2) for n in range(3)]
        with running(*replicas) as threads:
            until(lambda: held(*replicas) == [1, 2])
            for thread in threads:
                thread.join(2)
                assert thread.is_alive()
            source.run()
            send(node, 4, "b", first=8)
    assert sorted(results(topic="out")) == list(range(12))


def test_a_task_may_write_its_next_result_over_the_last(node: str, transport: Transport) -> None:
    buffer = np.zeros(50_000)

    def task(a: Reading, b: Reading) -> np.ndarray[Any, Any]:
        buffer[:] = a[1]
        return buffer

    send(node, 40)
    with replica(node, task, 0) as compute:
        compute.run(until="end")
    found: list[set[float]] = []
    with Materialize(lambda result: found.append(set(result)), node, topic="out") as sink:
        sink.run(until="end")
    assert sorted(found, key=min) == [{float(n)} for n in range(40)]


def test_an_interrupt_while_an_outcome_is_handed_over(node: str, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(threading.Event):
        left = 1

        def set(self) -> None:
            if Interrupted.left:
                Interrupted.left = 0
                raise KeyboardInterrupt
            super().set()

    class Interruptible(Offer):
        __slots__ = ()

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.changed = Interrupted()

    monkeypatch.setattr("edgeserve.stage.partition.Offer", Interruptible)
    send(node, 5)
    with replica(node, pair, 0) as compute:
        with pytest.raises(KeyboardInterrupt):
            compute.run(until="end")
        compute.run(until="end")
    assert sorted(results(topic="out")) == list(range(5))


def test_flush_while_partitions_change_hands(node: str) -> None:
    replicas = [replica(node, pair, n) for n in range(2)]
    with replicas[0] as first:
        for _ in range(3):
            with replica(node, pair, 1) as second:
                while not held(second):
                    first.flush()
            first.flush()


def test_a_task_may_step_its_own_node(node: str, results: Results) -> None:
    send(node, 4)

    def task(a: Reading, b: Reading) -> int:
        if not asked:
            asked.append(a[1])
            other.append(next(compute))
        return a[1]

    asked: list[int] = []
    other: list[int] = []
    with replica(node, task, 0) as compute:
        compute.run(until="end")
    assert len(other) == 1 and sorted(results(topic="out")) == [0, 1, 2, 3]


def test_more_replicas_than_partitions_and_the_idle_end_too(node: str, results: Results) -> None:
    replicas = [replica(node, pair, n, partitions=2) for n in range(4)]
    with running(*replicas):
        until(lambda: sum(len(held(each)) == 1 for each in replicas) == 2)
        send(node, 20)
    assert sorted(results(topic="out")) == list(range(20))


def test_another_number_of_partitions_is_another_group(node: str) -> None:
    with (
        replica(node, pair, 0),
        pytest.raises(GroupConflict, match="partitions=4, and this one has 2"),
        replica(node, pair, 1, partitions=2),
    ):
        pass
    with (
        pytest.raises(GroupConflict, match="partitions=4, and this one has 1: give it by= and partitions=4, or another group="),
        replica(node, pair, 1, partitions=1),
    ):
        pass


def test_a_join_of_all_keys_is_another_group(node: str) -> None:
    with (
        replica(node, pair, 0),
        pytest.raises(GroupConflict, match="partitions=4, and this one has 1"),
        replica(node, pair, 1, by=None, partitions=1),
    ):
        pass


def test_members_must_agree_on_what_makes_the_sets(node: str) -> None:
    with (
        replica(node, pair, 0),
        pytest.raises(GroupConflict, match="it has by=True, this one has by=a function"),
        replica(node, pair, 1, by=room),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": None}, "partitions=4 divides the keys of a join by key: give it by="),
        ({"group": "g" * 196}, "the group of a partition must be 1 to 200 bytes"),
        ({"partitions": 0}, "partitions=0: it is into how many parts"),
        ({"partitions": True}, "partitions=True: it is into how many parts"),
        ({"group": "shop#1of2"}, "is what the group of a partition is called"),
        ({"partitions": 257}, "an int from 1 to 256: each costs its holder"),
        ({"partitions": 2.5}, "partitions=2.5: it is into how many parts"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replica("memory://refused", pair, 0, **options)


# --- crashes ------------------------------------------------------------------------------------------------------


def _work(node: str, index: int, notes: Path, began: Any, never: Any) -> None:
    """A replica that notes what it runs; in its fifth set it stands still."""

    def task(a: Reading, b: Reading) -> int:
        with open(notes / f"ran-{index}", "a") as file:
            file.write(f"{a[1]}\n")
        if len((notes / f"ran-{index}").read_text().splitlines()) == 5:
            began.set()
            never.wait()
        return pair(a, b)

    with replica(node, task, index) as compute:
        compute.run(until="end")


@pytest.mark.parametrize("node", ["local", "nats", "pulsar"], indirect=True)
def test_a_kill_loses_nothing_and_the_keys_of_others_go_on_meanwhile(node: str, tmp_path: Path, results: Results) -> None:
    cx = mp.get_context("spawn")
    began, never = cx.Event(), cx.Event()
    victim = cx.Process(target=_work, args=(node, 0, tmp_path, began, never))
    other = replica(node, pair, 1)
    with running(other):
        victim.start()
        until(lambda: len(held(other)) == 2)
        mine = {key - 1 for key in held(other)}
        send(node, 400)
        assert began.wait(60)
        its = {n for name, n in readings(0, 400) if _partition(name) not in mine}
        # The victim stands still with a set in hand, so that only the keys of the other go on, and all of them do.
        until(lambda: len(set(results(topic="out")) - its) == 400 - len(its))
        assert its & set(results(topic="out")) <= set(map(int, (tmp_path / "ran-0").read_text().split()[:4]))
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
    # What it had published and not settled is published again: a sink drops it by its id.
    found = list[int]()
    with Materialize(found.append, node, topic="out") as sink:
        sink.run(until="end")
    assert sorted(found) == list(range(400))


def _partition(key: str) -> int:
    from edgeserve.core.message import Header

    return partition_of(Header(bytes(16), "a", "p", 0, 0, 0, key=key), PARTITIONS)
