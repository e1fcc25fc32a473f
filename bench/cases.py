"""A workload on four hosts with links of one bandwidth: what the model says of a placement, and what a run of it gives.

Hosts are network namespaces, the broker is NATS on the last one. Tasks sleep with a core token of their host (`workloads/common.py`).
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
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
HEADER, SETTLE, HOP = "580 B", "1180 B", "1.2 ms"
"""What a message over NATS costs beside its payload and its way, on this network: the same for all workloads."""
BURST = "8kb"
"""What a link may carry at once: little, so that a message takes the time that its bytes take at the link's rate."""
START_S, SETTLE_S, OVER_S, BUSY, EVERY_S = 120.0, 3.0, 10.0, 0.8, 0.01
DUE_S = 20.0
EDGESERVE = [sys.executable, "-P", "-c", "from edgeserve.cli import main; main()"]


def stop_well() -> None:
    """A run that is told to end takes its hosts and its broker along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def load(name: str) -> Workload:
    """The workload of a file in `workloads`."""
    if str(WORKLOADS) not in sys.path:
        sys.path.insert(0, str(WORKLOADS))  # as for `edgeserve run`
    found: Workload = importlib.import_module(name).workload
    return found


def topology(workload: Workload, mbit: int) -> str:
    """The cluster: each host has a link to a switch."""
    lines = ["nodes:", "  switch: {cores: 0}"]
    lines += [f"  {host}: {{cores: {workload.cores[host]}, memory: 8 GB}}" for host in HOSTS]
    lines += ["links:"]
    lines += [f"  to_{host}: {{ends: [{host}, switch], bandwidth: {mbit} Mbit/s, latency: 0.1 ms, duplex: true}}" for host in HOSTS]
    lines += [f"broker: {CENTRE}", f"header: {HEADER}", f"settle: {SETTLE}", f"hop: {HOP}", f"variability: {variability(workload):.4f}"]
    lines += ["sources:", *(f"  {name}: {host}" for name, host in workload.places.items())]
    return "\n".join([*lines, "sinks:", f"  {workload.sink}: {CENTRE}", ""])


def variability(workload: Workload) -> float:
    """Of the times between messages of all sources: each keeps its pace, and some are due at the same times."""
    due = sorted(n / hz for hz, _ in workload.rates.values() for n in range(int(DUE_S * hz)))
    gaps = [after - before for before, after in itertools.pairwise(due)]
    return statistics.pvariance(gaps) / statistics.fmean(gaps) ** 2


def costs(name: str, workload: Workload, faster: float) -> Costs:
    """What everything costs: it is known, since tasks sleep."""
    return Costs(
        pipeline=name,
        sources={
            source: SourceCost(rate_hz=hz * faster, bytes=size, messages=1, phase_ms=0) for source, (hz, size) in workload.rates.items()
        },
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


def places(placement: str, workload: Workload, upstream: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
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
        self.workload = load(name)
        self.name, self.mbit, self.faster, self.root = name, mbit, faster, root
        self.app = WORKLOADS / f"{name}.py"
        (root / "cluster.yaml").write_text(topology(self.workload, mbit))
        write_costs(root / "costs.json", costs(name, self.workload, faster))

    def priced(self, placement: str, where: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Any]:
        """Writes the assignment of a placement, eager unless it is planned; what the model says of it."""
        file = self.root / f"{placement}.json"
        command = [*EDGESERVE, "plan", str(self.app), "--topology", str(self.root / "cluster.yaml")]
        command += ["--costs", str(self.root / "costs.json"), "--json"]
        if placement == "planned":
            command += ["--apply", str(file)]
        else:
            if where is None:
                graph = json.loads(self._edgeserve("graph", "--format", "json", str(self.app)))
                where = places(placement, self.workload, {node["name"]: node["inputs"] for node in graph["nodes"]})
            ends = {source: (host,) for source, host in self.workload.places.items()} | {self.workload.sink: (CENTRE,)}
            routing: dict[str, Literal["eager", "lazy"]] = dict.fromkeys((*self.workload.rates, *self.workload.costs), "eager")
            write_assignment(file, Assignment(pipeline=self.name, places={**where, **ends}, routing=routing))
            command += ["--current", str(file)]
        env = os.environ | {"REPLICAS": str(self.replicas(placement))}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False)
        found = json.loads(done.stdout) if done.stdout else {}
        priced: dict[str, Any] = found.get("placements", {}).get("plan" if placement == "planned" else "current", {})
        return priced

    def replicas(self, placement: str) -> int:
        """How many processes run each task."""
        return len(HOSTS) if placement == "parallel" else 1

    def _edgeserve(self, *arguments: str) -> str:
        return subprocess.run([*EDGESERVE, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

    def run(self, placement: str, seconds: float, tries: int = 1) -> dict[str, Any]:
        """One run of a placement, whose assignment is written; again while the machine is too busy, so often."""
        found = self._run(placement, seconds)
        while found["busy"] > BUSY and (tries := tries - 1):
            found = self._run(placement, seconds)
        return found

    def _run(self, placement: str, seconds: float) -> dict[str, Any]:
        workload = self.workload
        with Cluster("cases", hosts=HOSTS, link=f"{self.mbit}mbit", broker=CENTRE, burst=BURST) as cluster:
            tokens = {host: Cores(cluster.root / f"cores-{host}", workload.cores[host]) for host in HOSTS}
            out, starts, ready = cluster.root / "notes", cluster.root / "at", cluster.root / "ready"
            ready.mkdir()
            env = {
                "SECONDS": str(seconds),
                "FASTER": str(self.faster),
                "AT": str(starts),
                "READY": str(ready),
                "OUT": str(out),
                "REPLICAS": str(self.replicas(placement)),
            }
            command = [*EDGESERVE, "run", str(self.app), "--node", cluster.node, "--assignment", str(self.root / f"{placement}.json")]
            runs = [cluster.on(host, *command, "--host", host, env=env | {"CORES": str(cluster.root / f"cores-{host}")}) for host in HOSTS]
            # One that looks what there is to run, on each host, and one for each node.
            wanted = len(HOSTS) + len(workload.rates) + len(workload.costs) * self.replicas(placement) + 1
            ends = time.monotonic() + START_S
            while len(list(ready.iterdir())) < wanted and time.monotonic() < ends:
                time.sleep(0.1)
            at = time.time() + SETTLE_S
            (cluster.root / "at-").write_text(str(at))
            (cluster.root / "at-").rename(starts)
            time.sleep(max(0.0, at - time.time()))
            before, ticks = [cluster.network.counters(host) for host in HOSTS], _ticks()
            time.sleep(max(0.0, at + seconds - time.time()))
            took, busy, after = time.time() - at, _busy(ticks, _ticks()), [cluster.network.counters(host) for host in HOSTS]
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
        moved = {f"to_{host}": (sum(a) - sum(b)) / took for host, a, b in zip(HOSTS, after, before, strict=True)}
        return measured(lines, at, seconds, self.faster, workload) | {"busy": busy, "link_bytes_s": moved, "faster": self.faster}


def measured(lines: list[list[int]], at: float, seconds: float, faster: float, workload: Workload) -> dict[str, Any]:
    """What the sink's notes say: when the inputs were due, when the result came, the answer."""
    due, came = ([line[n] / 1e9 - at for line in lines] for n in (0, 1))
    ages = sorted((b - a) * 1e3 for a, b in zip(due, came, strict=True))
    found = {"results": len(ages), "hz": sum(0 <= each < seconds for each in came) / seconds, "wanted_hz": workload.hz * faster}
    if not ages:
        return found | {"p50_ms": None, "p99_ms": None, "mean_ms": None, "right": 0.0, "backlog_s": seconds, "grows": True}
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
    in_time = [(b, b - a) for a, b in zip(due, came, strict=True)]
    early = [age for when, age in in_time if seconds / 4 <= when < seconds / 2]
    late = [age for when, age in in_time if 3 * seconds / 4 <= when < seconds]
    grew = statistics.median(late) - statistics.median(early) if early and late else seconds
    return found | {
        "p50_ms": ages[len(ages) // 2],
        "p99_ms": ages[int(len(ages) * 0.99)],
        "mean_ms": statistics.fmean(ages),
        "right": right / looks,
        "backlog_s": max(came) - max(due),
        # In a quarter of the run, by more than what chance does.
        "grows": found["hz"] < 0.95 * found["wanted_hz"] or grew > max(0.02 * seconds, 0.2 * statistics.median(early)),
    }


def off(said: Mapping[str, float], got: Mapping[str, float]) -> float:
    """By how much the bytes of a link are farther from what the model says of it than those of any other, as a part of it."""
    return max(abs(got[link] / said[link] - 1) for link in got if said.get(link)) if any(said.get(link) for link in got) else float("inf")


def _lines(file: Path) -> list[list[int]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _ticks() -> list[int]:
    return [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def _busy(before: list[int], after: list[int]) -> float:
    passed = [b - a for a, b in zip(before, after, strict=True)]
    return 1 - (passed[3] + passed[4]) / sum(passed)
