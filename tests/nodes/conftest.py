"""Nodes under test, on both engines of this machine."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeserve import DataSource, Materialize
from edgeserve.core.errors import ReceiveTimeout
from edgeserve.stage.deadletter import DeadLetter, read_dead_letter
from edgeserve.transport import Transport, connect, disconnect


@pytest.fixture(params=["memory", "local"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a node that nothing was sent to yet."""
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"local://{tmp_path / 'store'}"


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
def results(node: str) -> Callable[..., list[Any]]:
    """What is on a topic now."""

    def _results(topic: str = "dst") -> list[Any]:
        found: list[Any] = []
        with Materialize(found.append, node, topic=topic, group=f"look-{uuid.uuid4().hex}", timeout_ms=0) as sink:
            try:
                while True:
                    next(sink)
            except ReceiveTimeout:
                return found

    return _results


@pytest.fixture
def dead_letters(transport: Transport) -> Callable[[str], list[DeadLetter]]:
    """The dead letters of a topic."""
    return lambda topic: [read_dead_letter(frame) for frame, _, _ in transport.read(topic)]
