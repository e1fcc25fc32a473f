"""One declared graph, placed in five ways on four hosts: what each placement gives, beside what the model says of it.

    python bench/topologies.py activity            at every bandwidth of the workload; exit 1 when a line does not hold
    python bench/topologies.py driving --mbit 100 --only planned --only centralised
    python bench/topologies.py intrusion --faster 2 --json figures.json --svg figures.svg
    python bench/topologies.py driving --mbit 100 --sustained
                                                   the highest rates of the sources at which the backlog does not grow; then all
                                                   placements at that of centralised

centralised: all tasks at the broker, on host d; parallel: each task on every host, which share its queue; cascade: each level of the
graph on a host of its own; decentralised: the first level beside its sources, the rest at the broker; planned: what `edgeserve plan`
says. The first four are eager. See `cases.py` for hosts and tasks. A run is void when the machine was over 80 % busy, and done again.

Judged by lines that the sink's plain function wrote: `age` is how old the inputs were when the result came, `right` the share of the
time at which the newest answer was the right one, `backlog` how old the last result was. Bytes are the kernel's, of all links; `off` is
how far those of any link are from the model's. The objective is the mean age. A backlog grows when in a quarter of the run the age rises
by a fiftieth of the run, or results come at less than 95 % of their rate. Needs root.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import charts
from cases import BUSY, PLACEMENTS, Case, load, off, stop_well

NEAR, TIMES = 1.10, 5.0
MOST_FASTER, STEPS, PROBE_S = 16.0, 4, 10.0


def said_p50(said: dict[str, Any]) -> float | None:
    """The median that the model says, in ms; None: there is none."""
    found: float | None = next(iter(said.get("simulated_ms", {}).values()), {}).get("0.5")
    return found


def show(case: Case, placement: str, run: dict[str, Any]) -> None:
    """A line of the table."""
    said = run["model"]
    latency = said_p50(said)
    links, wanted = run["link_bytes_s"], said.get("link_bytes_s", {})
    figures = [run["hz"], run["p50_ms"], run["p99_ms"], run["mean_ms"], latency, 100 * run["right"], run["backlog_s"]]
    shown = "".join(f"{each:9.1f}" if each is not None else "        -" for each in figures)
    moved = f"{sum(links.values()) / 1e6:9.2f}{sum(wanted.get(link, 0.0) for link in links) / 1e6:9.2f}{100 * off(wanted, links):7.0f}"
    void = "   void: the machine was busy" if run["busy"] > BUSY else "   the backlog grows" if run["grows"] else ""
    rate = f"{case.faster:5.2f}"
    print(f"{case.name:10} {case.mbit:5} {rate} {placement:14}{shown}{moved}{100 * run['busy']:7.0f}{void}", flush=True)


def head() -> None:
    """Above the lines."""
    print(f"{'':10} Mbit/s rate {'':13} results   p50 ms   p99 ms  mean ms   p50 ms    right  backlog     MB/s     MB/s    off   busy")
    print(f"{'':10} {'':12} {'':13}    a s                age    model      in %        s             model   in %   in %")


def one(case: Case, placement: str, seconds: float, tries: int, where: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Any]:
    """A run, shown; it has what the model says of it."""
    said = case.priced(placement, where)
    found = case.run(placement, seconds, tries) | {"model": said}
    show(case, placement, found)
    return found


def at(name: str, mbit: int, faster: float, placement: str, seconds: float, tries: int) -> dict[str, Any]:
    """A run at so many times the sources' rates."""
    with tempfile.TemporaryDirectory(prefix="edgeserve-topologies-") as folder:
        return one(Case(name, mbit, faster, Path(folder)), placement, seconds, tries)


def sustained(name: str, mbit: int, placement: str, tries: int) -> dict[str, Any]:
    """The highest rate of the sources at which a placement's backlog does not grow, by bisection, and why it is not higher."""
    low, high, why = 0.0, 1.0, ""

    def holds(faster: float) -> bool:
        nonlocal why
        run = at(name, mbit, faster, placement, PROBE_S, tries)
        if run["grows"]:
            why = "the machine was busy" if run["busy"] > BUSY else ""
        return not run["grows"]

    while high <= MOST_FASTER and holds(high):
        low, high = high, high * 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    print(f"{name:10} {mbit:5} {placement:14} sustains {low:.2f} times the rates{f'; above, {why}' if why else ''}", flush=True)
    return {"faster": low, "limited_by": why}


def lines(name: str, mbit: int, runs: dict[str, dict[str, Any]]) -> list[str]:
    """What does not hold of a table of runs."""
    planned = runs.get("planned")
    others = {place: run["mean_ms"] for place, run in runs.items() if place != "planned" and run["mean_ms"] is not None}
    if planned is None or not others:
        return []
    if planned["busy"] > BUSY:
        return [f"{name} at {mbit} Mbit/s: planned is void: the machine was busy"]
    best = min(others, key=others.__getitem__)
    if planned["mean_ms"] is None or planned["mean_ms"] > NEAR * others[best]:
        return [f"{name} at {mbit} Mbit/s: planned {planned['mean_ms']} ms, {best} {others[best]:.1f} ms"]
    return []


def times(central: dict[str, Any], planned: dict[str, Any]) -> dict[str, float]:
    """How many times less the planned one has, of p99 and of bytes, and what it gains in accuracy."""
    p99 = central["p99_ms"] / planned["p99_ms"] if central["p99_ms"] and planned["p99_ms"] else 0.0
    moved = sum(central["link_bytes_s"].values()) / max(sum(planned["link_bytes_s"].values()), 1.0)
    return {"p99": p99, "bytes": moved, "right": planned["right"] - central["right"]}


def figures(name: str, mbit: int, runs: dict[str, dict[str, Any]], rates: dict[str, dict[str, Any]]) -> list[Any]:
    """The charts of a table of runs."""
    where = f"{name} at {mbit} Mbit/s"
    made: list[Any] = [
        (f"{where}: age of a result", "ms", {p: {"p50": r["p50_ms"], "p99": r["p99_ms"]} for p, r in runs.items()}),
        (f"{where}: time with the right answer", "%", {p: {"right": 100 * r["right"]} for p, r in runs.items()}),
        (
            f"{where}: bytes on all links",
            "MB/s",
            {
                p: {
                    "measured": sum(r["link_bytes_s"].values()) / 1e6,
                    "model": sum(r["model"].get("link_bytes_s", {}).values()) / 1e6 or None,
                }
                for p, r in runs.items()
            },
        ),
    ]
    if rates:
        made.append((f"{where}: sustained", "times the sources' rates", {p: {"rate": r["faster"]} for p, r in rates.items()}))
    return made


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=("activity", "driving", "intrusion"))
    parser.add_argument("--mbit", type=int, action="append", help="of each host's link; default: the workload's")
    parser.add_argument("--only", choices=PLACEMENTS, action="append")
    parser.add_argument("--faster", type=float, default=1.0, help="so many times the sources' rates")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tries", type=int, default=2, help="so often at most, while the machine is too busy")
    parser.add_argument("--sustained", action="store_true", help="look for the rates that each placement sustains")
    parser.add_argument("--json", type=Path, help="writes the figures there")
    parser.add_argument("--svg", type=Path, help="draws them there")
    a = parser.parse_args()
    stop_well()
    head()
    found: dict[str, Any] = {}
    wrong, drawn = list[str](), list[Any]()
    for mbit in a.mbit or load(a.workload).bandwidths:
        only, rates, faster = a.only or PLACEMENTS, dict[str, dict[str, Any]](), a.faster
        if a.sustained:
            rates = {placement: sustained(a.workload, mbit, placement, a.tries) for placement in only}
            faster = rates["centralised"]["faster"] if "centralised" in rates else faster
        runs = {placement: at(a.workload, mbit, faster, placement, a.seconds, a.tries) for placement in only}
        found[str(mbit)] = {"faster": faster, "runs": runs, "sustained": rates}
        wrong += lines(a.workload, mbit, runs)
        if "planned" in runs and "centralised" in runs:
            less = found[str(mbit)]["times"] = times(runs["centralised"], runs["planned"])
            print(
                f"planned has 1 / {less['p99']:.1f} of centralised's p99, 1 / {less['bytes']:.1f} of its bytes; right: {less['right']:+.1%}"
            )
            if a.sustained and not (max(less["p99"], less["bytes"]) >= TIMES and less["right"] >= 0):
                wrong.append(f"{a.workload} at {mbit} Mbit/s: neither p99 nor bytes of planned are a {TIMES:g}th of centralised's")
        drawn += figures(a.workload, mbit, runs, rates)
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    if a.svg:
        a.svg.write_text(charts.page(f"{a.workload}: five placements of one graph", drawn))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
