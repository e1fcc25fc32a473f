"""The three promised snippets, and what a step is."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.nodes.conftest import drain
from tests.waiting import until

import edgeserve
from edgeserve import Compute, DataSource, Materialize
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ClosedError, ConfigurationError, ReceiveTimeout, UnsupportedType
from edgeserve.core.message import WATERMARK_END, Kind, TimeKind
from edgeserve.stage import unseen
from edgeserve.transport import Transport


def test_snippets_with_one_source(node: str) -> None:
    def stream() -> Iterator[bytes]:
        yield b"example"

    def task(data1: bytes) -> bytes:
        return data1 + b" seen"

    seen: list[bytes] = []

    def final_process(result: bytes) -> int:
        seen.append(result)
        return len(result)

    with DataSource(stream(), node, source_id="data1", topic="topic_in") as ds:
        assert next(ds) == b"example"
        with pytest.raises(StopIteration):
            next(ds)
    with Compute(task, node, worker_id="worker1", topic_in="topic_in", topic_out="topic_out") as compute:
        assert next(compute) == b"example seen"
    with Materialize(final_process, node, topic="topic_out") as materialize:
        assert next(materialize) == 12
    assert seen == [b"example seen"]


def test_snippets_with_four_sources(node: str) -> None:
    def task(data1: int, data2: int, data3: int, data4: int) -> int:
        return 1000 * data1 + 100 * data2 + 10 * data3 + data4

    for number in range(1, 5):
        with DataSource(iter([number]), node, source_id=f"data{number}", topic="topic_in") as ds:
            next(ds)
    with Compute(task, node, worker_id="worker1", topic_in="topic_in", topic_out="topic_out") as compute:
        assert [next(compute) for _ in range(4)] == [None, None, None, 1234]
    with Materialize(lambda result: result, node, topic="topic_out") as materialize:
        assert next(materialize) == 1234


def test_a_text_is_a_stream_of_its_characters(node: str, caplog: pytest.LogCaptureFixture) -> None:
    with DataSource("ab", node, source_id="data", topic="in", gate=str.encode) as ds:
        assert [next(ds), next(ds)] == [b"a", b"b"]
    assert "each of its characters is a message" in caplog.text


def test_four_sources_until_the_end(node: str) -> None:
    def task(data1: int, data2: int, data3: int, data4: int) -> tuple[int, ...]:
        return data1, data2, data3, data4

    for number in range(1, 5):
        with DataSource(range(50), node, source_id=f"data{number}", topic="in", event_time=lambda i: i * 10**6) as ds:
            ds.run()
    with Compute(task, node, join="exact", topic_in="in", topic_out="out") as compute:
        compute.run(until="end")
    found: list[Any] = []
    with Materialize(found.append, node, topic="out") as materialize:
        materialize.run(until="end")
    assert sorted(found) == [(i, i, i, i) for i in range(50)]


def test_next_of_a_source_returns_what_was_sent(node: str) -> None:
    with DataSource([1, None, 2, 3], node, source_id="s", gate=lambda i: None if i == 2 else b"%d" % i) as ds:
        assert [next(ds) for _ in range(4)] == [b"1", None, None, b"3"]
        ds.flush()
        assert ds.counters == {"sent": 2, "gate": 1}


def test_gates_map_and_drop(node: str, send: Callable[..., None], results: Callable[..., list[Any]]) -> None:
    send("a", [b"1", b"2", b"3", b"4"])
    options = {"gate_in": lambda raw: None if raw == b"2" else int(raw), "gate_out": lambda i: None if i == 30 else b"%d" % i}
    with Compute(lambda a: a * 10, node, **options) as compute:
        assert [next(compute) for _ in range(4)] == [b"10", None, None, b"40"]
        assert compute.counters["gate"] == 2
    with Materialize(lambda x: x, node, gate=lambda raw: None if raw == b"10" else raw.decode()) as sink:
        assert [next(sink), next(sink)] == [None, "40"]
        assert sink.counters["gate"] == 1


def test_a_join_with_gates_drops_before_it_joins(node: str, send: Callable[..., None]) -> None:
    send("a", [b"x", b"1"])
    send("b", [b"2"])
    with Compute(lambda a, b: a + b, node, gate_in=lambda raw: int(raw) if raw.isdigit() else None) as compute:
        assert [next(compute) for _ in range(3)] == [None, None, 3]
        assert compute.counters["gate"] == 1


@pytest.mark.parametrize("result", [0, b"", "", False, 0.0, [], {}])
def test_falsy_results_are_results(node: str, send: Callable[..., None], results: Callable[..., list[Any]], result: object) -> None:
    send("a", [1])
    with Compute(lambda a: result, node) as compute:
        assert next(compute) == result
        assert compute.counters["sent"] == 1
    assert results() == [result]


def test_none_is_no_result(node: str, send: Callable[..., None], results: Callable[..., list[Any]]) -> None:
    send("a", [1, 2])
    with Compute(lambda a: None if a == 1 else a, node) as compute:
        assert [next(compute), next(compute)] == [None, 2]
    assert results() == [2]


def test_generators_give_several_results(node: str, send: Callable[..., None], results: Callable[..., list[Any]]) -> None:
    def task(a: int) -> Iterator[int]:
        yield from range(a)

    send("a", [3, 0])
    with Compute(task, node) as compute:
        assert next(compute) == [0, 1, 2]
        assert next(compute) == []
    assert results() == [0, 1, 2]


def test_a_list_is_one_result(node: str, send: Callable[..., None], results: Callable[..., list[Any]]) -> None:
    send("a", [1])
    with Compute(lambda a: [a, a], node) as compute:
        next(compute)
    assert results() == [[1, 1]]


def test_async_tasks_and_async_generators(node: str, send: Callable[..., None], results: Callable[..., list[Any]]) -> None:
    async def task(a: int) -> int:
        await asyncio.sleep(0)
        return a + edgeserve.context().keys["a"]

    async def several(worker1: int) -> AsyncIterator[int]:
        yield worker1
        yield -worker1

    send("a", [1], key=lambda _: 41)
    with Compute(task, node) as compute:
        assert next(compute) == 42
    with Compute(several, node, topic_in="dst", topic_out="pairs") as compute:
        assert next(compute) == [42, -42]
    assert results("pairs") == [42, -42]


def test_objects_are_set_up_and_closed(node: str, send: Callable[..., None]) -> None:
    class Model:
        def __init__(self) -> None:
            self.events: list[str] = []

        def setup(self) -> None:
            self.events.append("setup")

        def __call__(self, a: int) -> int:
            self.events.append("call")
            return a

        def close(self) -> None:
            self.events.append("close")

    send("a", [1])
    model = Model()
    with Compute(model, node) as compute:
        assert model.events == ["setup"]
        assert next(compute) == 1
    assert model.events == ["setup", "call", "close"]


@pytest.mark.parametrize("tasks", [lambda a: {"task": a}, lambda a: {"fuse": [a, lambda a: a]}], ids=["alone", "fused"])
def test_what_could_not_be_set_up_is_set_up_by_the_next_call(node: str, send: Callable[..., None], tasks: Callable[..., Any]) -> None:
    class Model:
        ready = False
        tries = closed = 0

        async def setup(self) -> None:
            self.tries += 1
            if self.tries == 1:
                raise OSError("no model there yet")
            self.ready = True

        def __call__(self, a: int) -> int:
            assert self.ready
            return a

        def close(self) -> None:
            self.closed += 1

    send("a", [1])
    model = Model()
    compute = Compute(node=node, **tasks(model))
    with pytest.raises(OSError, match="no model there yet"):
        next(compute)
    assert next(compute) == 1
    compute.close()
    assert (model.tries, model.closed) == (2, 1)


@dataclass
class Tick:
    price: float
    volume: int = 1


def test_annotations_pick_the_type(node: str, send: Callable[..., None]) -> None:
    def task(tick: Tick) -> float:
        return tick.price * tick.volume

    send("tick", [{"price": 2.5, "unknown": True}])
    with Compute(task, node) as compute:
        assert next(compute) == 2.5


def test_large_arrays_arrive_whole(node: str, results: Callable[..., list[Any]]) -> None:
    array = np.zeros((300, 1000))
    buffer = np.zeros_like(array)

    def frames() -> Iterator[Any]:
        for number in range(3):
            array[:] = number  # the stream's own buffer, used again for each item
            yield array

    def task(camera: Any) -> Any:
        buffer[:] = camera * 10
        return buffer

    with DataSource(frames(), node, source_id="camera") as source:
        source.run()
    with Compute(task, node) as compute:
        compute.run(until="end")
    assert [(float(a.min()), float(a.max())) for a in results()] == [(0, 0), (10, 10), (20, 20)]


def test_async_sources(node: str, results: Callable[..., list[Any]]) -> None:
    async def stream() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0)
            yield number

    with DataSource(stream(), node, source_id="a", topic="dst") as source:
        assert list(source) == [0, 1, 2]
    assert results() == [0, 1, 2]


def test_async_iteration_leaves_the_loop_free(node: str) -> None:
    async def main() -> list[Any]:
        found = []
        with Compute(lambda a: a + 1, node) as compute:
            waiting = asyncio.ensure_future(anext(compute))
            await asyncio.sleep(0)
            with DataSource([1, 2], node, source_id="a") as source:
                async for _ in source:
                    pass
            found.append(await waiting)
            async for result in compute:
                found.append(result)
                if len(found) == 2:
                    return found
        return found

    assert asyncio.run(main()) == [2, 3]


def test_a_cancelled_wait_loses_no_result(node: str, send: Callable[..., None]) -> None:
    async def main() -> Any:
        with Compute(lambda a: a, node) as compute:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(compute), 0.01)
            await asyncio.to_thread(send, "a", [7])
            return await anext(compute)

    assert asyncio.run(main()) == 7


def test_async_stream_and_async_task_in_a_running_loop(node: str) -> None:
    async def stream() -> AsyncIterator[int]:
        yield 1

    async def task(a: int) -> int:
        return a + 1

    async def main() -> Any:
        with DataSource(stream(), node, source_id="a") as source, Compute(task, node) as compute:
            next(source)
            return next(compute)

    assert asyncio.run(main()) == 2


def test_event_times_ids_and_keys_travel(node: str, transport: Transport) -> None:
    when = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)
    with DataSource([1, 2], node, source_id="a", event_time=lambda i: when, key=lambda i: f"k{i}", message_id=lambda i: i) as source:
        list(source)
    with DataSource([1], node, source_id="a", event_time=lambda i: 5, message_id=lambda i: i) as source:
        list(source)
    headers = [decode_frame(frame)[0] for frame, _, _ in transport.read("src")]
    assert headers[0].event_ns == 1767323045678901000
    assert [h.key for h in headers[:2]] == ["k1", "k2"]
    assert headers[0].id == headers[3].id != headers[1].id
    assert [h.kind for h in headers] == [Kind.DATA, Kind.DATA, Kind.END, Kind.DATA, Kind.END]
    assert headers[2].watermark_ns == WATERMARK_END
    assert headers[0].time_kind == TimeKind.DEVICE


def test_results_carry_their_inputs_times(node: str, transport: Transport) -> None:
    with DataSource([100, 300], node, source_id="a", event_time=lambda i: i, key=lambda i: "k", max_lateness_ms=0) as source:
        source.run()
    with DataSource([250], node, source_id="b", event_time=lambda i: i, key=lambda i: "k", max_lateness_ms=0) as source:
        source.run()
    with Compute(lambda a, b: a + b, node, output_id="sum") as compute:
        compute.run(until="end")
    headers = [decode_frame(frame)[0] for frame, _, _ in transport.read("dst")]
    assert [(h.source_id, h.event_ns, h.oldest_ns, h.key) for h in headers[:1]] == [("sum", 300, 250, "k")]
    assert headers[-1].kind == Kind.END


class Sends(logging.Handler):
    """Sends a source and its end as soon as a node says that it waits for this one only."""

    def __init__(self, node: str, source_id: str) -> None:
        super().__init__()
        self.node, self.source_id, self.sent = node, source_id, False

    def emit(self, record: logging.LogRecord) -> None:
        line = f"Compute 'w' waits: it runs until the end, and has received nothing of {self.source_id!r} on topic 'src' yet"
        if not self.sent and record.getMessage() == line:
            self.sent = True
            with DataSource([1], self.node, source_id=self.source_id) as source:
                source.run()


@pytest.mark.parametrize("task", [lambda b: b, lambda a, b: a + b], ids=["one", "join"])
def test_who_runs_until_the_end_says_which_source_it_has_never_seen(
    node: str, monkeypatch: pytest.MonkeyPatch, task: Callable[..., int]
) -> None:
    monkeypatch.setattr(unseen, "FIRST_S", 0)
    monkeypatch.setattr(unseen, "AGAIN_S", 0)
    with DataSource([1], node, source_id="a") as source:
        source.run()
    sends = Sends(node, "b")
    logger = logging.getLogger("edgeserve")
    logger.addHandler(sends)
    try:
        with Compute(task, node, worker_id="w") as compute:
            compute.run(until="end")
    finally:
        logger.removeHandler(sends)
    assert sends.sent


def test_the_watermark_of_a_lone_worker_is_its_input_s(node: str, transport: Transport) -> None:
    with DataSource([1000, 2000], node, source_id="a", event_time=lambda i: i * 10**6, max_lateness_ms=500) as source:
        source.run()
    with Compute(lambda a: a, node) as compute:
        compute.run(until="end")
    headers = [decode_frame(frame)[0] for frame, _, _ in transport.read("dst")]
    assert [h.watermark_ns for h in headers] == [500 * 10**6, 1500 * 10**6, WATERMARK_END]


def test_context_knows_the_inputs(node: str, send: Callable[..., None]) -> None:
    seen: list[edgeserve.TaskContext] = []

    def task(a: int, b: int) -> None:
        seen.append(edgeserve.context())

    send("a", [1], event_time=lambda _: 100, key=lambda _: "left")
    send("b", [2], event_time=lambda _: 150)
    with Compute(task, node) as compute:
        next(compute), next(compute)
    (context,) = seen
    assert context.event_times_ns == {"a": 100, "b": 150}
    assert (context.event_ns, context.missing, context.redelivered, context.keys) == (150, (), False, {"a": "left"})
    assert set(context.ids) == {"a", "b"} and len(context.join_id) == 16
    with pytest.raises(ConfigurationError, match="outside of a task"):
        edgeserve.context()


def test_timeout_is_named_and_the_node_stays_usable(node: str, send: Callable[..., None]) -> None:
    with Compute(lambda a: a, node, timeout_ms=20) as compute:
        with pytest.raises(ReceiveTimeout, match="timeout_ms=20"):
            next(compute)
        send("a", [1])
        results = list[int]()

        def comes() -> bool:
            try:
                results.append(next(compute))
            except ReceiveTimeout:  # a broker may take longer than that
                return False
            return True

        until(comes)
        assert results == [1]


def test_steps_do_not_consume_what_was_fetched_ahead(node: str, send: Callable[..., None]) -> None:
    send("a", range(10))
    with Compute(lambda a: a, node) as compute:
        assert [next(compute), next(compute)] == [0, 1]
    with Compute(lambda a: a, node, timeout_ms=5000) as compute:
        assert next(compute) == 2


def test_two_computes_share_a_group_and_other_groups_see_all(node: str, quiet_ms: int) -> None:
    with (
        Compute(lambda a: a, node, worker_id="w1", timeout_ms=quiet_ms) as one,
        Compute(lambda a: a, node, worker_id="w2", timeout_ms=quiet_ms) as two,
        DataSource(range(40), node, source_id="a") as source,
    ):
        for _ in source:
            source.flush()
        shared = [next(one), next(two)]
    with Compute(lambda a: a, node, group="other", timeout_ms=quiet_ms) as other:
        assert [next(other) for _ in range(40)] == list(range(40))
    assert len(set(shared)) == 2


def test_an_end_that_another_replica_has_met_is_not_the_last(embedded: str) -> None:
    def replica(number: int) -> Compute:
        return Compute(lambda n: n, embedded, f"w{number}", topic_in="in", topic_out="out", output_id="same", timeout_ms=0)

    first, second = (DataSource(numbers, embedded, source_id="n", topic="in") for numbers in ([0], [1, 2]))
    with first, second, replica(0) as one, replica(1) as other, Materialize(lambda n: n, embedded, topic="out") as sink:
        first.run()
        assert next(one) == 0  # and has fetched the end
        next(second), next(second)
        second.flush()
        assert next(other) == 1  # and has fetched the next, and knows of no end
        drain(one)
        assert next(other) == 2
        other.flush()
        second.run()
        drain(one)  # the second end
        sink.run(until="end")
        assert sink.counters["settled"] == 3


def test_runs_are_counted_without_their_ends(node: str) -> None:
    for name, count in (("a", 5), ("b", 3)):
        with DataSource(range(count), node, source_id=name, event_time=lambda i: i) as source:
            source.run()
            assert source.counters == {"sent": count}
        assert source.counters == {"sent": count}
    with Compute(lambda a, b: a + b, node, join="exact", topic_out="pairs") as compute:
        compute.run(until="end")
        assert compute.counters == {"received": 8, "settled": 8, "sent": 3, "unmatched": 2}
    with Materialize(repr, node, topic="pairs") as sink:
        sink.run(until="end")
        assert sink.counters == {"received": 3, "settled": 3, "sent": 0}
    with DataSource(range(5), node, source_id="a", topic="alone") as source:
        source.run()
    with Compute(lambda a: a, node, topic_in="alone") as compute:
        compute.run(until="end")
        assert compute.counters == {"received": 5, "settled": 5, "sent": 5}


def test_a_source_whose_stream_ends_under_next_counts_no_end(node: str) -> None:
    with DataSource([1, 2], node, source_id="a") as source:
        assert list(source) == [1, 2]
        source.flush()
        assert source.counters == {"sent": 2}


@pytest.mark.parametrize("parameters", [1, 2])
def test_control_messages_of_others_are_settled_and_not_counted(
    node: str, send: Callable[..., None], parameters: int, quiet_ms: int
) -> None:
    send("a", [1, 2])
    with DataSource([], node, source_id="stranger") as stranger:
        stranger.run()
    if parameters == 2:
        send("b", [3])
    tasks: list[Callable[..., Any]] = [lambda a: a, lambda a, b: a + b]
    with Compute(tasks[parameters - 1], node, timeout_ms=quiet_ms, no_overlap=parameters == 2) as compute:
        with pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
        compute.flush()
        assert compute.counters["received"] == (2 if parameters == 1 else 3)
        assert compute.counters["settled"] == (2 if parameters == 1 else 3)


def test_what_was_only_fetched_ahead_does_not_count_as_received(node: str, send: Callable[..., None]) -> None:
    send("a", range(10))
    with Compute(lambda a: a, node) as compute:
        next(compute)
        next(compute)
        assert compute.counters["received"] == 2


def test_use_after_close_is_named(node: str) -> None:
    source = DataSource([1], node, source_id="a")
    source.close()
    with pytest.raises(ClosedError, match="after it was closed"):
        next(source)
    source.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DataSource([1], source_id="a"), "needs the URL of a node"),
        (lambda: DataSource([1], "memory://x", pulsar_node="memory://y", source_id="a"), "got both"),
        (lambda: Compute(lambda a: a, "memory://x", topic_in="i" * 160, topic_out="o" * 160), "give it a group="),
        (lambda: DataSource(5, "memory://x", source_id="a"), "must be an iterable"),
        (lambda: DataSource([1], "memory://x", source_id=""), "non-empty"),
        (lambda: DataSource([1], "memory://x", source_id="a", event_time="t"), "event_time= is a function"),
        (lambda: DataSource([1], "memory://x", source_id="a", key=7), "key= is a function"),
        (lambda: DataSource([1], "memory://x", source_id="a", max_lateness_ms="a"), "max_lateness_ms"),
        (lambda: DataSource([1], "memory://x", source_id="a", send_window=1.5), "send_window"),
        (lambda: next(DataSource([1], "memory://x", source_id="a", topic="\ud800")), "a topic must be"),
        (lambda: next(DataSource([1], "memory://x", source_id="a", message_id=lambda i: None)), "message_id of source 'a' returned None"),
        (lambda: next(DataSource([1], "memory://x", source_id="a", message_id=lambda i: "\ud800")), "not valid Unicode"),
        (lambda: DataSource([1], "memory://x", source_id="a", log_path=5), "log_path=5: it is the path of a directory"),
        (lambda: DataSource([1], "memory://x", source_id="a", log_path=b"/tmp"), "log_path=b'/tmp'"),
        (lambda: DataSource([1], "memory://x", source_id="a", log_path=".", log_filename=5), "log_filename=5"),
        (lambda: Compute(lambda a: 1, "memory://x", log_path=5), "log_path=5"),
        (lambda: Materialize(print, "memory://x", log_path=5), "log_path=5"),
        (lambda: Compute(lambda a: 1, "memory://x", gate_in=b""), "gate_in= is a function"),
        (lambda: Compute(lambda a: 1, "memory://x", topic_in="t", topic_out="t"), "own results"),
        (lambda: Materialize(lambda: 1, "memory://x"), "called with one value"),
        (lambda: Materialize(print, "memory://x", gate="g"), "gate= is a function"),
        (lambda: Compute(5, "memory://x"), "callable"),
        (lambda: Compute(lambda: 1, "memory://x"), "no parameters"),
        (lambda: Compute(lambda *a: 1, "memory://x"), "names no source"),
        (lambda: Compute(lambda a: 1, "memory://x", join="nearest"), "nearest"),
        (lambda: Compute(lambda a: 1, "memory://x", join="exact"), "takes those of one, 'a': leave join out"),
        (lambda: DataSource([1], "memory://x", source_id="a\0b"), "the character NUL"),
        (lambda: Compute(lambda a: 1, "memory://x", retries=-1), "retries"),
        (lambda: Materialize(print, "memory://x", on_error="explode"), "on_error"),
        (lambda: Materialize(print, "memory://x").run(until="tomorrow"), "until"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make()


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        *[("retries", value) for value in (None, 1.5, True, "1", -1)],
        *[(name, value) for name in ("retry_backoff_ms", "max_time_diff_ms", "min_interval_ms") for value in ("1", None, -1, float("nan"))],
        *[(name, value) for name in ("timeout_ms", "drop_if_older_than_ms", "ack_timeout_ms") for value in ("1", -1, True)],
        ("ack_timeout_ms", 0),
        *[(name, value) for name in ("topic_in", "topic_out") for value in ("", None, 5)],
        *[("group", 5), ("group", ""), ("worker_id", 5), ("output_id", ""), ("no_overlap", "yes"), ("log_verbose", 1), ("join", None)],
        *[("max_held", value) for value in ("1", 0, None, True)],
        *[("overflow", "drop"), ("on_error", True), ("start", "now"), ("start", True)],
    ],
)
@pytest.mark.parametrize("task", [lambda a: a, lambda a, b: a], ids=["one", "two"])
def test_a_keyword_is_refused_by_name_value_and_what_it_takes(task: Callable[..., Any], keyword: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"^Compute: {keyword}={value!r}: it is "):
        Compute(task, "memory://x", **{keyword: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Materialize(print, "memory://x", group=None),  # type: ignore[arg-type]
        lambda: Materialize(print, "memory://x", topic=5),  # type: ignore[arg-type]
        lambda: Materialize(print, "memory://x", retries="3"),  # type: ignore[arg-type]
        lambda: DataSource([1], "memory://x", source_id="a", topic=None),  # type: ignore[arg-type]
        lambda: DataSource([1], "memory://x", source_id="a", send_window=True),
    ],
)
def test_the_other_nodes_refuse_theirs_too(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError, match=r"=.*: it is "):
        make()


def test_the_prototype_s_name_for_the_node_works() -> None:
    with DataSource([1], pulsar_node="memory://alias", source_id="a") as source:
        assert next(source) == 1


def test_naive_datetimes_and_unsendable_values_are_named(node: str) -> None:
    with DataSource([1], node, source_id="a", event_time=lambda _: dt.datetime(2026, 1, 1)) as source:  # noqa: DTZ001
        with pytest.raises(ConfigurationError, match="time zone"):
            next(source)
    with DataSource([0, object(), 1, lambda: 0], node, source_id="a") as source:
        for number, kind in ((1, "object"), (2, "function")):
            assert next(source) == number - 1
            named = rf"DataSource 'a', message {number + 1}: a value of type {kind} cannot be sent\. .* give gate="
            with pytest.raises(UnsupportedType, match=named):
                next(source)


@pytest.mark.parametrize("number", [2**70, -(2**70), 2**63, -(2**63) - 1, 10**5000], ids=lambda n: f"{n.bit_length()} bits")
def test_an_event_time_beyond_64_bits_is_refused_and_leaves_no_trace(node: str, transport: Transport, number: int) -> None:
    shown = str(number) if number.bit_length() < 100 else "bits"
    with DataSource([1, number, 2], node, source_id="a", event_time=lambda i: i, max_lateness_ms=0) as source:
        next(source)
        with pytest.raises(ConfigurationError, match=rf"(?s)event_time.*{shown}.*source 'a'.*nanoseconds"):
            next(source)
        assert next(source) == 2
    headers = [decode_frame(frame)[0] for frame, _, _ in transport.read("src")]
    assert [(h.sequence, h.event_ns, h.watermark_ns) for h in headers] == [(0, 1, 1), (1, 2, 2)]


@pytest.mark.parametrize("number", [2**70, 2**64, -(2**63) - 1], ids=lambda n: f"{n.bit_length()} bits")
def test_a_key_beyond_64_bits_is_refused_and_leaves_no_trace(node: str, transport: Transport, number: int) -> None:
    options = {"event_time": lambda i: 9 if i < 0 else min(i, 9), "max_lateness_ms": 0}
    with DataSource([1, number, 2], node, source_id="a", key=lambda i: i, **options) as source:
        next(source)
        with pytest.raises(ConfigurationError, match=rf"key.*{number}.*source 'a'.*str\(key\)"):
            next(source)
        assert next(source) == 2
    headers = [decode_frame(frame)[0] for frame, _, _ in transport.read("src")]
    assert [(h.sequence, h.key, h.watermark_ns) for h in headers] == [(0, 1, 1), (1, 2, 2)]


@pytest.mark.parametrize(("join", "times"), [("latest", [-7, -6, 0]), ("exact", [-(2**63), -(2**63) + 5, -7, 0, 2**63 - 1])])
def test_event_times_before_the_epoch_work(node: str, join: str, times: list[int]) -> None:
    for name in "ab":
        with DataSource(times, node, source_id=name, event_time=lambda t: t) as source:
            source.run()
    seen: list[tuple[int, ...]] = []
    with Compute(lambda a, b: seen.append((a, b, edgeserve.context().event_ns)), node, join=join) as compute:
        compute.run(until="end")
    assert seen[-1] == (times[-1],) * 3
    assert join == "latest" or seen == [(t, t, t) for t in times]
    alone: list[int] = []
    with Compute(lambda a: alone.append(edgeserve.context().event_ns), node, topic_out="alone") as compute:
        for _ in times:
            next(compute)
    assert alone == times


@pytest.mark.parametrize("as_path", [str, Path])
def test_logs_are_json_lines(node: str, tmp_path: Path, as_path: Callable[[Path], Any]) -> None:
    import json

    logs = {"log_path": as_path(tmp_path), "log_filename": "run"}
    with DataSource([b"1"], node, source_id="a", **logs) as source:
        next(source)
    with Compute(lambda a: a, node, **logs) as compute:
        next(compute)
    with Materialize(lambda x: x, node, **logs) as sink:
        next(sink)
    lines = {kind: json.loads((tmp_path / f"run.{kind}").read_text()) for kind in ("datasource", "compute", "output", "destination")}
    assert lines["datasource"]["msg_id"] == lines["compute"]["input_ids"][0] == lines["output"]["input_ids"][0]
    assert lines["destination"]["source_id"] == "worker1"
