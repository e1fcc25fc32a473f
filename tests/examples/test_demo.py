"""`make demo` as a whole: four processes on `local://`, nothing lost, and the two taps better than one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import demo
import pytest
import score
import zstandard
from tests import servers

from edgeserve.transport import connect, disconnect

DEMO = [sys.executable, str(score.HERE / "demo.py")]


def _environment(process: Path) -> str:
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:
        return ""


def run(*arguments: str, home: Path, node: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)} | ({"EDGESERVE_NODE": node} if node else {})
    return subprocess.run([*DEMO, *arguments], env=environment, cwd=home, capture_output=True, text=True, timeout=100, check=False)


def test_the_demo_loses_nothing_and_shows_what_the_second_tap_is_worth(tmp_path: Path) -> None:
    result = run("--json", "--speed", "0", "--out", "kept", home=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert (report["windows_sent"], report["windows_judged"], report["lost"], report["doubled"]) == (180, 180, 0, 0)
    f1 = {view: values["f1"] for view, values in report["scores"].items()}
    assert f1["both taps"] >= 0.9
    assert all(f1["both taps"] - f1[view] >= 0.2 for view in ("tap A alone", "tap B alone"))
    assert report["latency_p99_ms"] >= report["latency_p50_ms"] > 0
    assert len(report["try_next"]) == 3
    alerts = [json.loads(line) for line in (tmp_path / "kept" / "alerts.jsonl").read_text().splitlines()]
    assert len(alerts) == report["alerts"] > 0
    assert not list(tmp_path.glob(".local")), "the demo left state behind"


@pytest.mark.parametrize("engine", ["pulsar", "nats"])
def test_the_demo_runs_over_a_broker_and_leaves_nothing_there(engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = request.getfixturevalue(f"{engine}_url")
    node = f"{url}/{uuid.uuid4().hex}" if engine == "nats" else servers.with_namespace(url)
    result = run("--json", "--speed", "0", home=tmp_path, node=node)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert (report["windows_sent"], report["windows_judged"], report["lost"], report["doubled"]) == (180, 180, 0, 0)
    assert (report["node"], report["topics_left"]) == (node, [])
    transport = connect(node)
    try:
        assert transport.topics() == []
    finally:
        disconnect(transport)


def test_what_is_to_be_kept_stays_on_the_node_and_is_named_with_the_command_that_removes_it(tmp_path: Path) -> None:
    result = run("--speed", "0", "--out", "kept", "--node", "local://", home=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    store = f"local://{tmp_path}/.local/state/edgeserve/local"
    assert f"node       {store}\n" in result.stdout
    command = next(line.strip() for line in result.stdout.splitlines() if "edgeserve topic delete alerts-" in line)
    assert command.endswith(f"--node {store}")
    transport = connect(store)
    try:
        assert set(transport.topics()) < set(shlex.split(command)) and len(transport.topics()) == 3
    finally:
        disconnect(transport)


def test_a_report_for_people_is_plain_text_when_not_on_a_terminal(tmp_path: Path) -> None:
    result = run("--speed", "60", home=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "180 of 180 windows joined and judged, 0 lost, 0 doubled" in result.stdout
    assert "tap B alone" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_window_that_is_lost_or_judged_twice_is_counted(tmp_path: Path) -> None:
    for tap, windows in (("tap_a", (1, 2, 3, 4)), ("tap_b", (1, 2, 3, 9))):
        (tmp_path / f"sent-{tap}.txt").write_text("".join(f"{window}\n" for window in windows))
    done = [{"start_ns": window, "packets": 1, "flows": 1, "handed_ns": 0, "done_ns": 5_000_000} for window in (1, 3, 3)]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(verdict) + "\n" for verdict in done) + '{"start_ns": 2, "pack')
    report = demo.measure(demo.Files(tmp_path))
    assert (report["windows_sent"], report["windows_judged"], report["lost"], report["doubled"]) == (3, 3, 1, 1)
    assert report["latency_p50_ms"] == 5


def test_own_captures_are_judged_without_a_score(tmp_path: Path) -> None:
    taps = {tap: tmp_path / f"{tap}.pcap" for tap in ("a", "b")}
    for tap, path in taps.items():
        packed = score.HERE / "data" / "train" / f"tap_{tap}.pcap.zst"
        path.write_bytes(zstandard.ZstdDecompressor().decompressobj().decompress(packed.read_bytes()))
    result = run("--json", "--speed", "0", "--tap-a", str(taps["a"]), "--tap-b", str(taps["b"]), home=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["windows_judged"] == 180
    assert report["alerts"] > 0
    assert "scores" not in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tap-a", "other.pcap"), "No such file"),
        (("--tap-a", "ng.pcap"), "editcap -F pcap"),
        (("--out", "."), "exists"),
        (("--speed", "-1"), "--speed"),
        (("--node", "memory://x"), "memory of one process"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "ng.pcap").write_bytes(b"\x0a\x0d\x0d\x0a" + bytes(40))
    result = run(*arguments, home=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [*DEMO, "--speed", "1", "--out", str(tmp_path / "kept")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    verdicts = tmp_path / "kept" / "verdicts.jsonl"
    deadline = time.monotonic() + 60
    while not verdicts.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not [process for process in Path("/proc").glob("[0-9]*") if str(tmp_path / "kept") in _environment(process)]
