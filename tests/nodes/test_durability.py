"""`durability='broker'`: what is sent outlives the host that it came from. A host is its processes and its payload directory."""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeserve import Compute, DataSource, Materialize
from edgeserve.core.errors import ConfigurationError
from edgeserve.transport import connect, disconnect

SIZES = (70_000, 400_000, 7_000_000)
"""The last one is above what NATS and Pulsar take in one message."""
cx = mp.get_context("spawn")


@pytest.fixture
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "origin"))
    if request.param == "local":
        return f"local://{tmp_path}/store"
    if request.param == "nats":
        return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"
    from tests.servers import with_namespace

    return with_namespace(request.getfixturevalue("pulsar_url"))


def array(n: int) -> Any:
    """Different in every page."""
    return np.frombuffer(hashlib.shake_128(str(n).encode()).digest(SIZES[n % 3]), np.uint8)


def origin(node: str, options: dict[str, Any], ready: Any) -> None:
    """A host that sends, and whose task works on half of that; then nothing is in its hands, and it stays."""
    with (
        DataSource([array(n) for n in range(6)], node, source_id="a", topic="in", **options) as source,
        Compute(lambda a: a[::-1], node, topic_in="in", topic_out="out", **options) as compute,
    ):
        source.run()
        for _ in range(3):
            next(compute)
        compute.flush()
        ready.set()
        mp.Event().wait()


@pytest.mark.parametrize(
    ("node", "durability"), [("local", "origin"), *((engine, "broker") for engine in ("local", "nats", "pulsar"))], indirect=["node"]
)
def test_what_was_sent_outlives_its_host_or_is_gone_by_name(node: str, tmp_path: Path, durability: str) -> None:
    ready = cx.Event()
    host = cx.Process(target=origin, args=(node, {"routing": "lazy", "durability": durability}, ready))
    host.start()
    assert ready.wait(60)
    host.kill()
    host.join()
    shutil.rmtree(tmp_path / "origin", ignore_errors=True)
    seen: dict[str, list[bool]] = {"in": [], "out": []}

    def look(topic: str) -> Any:
        return lambda value: seen[topic].append(bool(np.array_equal(value, array(len(seen[topic]))[:: -1 if topic == "out" else 1])))

    gone = 0
    # The task goes on elsewhere with what the first one has not settled.
    with Compute(lambda a: a[::-1], node, topic_in="in", topic_out="out", routing="lazy", durability="broker") as compute:
        compute.run(until="end")
        gone += compute.counters["payload_gone"]
    for topic in seen:
        with Materialize(look(topic), node, topic=topic) as sink:
            sink.run(until="end")
            gone += sink.counters["payload_gone"]
    if durability == "broker":
        assert seen == {"in": [True] * 6, "out": [True] * 6} and gone == 0
    else:
        assert seen == {"in": [], "out": []} and gone == 3 + 6 + 3


def test_nothing_stays_on_the_origins_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "origin"))
    node = f"local://{tmp_path}/store"
    with DataSource([array(0)], node, source_id="a", routing="lazy", durability="broker") as source:
        assert not source.wiring.lazy  # so that no host is asked to wait until others have had it
        source.run()
    assert not (tmp_path / "origin").exists()
    transport = connect(node)
    try:
        assert transport.topic_info("src").stored_bytes > SIZES[0]
    finally:
        disconnect(transport)


@pytest.mark.parametrize("routing", ["eager", "lazy"])
def test_it_may_be_said_of_any_routing(routing: Any) -> None:
    node = f"memory://{uuid.uuid4().hex}"
    seen: list[int] = []
    with DataSource([array(1)], node, source_id="a", topic=routing, routing=routing, durability="broker") as source:
        source.run()
    with Materialize(lambda a: seen.append(len(a)), node, topic=routing) as sink:
        next(sink)
    assert seen == [SIZES[1]]


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"durability='disk'.*'origin' or 'broker'.*\?durability=disk"):
        DataSource([], "memory://n", source_id="a", durability="disk")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="durability=True"):
        Compute(lambda a: a, "memory://n", durability=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="ftp_memory=True"):
        Compute(lambda a: a, "memory://n", ftp=True, durability="broker")
    Compute(lambda a: a, "memory://n", ftp=True, ftp_memory=True, durability="broker")
