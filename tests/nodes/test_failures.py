"""What goes wrong in a stream, and what becomes of it: nothing is lost in silence, nothing stops the stage."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edgeserve
from edgeserve import Compute, DataSource, Materialize
from edgeserve.align import Exact, JoinSet, Member, Policy, Released
from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import (
    ClosedError,
    DiskFull,
    GroupConflict,
    ReceiveTimeout,
    SkewWarning,
    StoreFull,
    TooLarge,
    TransportError,
    UnsupportedType,
)
from edgeserve.core.message import Header, Kind
from edgeserve.stage import join as join_stage
from edgeserve.stage.deadletter import DeadLetter
from edgeserve.stage.decisions import Record
from edgeserve.transport import GroupKind, Transport, connect, disconnect
from edgeserve.transport.engine import LogEngine
from edgeserve.transport.member import LogSubscription
from edgeserve.transport.place import Place

DeadLetters = Callable[[str], list[DeadLetter]]
Send = Callable[..., None]
Results = Callable[..., list[Any]]


# --- a raising task ---------------------------------------------------------------------------------------------


def test_a_raising_task_is_tried_again_and_then_put_aside(node: str, send: Send, results: Results, dead_letters: DeadLetters) -> None:
    calls: list[int] = []

    def task(a: int) -> int:
        calls.append(a)
        if a == 1 or (a == 2 and calls.count(2) < 3):
            raise ValueError(f"cannot take {a}")
        return a

    send("a", [1, 2, 3])
    with Compute(task, node, retries=2, retry_backoff_ms=1) as compute:
        assert [next(compute) for _ in range(3)] == [None, 2, 3]
        assert compute.counters["dead_letter"] == 1
    assert calls == [1, 1, 1, 2, 2, 2, 3]
    assert results() == [2, 3]
    (letter,) = dead_letters("src.src->dst.dead-letters")
    assert (letter.reason, letter.attempts, letter.source_ids) == ("dead_letter", 3, ["a"])
    assert "cannot take 1" in letter.error and "Traceback" in letter.traceback
    assert len(letter.input_ids[0]) == 32 and len(letter.frames) == 1


@pytest.mark.parametrize("parameters", [1, 2])
def test_an_error_that_cannot_say_what_it_is(node: str, send: Send, dead_letters: DeadLetters, parameters: int) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            return str(self.missing)  # type: ignore[attr-defined]

    def fail(n: int) -> int:
        if n == 1:
            raise Mute
        return n

    def one(a: int) -> int:
        return fail(a)

    def two(a: int, b: int) -> int:
        return fail(a)

    for source in "ab"[:parameters]:
        send(source, [1, 2], event_time=int)
    options: dict[str, Any] = {} if parameters == 1 else {"join": "exact"}
    with Compute(one if parameters == 1 else two, node, retries=1, retry_backoff_ms=1, **options) as compute:
        assert [next(compute) for _ in range(2 * parameters)][-1] == 2
    (letter,) = dead_letters("src.src->dst.dead-letters")
    assert letter.error.startswith("Mute") and "return str(self.missing)" not in letter.traceback


@pytest.mark.parametrize("parameters", [1, 2])
def test_the_log_does_not_grow_with_the_dead_letters(
    node: str, send: Send, dead_letters: DeadLetters, caplog: pytest.LogCaptureFixture, parameters: int, quiet_ms: int
) -> None:
    send("stranger", range(40))
    task = [lambda a: a, lambda a, b: a][parameters - 1]
    with Compute(task, node, timeout_ms=quiet_ms) as compute:
        with pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
        assert compute.counters["unknown_source"] == 40
    lines = [record.getMessage() for record in caplog.records if "aside" in record.getMessage()]
    assert len(lines) == 6 and "put 35 more input(s) of 'src' aside (unknown_source)" in lines[-1]
    assert len(dead_letters("src.src->dst.dead-letters")) == 40


def test_a_put_aside_message_is_gone_from_the_topic(node: str, send: Send, quiet_ms: int) -> None:
    def task(a: int) -> int:
        raise ValueError

    send("a", [1])
    with Compute(task, node, retries=0) as compute:
        next(compute)
    with Compute(lambda a: a, node, timeout_ms=quiet_ms) as compute, pytest.raises(ReceiveTimeout):
        next(compute)


def test_on_error_raise_raises_and_goes_on(node: str, send: Send, dead_letters: DeadLetters) -> None:
    send("a", [0, 4])
    with Compute(lambda a: 8 // a, node, retries=0, on_error="raise") as compute:
        with pytest.raises(ZeroDivisionError):
            next(compute)
        assert next(compute) == 2
    assert len(dead_letters("src.src->dst.dead-letters")) == 1


def test_on_error_raise_ends_run(node: str, send: Send) -> None:
    send("a", [0, 4])
    with Compute(lambda a: 8 // a, node, retries=0, on_error="raise") as compute:
        with pytest.raises(ZeroDivisionError):
            compute.run()
        assert next(compute) == 2


@pytest.mark.parametrize("join", ["latest", "exact"])
def test_a_raising_join_puts_its_inputs_aside_and_goes_on(node: str, send: Send, dead_letters: DeadLetters, join: str) -> None:
    def task(a: int, b: int) -> int:
        if a == 1:
            raise ValueError("bad pair")
        return a + b

    with (
        DataSource([1, 2], node, source_id="a", event_time=lambda i: i) as a,
        DataSource([1, 2], node, source_id="b", event_time=lambda i: i) as b,
    ):
        next(a), next(b)
        with Compute(task, node, join=join, no_overlap=True, retries=1, retry_backoff_ms=1) as compute:
            assert [next(compute), next(compute)] == [None, None]
            next(a), next(b)
            assert [next(compute), next(compute)] == [None, 4]
    (letter,) = dead_letters("src.src->dst.dead-letters")
    assert (letter.source_ids, letter.attempts, len(letter.frames)) == (["a", "b"], 2, 2)


def test_a_sink_that_raises_is_tried_again(node: str, send: Send, dead_letters: DeadLetters) -> None:
    send("a", [1, 2], topic="dst")
    seen: list[tuple[int, bool]] = []

    def final(value: int) -> int:
        seen.append((value, edgeserve.context().redelivered))
        if value == 1:
            raise OSError("disk unplugged")
        return value

    with Materialize(final, node, retries=1, retry_backoff_ms=1) as sink:
        assert [next(sink), next(sink)] == [None, 2]
        assert sink.counters["dead_letter"] == 1
    assert seen == [(1, False), (1, True), (2, False)]
    assert "disk unplugged" in dead_letters("dst.materialize.dead-letters")[0].error


def test_the_traceback_of_a_dead_letter_is_the_tasks_and_of_its_last_attempt(node: str, send: Send, dead_letters: DeadLetters) -> None:
    def task(a: int) -> int:
        try:
            return a // 0
        except ZeroDivisionError as exc:
            raise ValueError("no quotient") from exc

    send("a", [1])
    with Compute(task, node, retries=1, retry_backoff_ms=0) as compute:
        assert next(compute) is None
    (letter,) = dead_letters("src.src->dst.dead-letters")
    assert letter.traceback.count("ValueError: no quotient") == letter.traceback.count("ZeroDivisionError: ") == 1
    assert "try_again" not in letter.traceback and "perform" not in letter.traceback
    assert letter.traceback.count(__file__) == 2


def test_an_unsendable_result_is_put_aside_at_once(node: str, send: Send, dead_letters: DeadLetters) -> None:
    calls = []
    send("a", [1, 2])
    with Compute(lambda a: (calls.append(a), object())[1] if a == 1 else a, node) as compute:
        assert [next(compute), next(compute)] == [None, 2]
    assert calls == [1]
    assert UnsupportedType.__name__ in dead_letters("src.src->dst.dead-letters")[0].error


def test_closing_ends_a_long_backoff_and_the_message_goes_back(node: str, send: Send) -> None:
    failed = threading.Event()

    def task(a: int) -> int:
        failed.set()
        raise ValueError

    send("a", [1])
    compute = Compute(task, node, retry_backoff_ms=60_000)
    errors: list[BaseException] = []

    def step() -> None:
        try:
            next(compute)
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=step)
    thread.start()
    assert failed.wait(5)
    compute.close()
    thread.join(5)
    assert not thread.is_alive() and len(errors) == 1
    with Compute(lambda a: a, node, timeout_ms=5000) as again:
        assert next(again) == 1


# --- what is not for this stage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [1, 2])
def test_unknown_sources_and_foreign_messages_stop_nothing(
    node: str, send: Send, transport: Transport, dead_letters: DeadLetters, parameters: int
) -> None:
    send("stranger", [1])
    publisher = transport.publisher("src")
    good = bytes(encode_frame(Header(b"i" * 16, "a", "p", 0, 1, 1, "b"), b"payload"))
    newer = good[:2] + b"\x7f" + good[3:]
    publisher.publish([b"not ours", good[:-3], good[:-1] + b"\x00", newer])
    publisher.close()
    send("a", [1])
    send("b", [2])
    task = (lambda a: a) if parameters == 1 else (lambda a, b: a + b)
    with Compute(task, node, timeout_ms=2000) as compute:
        assert [next(compute) for _ in range(5)] == [None] * 5
        expected = {"foreign": 1, "truncated": 1, "corrupt": 1, "newer": 1, "unknown_source": 1}
        assert {k: compute.counters[k] for k in expected} == expected
        assert [next(compute), next(compute)] == ([1, None] if parameters == 1 else [None, 3])
    letters = dead_letters("src.src->dst.dead-letters")
    assert sorted(letter.reason for letter in letters[:5]) == sorted(expected)
    assert b"not ours" in [letter.frames[0] for letter in letters]


def test_a_payload_that_does_not_fit_the_annotation_is_put_aside(node: str, send: Send, dead_letters: DeadLetters) -> None:
    def task(a: int) -> int:
        return a

    send("a", ["text", 5])
    with Compute(task, node) as compute:
        assert [next(compute), next(compute)] == [None, 5]
        assert compute.counters["schema"] == 1
    assert dead_letters("src.src->dst.dead-letters")[0].reason == "schema"


def test_a_missing_source_holds_and_says_so(node: str, send: Send, quiet_ms: int) -> None:
    send("a", [1])
    with Compute(lambda a, b: a + b, node, timeout_ms=quiet_ms) as compute:
        assert next(compute) is None
        with pytest.raises(ReceiveTimeout):
            next(compute)
        assert "no item of 'b'" in compute.explain()["sources"]["b"]["note"]
    send("b", [2])
    with Compute(lambda a, b: a + b, node, timeout_ms=2000) as compute:
        assert [next(compute), next(compute)] == [None, 3]


@pytest.mark.parametrize("source_id", ["ä" * 10, "データ源です", "x" * 255, "é" * 127])
def test_source_ids_of_any_script(node: str, source_id: str) -> None:
    payload = bytes(range(256))
    with DataSource([payload], node, source_id=source_id, topic="dst") as source:
        next(source)
    with Materialize(lambda data: (data, edgeserve.context().source_id), node) as sink:
        assert next(sink) == (payload, source_id)


def test_non_ascii_parameters_are_sources(node: str, send: Send) -> None:
    send("größe", [3])
    with Compute(lambda größe: größe + 1, node) as compute:
        assert next(compute) == 4


def test_a_source_id_reaches_the_parameter_that_python_takes_for_the_same(node: str, send: Send) -> None:
    send("\ufb01le", [1])  # the ligature; in a parameter's name it is the same as two letters
    with Compute(lambda file: file + 1, node, output_id="\uff52esult", timeout_ms=5000) as compute:
        assert next(compute) == 2
    with Compute(lambda result: result + 1, node, topic_in="dst", topic_out="end", timeout_ms=5000) as compute:
        assert next(compute) == 3


def test_big_messages_and_big_results(node: str, send: Send, results: Results) -> None:
    send("a", [b"x" * 6_000_000])
    with Compute(lambda a: a * 2, node) as compute:
        assert len(next(compute)) == 12_000_000
    assert [len(r) for r in results()] == [12_000_000]


# --- order, repeats, time ---------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
@pytest.mark.parametrize("step", [next, lambda source: source.run()], ids=["next", "run"])
def test_a_message_larger_than_the_store_is_refused_at_once(embedded: str, step: Callable[[DataSource], Any]) -> None:
    source = DataSource([bytes(3 << 20)], f"{embedded}?size_mb=2", source_id="a")
    with source, pytest.raises(TooLarge, match=r"a message of 3145\d+ bytes exceeds the 20970\d+ .*size_mb="):
        step(source)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("parameters", [1, 2])
def test_a_result_larger_than_the_store_is_put_aside(embedded: str, parameters: int) -> None:
    node = f"{embedded}?size_mb=2"
    for name in ("a", "b")[:parameters]:
        with DataSource([1], node, source_id=name) as source:
            source.run()
    task = [lambda a: bytes(3 << 20), lambda a, b: bytes(3 << 20)][parameters - 1]
    with Compute(task, node) as compute:
        compute.run(until="end")
        assert compute.counters["dead_letter"] == parameters


def test_a_throttled_tail_is_run(node: str, send: Send) -> None:
    send("a", range(10))
    with Compute(lambda a: a, node, min_interval_ms=50) as compute:
        found = [r for r in (next(compute) for _ in range(11)) if r is not None]
        assert (found[0], found[-1]) == (0, 9)
        assert compute.counters["throttled"] == 10 - len(found)


def test_a_throttled_tail_is_run_by_run_too(node: str, results: Results) -> None:
    with DataSource(range(10), node, source_id="a") as source:
        source.run()
    with Compute(lambda a: a, node, min_interval_ms=50) as compute:
        compute.run(until="end")
    found = results()
    assert found[-1] == 9 and len(found) < 10


@pytest.mark.parametrize("parameters", [1, 2])
def test_the_same_message_four_times_runs_once(node: str, send: Send, parameters: int, quiet_ms: int) -> None:
    for _ in range(4):
        send("a", [1, 2], message_id=lambda i: i, event_time=lambda i: i)
    send("b", [10], event_time=lambda _: 1)
    runs: list[int] = []
    task = (lambda a: runs.append(a)) if parameters == 1 else (lambda a, b: runs.append(a))
    with Compute(task, node, timeout_ms=quiet_ms) as compute:
        with pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
        assert compute.counters["duplicate"] == 6
    assert runs == ([1, 2] if parameters == 1 else [2])


def test_repeats_after_a_restart_are_dropped(node: str, send: Send, results: Results, quiet_ms: int) -> None:
    for _ in range(2):
        send("a", range(5), message_id=lambda i: i)
        with Compute(lambda a: a, node, timeout_ms=quiet_ms) as compute, pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
    assert results() == [0, 1, 2, 3, 4]


def test_a_rerun_by_another_group_is_another_result_and_by_the_same_a_repeat(node: str, send: Send) -> None:
    send("a", [1])
    for group in ("g", "h"):
        with Compute(lambda a: a, node, group=group) as compute:
            next(compute)
    seen: list[bytes] = []
    with Materialize(lambda _: seen.append(edgeserve.context().ids["worker1"]), node) as sink:
        next(sink), next(sink)
    assert len(set(seen)) == 2


def test_an_older_message_never_replaces_a_newer_one(node: str, send: Send) -> None:
    send("a", [10, 30, 20], event_time=lambda i: i)
    send("b", [40], event_time=lambda i: i)
    with Compute(lambda a, b: (a, b), node) as compute:
        assert [next(compute) for _ in range(4)] == [None, None, None, (30, 40)]
        assert compute.counters["superseded"] == 2


def test_a_clock_that_is_a_minute_off_is_named(node: str, send: Send) -> None:
    now = time.time_ns()
    send("slow", range(4), event_time=lambda i: now - 60 * 10**9 + i)
    send("good", range(4), event_time=lambda i: now + i)
    with (
        Compute(lambda slow, good: 1, node) as compute,
        pytest.warns(SkewWarning, match=r"60 s ahead of those of 'slow', 10 s"),
    ):
        assert [next(compute) for _ in range(8)] == [None] * 8


def test_old_messages_are_dropped_and_counted(node: str, send: Send, results: Results) -> None:
    send("a", [1])
    threading.Event().wait(0.03)
    send("a", [2])
    with Compute(lambda a: a, node, drop_if_older_than_ms=0) as compute:
        assert next(compute) is None
        assert compute.counters["late"] == 1
    with Compute(lambda a: a, node, group="patient", drop_if_older_than_ms=60_000) as compute:
        assert [next(compute), next(compute)] == [1, 2]


def test_joins_pair_each_message_once_without_overlap(node: str, results: Results) -> None:
    for name in "ab":
        with DataSource(range(200), node, source_id=name, event_time=lambda i: i) as source:
            source.run()
    with Compute(lambda a, b: (a, b), node, join="exact") as compute:
        compute.run(until="end")
    assert results() == [(i, i) for i in range(200)]


def test_unmatched_inputs_are_counted_when_their_sources_end(node: str) -> None:
    with DataSource([1, 2, 3], node, source_id="a", event_time=lambda i: i) as source:
        source.run()
    with DataSource([2], node, source_id="b", event_time=lambda i: i) as source:
        source.run()
    with Compute(lambda a, b: (a, b), node, join="exact") as compute:
        compute.run(until="end")
        assert compute.counters == {"received": 4, "settled": 4, "sent": 1, "unmatched": 2}


# --- groups -----------------------------------------------------------------------------------------------------


def test_a_second_sink_shares_the_topic(node: str, send: Send) -> None:
    send("a", range(6), topic="dst")
    with Materialize(lambda x: x, node, timeout_ms=500) as one, Materialize(lambda x: x, node, timeout_ms=500) as two:
        found = [next(one)]
        one.close()
        found += [next(two) for _ in range(5)]
    assert sorted(found) == list(range(6))


def test_different_signatures_in_a_group_conflict(node: str) -> None:
    with Compute(lambda a, b: a, node), pytest.raises(GroupConflict, match="a,b"), Compute(lambda a, c: a, node):
        pass


def test_members_of_a_group_whose_results_go_elsewhere_or_are_called_otherwise_conflict(node: str) -> None:
    def worker(name: str, out: str = "o", **options: Any) -> Compute:
        return Compute(lambda a: a, node, name, topic_out=out, **options)

    with worker("one", group="g", output_id="x"):
        with pytest.raises(GroupConflict, match="it has topic_out='o', this one has topic_out='p'"):
            worker("two", "p", group="g", output_id="x").__enter__()
        with pytest.raises(GroupConflict, match="it has output_id='x', this one has output_id='y'"):
            worker("two", group="g", output_id="y").__enter__()
        with worker("two", group="g", output_id="x"):
            pass
    with worker("one"), worker("two"), worker("three", "p"):
        pass


def test_another_replica_takes_over(node: str, send: Send, quiet_ms: int) -> None:
    holder = Compute(lambda a, b: (a, b), node, no_overlap=True)
    with holder:
        other = Compute(lambda a, b: (a, b), node, worker_id="worker2", no_overlap=True, timeout_ms=quiet_ms).__enter__()
        send("a", [1])
        with pytest.raises(ReceiveTimeout):
            next(other)
        assert other.explain()["holds_the_join"] is False
    send("b", [2])
    found = []
    while (1, 2) not in found:
        with suppress(ReceiveTimeout):
            found.append(next(other))
    assert other.explain()["holds_the_join"] is True
    other.close()


def test_a_holder_that_lost_the_log_begins_anew(node: str, send: Send, transport: Transport, results: Results, quiet_ms: int) -> None:
    send("a", [1, 2], event_time=lambda i: i)
    with Compute(lambda a, b: (a, b), node, join="exact", timeout_ms=quiet_ms) as compute:
        assert [next(compute), next(compute)] == [None, None]
        transport.fence("src.src->dst.sets", "somebody else")
        send("b", [1, 2], event_time=lambda i: i)
        with pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
    assert results() == [(1, 1), (2, 2)]


# --- ends -------------------------------------------------------------------------------------------------------


def test_a_new_incarnation_opens_an_ended_source_again(node: str, results: Results) -> None:
    with Compute(lambda a: a, node) as compute:
        for _ in range(2):
            with DataSource([1, 2], node, source_id="a") as source:
                source.run()
            assert [next(compute), next(compute)] == [1, 2]
    assert results() == [1, 2, 1, 2]


@pytest.mark.parametrize("join", ["latest", "exact"])
def test_a_new_incarnation_opens_a_join_again(node: str, results: Results, join: str) -> None:
    def send_both(numbers: list[int]) -> None:
        for name in "ab":
            with DataSource(numbers, node, source_id=name, event_time=lambda i: i) as source:
                source.run()

    with Compute(lambda a, b: (a, b), node, join=join, no_overlap=True) as compute:
        send_both([1])
        compute.run(until="end")
        send_both([2])
        assert [next(compute), next(compute)] == [None, (2, 2)]


def test_all_members_stop_at_the_end(node: str, results: Results) -> None:
    with Compute(lambda a: a, node, worker_id="w1", output_id="w") as one, Compute(lambda a: a, node, worker_id="w2", output_id="w") as two:
        threads = [threading.Thread(target=compute.run, kwargs={"until": "end"}) for compute in (one, two)]
        for thread in threads:
            thread.start()
        with DataSource(range(500), node, source_id="a") as source:
            source.run()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    assert sorted(results()) == list(range(500))


@pytest.mark.timeout(30)
def test_a_member_learns_of_an_end_whose_reader_has_left(embedded: str) -> None:
    # Not on a broker: what its client has fetched ahead for the one that stands still is not settled, so there is no end.
    with Compute(lambda a: a, embedded, worker_id="w2", output_id="w") as stays:
        with Compute(lambda a: a, embedded, worker_id="w1", output_id="w") as leaves:
            with DataSource(range(50), embedded, source_id="a") as source:
                source.run()
            leaves.run(until="end")
        stays.run(until="end")
    found: list[int] = []
    with Materialize(found.append, embedded) as sink:
        sink.run(until="end")
    assert sorted(found) == list(range(50))


def test_all_replicas_stop_at_the_end(node: str) -> None:
    with Compute(lambda a, b: a, node) as one, Compute(lambda a, b: a, node, worker_id="w2") as two:
        threads = [threading.Thread(target=compute.run, kwargs={"until": "end"}) for compute in (one, two)]
        for thread in threads:
            thread.start()
        for name in "ab":
            with DataSource(range(5), node, source_id=name) as source:
                source.run()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)


def test_closing_from_another_thread_ends_a_waiting_step(node: str) -> None:
    compute = Compute(lambda a: a, node).__enter__()
    outcome: list[str] = []

    def wait() -> None:
        outcome.extend("result" for _ in compute)
        outcome.append("ended")

    thread = threading.Thread(target=wait)
    thread.start()
    compute.close()
    thread.join(5)
    assert outcome in (["ended"], [])  # [] when it was closed before the step began: then the step says ClosedError
    assert not thread.is_alive()


@pytest.mark.parametrize("order", ["steps, then closes", "closes, then steps"])
@pytest.mark.parametrize("another_thread", [False, True])
def test_a_function_that_steps_its_own_node_and_closes_it_ends_well(
    embedded: str, tmp_path: Path, order: str, another_thread: bool, quiet_ms: int
) -> None:
    with DataSource([1, 2, 3], embedded, source_id="a", topic="dst") as source:
        for _ in range(3):
            next(source)
    done: list[int] = []
    closing: list[threading.Thread] = []

    def close() -> None:
        if another_thread:
            closing.append(threading.Thread(target=sink.close))
            closing[-1].start()
            assert sink._control.closing.wait(20)
        else:
            sink.close()

    def take(number: int) -> None:
        if number == 1:
            if order.startswith("closes"):
                close()
            next(sink)
            if order.startswith("steps"):
                close()
        done.append(number)

    sink = Materialize(take, embedded, log_path=tmp_path, retries=0, on_error="raise")
    next(sink)
    for thread in closing:
        thread.join(20)
    assert done == [2, 1]
    with pytest.raises(ClosedError):
        next(sink)
    assert len((tmp_path / "dst.destination").read_text().splitlines()) == 2
    rest: list[int] = []
    with Materialize(rest.append, embedded, timeout_ms=quiet_ms) as other, pytest.raises(ReceiveTimeout):
        while True:
            next(other)
    assert rest == [3]


def test_a_node_that_is_closed_while_it_opens_opens_first(node: str) -> None:
    opening, go_on = threading.Event(), threading.Event()
    calls: list[str] = []

    class Slow:
        def setup(self) -> None:
            opening.set()
            assert go_on.wait(20)
            calls.append("setup")

        def __call__(self, value: int) -> None:
            calls.append("call")

        def close(self) -> None:
            calls.append("close")

    sink = Materialize(Slow(), node)
    opener = threading.Thread(target=sink.__enter__)
    opener.start()
    assert opening.wait(20)
    closer = threading.Thread(target=sink.close)
    closer.start()
    assert sink._control.closing.wait(20)
    closer.join(0.1)  # long enough to do harm
    go_on.set()
    opener.join(20)
    closer.join(20)
    assert calls == ["setup", "close"]
    with pytest.raises(ClosedError):
        next(sink)


def test_a_sink_may_close_itself(node: str, send: Send) -> None:
    send("a", range(5), topic="dst")
    seen: list[int] = []

    def final(x: int) -> None:
        seen.append(x)
        if x == 2:
            sink.close()

    sink = Materialize(final, node)
    sink.run()
    with Materialize(lambda x: x, node) as other:
        assert next(other) == 3
    assert seen == [0, 1, 2]


def test_a_claim_that_expired_is_another_member_s_and_results_stay_single(node: str, send: Send, results: Results) -> None:
    in_hand, go_on = threading.Event(), threading.Event()

    def slow(a: int) -> int:
        in_hand.set()
        assert go_on.wait(20)
        return a

    send("a", [1])
    with Compute(slow, node, worker_id="w", ack_timeout_ms=50) as one, Compute(lambda a: a, node, worker_id="w", timeout_ms=20_000) as two:
        thread = threading.Thread(target=next, args=(one,))
        thread.start()
        assert in_hand.wait(10)
        assert next(two) == 1
        go_on.set()
        thread.join(10)
        assert one.counters["duplicate"] == 1
    assert results() == [1]


def test_the_end_passes_through_replicas(node: str) -> None:
    found: list[int] = []
    workers = [Compute(lambda a: a, node, worker_id=f"w{i}", output_id="w") for i in range(2)]
    sink = Materialize(found.append, node)
    with workers[0], workers[1], sink:
        threads = [threading.Thread(target=n.run, kwargs={"until": "end"}) for n in (*workers, sink)]
        for thread in threads:
            thread.start()
        with DataSource(range(3000), node, source_id="a") as source:
            source.run()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    assert sorted(found) == list(range(3000))


@pytest.mark.parametrize("join", ["latest", "exact"])
def test_a_source_that_starts_over_changes_no_set(node: str, results: Results, join: str, quiet_ms: int) -> None:
    options: dict[str, Any] = {"message_id": lambda i: i, "event_time": lambda i: i}
    for _ in range(3):
        for name in "ab":
            with DataSource(range(20), node, source_id=name, **options) as source:
                for _ in range(20):
                    next(source)
        with Compute(lambda a, b: (a, b), node, join=join, timeout_ms=quiet_ms) as compute, pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
    assert results() == ([(i, i) for i in range(20)] if join == "exact" else [(19, b) for b in range(20)])


def test_a_repeat_with_a_new_arrival_time_does_not_become_the_latest(node: str, results: Results, quiet_ms: int) -> None:
    """A join that was restarted must not take the repeat of a message that it has used for the message that it holds."""
    for name, items in (("a", [1, 2]), ("b", [5])):
        with DataSource(items, node, source_id=name, message_id=lambda i: i) as source:
            for _ in items:
                next(source)
    for more in ([], [1], []):
        if more:
            with DataSource([*more], node, source_id="a", message_id=lambda i: i) as source:
                next(source)
            with DataSource([6], node, source_id="b", message_id=lambda i: i) as source:
                next(source)
        with Compute(lambda a, b: (a, b), node, timeout_ms=quiet_ms) as compute, pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
    assert results() == [(2, 5), (2, 6)]


def test_overflow_is_counted_or_raised(node: str, send: Send, quiet_ms: int) -> None:
    send("a", range(10), event_time=lambda i: i)
    with Compute(lambda a, b: a, node, join="exact", max_held=4, timeout_ms=quiet_ms) as compute:
        with pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
        assert compute.counters["overflow"] == 6
    from edgeserve.core.errors import JoinOverflow

    with Compute(lambda a, b: a, node, join="exact", group="strict", max_held=4, overflow="error") as compute:
        assert [next(compute) for _ in range(4)] == [None] * 4
        for _ in range(2):  # and nothing is dropped by asking again
            with pytest.raises(JoinOverflow):
                next(compute)


def test_policies_of_one_s_own(node: str, send: Send) -> None:
    from functools import partial

    from edgeserve.align import Exact

    for name in "ab":
        send(name, [1, 2], key=lambda i: f"k{i}")
    for join in (Exact(["a", "b"], on="key"), partial(Exact, on="key")):
        with Compute(lambda a, b: (a, b), node, join=join, group=str(type(join))) as compute:
            assert [next(compute) for _ in range(4)] == [None, None, (1, 1), (2, 2)]


def test_run_waits_for_room_to_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"local://{tmp_path / 'store'}"
    with DataSource(range(5), url, source_id="a", topic="t") as source:
        list(source)
    claim, failures = Place._claim, [DiskFull("no space left")]

    def full_at_first(self: Place, *args: Any) -> Any:
        if failures:
            raise failures.pop()
        return claim(self, *args)

    monkeypatch.setattr(Place, "_claim", full_at_first)
    got: list[int] = []
    with Materialize(got.append, url, topic="t") as sink:
        sink.run(until="end")
    assert got == list(range(5))


def test_what_a_sink_did_but_could_not_settle_is_not_done_again_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"local://{tmp_path / 'store'}"
    with DataSource(range(3), url, source_id="a", topic="t") as source:
        list(source)
    done: list[int] = []
    settle, full = LogSubscription.settle, threading.Event()

    def without_room(self: LogSubscription, *args: Any, **rest: Any) -> None:
        if full.is_set():
            raise StoreFull("full")
        settle(self, *args, **rest)

    monkeypatch.setattr(LogSubscription, "settle", without_room)
    first = Materialize(done.append, url, topic="t")
    next(first)
    other = Materialize(done.append, url, topic="t", timeout_ms=50)
    with other:
        full.set()
        next(first)
        with pytest.raises(StoreFull):
            first.close()
        full.clear()
        with pytest.raises((ReceiveTimeout, StopIteration)):
            while True:
                next(other)
    assert sorted(done) == [0, 1, 2]


def test_a_join_without_room_to_take_over_waits_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"local://{tmp_path / 'store'}"
    for name in "ab":
        with DataSource(range(5), url, source_id=name, event_time=lambda i: i) as source:
            list(source)
    fence, failures = LogEngine.fence, [DiskFull("no space left")] * 2
    first = Compute(lambda a, b: (a, b), url, join="exact")
    first.__enter__()
    stand_by = Compute(lambda a, b: (a, b), url, join="exact")
    stand_by.__enter__()

    def full_at_first(self: LogEngine, *args: Any) -> Any:
        if failures:
            raise failures.pop()
        return fence(self, *args)

    monkeypatch.setattr(LogEngine, "fence", full_at_first)
    first.close()
    stand_by.run(until="end")
    stand_by.close()
    assert not failures
    got: list[Any] = []
    with Materialize(got.append, url, topic="dst") as sink:
        sink.run(until="end")
    assert got == [(i, i) for i in range(5)]


@pytest.mark.parametrize("held_before", [False, True])
def test_a_repeat_that_nobody_had_taken_is_no_state(embedded: str, held_before: bool) -> None:
    """A holder that is killed before its first record leaves a repeat that was delivered and never held."""

    def send(name: str, *items: str) -> None:
        with DataSource(items, embedded, source_id=name, event_time=lambda v: 1, key=lambda v: "k", message_id=lambda v: v) as source:
            for _ in items:
                next(source)

    def compute() -> Compute:
        return Compute(lambda a, b: [a, b], embedded, join=partial(Exact, on="key"), timeout_ms=50)

    with compute():
        pass  # the group is there
    send("a", "a1", "a1")
    transport = connect(embedded)
    name = transport.topic_info("src").groups.popitem()[0]
    killed = transport.subscribe(["src"], name, kind=GroupKind.FAILOVER, signature="a,b")
    # It had told the group of the id, and acknowledged nothing.
    (first, position, *_), _ = killed.receive(2, 1000)
    id_ = decode_frame(first)[0].id
    fence = transport.fence(f"src.{name}.sets", "killed")
    decisions = []
    if held_before:
        body = msgspec.msgpack.encode(Record([], [], [(position, id_)]))
        decisions = [encode_frame(Header(b"d" * 16, "x", "", 0, 1, 1, "", len(body), kind=int(Kind.DECISION)), body)]
    killed.settle({}, ids=[id_], decisions=decisions, fence=fence)
    killed.close(worked_on=True)
    disconnect(transport)
    send("b", "b1")
    found = []
    with compute() as again:
        with pytest.raises(ReceiveTimeout):
            while True:
                found.append(next(again))
        assert again.counters["duplicate"] == (1 if held_before else 2)
    assert [f for f in found if f] == ([["a1", "b1"]] if held_before else [])


def test_a_takeover_that_failed_half_way_still_knows_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"local://{tmp_path / 'store'}"
    ran: list[tuple[int, int]] = []

    def task(a: int, b: int) -> tuple[int, int]:
        ran.append((a, b))
        return a, b

    def send(name: str) -> None:
        with DataSource([1], url, source_id=name, message_id=lambda i: i) as source:
            next(source)

    def steps(compute: Compute) -> None:
        with pytest.raises((ReceiveTimeout, TransportError)):
            while True:
                next(compute)

    first = Compute(task, url, timeout_ms=50)
    first.__enter__()
    other = Compute(task, url, timeout_ms=50).__enter__()
    send("a")
    send("b")
    steps(first)
    read, failures = join_stage.last_record, [TransportError("a read that failed once")]

    def failing_once(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return read(*args)

    monkeypatch.setattr(join_stage, "last_record", failing_once)
    first.close()
    with other:
        while failures:
            steps(other)
        steps(other)
        send("b")
        steps(other)
    assert ran == [(1, 1)]


def test_a_full_store_does_not_let_go_of_what_a_join_remembers(tmp_path: Path) -> None:
    url = f"local://{tmp_path / 'store'}?size_mb=2&retention_s=0.001"

    def joined(name: str, item: bytes) -> list[bytes]:
        found = []
        with Compute(lambda a, b: a + b, url, timeout_ms=200) as compute:
            with DataSource([item], url, source_id=name) as source:
                next(source)
            with pytest.raises(ReceiveTimeout):
                while True:
                    found.append(next(compute))
        return [f for f in found if f is not None]

    joined("a", b"a1")
    assert joined("b", b"b1") == [b"a1b1"]
    transport = connect(url)
    publisher = transport.publisher("other", send_window=10**9)
    slow = transport.subscribe(["other"], "slow")
    with pytest.raises(StoreFull):
        while True:
            publisher.publish([bytes(60_000)])
    slow.settle({"other": [d[1] for d in slow.receive(1000, 1000)]})
    disconnect(transport)
    assert joined("b", b"b2") == [b"a1b2"]


def test_what_latest_holds_of_a_slow_source_does_not_fill_the_store(tmp_path: Path) -> None:
    url = f"local://{tmp_path / 'store'}?size_mb=2"
    with (
        Compute(lambda a, b: len(a) + len(b), url, timeout_ms=2000) as compute,
        DataSource([bytes(9)], url, source_id="a") as slow,
        DataSource((bytes(50_000) for _ in range(200)), url, source_id="b") as fast,
    ):
        next(slow)
        next(compute)
        for _ in range(200):
            next(fast)
            assert next(compute) == 50_009
        assert compute.explain()["held"] == 2


def test_a_held_input_does_not_keep_the_batch_that_it_came_with(tmp_path: Path) -> None:
    url = f"local://{tmp_path / 'store'}"
    ran: list[bytes] = []

    def send(name: str, stamps: Sequence[int], copies: int) -> None:
        with DataSource(stamps, url, source_id=name, event_time=int, max_lateness_ms=1e9, gate=lambda n: b"%4d" % n * copies) as source:
            for _ in stamps:
                next(source)

    def work(compute: Compute) -> None:
        with pytest.raises(ReceiveTimeout):
            while True:
                next(compute)

    rare = list(range(100, 2_001, 100))
    with Compute(lambda a, b: ran.append(bytes(a[:4] + b)), url, join="exact", timeout_ms=100) as compute:
        send("a", range(1, 2_001), 2_000)
        send("b", [n for n in range(1, 2_001) if n not in rare], 1)
        tracemalloc.start()
        try:
            work(compute)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert compute.explain()["held"] == 20
        assert kept < 4_000_000  # 160 kB of inputs, which came in batches of 16 MB together
        ran.clear()
        send("b", rare, 1)
        work(compute)
        assert ran == [b"%4d%4d" % (n, n) for n in rare]


def test_a_member_learns_of_what_one_did_that_came_and_went(embedded: str, quiet_ms: int) -> None:
    # Not on a broker: what its client has fetched ahead for the one that stands still the other would not get.
    ran: list[tuple[str, int]] = []

    def compute(name: str) -> Compute:
        def task(a: int) -> None:
            ran.append((name, a))

        return Compute(task, embedded, timeout_ms=quiet_ms)

    def send(item: int) -> None:
        with DataSource([item], embedded, source_id="a", message_id=lambda i: i) as source:
            next(source)

    with compute("long") as long:
        send(1)
        next(long)
        with compute("short") as short:
            send(2)
            next(short)
        send(2)
        with pytest.raises(ReceiveTimeout):
            while True:
                next(long)
    assert ran == [("long", 1), ("short", 2)]


def test_a_derived_policy_may_release_by_itself(node: str, send: Send) -> None:
    class Pairs(Policy):
        def __init__(self, sources: Sequence[str]) -> None:
            super().__init__(sources)
            self.heads: dict[str, Member] = {}
            self.gone: list[Released] = []

        def push(self, source: str, stamp_ns: int, item: Any, key: Any = None) -> list[JoinSet]:
            self.heads[source] = Member(stamp_ns, item)
            if len(self.heads) < len(self.sources):
                return []
            members, self.heads = self.heads, {}
            self.gone += [Released(s, m.stamp_ns, m.item, "") for s, m in members.items()]
            return [JoinSet(members)]

        def advance(self, now_ns: int) -> list[JoinSet]:
            return []

        def drain(self) -> list[Released]:
            gone, self.gone = self.gone, []
            return gone

        def explain(self) -> dict[str, Any]:
            return {}

    for name in "ab":
        send(name, [1])
    with Compute(lambda a, b: (a, b), node, join=Pairs) as compute:
        assert [next(compute) for _ in range(2)] == [None, (1, 1)]
        compute.flush()
        assert compute.counters["settled"] == 2
