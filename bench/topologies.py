"""One declared graph, placed in five ways on four hosts: what each placement gives, beside what the model says of it.

    python bench/topologies.py activity            at every bandwidth of the workload; exit 1 when a line does not hold
    python bench/topologies.py driving --mbit 100 --only planned --only centralised
    python bench/topologies.py intrusion --faster 4 --json figures.json

centralised: all tasks at the broker, on host d; parallel: each task on every host, which share its queue; cascade: each level of the
graph on a host of its own; decentralised: the first level beside its sources, the rest at the broker; planned: what `edgeserve plan`
says. Hosts are network namespaces, the broker is NATS on d. Tasks sleep with a core token of their host (`workloads/common.py`). A run
is void when the machine was over 80 % busy.

Judged by lines that the sink's plain function wrote: `age` is how old the inputs were when the result came, `right` the share of the
time at which the newest answer was the right one, `behind` how old the last result was. Bytes are the kernel's, of all links. Needs root.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from edgeserve.pipeline.assignment import Assignment, write_assignment
from edgeserve.pipeline.costs import Costs, SourceCost, TaskCost, write_costs
from hosts import Cluster
from workloads.common import Cores, Workload

WORKLOADS = Path(__file__).resolve().parent / "workloads"
HOSTS = ("a", "b", "c", "d")
CENTRE = HOSTS[-1]
PLACEMENTS = ("centralised", "parallel", "cascade", "decentralised", "planned")
START_S, OVER_S, BUSY, EVERY_S = 20.0, 10.0, 0.8, 0.01
NEAR = 1.10
EDGESERVE = [sys.executable, "-P", "-c", "from edgeserve.cli import main; main()"]


def topology(workload: Workload, mbit: int) -> str:
    """The cluster: each host has a link to a switch."""
    lines = ["nodes:", "  switch: {cores: 0}"]
    lines += [f"  {host}: {{cores: {workload.cores[host]}, memory: 8 GB}}" for host in HOSTS]
    lines += ["links:"]
    lines += [f"  to_{host}: {{ends: [{host}, switch], bandwidth: {mbit} Mbit/s, latency: 0.1 ms}}" for host in HOSTS]
    lines += [f"broker: {CENTRE}", "sources:", *(f"  {name}: {host}" for name, host in workload.places.items())]
    return "\n".join([*lines, "sinks:", f"  {workload.sink}: {CENTRE}", ""])


def costs(name: str, workload: Workload, faster: float) -> Costs:
    """What everything costs: it is known, since tasks sleep."""
    return Costs(
        pipeline=name,
        sources={source: SourceCost(rate_hz=hz * faster, bytes=size, messages=1) for source, (hz, size) in workload.rates.items()},
        tasks={
            task: TaskCost(
                cpu_s=cpu_s,
                cpu_s_quantiles={q: cpu_s for q in ("0.5", "0.9", "0.99")},
                memory_bytes=1e8,
                output_bytes=size,
                outputs_per_run=1,
                runs=1,
            )
            for task, (cpu_s, size) in workload.costs.items()
        },
    )


def places(placement: str, workload: Workload, upstream: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Where the tasks run."""
    if placement == "parallel":
        return dict.fromkeys(workload.costs, HOSTS)
    if placement == "cascade":
        behind = HOSTS[-1 - max(workload.levels.values()) :]
        return {task: (behind[level],) for task, level in workload.levels.items()}
    if placement == "decentralised":
        first = {task: workload.places[upstream[task][0]] for task, level in workload.levels.items() if not level}
        return {task: (first.get(task, CENTRE),) for task in workload.costs}
    return dict.fromkeys(workload.costs, (CENTRE,))


class Case:
    """A workload on links of one bandwidth, with the files that `edgeserve plan` takes."""

    def __init__(self, name: str, mbit: int, faster: float, root: Path) -> None:
        self.workload: Workload = importlib.import_module(name).workload
        self.name, self.mbit, self.faster, self.root = name, mbit, faster, root
        self.app = WORKLOADS / f"{name}.py"
        (root / "cluster.yaml").write_text(topology(self.workload, mbit))
        write_costs(root / "costs.json", costs(name, self.workload, faster))

    def priced(self, placement: str) -> dict[str, Any]:
        """Writes the assignment of a placement; what the model says of it."""
        file = self.root / f"{placement}.json"
        command = [*EDGESERVE, "plan", str(self.app), "--topology", str(self.root / "cluster.yaml")]
        command += ["--costs", str(self.root / "costs.json"), "--json"]
        if placement == "planned":
            command += ["--apply", str(file)]
        else:
            graph = json.loads(self._edgeserve("graph", "--format", "json", str(self.app)))
            upstream = {node["name"]: node["inputs"] for node in graph["nodes"]}
            routing: dict[str, Literal["eager", "lazy"]] = dict.fromkeys((*self.workload.rates, *self.workload.costs), "eager")
            where = places(placement, self.workload, upstream) | {source: (host,) for source, host in self.workload.places.items()}
            write_assignment(file, Assignment(pipeline=self.name, places=where | {self.workload.sink: (CENTRE,)}, routing=routing))
            command += ["--current", str(file)]
        env = os.environ | {"REPLICAS": str(len(HOSTS) if placement == "parallel" else 1)}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False)
        found = json.loads(done.stdout) if done.stdout else {"placements": {}}
        priced: dict[str, Any] = found["placements"].get("plan" if placement == "planned" else "current", {})
        return priced

    def _edgeserve(self, *arguments: str) -> str:
        return subprocess.run([*EDGESERVE, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

    def run(self, placement: str, seconds: float) -> dict[str, Any]:
        """One run of a placement, whose assignment is written."""
        workload = self.workload
        with Cluster("topologies", hosts=HOSTS, link=f"{self.mbit}mbit", broker=CENTRE) as cluster:
            tokens = {host: Cores(cluster.root / f"cores-{host}", workload.cores[host]) for host in HOSTS}
            out, at = cluster.root / "notes", time.time() + START_S
            env = {
                "SECONDS": str(seconds),
                "FASTER": str(self.faster),
                "AT": str(at),
                "OUT": str(out),
                "REPLICAS": str(len(HOSTS) if placement == "parallel" else 1),
            }
            command = [*EDGESERVE, "run", str(self.app), "--node", cluster.node, "--assignment", str(self.root / f"{placement}.json")]
            runs = [cluster.on(host, *command, "--host", host, env=env | {"CORES": str(cluster.root / f"cores-{host}")}) for host in HOSTS]
            time.sleep(max(0.0, at - time.time()))
            before, ticks = [cluster.network.counters(host) for host in HOSTS], _ticks()
            time.sleep(seconds)
            busy, after = _busy(ticks, _ticks()), [cluster.network.counters(host) for host in HOSTS]
            # What is still on its way.
            ends = time.monotonic() + OVER_S
            while time.monotonic() < ends and len(_lines(out)) < int(seconds * workload.hz * self.faster):
                time.sleep(0.1)
            for each in runs:
                each.send_signal(signal.SIGINT)
            for each in runs:
                each.wait(60)
            for cores in tokens.values():
                cores.close()
            lines = _lines(out)
        moved = {host: sum(a) - sum(b) for host, a, b in zip(HOSTS, after, before, strict=True)}
        return measured(lines, at, seconds, self.faster, workload) | {"busy": busy, "bytes_s": {h: m / seconds for h, m in moved.items()}}


def measured(lines: list[list[int]], at: float, seconds: float, faster: float, workload: Workload) -> dict[str, Any]:
    """What the sink's notes say: when the inputs were due, when the result came, the answer."""
    due, came = ([line[n] / 1e9 - at for line in lines] for n in (0, 1))
    ages = sorted((b - a) * 1e3 for a, b in zip(due, came, strict=True))
    if not ages:
        return {"results": 0, "hz": 0.0, "p50_ms": None, "p99_ms": None, "mean_ms": None, "right": 0.0, "behind_s": seconds}
    right = looks = at_ = 0
    newest, answer = float("-inf"), None
    order = sorted(zip(came, due, [line[2] for line in lines], strict=True))
    while (now := looks * EVERY_S) < seconds:
        while at_ < len(order) and order[at_][0] <= now:
            if order[at_][1] > newest:
                newest, answer = order[at_][1], order[at_][2]
            at_ += 1
        right += answer == workload.truth(now * faster)
        looks += 1
    return {
        "results": len(lines),
        "hz": sum(0 <= each < seconds for each in came) / seconds,
        "p50_ms": ages[len(ages) // 2],
        "p99_ms": ages[int(len(ages) * 0.99)],
        "mean_ms": statistics.fmean(ages),
        "right": right / looks,
        "behind_s": came[-1] - due[-1],
    }


def _lines(file: Path) -> list[list[int]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _ticks() -> list[int]:
    return [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def _busy(before: list[int], after: list[int]) -> float:
    passed = [b - a for a, b in zip(before, after, strict=True)]
    return 1 - (passed[3] + passed[4]) / sum(passed)


def show(case: Case, placement: str, said: dict[str, Any], run: dict[str, Any]) -> None:
    """A line of the table."""
    latency = next(iter(said.get("latency_ms", {}).values()), None)
    wanted = sum(said.get("link_bytes_s", {}).values())
    figures = [run["hz"], run["p50_ms"], run["p99_ms"], latency, 100 * run["right"], run["behind_s"]]
    shown = "".join(f"{each:9.1f}" if each is not None else "        -" for each in figures)
    moved = f"{sum(run['bytes_s'].values()) / 1e6:9.2f}{wanted / 1e6:9.2f}"
    void = "   void: the machine was busy" if run["busy"] > BUSY else ""
    print(f"{case.name:10} {case.mbit:5} {placement:14}{shown}{moved}{100 * run['busy']:7.0f}{void}", flush=True)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=("activity", "driving", "intrusion"))
    parser.add_argument("--mbit", type=int, action="append", help="of each host's link; default: the workload's")
    parser.add_argument("--only", choices=PLACEMENTS, action="append")
    parser.add_argument("--faster", type=float, default=1.0, help="so many times the sources' rates")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="writes the figures there")
    a = parser.parse_args()
    sys.path.insert(0, str(WORKLOADS))  # as for `edgeserve run`
    print(f"{'':10} Mbit/s {'':13} results   p50 ms   p99 ms  mean ms    right   behind     MB/s     MB/s   busy")
    print(f"{'':10} {'':6} {'':13}     a s              age    model      in %        s          model   in %")
    found: dict[str, Any] = {}
    wrong = list[str]()
    for mbit in a.mbit or importlib.import_module(a.workload).workload.bandwidths:
        with tempfile.TemporaryDirectory(prefix="edgeserve-topologies-") as folder:
            case = Case(a.workload, mbit, a.faster, Path(folder))
            runs: dict[str, Any] = {}
            for placement in a.only or PLACEMENTS:
                said = case.priced(placement)
                runs[placement] = case.run(placement, a.seconds) | {"model": said}
                show(case, placement, said, runs[placement])
        found[str(mbit)] = runs
        others = [run["mean_ms"] for name, run in runs.items() if name != "planned" and run["mean_ms"] is not None]
        planned = runs.get("planned")
        if planned and others and (planned["mean_ms"] is None or planned["mean_ms"] > NEAR * min(others)):
            wrong.append(f"{a.workload} at {mbit} Mbit/s: planned {planned['mean_ms']} ms, the best of the others {min(others):.1f} ms")
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
