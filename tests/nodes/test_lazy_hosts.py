"""routing='lazy' between hosts: the message goes through the broker, the payload straight from its sender. Hosts are payload directories
here: a process with another one finds nothing in this one's memory."""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.relays import Scripted, answering
from tests.transport.children import WAIT_S
from tests.waiting import until

from edgeserve import Compute, DataSource, Materialize
from edgeserve.cli.brokers.manage import free_port
from edgeserve.payload import Serving
from edgeserve.stage.deadletter import dead_letter_topic, read_dead_letter
from edgeserve.transport import connect, disconnect

SIZE = 300_000
cx = mp.get_context("spawn")


@pytest.fixture(params=["nats", "pulsar"])
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("EDGESERVE_ADVERTISE", f"127.0.0.1:{free_port()}")
    if request.param == "pulsar":
        from tests.servers import with_namespace

        yield with_namespace(request.getfixturevalue("pulsar_url"))
    else:
        yield f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"


def array(n: int) -> Any:
    """Different in every page."""
    return np.frombuffer(hashlib.shake_128(str(n).encode()).digest(SIZE), np.uint8)


def elsewhere(node: str, directory: Path, count: int, out: Any) -> None:
    """A sink on another host."""
    os.environ["EDGESERVE_PAYLOAD_DIR"] = str(directory)
    del os.environ["EDGESERVE_ADVERTISE"]

    def check(frame: np.ndarray[Any, Any]) -> None:
        out.put(int(next(n for n in range(count) if np.array_equal(frame, array(n)))))

    with Materialize(check, node, topic="src", group="there", retries=0) as sink:
        out.put("open")
        sink.run(until="end")


def stored_bytes(node: str, topic: str) -> int:
    transport = connect(node)
    try:
        return transport.topic_info(topic).stored_bytes
    finally:
        disconnect(transport)


def test_payloads_come_straight_from_the_host_of_their_sender(node: str, tmp_path: Path) -> None:
    out = cx.Queue()
    sink = cx.Process(target=elsewhere, args=(node, tmp_path / "there", 12, out))
    sink.start()
    assert out.get(timeout=60) == "open"
    with DataSource([array(n) for n in range(12)], node, source_id="camera", routing="lazy") as source:
        source.run()
        assert [out.get(timeout=WAIT_S) for _ in range(12)] == list(range(12))
        assert stored_bytes(node, "src") < SIZE
        # They are free again when the broker says that they are settled.
        until(lambda: _used(source) == 0)
    sink.join(60)
    assert sink.exitcode == 0


def _used(source: DataSource) -> int:
    writer = source._payloads.writer
    assert writer is not None
    writer._reclaim()
    return len(writer._used)


def send_and_end(node: str, count: int) -> None:
    with DataSource([array(n) for n in range(count)], node, source_id="camera", routing="lazy") as source:
        source.run()


def test_they_are_served_when_their_sender_has_ended(node: str, tmp_path: Path) -> None:
    out = cx.Queue()
    sender = cx.Process(target=send_and_end, args=(node, 3))
    sender.start()
    sender.join(60)
    assert sender.exitcode == 0
    command = [sys.executable, "-c", "from edgeserve.cli.app import main; main()", "payloads", "serve", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert os.environ["EDGESERVE_ADVERTISE"] in server.stdout.readline()
        sink = cx.Process(target=elsewhere, args=(node, tmp_path / "there", 3, out))
        sink.start()
        assert [out.get(timeout=60) for _ in range(4)] == ["open", 0, 1, 2]
        sink.join(60)
        server.terminate()
    assert sink.exitcode == server.returncode == 0


def test_a_sender_says_what_others_cannot_have_when_it_has_ended(node: str, caplog: pytest.LogCaptureFixture) -> None:
    said = f"leaves 3 payload(s) that are not settled, and nobody on this host serves them at http://{os.environ['EDGESERVE_ADVERTISE']}"
    served = Serving()
    send_and_end(node, 3)
    assert said not in caplog.text
    served.close()
    send_and_end(node, 3)
    assert said in caplog.text


def test_what_is_not_given_is_asked_for_once(node: str, tmp_path: Path) -> None:
    out = cx.Queue()
    sender = cx.Process(target=send_and_end, args=(node, 3))
    sender.start()
    sender.join(60)
    port = int(os.environ["EDGESERVE_ADVERTISE"].partition(":")[2])
    other = Scripted(answering("302 Found", b"", None, "Location: file:///etc/passwd"), port=port)
    try:
        sink = cx.Process(target=elsewhere, args=(node, tmp_path / "there", 3, out))
        sink.start()
        sink.join(60)
    finally:
        other.close()
    assert (sender.exitcode, sink.exitcode, out.get(timeout=WAIT_S), out.empty()) == (0, 0, "open", True)
    # Not once more for the dead letter: to wait in vain would take as long again.
    assert len(other.heads) == 3
    transport = connect(node)
    letters = [read_dead_letter(frame) for frame, _, _ in transport.read(dead_letter_topic("src", "there"))]
    disconnect(transport)
    assert len(letters) == 3 and all("redirects are not followed" in letter.error for letter in letters)


def test_without_an_address_for_others_they_are_gone_by_name(
    node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("EDGESERVE_ADVERTISE")
    out = cx.Queue()
    send_and_end(node, 3)
    assert "EDGESERVE_ADVERTISE is not set" in caplog.text
    monkeypatch.setenv("EDGESERVE_ADVERTISE", "unused")
    sink = cx.Process(target=elsewhere, args=(node, tmp_path / "there", 3, out))
    sink.start()
    sink.join(60)
    assert sink.exitcode == 0
    assert out.get(timeout=WAIT_S) == "open"
    assert out.empty()
    transport = connect(node)
    letters = [read_dead_letter(frame) for frame, _, _ in transport.read(dead_letter_topic("src", "there"))]
    disconnect(transport)
    assert [letter.reason for letter in letters] == ["payload_gone"] * 3
    assert "EDGESERVE_ADVERTISE" in letters[0].error


def test_on_one_host_they_are_read_in_place(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGESERVE_ADVERTISE")
    seen: list[Any] = []
    with Materialize(seen.append, node, topic="dst") as sink, Compute(lambda a: a, node, routing="lazy") as task:
        with DataSource([array(n) for n in range(3)], node, source_id="a", routing="lazy") as source:
            source.run()
        task.run(until="end")
        sink.run(until="end")
        assert all(np.array_equal(frame, array(n)) for n, frame in enumerate(seen))
        assert not any(frame.flags.owndata or frame.flags.writeable for frame in seen)
        assert stored_bytes(node, "src") < SIZE > stored_bytes(node, "dst")
        del seen[:]
