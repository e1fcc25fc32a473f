"""`examples/room_ar` on three hosts, 100 Mbit/s between them: what goes over each link, and how good the track is; lazy beside eager.

    python bench/room.py                      both once; exit 1 when a line does not hold
    python bench/room.py --seconds 60 --only lazy

Hosts are the network namespaces of `hosts.py`. The broker (NATS), two cameras and the motion sensor are on the first host, the third
camera on the second one; the third one looks for the ball in all pictures and tracks it.
Bytes are the kernel's counters of each interface. The track is
judged by the example itself. Needs root and the extra `video`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hosts import HOSTS, Cluster

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "room_ar"
SHARE, NEAR, MOST_CM, LEAST_HZ = 0.2, 0.05, 5.0, 2.0
START_S = 10.0
"""Until the sources begin: thirteen processes have to start before."""

PLACES = {"west": "a", "east": "b", "server": "c"}


def processes() -> list[tuple[str, str]]:
    """The host and the name of each process of the pipeline; who reads before who sends."""
    command = [sys.executable, "-P", "-c", "from edgeserve.cli import main; main()", "graph", "--format", "json", str(EXAMPLE / "app.py")]
    nodes = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["nodes"]
    return [(PLACES[node["places"][0]], node["name"]) for node in reversed(nodes)]


def measure(routing: str, join: str, room: Path, limit_s: float) -> dict[str, Any]:
    """One run: the example's report, with the bytes in and out of each host."""
    started = processes()
    with Cluster("room") as cluster:
        network, root = cluster.network, cluster.root
        time.sleep(1.0)
        options = ["--node", cluster.node, "--room", str(room), "--out", str(root / "out"), "--routing", routing, "--join", join]
        options += ["--at", str(time.time() + START_S)]
        before = {host: network.counters(host) for host in HOSTS}
        stages = [cluster.on(host, sys.executable, str(EXAMPLE), name, *options) for host, name in started]
        began, ends = time.monotonic(), time.monotonic() + limit_s
        while any(each.poll() is None for each in stages) and time.monotonic() < ends:
            if any(each.returncode for each in stages):
                raise SystemExit("a stage has failed: what it said is above")
            time.sleep(0.1)
        over = all(each.poll() is not None for each in stages)
        after = {host: network.counters(host) for host in HOSTS}
        for each in stages:
            each.terminate()
        for each in stages:
            each.wait(60)
        judged = [sys.executable, str(EXAMPLE), "report", "--room", str(room), "--out", str(root / "out"), "--json"]
        found: dict[str, Any] = json.loads(subprocess.run(judged, check=False, stdout=subprocess.PIPE).stdout)
        found["bytes"] = {host: [b - a for a, b in zip(before[host], after[host], strict=True)] for host in HOSTS}
        return found | {"over": over, "seconds": time.monotonic() - began - START_S}


def judge(found: dict[str, dict[str, Any]]) -> list[str]:
    """What does not hold."""
    wrong = list[str]()
    for routing, run in found.items():
        if not run["results"] or run["median_cm"] > MOST_CM:
            wrong.append(f"{routing}: a median error of {run['median_cm']} cm, not at most {MOST_CM:g}")
    lazy, eager = found.get("lazy"), found.get("eager")
    if lazy and lazy["hz"] < LEAST_HZ:
        wrong.append(f"lazy: {lazy['hz']:.2f} results/s, not {LEAST_HZ:g}")
    if lazy and eager and eager["results"]:
        share = total(lazy) / total(eager)
        if share > SHARE:
            wrong.append(f"lazy moves {share:.3f} of the bytes of eager, not under {SHARE:g}")
        if abs(lazy["median_cm"] / eager["median_cm"] - 1) > NEAR:
            wrong.append(f"the errors differ: {lazy['median_cm']} cm lazy, {eager['median_cm']} cm eager")
    return wrong


def total(run: dict[str, Any]) -> int:
    """All that went into a link."""
    return sum(out for _, out in run["bytes"].values())


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the recording")
    parser.add_argument("--join", choices=("exact", "latest"), default="exact")
    parser.add_argument("--only", choices=("lazy", "eager"), action="append")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    a = parser.parse_args()
    found = dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="edgeserve-room-") as folder:
        room = Path(folder)
        subprocess.run([sys.executable, str(EXAMPLE), "record", "--room", folder, "--seconds", str(a.seconds)], check=True)
        print("routing  results  of     Hz  median cm  p95 cm  seconds    a in MB  a out   b in  b out   c in  c out")
        for routing in a.only or ("lazy", "eager"):
            run = found[routing] = measure(routing, a.join, room, 60 + 15 * a.seconds)
            moved = "".join(f"{each / 1e6:7.1f}" for host in HOSTS for each in run["bytes"][host])
            figures = f"{run['hz']:7.2f} {run['median_cm'] or 0:10.3f} {run['p95_cm'] or 0:7.3f} {run['seconds']:8.1f}"
            print(
                f"{routing:8} {run['results']:7} {run['asked']:3}{figures}    {moved}{'' if run['over'] else '   not done in time'}",
                flush=True,
            )
    if "lazy" in found and "eager" in found:
        print(f"lazy moves {total(found['lazy']) / total(found['eager']):.3f} of the bytes of eager")
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    if wrong := judge(found):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
