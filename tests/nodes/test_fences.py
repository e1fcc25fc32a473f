"""A join lets go of what a broker's client holds for its decision log: nothing is left of one that was lost."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from tests.servers import with_namespace

from edgeserve import Compute, DataSource
from edgeserve.core.errors import ReceiveTimeout, SendError
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.driver import Done, Outlet
from edgeserve.transport.broker.engine import BrokerEngine

LOG = "src.src->dst.sets"


class _Watched(Outlet):
    """Counts those that are not closed."""

    held = 0

    def __init__(self, outlet: Outlet) -> None:
        self._outlet, self._closed = outlet, False
        _Watched.held += 1

    def send(self, data: bytes, done: Done) -> None:
        self._outlet.send(data, done)

    def close(self) -> None:
        _Watched.held -= not self._closed
        self._closed = True
        self._outlet.close()


@pytest.fixture(params=["nats", "pulsar"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "pulsar":
        return with_namespace(request.getfixturevalue("pulsar_url"))
    return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"


@pytest.fixture
def engine(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BrokerEngine]:
    engine = connect(url)  # the nodes share it
    assert isinstance(engine, BrokerEngine)
    make = engine.driver.fenced_outlet
    monkeypatch.setattr(engine.driver, "fenced_outlet", lambda topic: _Watched(make(topic)))
    monkeypatch.setattr(_Watched, "held", 0)
    yield engine
    disconnect(engine)


def test_a_log_that_was_lost_leaves_nothing_open(url: str, engine: BrokerEngine) -> None:
    with DataSource([1, 2], url, source_id="a") as source:
        source.run()
    with Compute(lambda a, b: (a, b), url, join="exact", timeout_ms=1_000) as compute:
        assert [next(compute), next(compute)] == [None, None]
        engine.fence(LOG, "somebody else").close()
        with DataSource([3], url, source_id="b") as source:
            source.run()
        with pytest.raises(ReceiveTimeout):
            while True:
                next(compute)
        assert compute.explain()["holds_the_join"] and _Watched.held == 1
        assert engine.driver.trouble() is None
    assert _Watched.held == 0


def test_a_fence_that_cannot_be_taken_leaves_nothing_open(engine: BrokerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(topic: str) -> None:
        raise SendError("not now")

    monkeypatch.setattr(engine.driver, "newest", fail)
    with pytest.raises(SendError, match="not now"):
        engine.fence(LOG, "me")
    assert _Watched.held == 0
