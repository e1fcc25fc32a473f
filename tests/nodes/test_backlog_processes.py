"""A slow sink with each policy beside a quick one in another group: processes, and files that plain functions write."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeserve import DataSource, Materialize

COUNT, WINDOW = 600, 50
cx = mp.get_context("spawn")


@pytest.fixture(params=["local", "nats"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return f"local://{tmp_path}/store"
    return f"{request.getfixturevalue('nats_url')}/{uuid.uuid4().hex}"


def numbers(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def sink(node: str, folder: Path, name: str, options: dict[str, Any], ready: Any) -> None:
    os.dup2(os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT, 0o600), 2)

    def function(value: bytes) -> None:
        if name == "slow":
            time.sleep(0.003)
        with (folder / name).open("a") as file:
            file.write(f"{int(value[:8])}\n")

    with Materialize(function, node, topic="in", group=name, **options) as materialize:
        ready.set()
        materialize.run(until="end")


def source(node: str, folder: Path) -> None:
    def stream() -> Iterator[bytes]:
        lead = 0
        for n in range(COUNT):
            lead = max(lead, n - len(numbers(folder / "slow")))
            yield b"%08d" % n + bytes(10_000)
        (folder / "lead").write_text(f"{lead}\n")

    with DataSource(stream(), node, source_id="a", topic="in", send_window=WINDOW) as ds:
        ds.run()


@pytest.mark.parametrize(
    "options", [{"backlog": "block"}, {"backlog": "drop_oldest", "max_backlog": 10}, {"backlog": "latest"}], ids=lambda o: o["backlog"]
)
def test_a_slow_sink_slows_or_sheds_and_the_others_go_on(node: str, tmp_path: Path, options: dict[str, Any]) -> None:
    ready = cx.Event(), cx.Event()
    processes = [
        cx.Process(target=sink, args=(node, tmp_path, "slow", options, ready[0])),
        cx.Process(target=sink, args=(node, tmp_path, "quick", {}, ready[1])),
        cx.Process(target=source, args=(node, tmp_path)),
    ]
    for process in processes[:2]:
        process.start()
    assert all(each.wait(60) for each in ready)
    processes[2].start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    slow, (lead,) = numbers(tmp_path / "slow"), numbers(tmp_path / "lead")
    assert numbers(tmp_path / "quick") == [*range(COUNT)]
    command = [sys.executable, "-c", "from edgeserve.cli.app import main; main()", "groups", "in", "--node", node, "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    dropped = {each["group"]: each["dropped"] for each in shown}
    if options["backlog"] == "block":
        assert slow == [*range(COUNT)] and dropped == {"slow": {}, "quick": {}}
        # The window, what is gathered in one batch, and on a broker what is settled and not told yet.
        assert lead < COUNT * 0.4
    else:
        reason = "overflow" if options["backlog"] == "drop_oldest" else "superseded"
        assert slow == sorted({*slow}) and slow[-1] == COUNT - 1
        assert dropped == {"slow": {reason: COUNT - len(slow)}, "quick": {}}
        assert lead > COUNT * 0.5  # it was not held back
        assert f"dropped {COUNT - len(slow)} messages: {reason} {COUNT - len(slow)} (of 'a')" in (tmp_path / "slow.log").read_text()
