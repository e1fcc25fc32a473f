"""What a placement costs, by the model that the solver uses, and in the terms of the problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from edgeserve.placement.check import close_to, listed, shown
from edgeserve.placement.errors import InvalidPlan
from edgeserve.placement.model import TOLERANCE, Model, Site
from edgeserve.placement.problem import Problem, Task
from edgeserve.placement.queueing import waiting
from edgeserve.placement.state import State, transfers

Mode = Literal["eager", "lazy"]
Assignment = Mapping[str, str | Sequence[str]]
"""Task to its node, or to the nodes of its replicas."""
Routing = Mapping[tuple[str, str], Mode] | Mode
"""(stream, task or sink) to how it travels, or one mode for all."""
UNITS = {"cpu": " cores", "memory": " bytes", "link": " bytes/s"}
"""What a violation of this name is counted in; all others are counts."""


def amount(number: float) -> str:
    """A number as a message shows it: whole if it is large, so that it can be told from one near by."""
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:.4g}"


@dataclass(frozen=True)
class Violation:
    """A capacity or a wish that a placement breaks.

    Attributes:
        name: `cpu`, `memory`, `accelerator`, `link`, `pin`, `zone`, `separation`, `colocation` or `replicas`.
        where: the node, link, task or edge.
        used: how much is used, in cores, bytes, accelerators, bytes per second, or a count.
        limit: how much may be.
        by: the tasks, or on a link the streams, that use it.
    """

    name: str
    where: str
    used: float
    limit: float
    by: tuple[str, ...] = ()

    def __str__(self) -> str:
        who = f", by {listed(self.by)}" if self.by else ""
        return f"{self.name} of {self.where}: {amount(self.used)} of {amount(self.limit)}{UNITS.get(self.name, '')}{who}"


@dataclass(frozen=True)
class Load:
    """What a node carries: busy cores and bytes, the part of its cores that is busy, and how many runs wait in the mean.

    Above `max_utilisation` as many wait as at it.
    """

    cores: float
    memory_bytes: float
    utilisation: float
    waiting: float
    accelerators: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What a placement costs.

    Attributes:
        objective: the weighted sum that `solve` makes small: `terms` added up.
        terms: `latency`, `waiting`, `bytes`, `cost`, weighted.
        latency_ms: per sink, from event to result in the mean, waiting included. Infinite behind what is loaded fully.
        unloaded_ms: per sink, without waiting.
        nodes: per node its load.
        link_bytes_s: per link the bytes per second, in both directions.
        link_utilisation: per link the part of its bandwidth that is used; of a duplex one in the direction where that is more.
        violations: what it breaks; empty when it can be run.
    """

    objective: float
    terms: Mapping[str, float]
    latency_ms: Mapping[str, float]
    unloaded_ms: Mapping[str, float]
    nodes: Mapping[str, Load]
    link_bytes_s: Mapping[str, float]
    link_utilisation: Mapping[str, float]
    violations: tuple[Violation, ...]

    @property
    def feasible(self) -> bool:
        """Whether nothing is violated."""
        return not self.violations


def evaluate(problem: Problem, assignment: Assignment, routing: Routing = "lazy") -> Evaluation:
    """Prices a placement, feasible or not. What is overloaded is a violation by name; no figure is NaN.

    Args:
        problem: what is placed.
        assignment: for each task its node, or the nodes of its replicas.
        routing: for each edge (stream, task or sink) how it travels, or one mode for all; edges that are not named are lazy.

    Raises:
        InvalidPlan: a task or a node is missing or unknown, or an edge, or what is given is no mapping.
        InvalidProblem: what is given is no problem, or a node of it cannot be reached.
    """
    model = Model(problem)
    sites, stray = read_assignment(model, assignment)
    return report(State(model, sites, read_routing(model, routing)), stray)


def read_assignment(model: Model, assignment: Assignment, what: str = "assignment") -> tuple[list[Site], list[Violation]]:
    """The sites of all groups, and what separates tasks that should be together; those count where their first task is."""
    for name in mapping(assignment, what, "a dict from task to node (a Plan has one in `.assignment`)"):
        if name not in model.task_number:
            raise InvalidPlan(f"{what}: there is no task {shown(name)}{_hint(name, model.task_number)}")
    sites: list[Site] = [()] * len(model.groups)
    stray = []
    for number, task in enumerate(model.tasks):
        if task.name not in assignment:
            raise InvalidPlan(f"{what}: the task {task.name!r} has no node; assign each task to one")
        names = site_names(assignment[task.name], f"{what}[{task.name!r}]")
        for name in names:
            if name not in model.node_number:
                raise InvalidPlan(f"{what}[{task.name!r}]: there is no node {name!r}{_hint(name, model.node_number)}")
        if not names or len(set(names)) < len(names):
            raise InvalidPlan(f"{what}[{task.name!r}] is {shown(names)}: name at least one node, and each once")
        site = tuple(sorted(model.node_number[name] for name in names))
        group = model.group_of[number]
        if sites[group] and sites[group] != site:
            stray.append(Violation("colocation", task.name, 1, 0))
        sites[group] = sites[group] or site
    return sites, stray


def mapping(given: Any, what: str, wanted: str) -> Mapping[Any, Any]:
    """What is given, if it is a mapping."""
    if not isinstance(given, Mapping):
        raise InvalidPlan(f"{what} is {shown(given)}: give {wanted}")
    return given


def site_names(given: Any, where: str) -> tuple[str, ...]:
    """The names of one node or of several."""
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence | Set) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise InvalidPlan(f"{where} is {shown(given)}: give the name of a node, or a tuple of such")
    return names


def read_routing(model: Model, routing: Routing) -> list[bool]:
    """Whether each edge is lazy."""
    if isinstance(routing, str):
        routing = {key: routing for key in model.edge_number}
    lazy = [True] * len(model.edges)
    for key, mode in mapping(routing, "routing", "'eager', 'lazy' or a dict from (stream, task or sink) to one of these").items():
        if key not in model.edge_number:
            raise InvalidPlan(f"routing: there is no edge {shown(key)}; an edge is (stream, task or sink that takes it)")
        if mode not in ("eager", "lazy"):
            raise InvalidPlan(f"routing[{key!r}] is {shown(mode)}: use 'eager' or 'lazy'")
        lazy[model.edge_number[key[0], key[1]]] = mode == "lazy"
    return lazy


def _hint(name: Any, known: Mapping[str, int]) -> str:
    close = close_to(name, known) if isinstance(name, str) else None
    return f"; did you mean {close!r}?" if close else f"; there are {listed(known)}"


def report(state: State, stray: Sequence[Violation] = ()) -> Evaluation:
    """The evaluation of a state."""
    model, problem = state.model, state.model.problem
    weights = problem.weights
    links, nodes, along = _waits(state)
    bytes_term = weights.bytes * sum(state.links)
    carried = by_link(model, state.links)
    cost = sum(link.cost_per_byte * carried[link.name] for link in problem.links)
    cost += sum(node.cost_per_core_s * busy for node, busy in zip(problem.nodes, state.cpu, strict=True))
    latency = sum(state.latency) + sum(model.edges[e].weight * state.delay[e] for e in model.plain_sinks)
    waiting = sum(count for count, _ in links) + sum(count for count, _ in nodes)
    terms = {"latency": latency, "waiting": weights.waiting * waiting, "bytes": bytes_term, "cost": weights.cost * cost}
    return Evaluation(
        objective=sum(terms.values()),
        terms=terms,
        latency_ms=_latency(state, [wait for _, wait in links], [wait for _, wait in nodes], model.since_s, along),
        unloaded_ms=_latency(state, [0.0] * len(links), [0.0] * len(nodes), [0.0] * len(model.tasks), along),
        nodes={
            name: Load(
                state.cpu[n],
                state.memory[n],
                state.cpu[n] / model.cores_of[n] if model.cores_of[n] else float(state.cpu[n] > 0),
                nodes[n][0],
                {kind: row[n] for kind, row in zip(model.kinds, state.accelerators, strict=True) if row[n]},
            )
            for n, name in enumerate(model.nodes)
        },
        link_bytes_s=carried,
        link_utilisation=by_link(model, [rate * each for rate, each in zip(state.links, model.per_byte_of, strict=True)], max),
        violations=(*_violations(state), *stray),
    )


def by_link(model: Model, numbers: Sequence[float], add: Callable[[Sequence[float]], float] = sum) -> dict[str, float]:
    """Numbers of channels as those of links, by name: the two directions of a duplex one added up, or the larger one of the two."""
    found: dict[int, list[float]] = {}
    for link, number in zip(model.routes.link_of, numbers, strict=True):
        found.setdefault(link, []).append(number)
    return {model.problem.links[link].name: add(each) for link, each in found.items()}


def _waits(state: State) -> tuple[list[tuple[float, float]], list[tuple[float, float]], dict[tuple[int, int], float]]:
    """How many wait, and how long each (seconds), per channel and per node; and of two channels which part of the second one's bytes comes
    straight from the first. What is over its limit waits as at the limit, in the objective."""
    model = state.model
    messages = [0.0] * len(state.links)
    along: dict[tuple[int, int], float] = {}
    for number in range(len(model.streams)):
        for a, b, rate, size in transfers(model, number, state.sites, state.lazy):
            path = model.routes.path(a, b) if rate * size else ()
            for link in path:
                messages[link] += rate
            for pair in pairwise(path):
                along[pair] = along.get(pair, 0.0) + rate * size / state.links[pair[1]]
    runs = [0.0] * len(model.nodes)
    for number, site in enumerate(state.sites):
        for node in site:
            runs[node] += model.groups[number].runs / len(site)
    loads = [rate * per_byte for rate, per_byte in zip(state.links, model.per_byte_of, strict=True)]
    more = model.variability
    links = [_wait(load, limit, 2.0, count, more) for load, limit, count in zip(loads, model.link_limit_of, messages, strict=True)]
    nodes = []
    for n, busy in enumerate(state.cpu):
        if model.cores_of[n]:
            nodes.append(_wait(busy / model.cores_of[n], model.cpu_limit_of[n], model.cpu_power_of[n], runs[n], more))
        else:
            nodes.append((0.0, math.inf if runs[n] else 0.0))
    return links, nodes, along


def _wait(load: float, limit: float, power: float, rate: float, variability: float) -> tuple[float, float]:
    counted = variability * waiting(min(load, limit), power)
    if load >= 1.0:
        return counted, math.inf
    return counted, variability * waiting(load, power) / rate if rate > 0 else 0.0


def _latency(
    state: State, links: Sequence[float], nodes: Sequence[float], since_s: Sequence[float], along: Mapping[tuple[int, int], float]
) -> dict[str, float]:
    model = state.model

    def on(a: int, b: int) -> float:
        """What has waited for a link comes at its pace, and for the next one waits for what comes from elsewhere: of two in a row that
        have the same messages only the longer wait counts (Friedman, Reduction methods for tandem queuing systems, 1965)."""
        path = model.routes.path(a, b)
        total = links[path[0]] if path else 0.0
        for before, link in pairwise(path):
            less = min(total, links[link])
            total = total + links[link] - (along.get((before, link), 0.0) * less if math.isfinite(less) else 0.0)
        return total

    delay = list(state.delay)
    for edge in model.edges:
        makers = model.site(edge.maker_group, edge.maker_node, state.sites)
        takers = model.site(edge.taker_group, edge.taker_node, state.sites)
        for a in makers:
            for b in takers:
                waits = on(a, model.broker) + on(model.broker, b) + (on(a, b) if state.lazy[edge.number] and not edge.small else 0.0)
                delay[edge.number] += waits / (len(makers) * len(takers))
    service = list(state.service)
    for task, group in enumerate(model.group_of):
        site = state.sites[group]
        service[task] += sum(nodes[n] for n in site) / len(site) + since_s[task]
        if model.handed_bytes(task, len(site)):
            service[task] += sum(on(n, model.broker) + on(model.broker, n) for n in site) / len(site)
    latency = {}
    done: dict[int, float] = {}
    for component in model.components:
        done.update(model.arrival(component, delay, service))
    for edge in model.edges:
        if edge.task < 0:
            latency[edge.consumer] = 1e3 * (delay[edge.number] + (done[edge.maker] if edge.maker >= 0 else 0.0))
    return latency


def _violations(state: State) -> list[Violation]:
    model, problem = state.model, state.model.problem
    found = []
    tasks: list[list[Task]] = [[] for _ in model.nodes]
    for number, task in enumerate(model.tasks):
        for n in state.sites[model.group_of[number]]:
            tasks[n].append(task)
    for n, node in enumerate(problem.nodes):
        # Where there is no core, even a run that takes no time would need one.
        busy = state.cpu[n] or float(bool(tasks[n]) and not node.cores)
        if busy > node.cores * node.max_utilisation * (1 + TOLERANCE):
            users = tuple(task.name for task in tasks[n])
            found.append(Violation("cpu", node.name, busy, node.cores * node.max_utilisation, users))
        if state.memory[n] > node.memory_bytes * (1 + TOLERANCE):
            users = tuple(task.name for task in tasks[n] if task.memory_bytes)
            found.append(Violation("memory", node.name, state.memory[n], node.memory_bytes, users))
        for kind, row in zip(model.kinds, state.accelerators, strict=True):
            if row[n] > node.accelerators.get(kind, 0) + TOLERANCE:
                users = tuple(task.name for task in tasks[n] if task.accelerators.get(kind))
                found.append(Violation("accelerator", f"{node.name} ({kind})", row[n], node.accelerators.get(kind, 0), users))
    for number, rate in enumerate(state.links):
        link = problem.links[model.routes.link_of[number]]
        if rate > link.bandwidth_bytes_s * link.max_utilisation * (1 + TOLERANCE):
            flows = sorted((-flow[number], s) for s, flow in enumerate(state.flows) if flow.get(number))
            users = tuple(model.streams[s].name for _, s in flows)
            found.append(Violation("link", link.name, rate, link.bandwidth_bytes_s * link.max_utilisation, users))
    for number, group in enumerate(model.groups):
        site, name = state.sites[number], model.tasks[group.tasks[0]].name
        wrong = [node for node in site if not model.wished[number][node]]
        if wrong:
            node_name = model.nodes[wrong[0]]
            pinned = any(node_name not in problem.pins.get(model.tasks[task].name, (node_name,)) for task in group.tasks)
            found.append(Violation("pin", f"{name} on {node_name} (by {'`pins`' if pinned else '`stays_in`'})", len(wrong), 0))
        if not group.least <= len(site) <= group.most:
            found.append(Violation("replicas", name, len(site), group.most if len(site) > group.most else group.least))
        for other in group.apart:
            shared = set(site) & set(state.sites[other]) if number < other else ()
            if shared:
                both = f"{name} and {model.tasks[model.groups[other].tasks[0]].name} on {model.nodes[min(shared)]}"
                found.append(Violation("separation", both, len(shared), 0))
    for edge, leaving in zip(model.edges, state.leaving, strict=True):
        if leaving:
            where = f"{model.streams[edge.stream].name} -> {edge.consumer} out of {model.zone_names[edge.zone]}"
            found.append(Violation("zone", where, 1, 0))
    return found
