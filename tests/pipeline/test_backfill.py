"""`edgeserve backfill`: the same graph over recorded files, to the end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import COMMAND, Command
from tests.waiting import until

from edgeserve.align import Latest
from edgeserve.pipeline import BadValue, Pipeline
from edgeserve.pipeline.backfill import backfill

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
    assert set(tmp_path.iterdir()) - before - {tmp_path / "__pycache__"} == {tmp_path / "out.jsonl"}
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
        (("--out", "alarm=x.jsonl"), 2, "source 'a' feeds alarm and has no file"),
        (("--live", "a", *IN[2:], "--out", "alarm=x.jsonl"), 1, "failed (exit status 1)"),
        (("--live", "a", *IN, "--out", "alarm=x.jsonl"), 2, "source 'a' feeds alarm and has a file and is live"),
        (("--live", "d", *IN, "--out", "alarm=x.jsonl"), 2, "has no source 'd'"),
        ((*IN, "--out", "raw=x.jsonl"), 2, "source 'b' is not run"),
        ((*IN, "--out", "alarm=x.jsonl", "--out", "raw=x.jsonl"), 2, "give each sink a file of its own"),
        ((*IN, "--out", "alarm=taken.jsonl"), 1, "taken.jsonl.partial is there already"),
    ],
)
def test_what_cannot_work_is_said(edgeserve: Command, app: str, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    (tmp_path / "taken.jsonl.partial").touch()
    result = edgeserve("backfill", app, *arguments)
    assert result.returncode == status, result.stderr
    assert said in result.stderr
    assert not (tmp_path / "rung").exists()


def test_what_feeds_no_sink_that_is_named_does_not_run(edgeserve: Command, app: str, tmp_path: Path) -> None:
    result = edgeserve("backfill", app, *IN[:2], "--out", "raw=raw.jsonl")
    assert result.returncode == 0, result.stderr
    assert "running 2 nodes" in result.stdout and "a (DataSource), raw (Materialize)" in result.stdout
    assert len((tmp_path / "raw.jsonl").read_text().splitlines()) == 50


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_is_interrupted_is_partial(tmp_path: Path, number: signal.Signals, status: int) -> None:
    app = tmp_path / "app.py"
    app.write_text(
        """
import itertools, time
from edgeserve.pipeline import Pipeline

app = Pipeline("endless")

@app.source()
def a():
    for i in itertools.count():
        yield i
        time.sleep(0.01)

app.add_sink("all", print, of="a")
"""
    )
    command = [COMMAND, "backfill", str(app), "--live", "a", "--out", "out.jsonl"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        partial = tmp_path / "out.jsonl.partial"
        until(lambda: partial.exists() and partial.stat().st_size > 20)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    assert "written" not in out and f"not whole: {partial}" in err.splitlines()
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"app.py", "out.jsonl.partial"}


ROWS = """
import json, time
from pathlib import Path
from edgeserve.pipeline import Pipeline

HERE = Path("{here}")
app = Pipeline("rows")

def when(row):
    return row["t"]

def count(row):
    return row["n"]

def rows(path="/no/such/file", wait=False):
    while wait and not (HERE / "a-over").exists():
        time.sleep(0.01)
    for n, line in enumerate(open(path)):
        yield {{"n": n, "t": int(line)}}
    (HERE / (Path(path).stem + "-over")).touch()

app.add_source("a", rows, event_time=when, message_id=count, max_lateness_ms=0)
app.add_source("b", rows, args={{"wait": True}}, event_time=when, message_id=count)

@app.task(join="exact", max_held=10)
def both(a: dict, b: dict) -> list:
    if a["t"] in (3, 4):
        raise ValueError("unlucky")
    return [a["t"], b["t"]]

@app.task(retries=0)
def one(b: dict) -> int:
    if b["t"] % 2:
        raise ValueError("odd")
    return b["t"]

app.add_sink("pairs", print, of="both")
app.add_sink("even", print, of="one")
"""


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """Joins a file with one that is read when that has been read to its end."""
    path = tmp_path / "app.py"
    path.write_text(ROWS.format(here=tmp_path))
    return str(path)


def numbers(path: Path, given: Iterable[int]) -> None:
    path.write_text("".join(f"{t}\n" for t in given))


def test_files_that_are_not_read_in_step_lose_nothing(edgeserve: Command, uneven: str, tmp_path: Path) -> None:
    numbers(tmp_path / "a.txt", range(10, 3_000))
    numbers(tmp_path / "b.txt", range(10, 3_000))
    result = edgeserve("backfill", uneven, "--in", "a=a.txt", "--in", "b=b.txt", "--out", "pairs=out.jsonl")
    assert result.returncode == 0, result.stderr
    assert sorted(json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()) == [[t, t] for t in range(10, 3_000)]


def test_what_is_lost_is_counted_named_and_kept(edgeserve: Command, uneven: str, tmp_path: Path) -> None:
    numbers(tmp_path / "a.txt", [5, 1, 6])
    numbers(tmp_path / "b.txt", range(7))
    result = edgeserve("backfill", uneven, "--in", "a=a.txt", "--in", "b=b.txt", "--out", "pairs=out.jsonl")
    assert result.returncode == 1, result.stderr
    assert "error: messages were lost: 1 late (both): they are older than their source's watermark" in result.stderr
    assert f"not whole: {tmp_path}/out.jsonl.partial" in result.stderr and not (tmp_path / "out.jsonl").exists()
    again = edgeserve("backfill", uneven, "--in", "b=b.txt", "--out", "even=even.jsonl")
    assert again.returncode == 1, again.stderr
    assert "error: messages were lost: 3 dead_letter (one): see the dead letters" in again.stderr
    assert f"dead letters: 3 in {tmp_path}/even.jsonl.dead-letters" in again.stderr
    letters = [json.loads(line) for line in (tmp_path / "even.jsonl.dead-letters").read_text().splitlines()]
    assert [letter["error"] for letter in letters] == ["ValueError: odd"] * 3
    assert (tmp_path / "even.jsonl.partial").read_text() == "0\n2\n4\n6\n"


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"min_interval_ms": 10}, "min_interval_ms=10 goes by the clock"),
        ({"min_interval_ms": 10, "no_overlap": True}, "min_interval_ms=10 goes by the clock"),
        ({"drop_if_older_than_ms": 5}, "drop_if_older_than_ms=5 goes by the clock"),
        ({"backlog": "latest"}, "backlog='latest' keeps what is newest"),
        ({"join": Latest(["a", "b"], min_period_ns=5)}, "the min_period_ns of its join goes by the clock"),
        ({"ftp": True}, "ftp=True takes files from elsewhere"),
    ],
)
def test_what_goes_by_the_clock_or_reaches_elsewhere_is_refused(tmp_path: Path, keywords: dict[str, Any], said: str) -> None:
    made = Pipeline("clock")
    for name in "ab":
        made.add_source(name, [1])
    made.add_task("t", lambda a, b: a, log_path=str(tmp_path / "logs"), **keywords)
    made.add_sink("out", print, of="t")
    with pytest.raises(BadValue, match=re.escape(f"task 't': {said}")):
        backfill(made, {}, {"out": tmp_path / "x.jsonl"}, live=["a", "b"])


def test_no_logs_are_written(tmp_path: Path) -> None:
    made = Pipeline("logs")
    made.add_source("a", [1], log_path=str(tmp_path / "logs"))
    made.add_sink("out", print, of="a", log_path=str(tmp_path / "logs"), log_filename="x")
    assert [each.keywords for each in backfill(made, {}, {"out": tmp_path / "x.jsonl"}, live=["a"]).declared] == [{}, {}]


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
