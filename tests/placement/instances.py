"""Random placement problems, small enough to try everything or as large as a cluster."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

from edgeserve.placement import Link, Node, Problem, Route, Sink, Source, Task, Weights
from edgeserve.placement.model import Model
from edgeserve.placement.state import State

MOST_CHOICES = 4_000


def small(seed: int) -> Problem:
    """A problem of three tasks with all features in it, whose placements and modes can all be tried."""
    rng = random.Random(seed)
    while True:
        problem = _small(rng)
        if choices(Model(problem)) <= MOST_CHOICES:
            return problem


def _small(rng: random.Random) -> Problem:
    names = [f"n{k}" for k in range(rng.choice([3, 4]))]
    nodes = tuple(
        Node(
            name=name,
            cores=rng.choice([1, 2, 4]),
            memory_bytes=rng.choice([2e9, 4e9, 8e9]),
            accelerators={"gpu": rng.choice([0, 0, 1, 2])},
            speed=rng.choice([0.5, 1.0, 2.0]),
            zone=rng.choice(["eu", "eu", "us"]),
            max_utilisation=rng.choice([0.6, 0.8, 0.9]),
            cost_per_core_s=rng.choice([0.0, 0.5, 2.0]),
        )
        for name in names
    )
    hub = Node(name="hub", cores=0, zone="eu")
    ends = [(name, "hub") for name in names] + ([(names[0], names[1])] if rng.random() < 0.4 else [])
    links = tuple(
        Link(
            name=f"l{k}",
            ends=pair,
            bandwidth_bytes_s=rng.choice([4e5, 1e6, 4e6]),
            latency_ms=rng.choice([0.5, 2.0, 10.0]),
            max_utilisation=rng.choice([0.6, 0.8, 0.9]),
            cost_per_byte=rng.choice([0.0, 1e-7]),
            duplex=rng.random() < 0.3,
        )
        for k, pair in enumerate(ends)
    )
    routes = (Route(start=names[0], end=names[2], links=("l0", "l2")),) if rng.random() < 0.4 else ()
    zoned = rng.random() < 0.4
    sources = tuple(
        Source(
            name=name,
            node=rng.choice(names),
            rate_hz=rng.choice([5.0, 10.0, 20.0]),
            bytes=rng.choice([200.0, 5e3, 2e4]),
            lazy=rng.random() < 0.8,
        )
        for name in ("s0", "s1")
    )
    if zoned:
        home = {node.name: node.zone for node in nodes}
        first = sources[0]
        sources = (
            Source(name="s0", node=first.node, rate_hz=first.rate_hz, bytes=first.bytes, stays_in=home[first.node], lazy=first.lazy),
            sources[1],
        )
    wish = rng.choice(["colocate", "separate", "none", "separate"])
    joins = 2 if rng.random() < 0.4 else 1
    tasks = (
        _task(rng, "t0", ("s0",), replicas=2 if rng.random() < 0.5 else 1),
        _task(
            rng,
            "t1",
            rng.choice([("s0", "s1"), ("t0", "s1"), ("s0", "t0")]),
            least=joins if wish != "colocate" and rng.random() < 0.5 else 1,
            replicas=joins,
            processes=rng.choice([None, 2, 3]),
        ),
        _task(rng, "t2", rng.choice([("t0", "t1"), ("t1",), ("t1", "s1")])),
    )
    if all("t0" not in task.inputs for task in tasks):
        sinks: tuple[Sink, ...] = (
            Sink(name="out", input="t2", node=rng.choice(names)),
            Sink(name="side", input="t0", node=rng.choice(names)),
        )
    else:
        sinks = (Sink(name="out", input="t2", node=rng.choice(names), weight=rng.choice([1.0, 3.0])),)
    return Problem(
        nodes=(*nodes, hub),
        links=links,
        routes=routes,
        broker=rng.choice([*names, "hub"]),
        sources=sources,
        tasks=tasks,
        sinks=sinks,
        pins={"t1": tuple(rng.sample(names, 2))} if rng.random() < 0.3 else {},
        colocate=(("t1", "t2"),) if wish == "colocate" else (),
        separate=(("t1", "t2"),) if wish == "separate" else (),
        reference_bytes=rng.choice([0.0, 160.0]),
        fetch_bytes=rng.choice([0.0, 500.0]),
        settle_bytes=rng.choice([0.0, 900.0]),
        hop_ms=rng.choice([0.0, 2.0]),
        variability=rng.choice([1.0, 1.0, 0.0, 2.0]),
        weights=Weights(waiting=rng.choice([0.0, 0.2, 1.0]), bytes=rng.choice([0.0, 1e-7]), cost=rng.choice([0.0, 1.0])),
    )


def _task(rng: random.Random, name: str, inputs: tuple[str, ...], replicas: int = 1, least: int = 1, processes: int | None = None) -> Task:
    return Task(
        name=name,
        inputs=inputs,
        cpu_s=rng.choice([0.002, 0.01, 0.03]),
        memory_bytes=rng.choice([0.0, 1e9, 2e9]),
        output_bytes=rng.choice([100.0, 5e3]),
        outputs_per_run=rng.choice([1.0, 1.0, 0.25]),
        accelerators={"gpu": 1} if rng.random() < 0.15 else {},
        trigger=rng.choice(["any", "all", inputs[0]]),
        min_interval_ms=rng.choice([0.0, 0.0, 80.0]),
        replicas_min=least,
        replicas_max=replicas,
        processes=processes,
        shares_sets=rng.random() < 0.8,
        lazy=rng.random() < 0.8,
    )


def _sites(model: Model) -> list[list[tuple[int, ...]]]:
    lists = []
    for number, group in enumerate(model.groups):
        nodes = [n for n in range(len(model.nodes)) if model.wished[number][n] and model.cores[n] > 0]
        lists.append([site for size in range(group.least, group.most + 1) for site in itertools.combinations(nodes, size)])
    return lists


def choices(model: Model) -> int:
    """How many placements there are, with all modes."""
    return math.prod(len(options) for options in _sites(model)) * 2 ** len(model.edges)


def everything(model: Model) -> Iterator[State]:
    """All placements of a problem with all modes."""
    for sites in itertools.product(*_sites(model)):
        for lazy in itertools.product([True, False], repeat=len(model.edges)):
            yield State(model, sites, lazy)


def brute_force(problem: Problem) -> State | None:
    """The best of all placements; None when none keeps within the capacities."""
    best: State | None = None
    for state in everything(Model(problem)):
        if state.feasible and (best is None or state.cost < best.cost):
            best = state
    return best


def cluster(seed: int, *, nodes: int = 1000, tasks: int = 100, latest: float = 0.1) -> Problem:
    """A cluster in three tiers below a cloud, and applications that crowd at a few of its sites.

    Each application joins sensors of one site, level by level, up to one result. The servers of its site have room for a part of the
    crowd only, and what goes elsewhere shares the site's uplink. `latest` is the part of joins that wait for all of their inputs.
    """
    rng = random.Random(seed)
    hubs = max(nodes // 200, 1)
    sites = max(nodes // 50, 2)
    parts: dict[str, list[Any]] = {
        "nodes": [Node(name="cloud", cores=64, memory_bytes=512e9, speed=2.0, cost_per_core_s=0.02)],
        "links": [],
    }
    for h in range(hubs):
        parts["nodes"].append(Node(name=f"hub{h}", cores=8, memory_bytes=32e9, speed=1.5, cost_per_core_s=0.01))
        parts["links"].append(_link(f"wan{h}", f"hub{h}", "cloud", rng.uniform(20e6, 40e6), rng.uniform(8, 15)))
    for s in range(sites):
        parts["nodes"].append(Node(name=f"site{s}", cores=8, memory_bytes=rng.choice([32e9, 48e9]), speed=1.0))
        parts["links"].append(_link(f"up{s}", f"site{s}", f"hub{s % hubs}", rng.uniform(5e6, 7.5e6), rng.uniform(2, 5)))
    devices: dict[int, list[str]] = {s: [] for s in range(sites)}
    for d in range(nodes - 1 - hubs - sites):
        s = d % sites
        devices[s].append(f"dev{d}")
        parts["nodes"].append(Node(name=f"dev{d}", cores=1, memory_bytes=1e9, speed=rng.choice([0.15, 0.25, 0.4])))
        parts["links"].append(_link(f"radio{d}", f"dev{d}", f"site{s}", rng.uniform(3e6, 6e6), rng.uniform(1, 3)))
    crowded = rng.sample(range(0, sites, hubs), max(min(len(range(0, sites, hubs)), tasks // 100), 1))
    made = _applications(rng, tasks, crowded, devices, latest)
    return Problem(
        nodes=tuple(parts["nodes"]),
        links=tuple(parts["links"]),
        broker="hub0",
        sources=tuple(made["sources"]),
        tasks=tuple(made["tasks"]),
        sinks=tuple(made["sinks"]),
        weights=Weights(waiting=0.3, bytes=1e-9, cost=0.1),
    )


def _link(name: str, a: str, b: str, bandwidth: float, latency: float) -> Link:
    return Link(name=name, ends=(a, b), bandwidth_bytes_s=bandwidth, latency_ms=latency, max_utilisation=0.7)


def _applications(rng: random.Random, count: int, crowded: list[int], devices: dict[int, list[str]], latest: float) -> dict[str, list[Any]]:
    sources: list[Source] = []
    tasks: list[Task] = []
    sinks: list[Sink] = []
    while len(tasks) < count:
        app = len(sinks)
        site = crowded[app % len(crowded)]
        width = min(rng.choice([2, 3, 4]), max((count - len(tasks)) // 2, 1))
        rate = rng.choice([5.0, 8.0, 10.0])
        level = []
        for k in range(width):
            name, heavy = f"a{app}s{k}", rng.random() < 0.6
            size = rng.uniform(2e4, 5e4) if heavy else rng.uniform(200, 4e3)
            sources.append(Source(name=name, node=rng.choice(devices[site]), rate_hz=rate, bytes=size))
            cpu = rng.uniform(0.01, 0.04) if heavy else rng.uniform(0.001, 0.005)
            tasks.append(_step(rng, f"a{app}t{k}", (name,), cpu, latest))
            level.append(tasks[-1].name)
        while len(level) > 1 and len(tasks) < count:
            pair, level = tuple(level[:2]), level[2:]
            tasks.append(_step(rng, f"a{app}j{len(level)}", pair, rng.uniform(0.003, 0.012), latest))
            level.append(tasks[-1].name)
        where = rng.choice([rng.choice(devices[site]), f"site{site}", "cloud"])
        sinks += [Sink(name=f"a{app}out{k}", input=name, node=where, weight=rng.uniform(0.5, 2)) for k, name in enumerate(level)]
    return {"sources": sources, "tasks": tasks, "sinks": sinks}


def _step(rng: random.Random, name: str, inputs: tuple[str, ...], cpu_s: float, latest: float) -> Task:
    trigger = "all" if rng.random() < latest else rng.choice(["any", inputs[0]])
    return Task(
        name=name,
        inputs=inputs,
        cpu_s=cpu_s,
        memory_bytes=rng.uniform(1e8, 1.2e9),
        output_bytes=rng.choice([500.0, 4e3, 2e4]),
        trigger=trigger,
        min_interval_ms=rng.choice([0.0, 0.0, 50.0]) if len(inputs) > 1 else 0.0,
    )
