"""routing='auto': payloads travel in the way that costs less, and whichever that is, all else is as it was. Hosts are payload directories
here, and the broker is beside all of them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
import threading
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tests.disks import fill_up
from tests.waiting import until

from edgeserve import Compute, DataSource, Materialize
from edgeserve.cli.app import root
from edgeserve.cli.brokers.manage import free_port
from edgeserve.core.codec import decode_frame
from edgeserve.core.errors import ConfigurationError
from edgeserve.payload import is_lazy, routing
from edgeserve.stage import routes
from edgeserve.stage.deadletter import dead_letter_topic, read_dead_letter
from edgeserve.transport import connect, disconnect

SIZE = 100_000
WAIT_S = 60.0
cx = mp.get_context("spawn")


def array(n: int) -> Any:
    """Different in every page."""
    return np.frombuffer(hashlib.shake_128(str(n).encode()).digest(SIZE), np.uint8)


def quickly() -> None:
    """What takes seconds takes less here."""
    routes.TICK_S, routes.SAY_S = 0.02, 0.2
    routing.HOLD_S, routing.FORGET_S = 0.1, 1.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module, name in ((routes, "TICK_S"), (routes, "SAY_S"), (routing, "HOLD_S"), (routing, "FORGET_S")):
        monkeypatch.setattr(module, name, getattr(module, name))
    quickly()
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("EDGESERVE_ADVERTISE", f"127.0.0.1:{free_port()}")


@pytest.fixture(params=["local", "nats"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return f"local://{tmp_path / 'store'}"
    return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> str:
    return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"


class Feed:
    """Examples, one for each step that is asked for; any number until it is to end."""

    def __init__(self) -> None:
        self.count, self.over = 0, False

    def __iter__(self) -> Iterator[Any]:
        while not self.over:
            yield array(self.count)
            self.count += 1


def shown(node: str, topic: str = "in") -> list[dict[str, Any]]:
    """What `edgeserve routes` tells."""
    found = CliRunner().invoke(root, ["routes", topic, "--node", node, "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    rows: list[dict[str, Any]] = json.loads(found.output)
    return rows


def ways(node: str, topic: str = "in") -> list[bool]:
    """Of each message whether its payload stayed in place."""
    transport = connect(node)
    try:
        return [is_lazy(header.schema) for frame, _, _ in transport.read(topic) if (header := decode_frame(frame)[0]).size]
    finally:
        disconnect(transport)


def digests(node: str, directory: str, group: str, out: Any) -> None:
    """A sink on the host whose payloads lie in a directory."""
    os.environ["EDGESERVE_PAYLOAD_DIR"] = directory
    quickly()

    def digest(frame: np.ndarray[Any, Any]) -> None:
        out.put((group, hashlib.sha256(frame.tobytes()).hexdigest()))

    with Materialize(digest, node, topic="in", group=group, retries=0) as sink:
        out.put((group, "open"))
        sink.run(until="end")


def test_on_one_host_payloads_stay_in_place(node: str) -> None:
    feed, taken = Feed(), list[Any]()

    def both(frame: np.ndarray[Any, Any], tick: int) -> int:
        taken.append(np.array_equal(frame, array(tick)))
        return tick

    stamps = {"event_time": lambda _: feed.count, "max_lateness_ms": 0}
    with (
        DataSource(feed, node, source_id="frame", topic="in", routing="auto", **stamps) as source,
        DataSource(range(0, 10**9, 10), node, source_id="tick", topic="in", event_time=int, max_lateness_ms=0) as ticks,
        Compute(both, node, topic_in="in", topic_out="out", group="some", join="exact") as some,
        Materialize(lambda _: None, node, topic="in", group="all") as sink,
    ):
        threads = [threading.Thread(target=each.run, kwargs={"until": "end"}) for each in (some, sink)]
        for thread in threads:
            thread.start()

        def told() -> bool:
            for _ in range(10):
                next(source)
            next(ticks)
            rows = {row["group"]: row for row in shown(node)}
            return {"all", "some"} <= rows.keys() and rows["some"]["share_used"] > 0

        until(told)
        some_row = next(row for row in shown(node) if row["group"] == "some")
        assert some_row["mode"] == "lazy"
        assert some_row["share_used"] < 0.5
        assert some_row["mean_bytes"] == SIZE
        assert some_row["why"] == "what is used is read in place, on this host"
        feed.over = True
        source.run()
        ticks._iterator = iter(())
        ticks.run()
        for thread in threads:
            thread.join(WAIT_S)
    assert taken and all(taken)
    assert all(ways(node, "in")[::11])
    # They are gone, and nothing is shown of them.
    assert shown(node) == []


def test_what_another_host_takes_from_a_broker_beside_it_is_sent_until_it_is_gone(broker: str, tmp_path: Path) -> None:
    out, feed = cx.Queue(), Feed()
    far = cx.Process(target=digests, args=(broker, str(tmp_path / "there"), "far", out))
    near = cx.Process(target=digests, args=(broker, str(tmp_path / "here"), "near", out))
    for each in (far, near):
        each.start()
    assert {out.get(timeout=WAIT_S), out.get(timeout=WAIT_S)} == {("far", "open"), ("near", "open")}
    with DataSource(feed, broker, source_id="camera", topic="in", routing="auto") as source:

        def is_now(mode: str) -> bool:
            for _ in range(5):
                next(source)
            return {row["mode"] for row in shown(broker)} == {mode}

        until(lambda: is_now("eager"))
        rows = {row["group"]: row for row in shown(broker)}
        assert rows["far"]["share_used"] == rows["near"]["share_used"] == 1
        assert rows["far"]["lazy_bytes_s"] > 0 == rows["near"]["lazy_bytes_s"] == rows["far"]["eager_bytes_s"]
        assert "fetching what is used costs" in rows["far"]["why"]
        far.kill()
        far.join()
        until(lambda: is_now("lazy"))
        next(source)
        feed.over = True
        source.run()
    near.join(WAIT_S)
    assert near.exitcode == 0
    taken = [out.get(timeout=WAIT_S) for _ in range(out.qsize())]
    # Each once and in order, whichever way it took.
    assert [seen for group, seen in taken if group == "near"] == [hashlib.sha256(array(n).tobytes()).hexdigest() for n in range(feed.count)]
    found = ways(broker)
    assert found[0] and found[-1] and not all(found)
    assert sum(a != b for a, b in pairwise(found)) == 2


def test_a_host_that_cannot_fetch_is_sent_payloads_with_their_messages(broker: str, tmp_path: Path) -> None:
    out, feed = cx.Queue(), Feed()
    far = cx.Process(target=digests, args=(broker, str(tmp_path / "there"), "far", out))
    far.start()
    assert out.get(timeout=WAIT_S) == ("far", "open")
    with DataSource(feed, broker, source_id="camera", topic="in", routing="auto") as source:
        writer = source._payloads.writer
        assert writer is not None
        writer._token = "of-another-host"

        def is_sent() -> bool:
            next(source)
            return any("could not fetch from http://127.0.0.1" in row["why"] for row in shown(broker))

        until(is_sent)
        assert {row["mode"] for row in shown(broker)} == {"eager"}
        began = feed.count + 1
        for _ in range(5):
            next(source)
        feed.over = True
        source.run()
    far.join(WAIT_S)
    assert far.exitcode == 0
    taken = [out.get(timeout=WAIT_S)[1] for _ in range(out.qsize())]
    assert taken[-5:] == [hashlib.sha256(array(n).tobytes()).hexdigest() for n in range(began, began + 5)]
    transport = connect(broker)
    letters = [read_dead_letter(frame) for frame, _, _ in transport.read(dead_letter_topic("in", "far"))]
    disconnect(transport)
    assert len(letters) == feed.count - len(taken) > 0


def test_results_go_the_way_that_costs_less(node: str) -> None:
    feed, seen = Feed(), list[Any]()
    with (
        DataSource(feed, node, source_id="a", topic="in", routing="auto") as source,
        Compute(lambda a: a[::-1].copy(), node, topic_in="in", topic_out="out", routing="auto") as task,
        Materialize(seen.append, node, topic="out") as sink,
    ):

        def told() -> bool:
            next(source), next(task), next(sink)
            return len(shown(node, "in")) == len(shown(node, "out")) == 1

        until(told)
        assert [row["source"] for row in shown(node, "out")] == ["worker1"]
        assert all(np.array_equal(frame, array(n)[::-1]) for n, frame in enumerate(seen))
        del seen[:]
    table = CliRunner().invoke(root, ["routes", "--node", node], catch_exceptions=False).output
    assert "no node with routing='auto'" in table


def test_without_an_address_for_others_payloads_go_with_their_messages(
    broker: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("EDGESERVE_ADVERTISE")
    with DataSource(Feed(), broker, source_id="a", topic="in", routing="auto") as source:
        next(source)
        assert "EDGESERVE_ADVERTISE is not set" in caplog.text
        until(lambda: shown(broker))
        (row,) = shown(broker)
        assert (row["mode"], row["group"]) == ("eager", None)
        assert "EDGESERVE_ADVERTISE is not set" in row["why"]
        table = CliRunner().invoke(root, ["routes", "--node", broker], catch_exceptions=False).output
        assert "eager" in table and "EDGESERVE_ADVERTISE" in table
    assert ways(broker) == [False]


class Paced(Feed):
    """One more for each turn."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = threading.Semaphore(0)

    def __iter__(self) -> Iterator[Any]:
        for frame in super().__iter__():
            self.turns.acquire()
            yield frame

    def more(self) -> bool:
        self.turns.release()
        return True


@pytest.mark.parametrize("full", [{"payloads"}, {"store"}, {"payloads", "store"}], ids=lambda full: " and ".join(sorted(full)))
def test_on_a_full_disk_nothing_is_lost_and_payloads_stay_in_place_again_when_there_is_room(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full: set[str]
) -> None:
    """The disk of the store, of the payloads, or of both, before the first large payload."""
    folder = {name: small_disk if name in full else tmp_path for name in ("payloads", "store")}
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(folder["payloads"] / "payloads"))
    node, feed, seen = f"local://{folder['store']}/store?retention_mb=100", Paced(), list[Any]()

    def take(frame: np.ndarray[Any, Any]) -> None:
        seen.append(np.array_equal(frame, array(len(seen))))

    with (
        DataSource(feed, node, source_id="a", topic="in", routing="auto") as source,
        Materialize(take, node, topic="in") as sink,
    ):
        ballast = fill_up(small_disk)
        threads = [threading.Thread(target=each.run, kwargs={"until": "end"}) for each in (source, sink)]
        for thread in threads:
            thread.start()
        if "payloads" in full:
            until(lambda: feed.more() and "payloads travel with their messages" in caplog.text)
        if "store" in full:
            until(lambda: feed.more() and "source 'a' waits, nothing is lost" in caplog.text)
        else:
            until(lambda: feed.more() and seen)
            assert not any(ways(node))
        ballast.unlink()
        until(lambda: feed.more() and ways(node)[-1:] == [True])
        # Those who tell each other how payloads travel have lost nothing but what they could not tell.
        until(lambda: feed.more() and any(row["share_used"] for row in shown(node)))
        feed.over = feed.more()
        for thread in threads:
            thread.join(WAIT_S)
    assert all(seen) and len(seen) == feed.count


def test_small_payloads_say_nothing_of_themselves(node: str) -> None:
    with DataSource([b"x" * 65_535], node, source_id="a", topic="in", routing="auto") as source:
        source.run()
    transport = connect(node)
    try:
        assert transport.topics() == ["in"]
    finally:
        disconnect(transport)
    assert shown(node) == []


def test_on_memory_it_changes_nothing() -> None:
    with DataSource([array(0)], f"memory://{uuid.uuid4().hex}", source_id="a", routing="auto") as source:
        assert np.array_equal(next(source), array(0))


def test_a_topic_whose_name_leaves_no_room_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="routing='auto' needs a topic beside"):
        DataSource([], "memory://", source_id="a", topic="t" * 194, routing="auto")
    with pytest.raises(ConfigurationError, match="routing='sometimes': it is 'eager', 'lazy' or 'auto'"):
        DataSource([], "memory://", source_id="a", routing="sometimes")  # type: ignore[arg-type]


def test_a_topic_takes_its_routes_along_when_it_is_deleted(node: str) -> None:
    with DataSource([array(0)], node, source_id="a", topic="in", routing="auto") as source:
        source.run()
    transport = connect(node)
    try:
        assert transport.topics() == ["in", "in.routes"]
        assert CliRunner().invoke(root, ["topic", "delete", "in", "--yes", "--node", node], catch_exceptions=False).exit_code == 0
        assert transport.topics() == []
    finally:
        disconnect(transport)


def test_a_topic_that_is_not_there_is_named(node: str) -> None:
    disconnect(connect(node))
    found = CliRunner().invoke(root, ["routes", "nowhere", "--node", node])
    assert found.exit_code == 1 and "there is no topic 'nowhere'" in found.output
