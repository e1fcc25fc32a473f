"""`edgeserve run` on a host whose sources end early: their payloads are to be had from it for as long as somebody wants them. Hosts are
payload directories here, as in tests/nodes/test_lazy_hosts.py."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeserve import Materialize
from edgeserve.cli.brokers.manage import free_port

from .conftest import line_with, started

FRAMES = """
import numpy as np

def frames():
    for n in range(3):
        yield np.full(300_000, n, np.uint8)
"""
SOURCE = (
    FRAMES
    + "from edgeserve import DataSource\ncamera = DataSource(frames(), {node!r}, source_id='camera', topic='frames', routing='lazy')\n"
)
PIPELINE = (
    FRAMES
    + """
from edgeserve.pipeline import Pipeline

app = Pipeline("film")
app.add_source("camera", frames, routing="lazy", place="roof")
app.add_sink("show", lambda camera: print("frame", camera.min(), camera.max(), flush=True), of="camera", place="cellar")
"""
)


@pytest.fixture
def node(nats_url: str) -> str:
    return f"{nats_url}/{uuid.uuid4().hex}"


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`on("roof")`: what is started from now on is on that host."""
    addresses = {host: f"127.0.0.1:{free_port()}" for host in ("roof", "cellar")}

    def _on(host: str) -> None:
        monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / host))
        monkeypatch.setenv("EDGESERVE_ADVERTISE", addresses[host])

    return _on


def written(tmp_path: Path, text: str, node: str) -> str:
    (tmp_path / "app.py").write_text(text.format(node=node))
    return str(tmp_path / "app.py")


def join(node: str) -> Materialize:
    """A group that wants the frames, and takes none yet."""
    return Materialize(print, node, topic="frames", group="late").__enter__()


def test_a_host_stays_until_the_others_have_what_its_sources_have_sent(tmp_path, node, on):
    app = written(tmp_path, PIPELINE, node)
    on("roof")
    with started("--node", node, "--host", "roof", "--linger", "600", app) as roof:
        said = line_with(roof, "waiting until 3 payloads", "stderr")
        assert "tasks that have not begun" in said and "Ctrl-C" in said
        on("cellar")
        with started("--node", node, "--host", "cellar", app) as cellar:
            assert ["frame 0 0", "frame 1 1", "frame 2 2"] == [line_with(cellar, "frame").split("| ")[1].strip() for _ in range(3)]
            assert roof.wait(60) == 0
            cellar.terminate()
            assert cellar.wait(60) == 0
    assert not list((tmp_path / "roof").glob("*/*.payloads"))


def test_it_goes_when_nothing_is_settled_for_as_long_as_it_is_told(tmp_path, node, on):
    on("roof")
    with join(node), started("--linger", "2", "--json", written(tmp_path, SOURCE, node)) as roof:
        events = [event for line in roof.stdout if (event := json.loads(line)).get("event") == "payloads"]
        assert roof.wait(60) == 0
    assert [(event["left"], event["groups"]) for event in events] == [(3, ["late"])] * 2


def test_a_signal_ends_the_waiting(tmp_path, node, on):
    on("roof")
    with join(node), started(written(tmp_path, SOURCE, node)) as roof:
        assert "by late" in line_with(roof, "waiting until 3 payloads", "stderr")
        roof.send_signal(signal.SIGINT)
        assert roof.wait(60) == 0


def test_what_nobody_reads_is_not_waited_for(edgeserve, tmp_path, node, on):
    on("roof")
    result = edgeserve("run", written(tmp_path, SOURCE, node))
    assert (result.returncode, result.stderr) == (0, "")


def test_an_address_that_cannot_be_served_is_named(edgeserve, tmp_path, node):
    result = edgeserve("run", written(tmp_path, SOURCE, node), env={"EDGESERVE_ADVERTISE": "http://roof"})
    assert result.returncode == 1
    assert "EDGESERVE_ADVERTISE" in result.stderr and len(result.stderr.splitlines()) == 3
