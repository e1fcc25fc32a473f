"""What the model says of placements, against real runs of them.

    python bench/predictions.py              12 runs: bytes of each link within 10 % and p50 within 25 % in at least 10; else exit 1
    python bench/predictions.py --every      two small pipelines: the planned placement is within 10 % of the best of all, each of them run
    python bench/predictions.py --only activity --only driving

See `cases.py` for hosts and tasks, `topologies.py` for the columns. What carries less than a hundredth of what the fullest link does is not
compared. A run is void when the machine was over 80 % busy, and done again. Needs root.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import BUSY, Case, stop_well
from topologies import NEAR, head, one, said_p50

RUNS = (
    ("activity", 20, 1.0, ("centralised", "cascade", "decentralised", "planned")),
    ("driving", 1_000, 0.5, ("centralised", "decentralised", "planned")),
    ("driving", 100, 0.5, ("planned",)),
    ("intrusion", 100, 0.4, ("centralised", "decentralised", "planned")),
    ("intrusion", 20, 0.2, ("planned",)),
)
"""Workload, Mbit/s, how many times the rates, placements: rates at which none is overloaded, links and machine."""
SMALL = (("chain", 20), ("pair", 20))
BYTES, P50, ENOUGH, LITTLE = 0.10, 0.25, 10, 0.01


def differences(run: dict[str, Any]) -> tuple[float, float]:
    """By how much the model is off in bytes (of the link where it is most) and in p50, as parts of what it says."""
    said = run["model"]
    wanted = said.get("link_bytes_s", {})
    compared = [link for link, rate in wanted.items() if rate > LITTLE * max(wanted.values())]
    moved = max((abs(run["link_bytes_s"][link] / wanted[link] - 1) for link in compared), default=float("inf"))
    latency = said_p50(said)
    return moved, abs(run["p50_ms"] / latency - 1) if latency and run["p50_ms"] else float("inf")


def predictions(only: list[str] | None, seconds: float, tries: int) -> tuple[list[dict[str, Any]], int]:
    """All runs, and in how many the model is right."""
    runs, right = list[dict[str, Any]](), 0
    for name, mbit, faster, placements in RUNS:
        for placement in placements if only is None or name in only else ():
            with tempfile.TemporaryDirectory(prefix="edgeserve-predictions-") as folder:
                run = one(Case(name, mbit, faster, Path(folder)), placement, seconds, tries)
            moved, p50 = differences(run)
            holds = moved <= BYTES and p50 <= P50 and run["busy"] <= BUSY
            right += holds
            print(f"  bytes {moved:.1%} off, p50 {p50:.1%} off: {'holds' if holds else 'does not hold'}", flush=True)
            runs.append({"workload": name, "mbit": mbit, "placement": placement, "bytes_off": moved, "p50_off": p50, "holds": holds, **run})
    return runs, right


def every(name: str, mbit: int, seconds: float, tries: int) -> tuple[dict[str, Any], bool]:
    """All placements of a small pipeline, eager, and the planned one: whether it is within 10 % of the best."""
    with tempfile.TemporaryDirectory(prefix="edgeserve-predictions-") as folder:
        case = Case(name, mbit, 1.0, Path(folder))
        able = [host for host, cores in case.workload.cores.items() if cores]
        runs: dict[str, Any] = {}
        for hosts in itertools.product(able, repeat=len(case.workload.costs)):
            where = {task: (host,) for task, host in zip(case.workload.costs, hosts, strict=True)}
            runs["".join(hosts)] = one(case, "".join(hosts), seconds, tries, where)
        planned = runs["planned"] = one(case, "planned", seconds, tries)
    best = min((run["mean_ms"] for place, run in runs.items() if place != "planned" and run["mean_ms"]), default=float("inf"))
    holds = planned["mean_ms"] is not None and planned["mean_ms"] <= NEAR * best and planned["busy"] <= BUSY
    print(f"{name}: planned {planned['mean_ms'] or float('inf'):.1f} ms, the best of {len(runs) - 1} {best:.1f} ms", flush=True)
    return runs, holds


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="run all placements of two small pipelines")
    parser.add_argument("--only", action="append", help="of these workloads")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--tries", type=int, default=2, help="so often at most, while the machine is too busy")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    a = parser.parse_args()
    stop_well()
    head()
    found: dict[str, Any] = {}
    wrong = list[str]()
    if a.every:
        for name, mbit in SMALL:
            if not a.only or name in a.only:
                found[name], holds = every(name, mbit, a.seconds, a.tries)
                wrong += [] if holds else [f"{name}: the planned placement is not within 10 % of the best, or void"]
    else:
        found["runs"], right = predictions(a.only, a.seconds, a.tries)
        print(f"{right} of {len(found['runs'])} hold")
        wrong += [] if right >= min(ENOUGH, len(found["runs"])) else [f"only {right} of {len(found['runs'])} predictions hold"]
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
