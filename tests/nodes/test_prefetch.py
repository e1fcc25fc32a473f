"""Payloads of other hosts come while the user's function works on what is before them, and never for what can still be superseded."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.payload.origins import BIG, MB, SERVE, TOKEN, Store, child, payload, remote_at, said
from tests.payload.test_server import path_of
from tests.relays import Relay
from tests.waiting import until

from edgeserve import Compute, Materialize
from edgeserve.cli.brokers.manage import free_port
from edgeserve.core.codec import encode_frame
from edgeserve.core.message import Header, Kind, message_id
from edgeserve.payload import Reference, lazy_schema
from edgeserve.payload.server import PayloadServer
from edgeserve.stage.deadletter import dead_letter_topic, read_dead_letter
from edgeserve.transport import Frame, connect, disconnect


@pytest.fixture(params=["nats", "pulsar"])
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "here"))
    if request.param == "pulsar":
        from tests.servers import with_namespace

        return with_namespace(request.getfixturevalue("pulsar_url"))
    return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"


nats = pytest.mark.parametrize("node", ["nats"], indirect=True)


class Elsewhere:
    """Another host, behind a relay, and messages whose payloads lie there."""

    def __init__(self, node: str, base: Path, to: int) -> None:
        self.node, self.store, self.relay = node, Store(base), Relay(to)
        self.lies: dict[str, Reference] = {}
        self._sent = 0

    def frame(self, source: str, n: int, size: int = 100_000, relay: Relay | None = None) -> Frame:
        """The nth message of a source."""
        url = (relay or self.relay).url
        reference = self.lies[f"{source}{n}"] = remote_at(url, self.store.put(payload(n, size)))
        header = self._header(source, n, lazy_schema("b"), size=size, watermark_ns=n)
        return encode_frame(header, reference.encode())

    def end(self, source: str) -> Frame:
        return encode_frame(self._header(source, 1 << 20, kind=int(Kind.END)), b"")

    def _header(self, source: str, n: int, schema: str = "", **fields: Any) -> Header:
        self._sent += 1
        id_ = message_id(source.encode().ljust(8), self._sent)
        return Header(id_, source, f"{source}-producer", self._sent, n, n, schema, **fields)

    def send(self, *frames: Frame) -> None:
        """All as one entry of the broker, so that they are received together."""
        transport = connect(self.node)
        publisher = transport.publisher("src")
        publisher.publish(frames)
        publisher.flush()
        publisher.close()
        disconnect(transport)

    def times(self, name: str) -> int:
        """How often a message's payload was asked for."""
        return sum(head.startswith(f"GET {path_of(self.lies[name])} ".encode()) for head in list(self.relay.heads))

    @property
    def asked(self) -> dict[str, int]:
        return {name: times for name in self.lies if (times := self.times(name))}


@pytest.fixture
def far(node: str, tmp_path: Path) -> Iterator[Elsewhere]:
    (tmp_path / "there").mkdir()
    with PayloadServer(tmp_path / "there", token=TOKEN) as server:
        elsewhere = Elsewhere(node, tmp_path / "there", server.port)
        yield elsewhere
        elsewhere.relay.close()


def in_thread(run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def letters(node: str, group: str) -> list[str]:
    transport = connect(node)
    try:
        return [read_dead_letter(frame).error for frame, _, _ in transport.read(dead_letter_topic("src", group))]
    finally:
        disconnect(transport)


def test_what_a_further_set_needs_comes_while_a_set_is_run(node: str, far: Elsewhere) -> None:
    """Also for a join that completes one set with each message, and holds what it is run on."""
    last, seen = 5, list[int]()

    def pair(a: bytes, b: bytes) -> int:
        n = len(seen)
        assert a == b == payload(n, 100_000)
        if n < last:
            until(lambda: far.times(f"a{n + 1}") and far.times(f"b{n + 1}"))
        seen.append(n)
        return n

    far.send(*(far.frame("a", n) for n in range(last + 1)))
    far.send(*(far.frame("b", n) for n in range(last + 1)), far.end("a"), far.end("b"))
    results: list[int] = []
    with (
        Compute(pair, node, topic_in="src", topic_out="dst", join="exact", retries=0) as compute,
        Materialize(results.append, node, topic="dst") as sink,
    ):
        compute.run(until="end")
        sink.run(until="end")
    assert seen == results == list(range(last + 1)) and not letters(node, "src->dst")
    assert far.asked == dict.fromkeys(far.lies, 1)


@nats
def test_payloads_of_one_set_come_together(node: str, far: Elsewhere) -> None:
    seen: list[tuple[bytes, ...]] = []
    far.send(*(far.frame(source, 0) for source in "abc"), *map(far.end, "abc"))
    far.relay.hold(1000)
    with Compute(lambda a, b, c: seen.append((a, b, c)), node, topic_in="src", topic_out="dst", join="exact") as compute:
        thread = in_thread(lambda: compute.run(until="end"))
        try:
            assert far.relay.held.wait(60)
            until(lambda: len(far.asked) == 3)  # one stands still, and the others are asked for
        finally:
            far.relay.go.set()
            thread.join(60)
    assert seen == [(payload(0, 100_000),) * 3] and far.asked == {"a0": 1, "b0": 1, "c0": 1}


@nats
@pytest.mark.parametrize("sink", [False, True])
def test_what_a_further_message_has_comes_while_one_is_run(node: str, far: Elsewhere, sink: bool) -> None:
    last, seen = 5, list[int]()

    def one(a: bytes) -> int:
        n = len(seen)
        assert a == payload(n, 100_000)
        if 0 < n < last:  # with the first one it is known that they lie elsewhere
            until(lambda: far.times(f"a{n + 1}"))
        seen.append(n)
        return n

    far.send(*(far.frame("a", n) for n in range(last + 1)), far.end("a"))
    if sink:
        with Materialize(one, node, topic="src", retries=0) as materialize:
            materialize.run(until="end")
    else:
        with Compute(one, node, topic_in="src", topic_out="dst", retries=0) as compute:
            compute.run(until="end")
    assert seen == list(range(last + 1)) and far.asked == dict.fromkeys(far.lies, 1)


@nats
@pytest.mark.parametrize("options", [{"backlog": "latest"}, {"min_interval_ms": 3_000}])
def test_of_what_is_superseded_nothing_is_ever_asked_for(node: str, far: Elsewhere, options: dict[str, Any]) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def pair(a: bytes, b: bytes) -> None:
        if not seen:
            # While it works, what supersedes each other comes.
            far.send(*(far.frame("a", n, 100_000 + n) for n in range(1, 6)), far.end("a"), far.end("b"))
        seen.append((a, b))

    far.send(far.frame("a", 0), far.frame("b", 0))
    with Compute(pair, node, topic_in="src", topic_out="dst", **options) as compute:
        compute.run(until="end")
    assert seen == [(payload(0, 100_000), payload(0, 100_000)), (payload(5, 100_005), payload(0, 100_000))]
    assert far.asked == {"a0": 1, "b0": 1, "a5": 1}


@nats
def test_a_set_that_waits_and_may_be_dropped_is_not_asked_for(node: str, far: Elsewhere) -> None:
    """Two wait while one is run, and newer ones come each time."""
    seen: list[bytes] = []
    news = [range(n, n + 4) for n in range(1, 33, 4)]

    def pair(a: bytes, b: bytes) -> None:
        if news:
            far.send(*(far.frame("a", n) for n in news.pop(0)), *([] if news else [far.end("a"), far.end("b")]))
        seen.append(a)

    far.send(far.frame("a", 0), far.frame("b", 0))
    options: dict[str, Any] = {"backlog": "drop_oldest", "max_backlog": 2}
    with Compute(pair, node, topic_in="src", topic_out="dst", **options) as compute:
        compute.run(until="end")
        assert compute.counters["superseded"] == 33 - len(seen) > 0
    assert far.asked == {"b0": 1} | {f"a{n}": 1 for n in range(33) if payload(n, 100_000) in seen}


@nats
def test_messages_that_wait_and_may_be_dropped_are_not_asked_for(node: str, far: Elsewhere) -> None:
    seen: list[bytes] = []

    def one(a: bytes) -> None:
        seen.append(a)
        if len(seen) == 2:
            far.send(*(far.frame("a", n) for n in range(2, 7)), far.end("a"))
            until(lambda: compute.counters["superseded"] == 4)

    far.send(far.frame("a", 0))
    with Compute(one, node, topic_in="src", topic_out="dst", backlog="latest", retries=0) as compute:
        thread = in_thread(lambda: compute.run(until="end"))
        until(lambda: len(seen) == 1)
        far.send(far.frame("a", 1))
        thread.join(60)
    assert seen == [payload(n, 100_000) for n in (0, 1, 6)] and far.asked == {"a0": 1, "a1": 1, "a6": 1}


@nats
def test_a_server_that_is_killed_while_it_sends_ahead_and_comes_back(node: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    port, seen = free_port(), list[int]()
    servers = [child(SERVE, tmp_path / "there", port, TOKEN)]
    assert said(servers[0]) == str(port)
    far, slow = Elsewhere(node, tmp_path / "there", port), Relay(port)
    slow.hold(MB)

    def pair(a: bytes, b: bytes) -> None:
        assert a == payload(len(seen), BIG)
        if not seen:
            assert slow.held.wait(60)
            servers[0].kill()
            servers[0].wait()
            servers.append(child(SERVE, tmp_path / "there", port, TOKEN))
            assert said(servers[1]) == str(port)
            slow.go.set()
        seen.append(len(seen))

    try:
        frames = [far.frame("a", 0, BIG), far.frame("a", 1, BIG, slow), far.frame("b", 0), far.frame("b", 1)]
        far.send(*frames, far.end("a"), far.end("b"))
        with Compute(pair, node, topic_in="src", topic_out="dst", join="exact", retries=0) as compute:
            compute.run(until="end")
        assert seen == [0, 1] and not letters(node, "src->dst")
        first, second = slow.heads
        assert b"Range:" not in first and b"Range: bytes=" in second
    finally:
        slow.close()
        far.relay.close()
        for server in servers:
            with server:
                server.kill()
