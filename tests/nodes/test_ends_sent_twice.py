"""An end that is stored again further on, by a client whose connection broke or by who takes over from the one that sent it first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import pytest
from tests.nodes.conftest import fresh
from tests.waiting import until

from edgeserve import Compute, DataSource, context
from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import UnknownTopic
from edgeserve.core.message import WATERMARK_END, Header, Kind, TimeKind
from edgeserve.core.payload import encode_sized
from edgeserve.stage import direct
from edgeserve.stage.assignment import partition_group, partition_of
from edgeserve.stage.decisions import Decisions, decision_topic
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.envelope import INDEX_BITS

node = pytest.fixture(params=["local", "nats"], name="node")(fresh)


def message(source: str, producer: str, sequence: int, number: int, kind: Kind = Kind.DATA, key: int = 0) -> bytes:
    """Of a task's replica. Ends of one round have one id, whoever sends them."""
    schema, payload, size = encode_sized(b"" if kind is Kind.END else number)
    id_ = source.encode() + kind.to_bytes(1, "big") + number.to_bytes(14, "big")
    mark = WATERMARK_END if kind is Kind.END else number
    header = Header(
        *(id_, source, producer, sequence, number, 0, schema, size),
        watermark_ns=mark,
        key=key,
        kind=int(kind),
        time_kind=int(TimeKind.COMPUTED),
    )
    return bytes(encode_frame(header, payload))  # type: ignore[arg-type]  # small


def pair(a: int, b: int) -> int:
    assert a == b
    return a


def send(node: str, *messages: bytes) -> None:
    transport = connect(node)
    try:
        with closing(transport.publisher("in")) as publisher:
            for each in messages:
                publisher.publish([each])
            publisher.flush()
    finally:
        disconnect(transport)


def ends(node: str, topic: str = "out") -> list[bytes]:
    """The ids of those that are stored."""
    transport = connect(node)
    try:
        headers = [decode_frame(bytes(frame))[0] for frame, _, _ in transport.read(topic)]
    finally:
        disconnect(transport)
    return [header.id for header in headers if header.kind == Kind.END]


def test_the_end_that_who_takes_over_sends_again_ends_nothing_of_the_next_round(node: str, results: Callable[..., list[Any]]) -> None:
    def join() -> Compute:
        return Compute(pair, node, worker_id="w", output_id="pair", topic_in="in", topic_out="out", join="exact", group="g")

    def end(source: str, producer: str, sequence: int, of: int) -> bytes:
        return message(source, producer, sequence, of, Kind.END)

    send(node, message("a", "p", 1, 1), message("b", "r", 1, 1), end("a", "p", 2, 1), end("b", "r", 2, 1))
    with join() as compute:
        compute.run(until="end")
    send(node, message("b", "r", 3, 2), end("a", "q", 1, 1), message("a", "q", 2, 2), end("a", "q", 3, 2), end("b", "r", 4, 2))
    with join() as compute:
        compute.run(until="end")
    assert results(topic="out") == [1, 2]
    assert len({*ends(node)}) == 2


@pytest.mark.parametrize("parameters", [1, 2])
def test_an_end_that_is_stored_again_is_sent_on_once(node: str, parameters: int) -> None:
    def one(a: int) -> int:
        return a

    def both(a: int, b: int) -> int:
        return a + b

    names = "ab"[:parameters]

    def run() -> None:
        with Compute(one if parameters == 1 else both, node, topic_in="in", topic_out="out", group="g") as compute:
            compute.run(until="end")

    send(node, *(message(name, "p", 1, 1) for name in names), *(message(name, "p", 2, 1, Kind.END) for name in names))
    run()
    assert len(ends(node)) == 1
    send(node, *(message(name, "p", 2, 1, Kind.END) for name in names))
    run()
    assert len(ends(node)) == 1


def test_a_partition_without_messages_of_its_own_decides_nothing(node: str, results: Callable[..., list[Any]]) -> None:
    with Compute(pair, node, topic_in="in", topic_out="out", join="exact", group="g", by=True, partitions=2) as compute:
        thread = threading.Thread(target=compute.run, kwargs={"until": "end"})
        thread.start()
        for number in range(1, 20):
            send(node, *(message(source, "p", number, number, key=7) for source in "ab"))
            until(lambda number=number: compute.counters["settled"] >= 2 * number)  # type: ignore[misc]
        send(node, *(message(source, "p", 20, 1, Kind.END) for source in "ab"))
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(results(topic="out")) == list(range(1, 20))
    other = 1 - partition_of(decode_frame(message("a", "p", 1, 1, key=7))[0], 2)
    transport = connect(node)
    try:
        info = transport.topic_info(decision_topic("in", partition_group("g", other, 2)), groups=False)
        log = (info.next - info.first) >> INDEX_BITS
    except UnknownTopic:
        log = 0
    finally:
        disconnect(transport)
    # Who takes the log over writes itself down there; then who produces for each source, and the ends of both.
    assert log <= 7, log


def test_what_others_have_done_while_a_replica_stood_still_is_not_published(
    node: str, results: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they have is what the engine is made to say: two processes would have to be stopped at one line each."""
    monkeypatch.setattr(direct, "_PAUSE_NS", -1)  # two seconds would be long for a test
    done_by_others: list[bytes] = []

    def task(a: int) -> int:
        if a == 2:
            done_by_others.append(context().join_id)
        return a

    with DataSource([1, 2, 3], node, source_id="a", topic="in") as source:
        source.run()
    with Compute(task, node, topic_in="in", topic_out="out") as compute:
        subscription = compute._stage._subscription  # type: ignore[attr-defined]
        asked = subscription.settled_ids

        def settled_ids() -> list[bytes]:
            found = [*asked(), *done_by_others]
            done_by_others.clear()
            return found

        monkeypatch.setattr(subscription, "settled_ids", settled_ids)
        compute.run(until="end")
        assert compute.counters["duplicate"] == 1
    assert results(topic="out") == [1, 3]


def test_what_a_round_has_left_over_meets_nothing_of_the_next_though_its_holder_is_gone(
    node: str, results: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is there when the first holder comes, which is gone when it has told that the next round has begun."""

    def join() -> Compute:
        return Compute(pair, node, worker_id="w", output_id="pair", topic_in="in", topic_out="out", join="exact", group="g")

    def write_control(self: Decisions, acks: Any, outputs: Any, attributes: Mapping[str, bytes], *ids: Any) -> None:
        written(self, acks, outputs, attributes, *ids)
        if any("begun:" in name for name in attributes):
            patched.setattr(Decisions, "_write", lambda *_: None)  # killed
            raise InterruptedError

    written = Decisions.write_control
    ends_of_first, ends_of_second = ([message(name, "p", at, at, Kind.END) for name in "ab"] for at in (2, 5))
    send(node, message("a", "p", 1, 5), message("b", "p", 1, 3), *ends_of_first, message("b", "p", 3, 5))
    with monkeypatch.context() as patched, join() as first:
        patched.setattr(Decisions, "write_control", write_control)
        with pytest.raises(InterruptedError):
            first.run()
    send(node, *(message(name, "p", 4, 7) for name in "ab"), *ends_of_second)
    with join() as second:
        second.run(until="end")
    assert results(topic="out") == [7]
