"""A placement, with what it costs and what it would cost to change it a little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TypeVar

from edgeserve.placement.model import TOLERANCE, Edge, Model, Site

T = TypeVar("T")
Flow = dict[int, float]
"""Bytes per second by channel: see `routes`."""


@dataclass(slots=True)
class Change:
    """What a change of sites and modes does; `State.apply` makes it so."""

    sites: Mapping[int, Site]
    lazy: Mapping[int, bool]
    flows: dict[int, Flow]
    links: Flow
    cpu: dict[int, float]
    memory: dict[int, float]
    accelerators: dict[tuple[int, int], float]
    delay: dict[int, float]
    service: dict[int, float]
    latency: dict[int, float]
    leaving: dict[int, bool]
    cost: float
    excess: float


class State:
    """Sites of all groups and modes of all edges. The site of a group that is not placed yet is empty; nothing flows to it or from it.

    `cost` is the objective, `excess` the sum of what is above the capacities, each as a part of its own, and 1 for each broken wish.
    What a move from `previous` costs is in `cost`.
    """

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        lazy: Sequence[bool],
        *,
        previous: Sequence[Site] | None = None,
        move_cost: float = 0.0,
    ) -> None:
        self.model, self.previous, self.move_cost = model, previous, move_cost
        self.sites, self.lazy = list(sites), list(lazy)
        self.flows = [stream_flow(model, number, self.sites, self.lazy) for number in range(len(model.streams))]
        self.links = [0.0] * len(model.routes.link_of)
        for flow in self.flows:
            for link, rate in flow.items():
                self.links[link] += rate
        self.cpu = [0.0] * len(model.nodes)
        self.memory = [0.0] * len(model.nodes)
        self.accelerators = [[0.0] * len(model.nodes) for _ in model.kinds]
        for number, site in enumerate(self.sites):
            for node in site:
                self.cpu[node] += model.groups[number].cpu / (len(site) * model.speed_of[node])
                self.memory[node] += model.groups[number].memory_at[len(site)]
                for kind in range(len(model.kinds)):
                    self.accelerators[kind][node] += model.groups[number].held_at[len(site)][kind]
        self.delay = [edge_delay(model, edge, self.sites, self.lazy[edge.number]) for edge in model.edges]
        self.service = [service(model, task, self.sites) for task in range(len(model.tasks))]
        self.latency = [model.latency_cost(component, self.delay, self.service) for component in model.components]
        self.leaving = [leaves(model, edge, self.sites, self.lazy[edge.number]) for edge in model.edges]
        self.cost, self.excess = self._total()

    def _total(self) -> tuple[float, float]:
        model = self.model
        parts = [(cost, 0.0) for cost in self.latency]
        parts += [(model.edges[e].weight * self.delay[e], 0.0) for e in model.plain_sinks]
        parts += [link_cost(model, link, rate) for link, rate in enumerate(self.links) if rate]
        parts += [cpu_cost(model, node, busy) for node, busy in enumerate(self.cpu) if busy]
        parts += [(0.0, over(model.memory_of[node], used)) for node, used in enumerate(self.memory) if used]
        for kind, row in enumerate(self.accelerators):
            parts += [(0.0, over(float(model.accelerators[kind, node]), used)) for node, used in enumerate(row) if used]
        parts += [(self._moved(group, site), self._misplaced(group, site)) for group, site in enumerate(self.sites)]
        parts += [(0.0, float(sum(self.leaving)))]
        together = sum(len(set(self.sites[a]) & set(self.sites[b])) for a, g in enumerate(model.groups) for b in g.apart if a < b)
        return sum(cost for cost, _ in parts), sum(excess for _, excess in parts) + together

    def _moved(self, group: int, site: Site) -> float:
        if self.previous is None or not self.move_cost:
            return 0.0
        return self.move_cost * len(set(site) - set(self.previous[group]))

    def _misplaced(self, group: int, site: Site) -> float:
        found = self.model.groups[group]
        wrong = sum(not self.model.wished[group][node] or not self.model.cores_of[node] for node in site)
        return float(wrong + max(found.least - len(site), 0, len(site) - found.most))

    def trial(self, sites: Mapping[int, Site], lazy: Mapping[int, bool]) -> Change:
        """What changing these sites and modes would do."""
        model = self.model
        new_sites, new_lazy = list(self.sites), list(self.lazy)
        for group, site in sites.items():
            new_sites[group] = site
        for turned, mode in lazy.items():
            new_lazy[turned] = mode
        streams = {stream for group in sites for stream in model.groups[group].streams} | {model.edges[edge].stream for edge in lazy}
        edges = {edge for group in sites for edge in model.groups[group].edges} | set(lazy)
        change = Change(sites, lazy, {}, {}, {}, {}, {}, {}, {}, {}, {}, self.cost, self.excess)
        self._try_links(change, streams, new_sites, new_lazy)
        for group, site in sites.items():
            self._try_nodes(change, group, site)
        self._try_apart(change, sites, new_sites)
        self._settle_nodes(change)
        delay, spent = self.delay.copy(), self.service
        for edge in (model.edges[number] for number in edges):
            number = edge.number
            delay[number] = change.delay[number] = edge_delay(model, edge, new_sites, new_lazy[number])
            if edge.zone:
                change.leaving[number] = leaves(model, edge, new_sites, new_lazy[number])
                change.excess += float(change.leaving[number]) - float(self.leaving[number])
            if edge.maker_group < 0 and edge.task < 0:
                change.cost += edge.weight * (delay[number] - self.delay[number])
        if sites:
            spent = self.service.copy()
            for group in sites:
                for task in model.groups[group].tasks:
                    spent[task] = change.service[task] = service(model, task, new_sites)
        touched = {model.groups[group].component for group in sites}
        touched |= {model.groups[g].component for e in lazy for g in (model.edges[e].maker_group, model.edges[e].taker_group) if g >= 0}
        for number in touched:
            change.latency[number] = model.latency_cost(model.components[number], delay, spent)
            change.cost += change.latency[number] - self.latency[number]
        return change

    def _try_links(self, change: Change, streams: set[int], sites: Sequence[Site], lazy: Sequence[bool]) -> None:
        moved: Flow = {}
        for stream in sorted(streams):
            change.flows[stream] = stream_flow(self.model, stream, sites, lazy)
            for link, rate in self.flows[stream].items():
                moved[link] = moved.get(link, 0.0) - rate
            for link, rate in change.flows[stream].items():
                moved[link] = moved.get(link, 0.0) + rate
        for link, rate in moved.items():
            if rate:
                before = self.links[link]
                after = change.links[link] = max(before + rate, 0.0)
                (cost, excess), (old_cost, old_excess) = link_cost(self.model, link, after), link_cost(self.model, link, before)
                change.cost += cost - old_cost
                change.excess += excess - old_excess

    def _try_nodes(self, change: Change, group: int, site: Site) -> None:
        model, old = self.model, self.sites[group]
        demand = model.groups[group]
        for sign, nodes in ((-1.0, old), (1.0, site)):
            for node in nodes:
                busy = demand.cpu / (len(nodes) * model.speed_of[node])
                change.cpu[node] = change.cpu.get(node, self.cpu[node]) + sign * busy
                change.memory[node] = change.memory.get(node, self.memory[node]) + sign * demand.memory_at[len(nodes)]
                for kind, row in enumerate(self.accelerators):
                    wanted = demand.held_at[len(nodes)][kind]
                    if wanted:
                        change.accelerators[kind, node] = change.accelerators.get((kind, node), row[node]) + sign * wanted
        change.cost += self._moved(group, site) - self._moved(group, old)
        change.excess += self._misplaced(group, site) - self._misplaced(group, old)

    def _try_apart(self, change: Change, sites: Mapping[int, Site], new_sites: Sequence[Site]) -> None:
        for one, other in {(min(a, b), max(a, b)) for a in sites for b in self.model.groups[a].apart}:
            before = len(set(self.sites[one]) & set(self.sites[other]))
            change.excess += len(set(new_sites[one]) & set(new_sites[other])) - before

    def _settle_nodes(self, change: Change) -> None:
        model = self.model
        for node, after in change.cpu.items():
            (cost, excess), (old_cost, old_excess) = cpu_cost(model, node, after), cpu_cost(model, node, self.cpu[node])
            change.cost += cost - old_cost
            change.excess += excess - old_excess
        for node, after in change.memory.items():
            change.excess += over(model.memory_of[node], after) - over(model.memory_of[node], self.memory[node])
        for (kind, node), after in change.accelerators.items():
            capacity = float(model.accelerators[kind, node])
            change.excess += over(capacity, after) - over(capacity, self.accelerators[kind][node])

    def apply(self, change: Change) -> None:
        """Makes a change that was tried in this very state."""
        for group, site in change.sites.items():
            self.sites[group] = site
        for edge, mode in change.lazy.items():
            self.lazy[edge] = mode
        for numbers, found in ((self.links, change.links), (self.cpu, change.cpu), (self.memory, change.memory)):
            _put(numbers, found)
        for numbers, found in ((self.delay, change.delay), (self.service, change.service), (self.latency, change.latency)):
            _put(numbers, found)
        _put(self.flows, change.flows)
        _put(self.leaving, change.leaving)
        for (kind, node), value in change.accelerators.items():
            self.accelerators[kind][node] = value
        self.cost, self.excess = change.cost, change.excess

    def copy(self) -> State:
        """A fresh one with the same sites and modes; what rounding has added up is gone."""
        return State(self.model, self.sites, self.lazy, previous=self.previous, move_cost=self.move_cost)

    def twin(self) -> State:
        """One that can be changed by itself, with what rounding has added up: at a small part of what `copy` takes."""
        other = copy(self)
        for name in ("sites", "lazy", "flows", "links", "cpu", "memory", "delay", "service", "latency", "leaving"):
            setattr(other, name, list(getattr(self, name)))
        other.accelerators = [list(row) for row in self.accelerators]
        return other

    @property
    def feasible(self) -> bool:
        """Whether it keeps within all capacities and wishes."""
        return self.excess <= TOLERANCE


def _put(target: list[T], found: Mapping[int, T]) -> None:
    for key, value in found.items():
        target[key] = value


def over(capacity: float, used: float) -> float:
    """What is used above a capacity, as a part of it."""
    if used <= capacity * (1 + TOLERANCE):
        return 0.0
    return used / capacity - 1.0 if capacity > 0 else 1.0


def link_cost(model: Model, link: int, rate: float) -> tuple[float, float]:
    """Objective and excess of a link that carries so many bytes per second."""
    return _busy_cost(model, rate * model.per_byte_of[link], model.link_limit_of[link], 2.0, rate * model.byte_price_of[link])


def cpu_cost(model: Model, node: int, busy: float) -> tuple[float, float]:
    """Objective and excess of a node with so many busy cores."""
    cores = model.cores_of[node]
    if cores == 0:
        return busy * model.core_price_of[node], max(busy, 0.0)
    return _busy_cost(model, busy / cores, model.cpu_limit_of[node], model.cpu_power_of[node], busy * model.core_price_of[node])


def _busy_cost(model: Model, load: float, limit: float, power: float, cost: float) -> tuple[float, float]:
    if load <= 0.0:
        return 0.0, 0.0
    kept = min(load, limit)
    cost += model.waiting_weight * 0.5 * kept**power / (1.0 - kept)
    return cost, (load - limit if load > limit * (1 + TOLERANCE) else 0.0)


def stream_flow(model: Model, number: int, sites: Sequence[Site], lazy: Sequence[bool]) -> Flow:
    """Bytes per second that a stream puts on each link."""
    stream = model.streams[number]
    flow: Flow = {}
    if not model.site(stream.group, stream.node, sites):
        return flow
    for a, b, messages, size in transfers(model, number, sites, lazy):
        rate = messages * size
        for link in model.routes.path(a, b) if rate else ():
            flow[link] = flow.get(link, 0.0) + rate
    return flow


def transfers(model: Model, number: int, sites: Sequence[Site], lazy: Sequence[bool]) -> list[tuple[int, int, float, float]]:
    """What a stream sends, and for the runs that make it: from, to, messages per second, bytes of each.

    The maker sends each header to the broker once, with the payload if any taker is eager; the broker sends header, or header and payload,
    to each taker; a payload that is fetched goes once to each node that uses it. Replicas of a join hand each other sets: which of them
    joins is not known, so each does a part of it.
    """
    stream = model.streams[number]
    makers = model.site(stream.group, stream.node, sites)
    sent: list[tuple[int, int, float, float]] = []
    if stream.task >= 0 and (size := model.handed_bytes(stream.task, len(makers))):
        runs = float(model.runs[stream.task]) / len(makers)
        sent += [way for a in makers for way in ((a, model.broker, runs, size), (model.broker, a, runs, size))]
    if not stream.edges:
        return sent
    eager = any(not lazy[edge] for edge in stream.edges)
    rate = stream.rate / len(makers)
    sent += [(a, model.broker, rate, stream.header + (stream.more if eager else 0.0)) for a in makers]
    used: dict[int, float] = {}
    for number in stream.edges:
        edge = model.edges[number]
        takers = model.site(edge.taker_group, edge.taker_node, sites)
        for b in takers:
            size = edge.header + edge.settle + (0.0 if lazy[number] else edge.more)
            sent.append((model.broker, b, stream.rate / len(takers), size))
            if lazy[number]:
                used[b] = max(used.get(b, 0.0), edge.share / len(takers))
    for b, share in used.items():
        sent.extend((a, b, rate * share, stream.bytes) for a in makers if a != b)
    return sent


def edge_delay(model: Model, edge: Edge, sites: Sequence[Site], lazy: bool) -> float:
    """Seconds from sending to having header and payload, without waiting: the mean over pairs of replicas."""
    makers = model.site(edge.maker_group, edge.maker_node, sites)
    takers = model.site(edge.taker_group, edge.taker_node, sites)
    if not makers or not takers:
        return 0.0
    total = 0.0
    for a in makers:
        for b in takers:
            total += pair_delay(model, edge, a, b, lazy)
    return total / (len(makers) * len(takers))


def pair_delay(model: Model, edge: Edge, a: int, b: int, lazy: bool) -> float:
    """`edge_delay` between two nodes."""
    size = edge.header + (0.0 if lazy else edge.more)
    total = model.hop_s + model.transfer_s(a, model.broker, size) + model.transfer_s(model.broker, b, size)
    if lazy and not edge.small and a != b:
        total += model.pair(b, a)[0] + model.transfer_s(a, b, edge.bytes)
    return total


def service(model: Model, task: int, sites: Sequence[Site]) -> float:
    """Seconds of a run, the mean over replicas, and of the way of its set between them."""
    site = sites[model.group_of[task]]
    return service_on(model, task, site) if site else 0.0


def service_on(model: Model, task: int, site: Site) -> float:
    """`service` at a site."""
    return float(model.tasks[task].cpu_s * sum(1.0 / model.speed_of[node] for node in site) / len(site) + model.handed_s(task, site))


def leaves(model: Model, edge: Edge, sites: Sequence[Site], lazy: bool) -> bool:
    """Whether a payload leaves the zone that it may not leave."""
    if not edge.zone:
        return False
    makers = model.site(edge.maker_group, edge.maker_node, sites)
    takers = model.site(edge.taker_group, edge.taker_node, sites)
    if not makers or not takers:
        return False
    if not all(model.in_zone[edge.zone, node] for node in (*makers, *takers)):
        return True
    if lazy and not edge.small:
        return any(model.leaves(edge.zone, a, b) for a in makers for b in takers)
    return not model.in_zone[edge.zone, model.broker] or any(
        model.leaves(edge.zone, *way) for way in (*((a, model.broker) for a in makers), *((model.broker, b) for b in takers))
    )
