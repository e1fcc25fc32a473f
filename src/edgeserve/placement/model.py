"""A problem in numbers: what evaluation, search and bound work on.

Tasks that are colocated form one *group*, which has one *site*: the nodes of its replicas. An *edge* is a stream and who takes it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeserve.placement.check import LARGEST, colocated, shown
from edgeserve.placement.errors import BadValue
from edgeserve.placement.forest import set_of
from edgeserve.placement.problem import ALL, ANY, Problem, Source, Task
from edgeserve.placement.queueing import Array, exponent
from edgeserve.placement.routes import make_routes

Site = tuple[int, ...]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

PACKET_BYTES = 1500.0
"""What a link passes on at a time: of a message on its way over several links all but one packet is on them at the same time."""

SETTLES_HZ = 8.0
"""So often a process that has more to do notes what is done."""

MEMBER_BYTES = 140.0
"""The header of each message of a set that a replica hands to another one, in the set's message."""

TOLERANCE = 1e-9
"""What counts as keeping within a capacity, as a part of it."""


@dataclass(slots=True)
class Edge:
    """A stream on its way to one task or sink; a fixed end has group -1.

    `header` goes through the broker in any case, with the reference to the payload; `settle` is what settling it takes, on its way down,
    though nobody waits for that; `more` is what an eager one adds to it, `bytes` what is fetched of a lazy one. Of a `small` stream the
    payload counts as header.
    """

    number: int
    stream: int
    consumer: str
    task: int
    maker: int
    maker_group: int
    maker_node: int
    taker_group: int
    taker_node: int
    rate: float
    header: float
    settle: float
    more: float
    bytes: float
    share: float
    small: bool
    zone: int
    weight: float = 0.0
    sharing: int = 1


@dataclass(slots=True)
class Stream:
    """What a source or a task sends."""

    name: str
    rate: float
    header: float
    more: float
    bytes: float
    small: bool
    group: int
    node: int
    task: int
    zone: int
    edges: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Group:
    """Tasks that share their nodes; demands are sums over them, at speed 1.

    `memory_at` and `held_at` (accelerators by kind) are those of one of so many nodes; on as many as there can be they are the least.
    """

    tasks: list[int]
    cpu: float = 0.0
    runs: float = 0.0
    least: int = 1
    most: int = 1
    memory_at: list[float] = field(default_factory=list)
    held_at: list[list[float]] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    component: int = -1


@dataclass(slots=True)
class Component:
    """Tasks that are connected by streams between tasks, in order of flow, and the edges to their sinks."""

    tasks: list[int]
    groups: list[int]
    sinks: list[int]


class Model:
    """See the module; arrays are indexed by the numbers of nodes, links, tasks, groups, streams and edges."""

    def __init__(self, problem: Problem) -> None:
        if not isinstance(problem, Problem):
            raise BadValue(f"problem is {shown(problem)}: give a Problem; `Problem.from_json` makes one of its JSON")
        self.problem = problem
        self.nodes = [node.name for node in problem.nodes]
        self.node_number = {name: number for number, name in enumerate(self.nodes)}
        self.broker = self.node_number[problem.broker]
        self.hop_s = problem.hop_ms / 1e3
        weights = problem.weights
        self.variability = problem.variability
        self.latency_weight, self.waiting_weight = weights.latency, weights.waiting * self.variability
        self._set_nodes()
        self.routes = make_routes(problem)
        self._set_links()
        self._set_zones()
        self._pairs: dict[tuple[int, int], tuple[float, float, float]] = {}
        self._set_streams()
        self._set_groups()
        self._set_edges()
        self._set_sets()
        self._set_components()
        self._set_allowed()
        # Plain lists beside the arrays: reading single numbers from these is several times faster.
        self.speed_of, self.cores_of, self.memory_of = self.speed.tolist(), self.cores.tolist(), self.memory.tolist()
        self.cpu_limit_of, self.cpu_power_of = self.cpu_limit.tolist(), self.cpu_power.tolist()
        self.core_price_of, self.byte_price_of = self.core_price.tolist(), self.byte_price.tolist()
        self.per_byte_of, self.link_limit_of = self.per_byte.tolist(), self.link_limit.tolist()

    def _set_nodes(self) -> None:
        nodes, weights = self.problem.nodes, self.problem.weights
        self.cores = np.array([float(node.cores) for node in nodes])
        self.speed = np.array([node.speed for node in nodes])
        self.cpu_limit = np.array([node.max_utilisation for node in nodes])
        self.cpu_power = np.array([exponent(node.cores) for node in nodes])
        self.memory = np.array([node.memory_bytes for node in nodes])
        self.core_price = weights.cost * np.array([node.cost_per_core_s for node in nodes])
        self.kinds = sorted({kind for task in self.problem.tasks for kind, count in task.accelerators.items() if count})
        self.accelerators = np.array([[float(node.accelerators.get(kind, 0)) for node in nodes] for kind in self.kinds]).reshape(
            len(self.kinds), len(nodes)
        )

    def _set_links(self) -> None:
        links, weights = [self.problem.links[number] for number in self.routes.link_of], self.problem.weights
        self.latency = np.array([link.latency_ms / 1e3 for link in links])
        self.per_byte = np.array([1.0 / link.bandwidth_bytes_s for link in links])
        self.link_limit = np.array([link.max_utilisation for link in links])
        self.link_power = np.full(len(links), exponent(1))
        self.byte_price = weights.bytes + weights.cost * np.array([link.cost_per_byte for link in links])

    def _set_zones(self) -> None:
        """Zone 0 is none. The field of a zone is 1 for links that touch a node outside of it."""
        names = sorted({stream.stays_in for stream in self.problem.made if stream.stays_in is not None})
        self.zone_number: dict[str | None, int] = {None: 0, **{name: number for number, name in enumerate(names, 1)}}
        self.zone_names: list[str | None] = [None, *names]
        self.zone_fields = np.zeros((len(names) + 1, len(self.routes.link_of)))
        zones = [node.zone for node in self.problem.nodes]
        for number, link in enumerate(self.problem.links[each] for each in self.routes.link_of):
            ends = {zones[self.node_number[end]] for end in link.ends}
            for zone in names:
                self.zone_fields[self.zone_number[zone], number] = float(ends != {zone})
        self.in_zone = np.ones((len(names) + 1, len(zones)), dtype=bool)
        for zone in names:
            self.in_zone[self.zone_number[zone]] = [found == zone for found in zones]

    def _set_streams(self) -> None:
        problem = self.problem
        self.streams: list[Stream] = []
        self.stream_number: dict[str, int] = {}
        for source in problem.sources:
            self.stream_number[source.name] = len(self.streams)
            node, zone = self.node_number[source.node], self.zone_number[source.stays_in]
            self.streams.append(self._stream(source, source.rate_hz, source.bytes, node, -1, zone))
        self.tasks = problem.tasks
        self.task_number = {task.name: number for number, task in enumerate(problem.tasks)}
        for number, task in enumerate(problem.tasks):
            self.stream_number[task.name] = len(self.streams)
            self.streams.append(self._stream(task, 0.0, task.output_bytes, -1, number, self.zone_number[task.stays_in]))
        self.own_stream = [self.stream_number[task.name] for task in problem.tasks]
        self.order = _flow_order(problem.tasks)
        self.runs = np.zeros(len(problem.tasks))
        self.since_s = [0.0] * len(problem.tasks)
        for number in self.order:
            task = problem.tasks[number]
            rates = [self.streams[self.stream_number[name]].rate for name in task.inputs]
            self.runs[number] = run_rate(task, rates)
            self.since_s[number] = since_s(task, rates, self.variability)
            rate = self.streams[self.own_stream[number]].rate = float(self.runs[number]) * task.outputs_per_run
            if rate > LARGEST:
                raise BadValue(
                    f"tasks[{task.name!r}].outputs_per_run: results come at {rate:g} Hz, and at most {LARGEST:g} can be; lower it"
                )

    def _stream(self, made: Source | Task, rate: float, size: float, node: int, task: int, zone: int) -> Stream:
        """What always travels with its header is a longer header: so no mode has to be chosen for it."""
        problem = self.problem
        reference = min(problem.reference_bytes, size) if made.lazy else size
        more, fetched = (size - reference, size + problem.fetch_bytes) if made.lazy else (0.0, 0.0)
        return Stream(made.name, rate, problem.header_bytes + reference, more, fetched, not made.lazy, -1, node, task, zone)

    def _set_groups(self) -> None:
        together = colocated(self.problem)
        numbers: dict[str, int] = {}
        self.groups: list[Group] = []
        self.group_of: list[int] = []
        for number, task in enumerate(self.tasks):
            if together[task.name] not in numbers:
                numbers[together[task.name]] = len(self.groups)
                self.groups.append(Group([]))
            group = self.groups[numbers[together[task.name]]]
            self.group_of.append(numbers[together[task.name]])
            group.tasks.append(number)
            group.cpu += float(self.runs[number]) * task.cpu_s
            group.runs += float(self.runs[number])
            group.least = max(group.least, task.replicas_min)
            group.most = task.replicas_max if len(group.tasks) == 1 else min(group.most, task.replicas_max)
            self.streams[self.stream_number[task.name]].group = self.group_of[number]
        for group in self.groups:
            group.most = max(group.least, min(group.most, len(self.nodes)))
            for count in range(group.most + 1):
                each = [(self.tasks[t], processes_on(self.tasks[t], max(count, 1))) for t in group.tasks]
                group.memory_at.append(sum(task.memory_bytes * on for task, on in each))
                group.held_at.append([float(sum(task.accelerators.get(kind, 0) * on for task, on in each)) for kind in self.kinds])
        self.demand = np.array([group.held_at[-1] for group in self.groups]).reshape(len(self.groups), len(self.kinds))
        for names in self.problem.separate:
            classes = [self.group_of[self.task_number[name]] for name in names]
            for one in classes:
                self.groups[one].apart.extend(other for other in classes if other != one and other not in self.groups[one].apart)

    def _set_edges(self) -> None:
        self.edges: list[Edge] = []
        self.inputs: list[list[int]] = [[] for _ in self.tasks]
        for number, task in enumerate(self.tasks):
            for name in task.inputs:
                rate = self.streams[self.stream_number[name]].rate
                share = min(1.0, float(self.runs[number]) / rate) if rate > 0 else 0.0
                edge = self._add_edge(name, task.name, number, self.group_of[number], -1, share)
                self.inputs[number].append(edge)
        for sink in self.problem.sinks:
            edge = self._add_edge(sink.input, sink.name, -1, -1, self.node_number[sink.node], 1.0)
            self.edges[edge].weight = self.latency_weight * sink.weight * self.edges[edge].rate
        for stream in self.streams:
            for edge in stream.edges:
                self.edges[edge].sharing = len(stream.edges)
        self.sink_weights = [edge.weight for edge in self.edges]
        self.edge_number = {(self.streams[edge.stream].name, edge.consumer): edge.number for edge in self.edges}
        for number, group in enumerate(self.groups):
            group.edges = [e.number for e in self.edges if number in (e.maker_group, e.taker_group)]
            group.streams = sorted({self.edges[edge].stream for edge in group.edges} | {self.own_stream[task] for task in group.tasks})
        self.fraction = np.ones(len(self.edges))
        self.latest: list[int] = []
        for number, task in enumerate(self.tasks):
            rates = [self.edges[edge].rate for edge in self.inputs[number]]
            for edge, name, rate in zip(self.inputs[number], task.inputs, rates, strict=True):
                if task.trigger == ANY:
                    self.fraction[edge] = rate / sum(rates) if sum(rates) > 0 else 1.0 / len(rates)
                else:
                    self.fraction[edge] = 1.0 / len(rates) if task.trigger == ALL else float(name == task.trigger)
            if task.trigger == ALL and len(rates) > 1:
                self.latest.append(number)
        self.parts: list[float] = self.fraction.tolist()
        self.waits_for_all = set(self.latest)

    def _set_sets(self) -> None:
        """Bytes of the sets of each task, if its replicas hand each other some."""
        sizes = {made.name: made.bytes if isinstance(made, Source) else made.output_bytes for made in self.problem.made}
        self.set_bytes = [0.0] * len(self.tasks)
        for number, task in enumerate(self.tasks):
            if len(task.inputs) > 1 and task.shares_sets:
                self.set_bytes[number] = self.problem.header_bytes + sum(sizes[name] + MEMBER_BYTES for name in task.inputs)

    def handed_bytes(self, task: int, nodes: int) -> float:
        """Bytes of the set that each run of a task takes on so many nodes; 0: there is none, since one process joins and runs all."""
        return self.set_bytes[task] if nodes > 1 or (self.tasks[task].processes or 1) > 1 else 0.0

    def handed_s(self, task: int, site: Site) -> float:
        """Seconds that a set takes from the replica that joins to the one that runs it, without waiting: the mean over all."""
        size = self.handed_bytes(task, len(site))
        if not size:
            return 0.0
        ways = (self.transfer_s(node, self.broker, size) + self.transfer_s(self.broker, node, size) for node in site)
        return self.hop_s + sum(ways) / len(site)

    def _settle_bytes(self, task: int) -> float:
        """Bytes for each message that a task takes, to note what is done: for each run, but so many times a second at most."""
        rate = sum(self.streams[self.stream_number[name]].rate for name in self.tasks[task].inputs)
        return self.problem.settle_bytes * min(float(self.runs[task]), SETTLES_HZ) / rate if rate > 0 else 0.0

    def _add_edge(self, name: str, consumer: str, task: int, group: int, node: int, share: float) -> int:
        number, stream = len(self.edges), self.streams[self.stream_number[name]]
        made = Edge(
            number=number,
            stream=self.stream_number[name],
            consumer=consumer,
            task=task,
            maker=stream.task,
            maker_group=stream.group,
            maker_node=stream.node,
            taker_group=group,
            taker_node=node,
            rate=stream.rate,
            header=stream.header,
            settle=self._settle_bytes(task) if task >= 0 else 0.0,
            more=stream.more,
            bytes=stream.bytes,
            share=share,
            small=stream.small,
            zone=stream.zone,
        )
        self.edges.append(made)
        stream.edges.append(number)
        return number

    def _set_components(self) -> None:
        parent = list(range(len(self.groups)))

        for edge in self.edges:
            if edge.maker_group >= 0 and edge.taker_group >= 0:
                parent[set_of(parent, edge.maker_group)] = set_of(parent, edge.taker_group)
        numbers: dict[int, int] = {}
        self.components: list[Component] = []
        for number, group in enumerate(self.groups):
            first = set_of(parent, number)
            if first not in numbers:
                numbers[first] = len(self.components)
                self.components.append(Component([], [], []))
            group.component = numbers[first]
            self.components[group.component].groups.append(number)
        for task in self.order:
            self.components[self.groups[self.group_of[task]].component].tasks.append(task)
        self.plain_sinks = [edge.number for edge in self.edges if edge.task < 0 and edge.maker_group < 0]
        for edge in self.edges:
            if edge.task < 0 and edge.maker_group >= 0:
                self.components[self.groups[edge.maker_group].component].sinks.append(edge.number)

    def _set_allowed(self) -> None:
        """`allowed[group, node]`: by pins, zones and the node's capacity, if nothing else ran there and all replicas did."""
        self.allowed = np.ones((len(self.groups), len(self.nodes)), dtype=bool)
        self.wished = [self.wanted(number).tolist() for number in range(len(self.groups))]
        for number in range(len(self.groups)):
            self.allowed[number] = self.wanted(number) & (self.shortage(number).max(axis=0) <= TOLERANCE)

    def wanted(self, group: int) -> Flags:
        """The nodes on which pins and zones let a group run."""
        wanted = np.ones(len(self.nodes), dtype=bool)
        for task in self.groups[group].tasks:
            name = self.tasks[task].name
            if name in self.problem.pins:
                pinned = np.zeros(len(self.nodes), dtype=bool)
                pinned[[self.node_number[node] for node in self.problem.pins[name]]] = True
                wanted &= pinned
            for stream in (name, *self.tasks[task].inputs):
                wanted &= self.in_zone[self.streams[self.stream_number[stream]].zone]
        return wanted

    def shortage(self, group: int) -> Array:
        """`[cores, memory, accelerators..., nodes]`: by how much an otherwise empty node is too small for one replica of a group."""
        demand = self.groups[group]
        cpu = demand.cpu / (max(demand.most, 1) * self.speed) - self.cores * self.cpu_limit
        cpu = np.where((self.cores == 0) & (cpu <= 0), 1.0, cpu)
        rows = [cpu, demand.memory_at[-1] - self.memory, *(self.demand[group][:, None] - self.accelerators)]
        short: Array = np.maximum(np.stack(rows), 0.0)
        return short

    def pair(self, a: int, b: int) -> tuple[float, float, float]:
        """From a to b: seconds of propagation, and seconds per byte of all links, added up, and of the slowest."""
        found = self._pairs.get((a, b))
        if found is None:
            path = list(self.routes.path(a, b))
            each = self.per_byte[path] if path else np.zeros(1)
            found = self._pairs[a, b] = (float(self.latency[path].sum()) if path else 0.0, float(each.sum()), float(each.max()))
        return found

    def transfer_s(self, a: int, b: int, size: float) -> float:
        """Seconds that a message of so many bytes takes from a to b, without waiting."""
        latency, summed, slowest = self.pair(a, b)
        packet, rest = split(size)
        return latency + packet * summed + rest * slowest

    def leaves(self, zone: int, a: int, b: int) -> bool:
        """Whether the way from a to b leaves the zone."""
        fields = self.zone_fields[zone]
        return any(fields[link] for link in self.routes.path(a, b))

    def site(self, group: int, fixed: int, sites: Sequence[Site]) -> Site:
        """The nodes of an end of an edge."""
        return sites[group] if group >= 0 else (fixed,)

    def spread_weights(self, fraction: Array, component: Component | None = None) -> tuple[list[float], list[float]]:
        """What a second costs on each edge and in each task (of a component), per second: the sinks' weights, carried against the flow."""
        edge_weight = self.sink_weights.copy()
        task_weight = [0.0] * len(self.tasks)
        for number in reversed(self.order if component is None else component.tasks):
            stream = self.streams[self.stream_number[self.tasks[number].name]]
            total = task_weight[number] = sum(edge_weight[edge] for edge in stream.edges)
            for edge in self.inputs[number]:
                edge_weight[edge] = total * float(fraction[edge])
        return edge_weight, task_weight

    def arrival(self, component: Component, delay: Sequence[float], service: Sequence[float]) -> dict[int, float]:
        """Seconds from an event to the result of each task: over the mean of the inputs, the one that triggers, or the latest."""
        done: dict[int, float] = {}
        for task in component.tasks:
            ways = [(done[self.edges[e].maker] if self.edges[e].maker >= 0 else 0.0) + delay[e] for e in self.inputs[task]]
            if task in self.waits_for_all:
                came = max(ways)
            else:
                came = sum(way * self.parts[e] for way, e in zip(ways, self.inputs[task], strict=True) if self.parts[e])
            done[task] = came + service[task]
        return done

    def latency_cost(self, component: Component, delay: Sequence[float], service: Sequence[float]) -> float:
        """The weighted latency of a component's sinks."""
        done = self.arrival(component, delay, service)
        return sum(self.edges[e].weight * (done[self.edges[e].maker] + delay[e]) for e in component.sinks)


def processes_on(task: Task, nodes: int) -> int:
    """The most processes of a task that one of its nodes has."""
    return 1 if task.processes is None else math.ceil(task.processes / nodes)


def split(size: float) -> tuple[float, float]:
    """Bytes of a message that take their time on each link of a route, and those that do on the slowest alone."""
    packet = min(size, PACKET_BYTES)
    return packet, size - packet


def _triggered(task: Task, rates: Sequence[float]) -> float:
    if task.trigger == ANY:
        return sum(rates)
    return min(rates) if task.trigger == ALL else rates[task.inputs.index(task.trigger)]


def run_rate(task: Task, rates: Sequence[float]) -> float:
    """Runs per second of a task whose inputs have these rates."""
    triggered = _triggered(task, rates)
    return min(triggered, 1e3 / task.min_interval_ms) if task.min_interval_ms > 0 else triggered


def since_s(task: Task, rates: Sequence[float], variability: float) -> float:
    """How long ago the message came that a run is started with, in the mean over runs: 0 where it starts the run itself, and where
    `min_interval_ms` had held it back the age of a renewal process, taken for an exponential one, as far as it is below the interval."""
    rate, interval_s = _triggered(task, rates), task.min_interval_ms / 1e3
    if task.trigger == ALL or not rate * interval_s:
        return 0.0
    age_s = (1.0 + variability) / (2.0 * rate)
    return age_s * (1.0 - math.exp(-interval_s / age_s) * (1.0 + interval_s / age_s))


def _flow_order(tasks: Sequence[Task]) -> list[int]:
    """The tasks' numbers, each behind what feeds it."""
    number = {task.name: position for position, task in enumerate(tasks)}
    waits = [sum(name in number for name in task.inputs) for task in tasks]
    feeds: dict[str, list[int]] = defaultdict(list)
    for position, task in enumerate(tasks):
        for name in task.inputs:
            feeds[name].append(position)
    order = [position for position, count in enumerate(waits) if count == 0]
    for position in order:
        for other in feeds[tasks[position].name]:
            waits[other] -= 1
            if waits[other] == 0:
                order.append(other)
    return order
