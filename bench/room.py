"""`examples/room_ar` on three hosts, 100 Mbit/s between them: what goes over each link, and how good the track is; by routing.

    python bench/room.py                      auto, lazy and eager once; exit 1 when a line does not hold
    python bench/room.py --seconds 60 --only lazy

Hosts are the network namespaces of `hosts.py`, and `edgeserve run --host` runs on each what the pipeline places there. The broker (NATS),
two cameras and the motion sensor are on the first host, the third camera on the second; the third host looks for the ball in all pictures
and tracks it. A run is over when there is a result for each picture that is asked for, or none has come for 20 s.
Bytes are the kernel's counters of each interface. Halfway through a run of auto `edgeserve routes` shows what it does, and why. The track
is judged by the example itself. Needs root and the extra `video`.
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
ROUTINGS = ("auto", "lazy", "eager")
SHARE, NEAR, MOST_CM, LEAST_HZ = 0.2, 0.05, 5.0, 2.0
START_S = 20.0
"""Until the sources begin: thirteen processes have to start before."""

QUIET_S = 20.0
EDGESERVE = (sys.executable, "-P", "-c", "from edgeserve.cli import main; main()")
PLACES = {"server": "c", "west": "a", "east": "b"}


def measure(routing: str, join: str, room: Path, limit_s: float) -> dict[str, Any]:
    """One run: the example's report, with the bytes in and out of each host."""
    with Cluster("room") as cluster:
        network, out = cluster.network, cluster.root / "out"
        out.mkdir()
        asked = report(room, out)["asked"]
        settings = {"ROOM": room, "OUT": out, "ROUTING": routing, "JOIN": join, "AT": time.time() + START_S}
        command = ["env", *(f"{name}={value}" for name, value in settings.items())]
        command += [*EDGESERVE, "run", "--node", cluster.node]
        before = {host: network.counters(host) for host in HOSTS}
        runs = [cluster.on(host, *command, "--host", place, str(EXAMPLE / "app.py")) for place, host in PLACES.items()]
        began = newest = time.monotonic()
        results, shown = 0, routing != "auto"
        while results < asked and time.monotonic() < (newest + QUIET_S if results else began + limit_s):
            if any(each.poll() for each in runs):
                raise SystemExit("a stage has failed: what it said is above")
            time.sleep(0.1)
            if (out / "track.jsonl").exists() and (count := (out / "track.jsonl").read_bytes().count(b"\n")) > results:
                results, newest = count, time.monotonic()
                if not shown and results >= asked / 2:
                    shown = True
                    cluster.on("c", *EDGESERVE, "routes", "--node", cluster.node).wait(60)
        after = {host: network.counters(host) for host in HOSTS}
        for each in runs:
            each.terminate()
        for each in runs:
            each.wait(60)
        found = report(room, out)
        found["bytes"] = {host: [b - a for a, b in zip(before[host], after[host], strict=True)] for host in HOSTS}
        return found | {"seconds": newest - began - START_S}


def report(room: Path, out: Path) -> dict[str, Any]:
    """What the example says of the track so far."""
    command = [sys.executable, str(EXAMPLE), "report", "--room", str(room), "--out", str(out), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=False, stdout=subprocess.PIPE).stdout)
    return found


def judge(found: dict[str, dict[str, Any]]) -> list[str]:
    """What does not hold."""
    wrong = list[str]()
    for routing, run in found.items():
        if not run["results"] or run["median_cm"] > MOST_CM:
            wrong.append(f"{routing}: a median error of {run['median_cm']} cm, not at most {MOST_CM:g}")
    eager = found.get("eager")
    for routing, run in found.items():
        if routing == "eager":
            continue
        if run["hz"] < LEAST_HZ:
            wrong.append(f"{routing}: {run['hz']:.2f} results/s, not {LEAST_HZ:g}")
        if eager and eager["results"] and run["results"]:
            share = total(run) / total(eager)
            if share >= SHARE:
                wrong.append(f"{routing} moves {share:.3f} of the bytes of eager, not under {SHARE:g}")
            if abs(run["median_cm"] / eager["median_cm"] - 1) > NEAR:
                wrong.append(f"the errors differ: {run['median_cm']} cm {routing}, {eager['median_cm']} cm eager")
    return wrong


def total(run: dict[str, Any]) -> int:
    """All that went into a link."""
    return sum(out for _, out in run["bytes"].values())


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the recording")
    parser.add_argument("--join", choices=("exact", "latest"), default="exact")
    parser.add_argument("--only", choices=ROUTINGS, action="append")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    a = parser.parse_args()
    found = dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="edgeserve-room-") as folder:
        room = Path(folder)
        subprocess.run([sys.executable, str(EXAMPLE), "record", "--room", folder, "--seconds", str(a.seconds)], check=True)
        print("routing  results  of     Hz  median cm  p95 cm  seconds    a in MB  a out   b in  b out   c in  c out")
        for routing in a.only or ROUTINGS:
            run = found[routing] = measure(routing, a.join, room, 60 + 15 * a.seconds)
            moved = "".join(f"{each / 1e6:7.1f}" for host in HOSTS for each in run["bytes"][host])
            figures = f"{run['hz']:7.2f} {run['median_cm'] or 0:10.3f} {run['p95_cm'] or 0:7.3f} {run['seconds']:8.1f}"
            print(f"{routing:8} {run['results']:7} {run['asked']:3}{figures}    {moved}", flush=True)
    for routing in sorted(found.keys() - {"eager"}) if "eager" in found else ():
        print(f"{routing} moves {total(found[routing]) / total(found['eager']):.3f} of the bytes of eager")
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    if wrong := judge(found):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
