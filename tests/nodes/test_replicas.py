"""Replicas of a task of several parameters: one holds the join, all run its sets."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from tests import servers
from tests.nodes.conftest import running
from tests.waiting import until

from edgeserve import Compute, DataSource, Materialize, context
from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import JoinOverflow, ReceiveTimeout
from edgeserve.core.message import Header, Kind
from edgeserve.stage.deadletter import DeadLetter
from edgeserve.stage.decisions import work_topic
from edgeserve.testing.transport import publish
from edgeserve.transport import Transport

Results = Callable[..., list[Any]]
Work = Callable[[int, int], Any]


def replica(node: str, work: Work, number: int, **options: Any) -> Compute:
    options = {"join": "exact", "output_id": "pair"} | options
    return Compute(work, node, worker_id=f"w{number}", group="g", topic_in="in", topic_out="out", **options)


@contextlib.contextmanager
def sharing(*replicas: Compute) -> Iterator[None]:
    """Runs replicas until the end; begins when each knows of the others."""
    with running(*replicas):
        until(lambda: all(each.explain()["shares_sets"] for each in replicas))
        yield


def send(node: str, count: int, names: str = "ab", first: int = 0) -> None:
    for name in names:
        with DataSource(range(first, first + count), node, source_id=name, topic="in", event_time=int, message_id=int) as source:
            source.run()


def test_all_replicas_run_sets_and_each_set_runs_once(node: str, results: Results) -> None:
    ran: list[list[tuple[int, int]]] = [[], [], []]
    together = threading.Barrier(3, timeout=60)

    def work(number: int) -> Work:
        def task(a: int, b: int) -> tuple[int, int]:
            if not ran[number]:
                together.wait()  # nobody goes on before all have one
            ran[number].append((a, b))
            return a, b

        return task

    with sharing(*(replica(node, work(n), n) for n in range(3))):
        send(node, 300)
    assert all(ran)
    assert sorted(pair for some in ran for pair in some) == [(n, n) for n in range(300)]
    assert sorted(results(topic="out")) == [(n, n) for n in range(300)]


def test_a_slow_task_of_the_holder_keeps_no_other_waiting(node: str) -> None:
    others_done, count = threading.Event(), 50
    ran: list[int] = []

    def held_up(a: int, b: int) -> None:
        others_done.wait(60)

    def quick(a: int, b: int) -> None:
        ran.append(a)
        if len(ran) >= count // 2:
            others_done.set()

    with sharing(replica(node, held_up, 0), replica(node, quick, 1)):
        send(node, count)
    assert others_done.is_set()


def test_a_replica_that_is_alone_again_runs_its_sets_itself(node: str, transport: Transport, results: Results) -> None:
    first = replica(node, lambda a, b: (a, b), 0)
    with running(first):
        assert first.explain()["shares_sets"] is False
        with replica(node, lambda a, b: (a, b), 1):
            until(lambda: first.explain()["shares_sets"])
            send(node, 20, "a")
        until(lambda: not first.explain()["shares_sets"])
        send(node, 20, "b")
    assert sorted(results(topic="out")) == [(n, n) for n in range(20)]


def test_sets_that_a_replica_left_are_run_by_who_comes_next(node: str, transport: Transport, results: Results) -> None:
    with replica(node, lambda a, b: (a, b), 0, timeout_ms=1_000) as first, replica(node, lambda a, b: (a, b), 1):
        send(node, 200)
        assert next(first) is not None  # and the others are made, too, while nobody asks for them
        until(lambda: transport.topic_info("in").groups["g"].backlog <= 2)
    with replica(node, lambda a, b: (a, b), 2) as last:
        last.run(until="end")
    assert sorted(results(topic="out")) == [(n, n) for n in range(200)]


def test_what_a_replica_gives_up_names_the_inputs(node: str, dead_letters: Callable[[str], list[DeadLetter]], results: Results) -> None:
    def task(a: int, b: int) -> int:
        if a == 3:
            raise ValueError("not three")
        return a

    options: dict[str, Any] = {"retries": 1, "retry_backoff_ms": 1}
    with running(replica(node, task, 0, **options), replica(node, task, 1, **options)):
        send(node, 6)
    (letter,) = dead_letters("in.g.dead-letters")
    assert (letter.source_ids, letter.attempts, letter.topic) == (["a", "b"], 2, "in")
    assert "not three" in letter.error
    assert sorted(results(topic="out")) == [0, 1, 2, 4, 5]


def test_replicas_may_call_their_results_differently(node: str, results: Results) -> None:
    with running(*(replica(node, lambda a, b: a, n, output_id=None) for n in range(2))):
        send(node, 30)
    assert sorted(results(topic="out")) == list(range(30))


def test_a_gated_value_that_cannot_travel_is_given_up_by_name(node: str, dead_letters: Callable[[str], list[DeadLetter]]) -> None:
    with sharing(*(replica(node, lambda a, b: None, n, gate_in=lambda value: object()) for n in range(2))):
        send(node, 2)
    assert {letter.error.partition(":")[0] for letter in dead_letters("in.g.dead-letters")} == {"UnsupportedType"}


def test_context_and_gates_are_the_same_for_a_set_that_is_shared(node: str) -> None:
    seen: list[tuple[int, int, int, set[str], bool]] = []

    def gate(value: int) -> int | None:
        assert context().source_id in ("a", "b")
        return None if value == 2 else value * 10

    def task(a: int, b: int) -> None:
        of = context()
        seen.append((a, b, of.event_ns, set(of.ids), of.redelivered))

    with running(replica(node, task, 0, gate_in=gate), replica(node, task, 1, gate_in=gate)):
        send(node, 5)
    assert sorted(seen) == [(n * 10, n * 10, n, {"a", "b"}, False) for n in (0, 1, 3, 4)]


def test_an_error_of_the_join_reaches_who_runs_the_task(node: str) -> None:
    with replica(node, lambda a, b: a, 0, max_held=3, overflow="error") as holder, replica(node, lambda a, b: a, 1):
        send(node, 5, "a")
        with pytest.raises(JoinOverflow):
            while True:
                next(holder)


def test_results_reach_a_sink_and_so_does_their_end(node: str) -> None:
    found: list[Any] = []
    with running(replica(node, lambda a, b: a + b, 0), replica(node, lambda a, b: a + b, 1)):
        send(node, 30)
    with Materialize(found.append, node, topic="out") as sink:
        sink.run(until="end")
    assert sorted(found) == [2 * n for n in range(30)]


def test_another_round_after_the_end(node: str, results: Results) -> None:
    for first in (0, 10):
        with running(replica(node, lambda a, b: a, 0), replica(node, lambda a, b: a, 1)):
            send(node, 10, first=first)
    assert sorted(results(topic="out")) == list(range(20))


def test_a_new_version_takes_over_from_the_old_one_message_by_message(node: str, transport: Transport, results: Results) -> None:
    """Two old ones run, two new ones come, the old ones are stopped while sets are made."""
    together = threading.Barrier(5, timeout=60)

    def work() -> Work:
        begun = False

        def task(a: int, b: int) -> int:
            nonlocal begun
            if not begun:
                begun = True
                together.wait()  # nobody goes on before all have one
            time.sleep(0.002)
            return a

        return task

    old = [replica(node, work(), n, task_version="1") for n in range(2)]
    new = [replica(node, work(), 2 + n, task_version="2") for n in range(2)]
    feeding = threading.Thread(target=send, args=(node, 800))
    with running(*new):
        running_old = [threading.Thread(target=each.run) for each in old]
        for thread in running_old:
            thread.start()
        feeding.start()
        together.wait()
        assert {*transport.topic_info("in").groups["g"].versions.values()} == {"1", "2"}
        for each in old:
            each.close()  # as a SIGTERM ends it
        for thread in (*running_old, feeding):
            thread.join(60)
    assert sorted(results(topic="out")) == list(range(800))
    versions = {decode_frame(frame)[0].task_version for frame, _, _ in transport.read("out")}
    assert {"1", "2"} <= versions


def test_the_newest_set_runs_next_where_only_that_is_wanted(node: str, results: Results) -> None:
    busy, go_on = threading.Event(), threading.Event()

    def task(a: int, b: int) -> int:
        if a == 0:
            busy.set()
            assert go_on.wait(60)
        return a

    compute = replica(node, task, 0, backlog="latest")
    with running(compute):
        send(node, 1)
        assert busy.wait(60)
        send(node, 100, first=1)
        go_on.set()
    found = results(topic="out")
    assert found[0] == 0 and found[-1] == 100 and found == sorted(found)
    assert len(found) + compute.counters["superseded"] == 101 and len(found) < 50


def test_replicas_run_the_newest_sets_that_they_can_get(node: str, results: Results) -> None:
    begun, go_on = [threading.Event(), threading.Event()], threading.Event()

    def work(number: int) -> Work:
        def task(a: int, b: int) -> int:
            begun[number].set()
            assert go_on.wait(60)
            return a

        return task

    nodes = [replica(node, work(n), n, backlog="latest") for n in range(2)]
    with running(*nodes):
        count = 0
        while not all(each.is_set() for each in begun):
            send(node, 1, first=count)
            count += 1
            begun[count % 2].wait(0.5)
        send(node, 300, first=count)  # both are busy
        go_on.set()
        count += 300
    found = results(topic="out")
    assert len(found) == len({*found}) and count - 1 in found
    assert len(found) + sum(each.counters["superseded"] for each in nodes) == count and len(found) < 250


def test_next_ends_in_time_while_the_broker_does_not_answer(new_nats: servers.NewServer) -> None:
    server = new_nats()
    options: dict[str, Any] = {"topic_in": "in", "topic_out": "out", "join": "exact", "group": "g"}
    with Compute(lambda a, b: a, server.url, worker_id="w", timeout_ms=2_000, **options) as compute:
        with DataSource(range(20), server.url, source_id="a", topic="in", event_time=int) as source:
            for _ in range(20):
                next(source)
            for _ in range(20):
                next(compute)
            assert compute.explain()["held"] == 20
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(ReceiveTimeout):
                    next(compute)
            finally:
                os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("node", ["memory", "local"], indirect=True)
def test_a_set_that_is_stored_again_behind_the_end_takes_nothing_back(node: str, transport: Transport, results: Results) -> None:
    """As one does that held the join before, and stood still while another took it over."""
    began, go_on, again = threading.Event(), threading.Event(), threading.Event()

    def task(a: int, b: int) -> int:
        if a == 3:
            if began.is_set():
                again.set()
            else:
                began.set()
                go_on.wait(60)
        return a

    def stored() -> list[tuple[Header, Any]]:
        return [decode_frame(bytes(frame)) for frame, _, _ in transport.read(work_topic("in", "g"))]

    with sharing(replica(node, task, 0), replica(node, task, 1)):
        send(node, 8)
        assert began.wait(60)
        until(lambda: any(header.kind == Kind.END for header, _ in stored()))
        header, payload = next(each for each in stored() if each[0].event_ns == 3)
        publish(transport, work_topic("in", "g"), [encode_frame(replace(header, producer="another"), payload)])
        assert again.wait(60)
        go_on.set()
    assert sorted(set(results(topic="out"))) == list(range(8))
    assert sum(decode_frame(frame)[0].kind == Kind.END for frame, _, _ in transport.read("out")) == 1
