"""`edgeserve plan`, and `run` on what it has written: real files, real processes."""

from __future__ import annotations

import json
import math
import re
import signal
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.cli.conftest import Command, line_with, started

from edgeserve.pipeline import InvalidPipeline, Pipeline
from edgeserve.pipeline.assignment import Assignment, apply, read_assignment, write_assignment
from edgeserve.pipeline.costs import Costs, LinkCost, SourceCost, TaskCost, write_costs
from edgeserve.placement import Link, Node, Problem, Sink, Source, Task, evaluate, solve

APP = """
import itertools, time
from edgeserve.pipeline import Pipeline

app = Pipeline("yard", node={node!r})

def numbers():
    for i in itertools.count():
        yield i
        time.sleep(0.01)

app.add_source("frames", numbers, message_id=int, place="camera")

@app.task()
def detect(frames):
    return frames

@app.task()
def track(detect):
    return detect

@app.sink(place="cloud")
def alarm(track):
    print("got", track, flush=True)
"""

CLUSTER = """\
nodes:
  camera: {cores: 1, memory: 1 GB, speed: 0.2}
  gateway: {cores: 2, memory: 4 GB}
  cloud: {cores: 16, memory: 64 GB, speed: 2}
links:
  wifi: {ends: [camera, gateway], bandwidth: 20 Mbit/s, latency: 2 ms}
  uplink: {ends: [gateway, cloud], bandwidth: 9.6 Mbit/s, latency: 12 ms}
broker: gateway
"""


def task_cost(cpu_s: float, output_bytes: float) -> TaskCost:
    return TaskCost(cpu_s=cpu_s, cpu_s_quantiles={"0.5": cpu_s}, memory_bytes=1e8, output_bytes=output_bytes, outputs_per_run=1, runs=100)


def costs(**more: Any) -> Costs:
    given = {
        "pipeline": "yard",
        "sources": {"frames": SourceCost(rate_hz=10, bytes=80_000, messages=100)},
        "tasks": {"detect": task_cost(0.02, 2000), "track": task_cost(0.005, 300)},
    }
    return Costs(**given | more)


def by_hand() -> Problem:
    """The problem that APP, CLUSTER and the costs make."""
    return Problem(
        nodes=(
            Node(name="camera", memory_bytes=1e9, speed=0.2),
            Node(name="gateway", cores=2, memory_bytes=4e9),
            Node(name="cloud", cores=16, memory_bytes=64e9, speed=2),
        ),
        links=(
            Link(name="wifi", ends=("camera", "gateway"), bandwidth_bytes_s=2.5e6, latency_ms=2),
            Link(name="uplink", ends=("gateway", "cloud"), bandwidth_bytes_s=1.2e6, latency_ms=12),
        ),
        broker="gateway",
        sources=(Source(name="frames", node="camera", rate_hz=10, bytes=80_000),),
        tasks=(
            Task(name="detect", inputs=("frames",), cpu_s=0.02, memory_bytes=1e8, output_bytes=2000, lazy=False),
            Task(name="track", inputs=("detect",), cpu_s=0.005, memory_bytes=1e8, output_bytes=300, lazy=False),
        ),
        sinks=(Sink(name="alarm", input="track", node="cloud"),),
        reference_bytes=160,
        fetch_bytes=500,
    )


MODES: tuple[Any, ...] = ("eager", "lazy")
PLAN = ("plan", "app.py", "--topology", "cluster.yaml", "--costs", "costs.json")
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, node: str) -> Write:
    """`write(app=..., cluster=..., costs=...)` writes the files of a plan."""

    def write(app: str = APP, cluster: str = CLUSTER, measured: Costs | None = None) -> None:
        (tmp_path / "app.py").write_text(app.replace("{node!r}", repr(node)))
        (tmp_path / "cluster.yaml").write_text(cluster)
        write_costs(tmp_path / "costs.json", measured or costs())

    return write


def planned(edgeserve: Command, *options: str) -> Any:
    result = edgeserve(*PLAN, "--json", *options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_plan_is_priced_as_the_problem_written_by_hand(edgeserve: Command, write: Write) -> None:
    write()
    found, best = planned(edgeserve), solve(by_hand())
    assert found["placements"]["plan"]["assignment"] == {name: list(nodes) for name, nodes in best.assignment.items()}
    assert found["lower_bound"] == pytest.approx(best.lower_bound) and found["gap"] < 0.05
    for name, place in (("centralised", "gateway"), ("all_at_source", "camera")):
        there = found["placements"][name]
        assert there["assignment"] == {"detect": [place], "track": [place]}
        small: dict[tuple[str, str], Any] = {("detect", "track"): "eager", ("track", "alarm"): "eager"}
        priced = [evaluate(by_hand(), {"detect": place, "track": place}, {("frames", "detect"): mode, **small}) for mode in MODES]
        cheaper = min(priced, key=lambda each: (len(each.violations), each.objective))
        assert there["objective"] == pytest.approx(cheaper.objective)
        assert there["violations"] == [str(each) for each in cheaper.violations]
    assert found["placements"]["all_at_source"]["violations"][0].startswith("cpu of camera")
    for name in ("detect", "track"):
        assert found["why"][name]["nodes"] == list(best.assignment[name])
        assert found["why"][name]["next_best"] == list(best.why[name].next_best or ())
    small = {("detect", "track"): "eager", ("track", "alarm"): "eager"}
    moved = [evaluate(by_hand(), {"detect": "gateway", "track": "cloud"}, {("frames", "detect"): mode, **small}) for mode in MODES]
    extra = min(each.objective for each in moved) - found["objective"]
    assert found["why"]["track"]["extra"] == pytest.approx(extra) and extra > 0


def test_what_a_faster_link_and_one_more_node_would_change(edgeserve: Command, write: Write) -> None:
    write()
    found = planned(edgeserve)
    objectives = {each["change"]: each["objective"] for each in found["what_if"]}
    assert "one more node like cloud" in objectives and any(name.startswith("twice the bandwidth of ") for name in objectives)
    assert all(objective <= found["objective"] + 1e-12 for objective in objectives.values())
    assert min(objectives.values()) < found["objective"]


def test_people_read_tables_sentences_and_a_picture(edgeserve: Command, write: Write, tmp_path: Path) -> None:
    write()
    result = edgeserve(*PLAN, "--svg", "plan.svg")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("plan for yard on cluster.yaml: objective ") and "(lower bound " in lines[0]
    assert re.search(
        r"^detect +gateway +on cloud the objective would be .*, alarm would come after .*, uplink would be \d+ % busy", result.stdout, re.M
    )
    assert "all at source breaks cpu of camera: " in result.stdout
    for heading in ("TASK", "FROM", "PLAN", "NODE", "LINK", "WHAT IF"):
        assert sum(line.strip().startswith(f"{heading} ") for line in lines) == 1, heading
    picture = ET.fromstring((tmp_path / "plan.svg").read_text())
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "12 % of its cores, and the broker" in texts
    assert {"camera", "gateway", "cloud", "frames", "detect", "track", "alarm"} <= set(texts)
    assert any(text and text.startswith("wifi (camera - gateway): ") for text in texts)
    arrows = [path for path in picture.iter("{http://www.w3.org/2000/svg}path") if path.get("marker-end")]
    assert len(arrows) == 3


def test_hosts_run_what_the_assignment_puts_on_them(edgeserve: Command, write: Write, tmp_path: Path) -> None:
    # Its task is placed elsewhere than the plan wants: the assignment has the last word.
    write(cluster=CLUSTER + "pins: {track: cloud}\n")
    result = edgeserve(*PLAN, "--apply", "assignment.json")
    assert result.returncode == 0, result.stderr
    assert "edgeserve run app.py --assignment assignment.json --host NAME" in result.stdout
    places = read_assignment(tmp_path / "assignment.json").places
    assert places == {"frames": ("camera",), "detect": ("gateway",), "track": ("cloud",), "alarm": ("cloud",)}
    run = (str(tmp_path / "app.py"), "--assignment", str(tmp_path / "assignment.json"), "--host")
    with ExitStack() as stack:
        hosts = {host: stack.enter_context(started(*run, host)) for host in ("cloud", "gateway", "camera")}
        assert "track (Compute), alarm (Materialize)" in line_with(hosts["cloud"], "running 2 nodes")
        assert "detect (Compute)" in line_with(hosts["gateway"], "running 1 nodes")
        assert "frames (DataSource)" in line_with(hosts["camera"], "running 1 nodes")
        line_with(hosts["cloud"], "got 20")
        for process in reversed(hosts.values()):
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, out + err


def test_the_current_placement_stands_beside_the_plan(edgeserve: Command, write: Write, tmp_path: Path) -> None:
    write()
    now = Assignment(
        pipeline="yard",
        places={"frames": ("camera",), "detect": ("cloud",), "track": ("cloud",), "alarm": ("cloud",)},
        routing={"frames": "lazy", "detect": "eager", "track": "eager"},
    )
    write_assignment(tmp_path / "now.json", now)
    found = planned(edgeserve, "--current", "now.json")["placements"]
    modes: Any = {("frames", "detect"): "lazy", ("detect", "track"): "eager", ("track", "alarm"): "eager"}
    priced = evaluate(by_hand(), {"detect": "cloud", "track": "cloud"}, modes)
    assert found["current"]["objective"] == pytest.approx(priced.objective)
    assert found["current"]["latency_ms"]["alarm"] == pytest.approx(priced.latency_ms["alarm"])
    lived = found["current"]["simulated_ms"]["alarm"]
    least = evaluate(by_hand(), {"detect": "cloud", "track": "cloud"}, modes).unloaded_ms["alarm"]
    assert least <= lived["0.5"] * 1.001 and lived["0.5"] <= lived["0.9"] <= lived["0.99"]
    assert found["plan"]["objective"] < found["current"]["objective"]


def test_what_is_left_open_is_priced_as_the_cheaper_way(edgeserve: Command, write: Write, tmp_path: Path) -> None:
    write()
    places = {"frames": ("camera",), "detect": ("cloud",), "track": ("cloud",), "alarm": ("cloud",)}
    objectives = {}
    for mode in ("lazy", "eager", "auto"):
        routing: Any = dict.fromkeys(("frames", "detect", "track"), mode)
        write_assignment(tmp_path / "now.json", Assignment(pipeline="yard", places=places, routing=routing))
        objectives[mode] = planned(edgeserve, "--current", "now.json")["placements"]["current"]["objective"]
    assert objectives["auto"] <= min(objectives["lazy"], objectives["eager"])


FAN = """
from edgeserve.pipeline import Pipeline

app = Pipeline("yard", node={node!r})
app.add_source("frames", range(3), place="camera")
app.add_source("sound", range(3), place="gateway")
app.add_task("detect", lambda frames: frames, place=["gateway", "cloud"], replicas=2)
app.add_task("track", lambda frames, sound: frames, join="exact")
app.add_sink("alarm", print, of=["track", "detect"], place="cloud")
"""


def test_relays_replicas_joins_and_sinks_of_several(edgeserve: Command, write: Write, tmp_path: Path) -> None:
    sources = {"frames": SourceCost(rate_hz=10, bytes=80_000, messages=9), "sound": SourceCost(rate_hz=4, bytes=100, messages=9)}
    write(app=FAN, measured=costs(sources=sources))
    found = planned(edgeserve, "--apply", "assignment.json")
    assignment, rates = found["placements"]["plan"]["assignment"], {row["from"]: row["messages_s"] for row in found["edges"]}
    assert assignment["frames>track"] == ["camera"], "a relay runs where what it hands on is made"
    assert sorted(assignment["detect"]) == ["cloud", "gateway"], "a replica on each place that is given"
    assert rates["track"] == 4, "a join of all runs as often as its slowest input comes"
    assert {row["to"] for row in found["edges"] if row["from"] in ("track", "detect")} == {"alarm of track", "alarm of detect"}
    applied = read_assignment(tmp_path / "assignment.json")
    assert set(applied.places) == {"frames", "sound", "detect", "track", "alarm"}
    assert applied.places["alarm"] == ("cloud",) and set(applied.routing) == {"frames", "sound", "detect", "track"}
    assert applied.routing["sound"] == "eager", "what is small travels with its header"


def test_replicas_may_run_on_one_node_and_each_placement_is_priced_so(edgeserve: Command, write: Write) -> None:
    write(app=APP.replace("@app.task()\ndef detect", "@app.task(replicas=2)\ndef detect"))
    found = planned(edgeserve)
    best, centralised = found["placements"]["plan"], found["placements"]["centralised"]
    assert best["assignment"]["detect"] == ["gateway"] and best["nodes"]["gateway"]["memory_bytes"] == 3e8, "with track"
    assert not centralised["violations"] and found["lower_bound"] <= best["objective"] <= centralised["objective"]


def test_what_is_to_outlive_its_host_is_priced_as_it_travels(edgeserve: Command, write: Write) -> None:
    write(app=APP.replace('place="camera"', 'place="camera", durability="broker"'))
    found = planned(edgeserve)
    assert {row["from"]: row["travels"] for row in found["edges"]}["frames"] == "eager"
    safe = msgspec.structs.replace(by_hand(), sources=(Source(name="frames", node="camera", rate_hz=10, bytes=80_000, lazy=False),))
    assert found["objective"] == pytest.approx(solve(safe).objective)


@pytest.mark.parametrize(("mode", "kept"), [("lazy", 1), ("eager", 0), ("auto", 1)])
def test_an_assignment_says_how_payloads_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str, mode: Any, kept: int) -> None:
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "payloads"))
    app = Pipeline("yard", node=node)
    app.add_source("frames", [bytes(100_000)], routing="lazy" if mode == "eager" else "eager")
    app.add_sink("show", len, of="frames")
    assignment = Assignment(pipeline="yard", places={"frames": ("a",), "show": ("b",)}, routing={"frames": mode})
    placed = apply(app, assignment, "assignment.json")
    assert [list(placed.look(host=host)) for host in "ab"] == [["frames"], ["show"]]
    with placed.node("frames") as source:
        source.run()
    segments = [path for path in (tmp_path / "payloads").rglob("*") if path.is_file() and path.stat().st_size > 65_536]
    assert len(segments) == kept, segments


def test_a_link_without_a_bandwidth_has_the_one_that_was_measured(edgeserve: Command, write: Write) -> None:
    slower = CLUSTER.replace("bandwidth: 20 Mbit/s, latency: 2 ms", "max_utilisation: 0.8")
    measured = costs(links=[LinkCost(ends=("gateway", "camera"), bandwidth_bytes_s=2.5e6, latency_ms=2)])
    write(cluster=slower, measured=measured)
    found = planned(edgeserve)
    assert found["lower_bound"] == pytest.approx(solve(by_hand()).lower_bound)


def replaced(old: str, new: str) -> str:
    assert old in CLUSTER
    return CLUSTER.replace(old, new, 1)


WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    ({"cluster": replaced("20 Mbit/s", "20")}, "link 'wifi': bandwidth: 20 has no unit", "cluster.yaml:6", "100 Mbit/s"),
    ({"cluster": replaced("bandwidth: 20 Mbit/s, ", "")}, "link 'wifi' has no bandwidth", "cluster.yaml:6", "100 Mbit/s"),
    ({"cluster": replaced("[camera, gateway]", "[camera, gatway]")}, "no node 'gatway'", "cluster.yaml:6", "did you mean 'gateway'?"),
    ({"cluster": replaced("[camera, gateway]", "[camera, camera]")}, "both are 'camera'", "cluster.yaml:6", "two nodes"),
    ({"cluster": replaced("broker: gateway", "broker: mars")}, "broker: there is no node 'mars'", "cluster.yaml:8", "add it to `nodes`"),
    ({"cluster": replaced("speed: 2}", "speed: 0}")}, "nodes['cloud'].speed is 0", "cluster.yaml:4", "positive"),
    ({"cluster": replaced("  uplink:", "  wifi:")}, "the key 'wifi' is there twice, first in line 6", "cluster.yaml:7", "rename"),
    ({"cluster": CLUSTER.replace("\n  uplink", "\n  # uplink")}, "no way leads from", "cluster.yaml:5", "add a link"),
    ({"cluster": CLUSTER + "sources: {frame: camera}\n"}, "the pipeline has no source 'frame'", "cluster.yaml:9", "'frames'?"),
    ({"cluster": CLUSTER + "pins: {detekt: cloud}\n"}, "there is no task 'detekt'", "cluster.yaml:9", "'detect'?"),
    ({"cluster": CLUSTER + "separate:\n  - [detect, trak]\n"}, "there is no task 'trak'", "cluster.yaml:10", "'track'?"),
    ({"cluster": CLUSTER + "tasks:\n  detect: {stays_in: eu}\n"}, "there is no zone 'eu'", "cluster.yaml:10", "`zone`"),
    ({"app": APP.replace('place="camera"', 'place="camra"')}, "source 'frames' has place='camra'", "app.py", "'camera'?"),
    ({"app": APP.replace(', place="camera"', "")}, "source 'frames' has no place", "cluster.yaml", "`frames: NODE` under sources:"),
    (
        {"app": APP.replace('place="camera"', 'place=["camera", "cloud"], replicas=2')},
        "stand on camera, cloud",
        "cluster.yaml",
        "each place",
    ),
    ({"app": APP.replace("def detect(frames)", "def detect(track)")}, "feed each other in a circle", "app.py:14", "take one of these"),
    ({"cluster": CLUSTER + "#" + "x" * 10_000_000}, "the file has more than 1000000 bytes", "cluster.yaml", "is it the right file?"),
    ({"cluster": "a: &a [x]\nb: &b [*a, *a]\n" + CLUSTER}, "&a: anchors and aliases are not taken", "cluster.yaml:1", "write out"),
    ({"measured": costs(pipeline="other")}, "these are the costs of 'other'", "costs.json", "name the costs of this one"),
    ({"measured": costs(tasks={"detect": task_cost(1, 1)})}, "the costs say nothing of task 'track'", "costs.json", "measure it anew"),
]


@pytest.mark.parametrize(("files", "what", "where", "to_do"), WRONG, ids=[each[1] for each in WRONG])
def test_what_is_wrong_is_said_with_its_line(
    edgeserve: Command, write: Write, tmp_path: Path, files: dict[str, Any], what: str, where: str, to_do: str
) -> None:
    write(**files)
    result = edgeserve(*PLAN, "--apply", "assignment.json")
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    said = result.stderr.splitlines()
    assert len(said) == 3, result.stderr
    assert what in said[0] and said[1].rpartition("/")[2].removeprefix("where: ") == where and to_do in said[2], result.stderr
    assert not (tmp_path / "assignment.json").exists()


def test_what_fits_nowhere_says_what_is_short(edgeserve: Command, write: Write) -> None:
    write(measured=costs(tasks={"detect": task_cost(50, 1), "track": task_cost(0.005, 300)}))
    result = edgeserve(*PLAN)
    assert (result.returncode, result.stdout) == (1, "")
    assert "the next, cloud, is short of cpu by 237.2 cores" in result.stderr.splitlines()[0], result.stderr
    assert result.stderr.splitlines()[1:] == ["where: cluster.yaml", "to do: give it that, or make the task smaller"]


def test_costs_and_assignments_that_are_none_are_named(edgeserve: Command, write: Write, tmp_path: Path) -> None:
    write()
    (tmp_path / "costs.json").write_text('{"pipeline": "yard",')
    result = edgeserve(*PLAN)
    assert result.returncode != 0 and "costs.json" in result.stderr and len(result.stderr.splitlines()) == 3
    write()
    for text, said in (
        ("{", "this is no assignment"),
        ('{"pipeline": "yard", "places": {}, "routing": {}, "version": 9}', "is in version 9 of the format"),
        ('{"pipeline": "other", "places": {}, "routing": {}}', "is of the pipeline 'other', and this is 'yard'"),
        ('{"pipeline": "yard", "places": {"frame": ["a"]}, "routing": {}}', "has no 'frame'"),
        ('{"pipeline": "yard", "places": {}, "routing": {}}', "gives 'frames' no place"),
    ):
        (tmp_path / "assignment.json").write_text(text)
        for command in ((*PLAN, "--current", "assignment.json"), ("run", "app.py", "--assignment", "assignment.json", "--host", "cloud")):
            result = edgeserve(*command)
            assert result.returncode != 0 and said in result.stderr.splitlines()[0], (command, result.stderr)
            assert "assignment.json" in result.stderr.splitlines()[1]


def test_a_host_that_the_assignment_leaves_out_runs_nothing(edgeserve: Command, write: Write) -> None:
    write()
    assert edgeserve(*PLAN, "--apply", "assignment.json").returncode == 0
    result = edgeserve("run", "app.py", "--assignment", "assignment.json", "--host", "attic")
    assert result.returncode == 1 and "nothing runs on the host 'attic'" in result.stderr


def test_an_assignment_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = Assignment(pipeline="p", places={"a": ("x", "y")}, routing={"a": "lazy"})
    write_assignment(tmp_path / "a.json", given)
    assert read_assignment(tmp_path / "a.json") == given
    with pytest.raises(InvalidPipeline, match="did you mean 'a'"):
        app = Pipeline("p")
        app.add_source("a", [1])
        apply(app, Assignment(pipeline="p", places={"aa": ("x",)}, routing={}), "a.json")


def test_an_infinite_latency_is_null_in_json(edgeserve: Command, write: Write) -> None:
    write(measured=costs(tasks={"detect": task_cost(0.2, 2000), "track": task_cost(0.005, 300)}))
    found = planned(edgeserve)["placements"]
    assert found["all_at_source"]["latency_ms"]["alarm"] is None
    assert math.isfinite(found["plan"]["latency_ms"]["alarm"])
