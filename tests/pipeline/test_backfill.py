"""`edgeserve backfill`: the same graph over recorded files, to the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Command

ROOT = Path(__file__).resolve().parents[2]

APP = """
from edgeserve.pipeline import Pipeline
from edgeserve.sources import CsvReplay, JsonLinesTail, time_ns

app = Pipeline("records", node="nats://nowhere:1")

def when(row):
    return int(row["t"]) * 10**9

def live():
    raise RuntimeError("there is no sensor here")

app.add_source("a", live, event_time=when)
app.add_source("b", JsonLinesTail, args={{"path": "/no/such/log", "position": "/no/such/place"}}, event_time=when)

@app.source(event_time=when, replicas=2)
def c(path="/no/such/file"):
    for line in open(path):
        yield {{"t": line, "v": "c"}}

@app.task(join="exact", replicas=2)
def add(a, b, c):
    return {{"t": int(a["t"]), "v": a["v"] + b["v"] + c["v"]}}

@app.sink()
def alarm(add):
    open("{here}/rung", "a").close()

app.add_sink("raw", print, of="a")
"""


@pytest.fixture
def app(tmp_path: Path) -> str:
    (tmp_path / "a.csv").write_text("t,v\n" + "".join(f"{t},a{t}\n" for t in range(50)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"t": t, "v": f"b{t}"}) + "\n" for t in range(10, 60)))
    (tmp_path / "c.txt").write_text("".join(f"{t}\n" for t in range(40)))
    path = tmp_path / "app.py"
    path.write_text(APP.format(here=tmp_path))
    return str(path)


IN = ("--in", "a=a.csv", "--in", "b=b.jsonl", "--in", "c=c.txt")


def rows(path: Path) -> list[Any]:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["t"])


def test_the_graph_runs_over_files_to_their_end_and_leaves_the_results_only(edgeserve: Command, app: str, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    temporary = tmp_path.parent / f"{tmp_path.name}-temporary"
    temporary.mkdir()
    result = edgeserve("backfill", app, *IN, "--out", "alarm=out.jsonl", env={"TMPDIR": str(temporary)})
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == f"written: {tmp_path}/out.jsonl"
    assert rows(tmp_path / "out.jsonl") == [{"t": t, "v": f"a{t}b{t}c"} for t in range(10, 40)]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out.jsonl"}
    assert list(temporary.iterdir()) == []


def test_results_as_parquet_and_of_several_sinks(edgeserve: Command, app: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    result = edgeserve("backfill", app, *IN, "--out", "alarm=out.parquet", "--out", "raw=raw.jsonl")
    assert result.returncode == 0, result.stdout + result.stderr
    found = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert sorted(row["t"] for row in found) == [*range(10, 40)]
    assert [row["t"] for row in map(json.loads, (tmp_path / "raw.jsonl").read_text().splitlines())] == [str(t) for t in range(50)]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((*IN, "--in", "d=a.csv", "--out", "raw=x.jsonl"), 2, "has no source 'd'"),
        ((*IN, "--out", "alrm=x.jsonl"), 2, "has no sink 'alrm'"),
        ((*IN, "--out", "alarm=x.txt"), 2, "nothing is known of how x.txt is written"),
        (("--in", "a=c.txt", "--out", "alarm=x.jsonl"), 2, "nothing is known of how c.txt is read"),
        ((*IN, "--out", "x.jsonl"), 2, "say which sink, as SINK=FILE: there is alarm, raw"),
        ((*IN, "--out", "alarm=a.csv"), 1, "a.csv is there already"),
        ((*IN, "--in", "a=a.csv", "--out", "alarm=x.jsonl"), 2, "give each name once"),
        (("--out", "alarm=x.jsonl"), 1, "failed (exit status 1)"),
    ],
)
def test_what_cannot_work_is_said(edgeserve: Command, app: str, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    result = edgeserve("backfill", app, *arguments)
    assert result.returncode == status, result.stderr
    assert said in result.stderr
    assert not (tmp_path / "rung").exists()


def test_backfill_gives_the_rows_that_streaming_gives(edgeserve: Command, tmp_path: Path) -> None:
    example = ROOT / "examples" / "network_security"
    environment = {"SPEED": "0", "OUT": str(tmp_path), "EDGESERVE_NODE": f"local://{tmp_path}/store"}
    streamed = edgeserve("run", str(example / "app.py"), "--until-end", env=environment)
    assert streamed.returncode == 0, streamed.stderr
    taps = [f"tap_{tap}={example}/data/judge/tap_{tap}.pcap.zst" for tap in "ab"]
    result = edgeserve(
        "backfill", str(example / "app.py"), "--in", taps[0], "--in", taps[1], "--out", "verdicts-again.jsonl", env=environment
    )
    assert result.returncode == 0, result.stderr
    again = [json.loads(line) for line in (tmp_path / "verdicts-again.jsonl").read_text().splitlines()]
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    alerts = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    kept = ("start_ns", "packets", "flows")
    assert len(verdicts) == 180 and len(alerts) > 0
    assert [[row[name] for name in kept] for row in again] == [[row[name] for name in kept] for row in verdicts]
    assert [alert for row in again for alert in row["alerts"]] == alerts
