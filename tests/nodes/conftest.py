"""Nodes under test, on both engines of this machine."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.servers import with_namespace

from edgeserve import Compute, DataSource
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ReceiveTimeout
from edgeserve.core.message import Kind
from edgeserve.core.payload import decoder_for
from edgeserve.stage.deadletter import DeadLetter, read_dead_letter
from edgeserve.transport import Transport, connect, disconnect


def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a node that nothing was sent to yet, of the engine that the fixture's parameter names."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    if request.param == "local":
        return f"local://{tmp_path / 'store'}"
    if request.param == "nats":
        return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"
    return with_namespace(request.getfixturevalue("pulsar_url"))


node = pytest.fixture(params=["memory", "local", "pulsar", "nats"], name="node")(fresh)
embedded = pytest.fixture(params=["memory", "local"], name="embedded")(fresh)


@contextlib.contextmanager
def running(*nodes: Compute) -> Iterator[list[threading.Thread]]:
    """Runs nodes until the end, each in a thread."""
    threads = [threading.Thread(target=node.run, kwargs={"until": "end"}) for node in nodes]
    for node in nodes:
        node.__enter__()
    for thread in threads:
        thread.start()
    try:
        yield threads
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        for node in nodes:
            node.close()


def drain(node: Any) -> None:
    """Steps until nothing comes; with timeout_ms=0."""
    with pytest.raises(ReceiveTimeout):
        while True:
            next(node)


def crash(compute: Compute, steps: int) -> None:
    """Steps, as long as something comes; then the member is gone without a word: what it had not settled comes again."""
    compute.__enter__()
    with contextlib.suppress(ReceiveTimeout):
        for _ in range(steps):
            next(compute)
    join = compute._stage._join  # type: ignore[attr-defined]
    join._subscription.close()
    join._holding.pending.close()


@pytest.fixture
def quiet_ms(request: pytest.FixtureRequest) -> int:
    """After so long without a message there is none: an embedded engine has it at once, a broker takes its time."""
    url: str = request.getfixturevalue("embedded" if "embedded" in request.fixturenames else "node")
    return 50 if url.startswith(("memory", "local")) else 1_000


@pytest.fixture
def transport(node: str) -> Iterator[Transport]:
    """A look behind the nodes."""
    connection = connect(node)
    yield connection
    disconnect(connection)


@pytest.fixture
def send(node: str) -> Callable[..., None]:
    """Sends items as a source: `send('a', [1, 2], topic='src')`."""

    def _send(source_id: str, items: Any, **options: Any) -> None:
        options = {"topic": "src"} | options
        with DataSource(items, node, source_id=source_id, **options) as source:
            for _ in items:
                next(source)

    return _send


@pytest.fixture
def results(transport: Transport) -> Callable[..., list[Any]]:
    """What is on a topic now."""
    decode = decoder_for()

    def _results(topic: str = "dst") -> list[Any]:
        messages = (decode_frame(frame) for frame, _, _ in transport.read(topic))
        return [decode(header.schema, payload) for header, payload in messages if header.kind == Kind.DATA]

    return _results


@pytest.fixture
def dead_letters(transport: Transport) -> Callable[[str], list[DeadLetter]]:
    """The dead letters of a topic."""
    return lambda topic: [read_dead_letter(frame) for frame, _, _ in transport.read(topic)]
