"""Every task by itself: what is left of a problem when capacities and waiting have prices instead of bounds.

With a price for each load the objective falls apart into numbers per task and per edge, and what remains is a choice of a node for
each task of an application: a tree of tasks, solved exactly by dynamic programming. Its value, less what the prices are worth at most (the
convex conjugate of the cost of load), is a lower bound of every placement's objective (Lagrangian duality; Fenchel's for the convex terms).

What does not fit this form is relaxed, so that the bound holds: an edge that would close a circle of tasks costs its headers only; what
several takers of a stream share is charged to each in part; replicas count as one that runs on the cheapest of their nodes; tasks that
have to be apart are not; a join of the latest of its inputs pays for a mixture of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeserve.placement.forest import set_of
from edgeserve.placement.model import Flags, Model, Site, split
from edgeserve.placement.queueing import Array, conjugate, waiting_all

FAR = 1e7
"""The price of what is not allowed: far above what counts, and small enough for sums of it to keep their digits."""

_LATENCY, _PER_BYTE, _PRICE, _ZONES = 0, 1, 2, 3
_WAYS = ("hu", "hd", "eu", "ed", "lazy")
"""What an edge pays for: the header up to the broker and down from it, what an eager payload adds to both, what a lazy one costs."""


@dataclass(slots=True)
class Prices:
    """What a load of 1 (all of a capacity) costs, and how a join of the latest weighs its inputs.

    `cpu` and `memory` are by node, `accelerators` by kind and node, `links` by link, `fraction` by edge.
    """

    cpu: Array
    memory: Array
    accelerators: Array
    links: Array
    fraction: Array

    def flat(self) -> Array:
        """All prices in one row."""
        return np.concatenate([self.cpu, self.memory, self.accelerators.ravel(), self.links])

    def shaped(self, flat: Array, fraction: Array) -> Prices:
        """Prices of this shape from one row."""
        nodes = len(self.cpu)
        cpu, memory, accelerators, links = np.split(flat, [nodes, 2 * nodes, 2 * nodes + self.accelerators.size])
        return Prices(cpu, memory, accelerators.reshape(self.accelerators.shape), links, fraction)

    def mixed(self, other: Prices, part: float) -> Prices:
        """`part` of the other and the rest of these; fractions stay."""
        return self.shaped((1 - part) * self.flat() + part * other.flat(), self.fraction)


def no_prices(model: Model) -> Prices:
    """All zero."""
    nodes = len(model.nodes)
    return Prices(
        np.zeros(nodes), np.zeros(nodes), np.zeros((len(model.kinds), nodes)), np.zeros(len(model.routes.link_of)), model.fraction.copy()
    )


@dataclass(slots=True)
class Restriction:
    """What a branch of the search has decided: `nodes[group, node]` says which are left; modes that are out."""

    nodes: Array
    no_eager: Array
    no_lazy: Array


class Relaxation:
    """The relaxed problem of some groups (all by default), ready to be solved for many prices.

    On nodes that are `alone` each group pays for the waiting of its own runs, and the price is one of the limit only. Waiting grows faster
    than load, so that is never too much; and where one group at most fits it is all, while by a price per load half a group would wait a
    quarter as long.
    """

    def __init__(
        self,
        model: Model,
        groups: Sequence[int] | None = None,
        *,
        alone: Flags | None = None,
        previous: Sequence[Site] | None = None,
        move_cost: float = 0.0,
    ) -> None:
        self.model = model
        self.alone = np.zeros(len(model.nodes), dtype=bool) if alone is None else alone
        self.groups = list(range(len(model.groups))) if groups is None else list(groups)
        self.row = {group: row for row, group in enumerate(self.groups)}
        self._base = np.where(model.allowed[self.groups], 0.0, FAR)
        self._base[:, self.alone] += self._waits_alone()[:, self.alone]
        if previous is not None and move_cost:
            for row, group in enumerate(self.groups):
                self._base[row] += move_cost
                self._base[row, list(previous[group])] -= move_cost
        self._sort_edges()
        self._grow_forest()
        self._set_fields()

    def _waits_alone(self) -> Array:
        """`[rows, nodes]`: what a group's own runs wait for each other."""
        model = self.model
        cpu = np.array([model.groups[group].cpu / model.groups[group].most for group in self.groups])
        load = np.minimum(np.outer(cpu, 1.0 / (model.speed * np.maximum(model.cores, 1.0))), model.cpu_limit)
        waits: Array = model.waiting_weight * waiting_all(load, np.broadcast_to(model.cpu_power, load.shape))
        return waits

    def _sort_edges(self) -> None:
        edges = [
            e for e in self.model.edges if e.maker_group in self.row or e.taker_group in self.row or len(self.row) == len(self.model.groups)
        ]
        self.edges = edges
        self.numbers = np.array([edge.number for edge in edges], dtype=np.int64)
        self._from_fixed = [k for k, e in enumerate(edges) if e.maker_group < 0 and e.taker_group >= 0]
        self._to_fixed = [k for k, e in enumerate(edges) if e.maker_group >= 0 and e.taker_group < 0]
        self._fixed = [k for k, e in enumerate(edges) if e.maker_group < 0 and e.taker_group < 0]
        self._within = [k for k, e in enumerate(edges) if e.maker_group == e.taker_group >= 0]

    def _grow_forest(self) -> None:
        """A spanning forest of the groups: heavy edges first; the others are `_dropped`."""
        between = [k for k, e in enumerate(self.edges) if e.maker_group >= 0 and e.taker_group >= 0 and e.maker_group != e.taker_group]
        parent = {group: group for group in self.groups}

        near: dict[int, list[int]] = defaultdict(list)
        self._dropped = []
        for k in sorted(between, key=lambda k: (-self.edges[k].rate * self.edges[k].bytes, k)):
            a, b = self.edges[k].maker_group, self.edges[k].taker_group
            if set_of(parent, a) == set_of(parent, b):
                self._dropped.append(k)
                continue
            parent[set_of(parent, a)] = set_of(parent, b)
            near[a].append(k)
            near[b].append(k)
        self.roots: list[int] = []
        self.above: dict[int, int] = {}
        visited: list[int] = []
        for root in reversed(self.groups):
            if root in self.above:
                continue
            self.roots.append(self.row[root])
            self.above[root] = -1
            stack = [root]
            while stack:
                group = stack.pop()
                visited.append(group)
                for k in near[group]:
                    other = self.edges[k].maker_group if self.edges[k].taker_group == group else self.edges[k].taker_group
                    if other not in self.above:
                        self.above[other] = k
                        stack.append(other)
        self._set_heights(visited)

    def _set_heights(self, visited: list[int]) -> None:
        height = dict.fromkeys(visited, 0)
        for group in reversed(visited):
            if self.above[group] >= 0:
                over = self._parent(group)
                height[over] = max(height[over], height[group] + 1)
        self.order = [self.row[group] for group in visited]
        batches: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for group in visited:
            if self.above[group] >= 0:
                batches[height[group], self.edges[self.above[group]].maker_group == group].append(group)
        self._batches: list[tuple[bool, list[int], list[int], list[int]]] = []
        for (_, forward), members in sorted(batches.items()):
            edges = [self.above[group] for group in members]
            parents = [self.row[self._parent(group)] for group in members]
            self._batches.append((forward, [self.row[group] for group in members], edges, parents))

    def _parent(self, group: int) -> int:
        edge = self.edges[self.above[group]]
        return edge.taker_group if edge.maker_group == group else edge.maker_group

    def _set_fields(self) -> None:
        """The fields of the network, and of each edge the parts that do not depend on prices."""
        model, routes = self.model, self.model.routes
        zones = len(model.zone_fields) - 1
        self._fields = np.concatenate([2.0 * model.latency[None], model.per_byte[None], model.per_byte[None], model.zone_fields[1:]])
        single = routes.sums(np.concatenate([model.latency[None], self._fields[1:]]))
        self._sums = single.copy()
        self._sums[:1] = routes.round_trip(single[:1])
        # Behind the sums: the slowest link.
        self._up = np.concatenate([routes.to_broker(single), routes.slowest_up[None]])
        self._down = np.concatenate([routes.from_broker(single), routes.slowest_down[None]])
        rate = np.array([e.rate for e in self.edges])
        header, settle = np.array([e.header for e in self.edges]), np.array([e.settle for e in self.edges])
        more, size = np.array([e.more for e in self.edges]), np.array([e.bytes for e in self.edges])
        each = 1.0 / np.array([e.sharing for e in self.edges], dtype=float) if self.edges else np.zeros(0)
        share = np.array([e.share for e in self.edges])
        # Bytes that take their time on each link, and those that do on the slowest of the route: a field has only sums over links.
        (packet, rest), (all_packet, all_rest), (own, own_rest) = (
            np.array([split(each) for each in sizes]).reshape(-1, 2).T for sizes in (header, header + more, size)
        )
        self._sizes = {"eu": (all_packet - packet, all_rest - rest), "hu": (packet, rest), "lazy": (own, own_rest)}
        self._sizes |= {"hd": self._sizes["hu"], "ed": self._sizes["eu"]}
        self.slow = {name: np.zeros(len(self.edges)) for name in _WAYS}
        self._parts = {name: np.zeros((len(self.edges), _ZONES + zones)) for name in _WAYS}
        for name, load in (
            ("hu", rate * header * each),
            ("hd", rate * (header + settle)),
            ("eu", rate * more * each),
            ("ed", rate * more),
            ("lazy", rate * size * share * each),
        ):
            self._parts[name][:, _PRICE] = load
        self.no_eager, self.no_lazy = np.zeros(len(self.edges)), np.zeros(len(self.edges))
        for k, edge in enumerate(self.edges):
            if edge.small:
                self.no_lazy[k] = FAR
            if edge.zone:
                for name in ("eu", "ed", "lazy"):
                    self._parts[name][k, _ZONES + edge.zone - 1] = FAR
                if not model.in_zone[edge.zone, model.broker]:
                    self.no_eager[k] = FAR

    def solve(self, prices: Prices, limit: Restriction | None = None) -> Solution:
        """The best choice at these prices, of what a restriction leaves."""
        return Solution(self, prices, limit)


class Solution:
    """A relaxed problem solved for some prices.

    Attributes:
        value: what the choice costs at the prices, without what the prices are worth (`Solution.bound` takes that off).
        at: node by row, the choice.
    """

    def __init__(self, relaxation: Relaxation, prices: Prices, limit: Restriction | None) -> None:
        self.relaxation, self.prices = relaxation, prices
        self._no_eager, self._no_lazy = relaxation.no_eager, relaxation.no_lazy
        if limit is not None:
            self._no_eager = self._no_eager + limit.no_eager[relaxation.numbers]
            self._no_lazy = self._no_lazy + limit.no_lazy[relaxation.numbers]
        self._weigh()
        self._single(limit)
        self._climb()

    def _weigh(self) -> None:
        """Prices and weights put into the fields and the edges' parts."""
        own, model, routes = self.relaxation, self.relaxation.model, self.relaxation.model.routes
        edge_weight, self.task_weight = model.spread_weights(self.prices.fraction)
        weight = np.array(edge_weight)[own.numbers] if len(own.numbers) else np.zeros(0)
        for name, (packet, rest) in own._sizes.items():
            own._parts[name][:, _LATENCY] = 0.0 if name in ("eu", "ed") else weight
            own._parts[name][:, _PER_BYTE] = weight * packet
            own.slow[name] = weight * rest
        self._hops = model.hop_s * float(weight.sum())
        price = model.byte_price + self.prices.links * model.per_byte
        own._fields[_PRICE] = price
        summed = routes.sums(price[None])
        own._sums[_PRICE] = summed[0]
        own._up[_PRICE], own._down[_PRICE] = routes.to_broker(summed)[0], routes.from_broker(summed)[0]
        self.hu, self.eu = (np.column_stack((own._parts[each], own.slow[each])) @ own._up for each in ("hu", "eu"))
        self.hd, self.ed = (np.column_stack((own._parts[each], own.slow[each])) @ own._down for each in ("hd", "ed"))
        self.eu += self._no_eager[:, None]

    def _single(self, limit: Restriction | None) -> None:
        """What each row costs at each node by itself, edges to fixed ends included."""
        own, model = self.relaxation, self.relaxation.model
        groups = [model.groups[group] for group in own.groups]
        spent = np.array([sum(self.task_weight[t] * model.tasks[t].cpu_s for t in group.tasks) for group in groups])
        busy = np.array([group.cpu for group in groups])
        core = model.core_price + np.divide(self.prices.cpu, model.cores, out=np.zeros_like(model.cores), where=model.cores > 0)
        self.single = own._base + np.outer(spent, 1.0 / model.speed) + np.outer(busy, core / model.speed)
        room = np.maximum(model.memory, 1.0)
        self.single += np.outer([group.memory_at[-1] for group in groups], self.prices.memory / room)
        if model.kinds:
            self.single += model.demand[own.groups] @ (self.prices.accelerators / np.maximum(model.accelerators, 1.0))
        for row, group in enumerate(groups):
            for task in group.tasks:
                if model.handed_bytes(task, group.least):
                    self.single[row] += self._handed(task)
        if limit is not None:
            self.single += limit.nodes[own.groups]
        self.constant = self._hops
        hu, hd, eu, ed, lazy, slow = self.hu, self.hd, self.eu, self.ed, own._parts["lazy"], own.slow["lazy"]
        if own._from_fixed:
            k = own._from_fixed
            at = [own.edges[i].maker_node for i in k]
            way = model.routes.rows(own._sums, lazy[k], slow[k], at) + self._no_lazy[k][:, None]
            cost = hu[k, at][:, None] + hd[k] + np.minimum(eu[k, at][:, None] + ed[k], way)
            for i, row in zip(k, cost, strict=True):
                self.single[own.row[own.edges[i].taker_group]] += row
        if own._to_fixed:
            k = own._to_fixed
            at = [own.edges[i].taker_node for i in k]
            way = model.routes.rows(own._sums, lazy[k], slow[k], at, reverse=True) + self._no_lazy[k][:, None]
            cost = hd[k, at][:, None] + hu[k] + np.minimum(ed[k, at][:, None] + eu[k], way)
            for i, row in zip(k, cost, strict=True):
                self.single[own.row[own.edges[i].maker_group]] += row
        for i in own._fixed:
            a, b = own.edges[i].maker_node, own.edges[i].taker_node
            fetched = float(model.routes.rows(own._sums, lazy[[i]], slow[[i]], [a])[0, b] + self._no_lazy[i])
            self.constant += float(hu[i, a] + hd[i, b]) + min(float(eu[i, a] + ed[i, b]), fetched)
        for i in own._within:
            row = own.row[own.edges[i].maker_group]
            self.single[row] += hu[i] + hd[i] + np.minimum(eu[i] + ed[i], self._no_lazy[i])
        for i in own._dropped:
            only = 1.0 if self._no_lazy[i] else 0.0
            self.single[own.row[own.edges[i].maker_group]] += hu[i] + only * eu[i]
            self.single[own.row[own.edges[i].taker_group]] += hd[i] + only * ed[i]

    def _handed(self, task: int) -> Array:
        """What the sets of a task that has replicas cost on their way to the broker from each node and back."""
        own, model = self.relaxation, self.relaxation.model
        size, weight = model.set_bytes[task], self.task_weight[task]
        packet, rest = split(size)
        part = np.zeros(len(own._up))
        part[[_LATENCY, _PER_BYTE, _PRICE, -1]] = weight, weight * packet, float(model.runs[task]) * size, weight * rest
        ways: Array = part @ own._up + part @ own._down + weight * model.hop_s
        return ways

    def _cross(self, forward: bool, edges: list[int], first: Array, up: bool) -> Array:
        """The best of `first` on one end of edges for each node of the other end; `up`: from the child to the parent of the forest."""
        own = self.relaxation
        along = forward == up
        near, near_more, far, far_more = (self.hu, self.eu, self.hd, self.ed) if along else (self.hd, self.ed, self.hu, self.eu)
        start = first + near[edges]
        eager = (start + near_more[edges]).min(axis=1)[:, None] + far_more[edges]
        lazy = own.model.routes.spread(start, own._sums, own._parts["lazy"][edges], own.slow["lazy"][edges], reverse=not along)
        result: Array = far[edges] + np.minimum(eager, lazy + self._no_lazy[edges][:, None])
        return result

    def _climb(self) -> None:
        """From the leaves of the forest to its roots."""
        own = self.relaxation
        self.best = self.single.copy()
        self._told: list[Array] = []
        for forward, rows, edges, parents in own._batches:
            told = self._cross(forward, edges, self.best[rows], up=True)
            self._told.append(told)
            for row, cost in zip(parents, told, strict=True):
                self.best[row] += cost
        self.value = self.constant + sum(float(self.best[row].min()) for row in own.roots)

    @property
    def at(self) -> list[int]:
        """The choice, node by row."""
        own = self.relaxation
        found = [-1] * len(own.groups)
        for row in own.order:
            k = own.above[own.groups[row]]
            if k < 0:
                found[row] = int(self.best[row].argmin())
                continue
            forward = own.edges[k].maker_group == own.groups[row]
            there = found[own.row[own._parent(own.groups[row])]]
            near, near_more, far_more = (self.hu, self.eu, self.ed) if forward else (self.hd, self.ed, self.eu)
            start = self.best[row] + near[k]
            way = own.model.routes.rows(own._sums, own._parts["lazy"][[k]], own.slow["lazy"][[k]], [there], reverse=forward)[0]
            way = way + self._no_lazy[k]
            found[row] = int((start + np.minimum(way, near_more[k] + far_more[k, there])).argmin())
        return found

    def marginals(self) -> Array:
        """`[rows, nodes]`: the least value with that row at that node."""
        own = self.relaxation
        total = self.best.copy()
        rest = self.value - self.constant
        for row in own.roots:
            total[row] += rest - self.best[row].min()
        for (forward, rows, edges, parents), told in zip(reversed(own._batches), reversed(self._told), strict=True):
            total[rows] += self._cross(forward, edges, total[parents] - told, up=False)
        return total + self.constant

    def bound(self) -> float:
        """A lower bound of the objective, if the relaxation is of all groups."""
        return self.value - worth(self.relaxation, self.prices)[0]

    def modes(self, at: Sequence[int]) -> dict[int, bool]:
        """The cheaper mode of each edge for nodes by row: True is lazy."""
        own, modes = self.relaxation, {}
        for k, edge in enumerate(own.edges):
            a = at[own.row[edge.maker_group]] if edge.maker_group >= 0 else edge.maker_node
            b = at[own.row[edge.taker_group]] if edge.taker_group >= 0 else edge.taker_node
            modes[edge.number] = self.lazy_cost(k, a, b) <= float(self.eu[k, a] + self.ed[k, b])
        return modes

    def lazy_cost(self, k: int, a: int, b: int) -> float:
        """What fetching from a to b adds to the headers."""
        own, part = self.relaxation, self.relaxation._parts["lazy"][k]
        if a == b:
            return float(self._no_lazy[k])
        field = part @ own._fields
        slowest = own.slow["lazy"][k] * own.model.pair(a, b)[2]
        return float(field[list(own.model.routes.path(a, b))].sum() + slowest + self._no_lazy[k])


def worth(relaxation: Relaxation, prices: Prices) -> tuple[float, Prices]:
    """The most that prices bring beyond the cost of load, and the loads at which they do."""
    model = relaxation.model
    weight = model.waiting_weight
    total = 0.0
    loads = []
    none = np.zeros(len(prices.links), dtype=bool)
    for price, power, limit, alone in (
        (prices.cpu, model.cpu_power, model.cpu_limit, relaxation.alone),
        (prices.links, model.link_power, model.link_limit, none),
    ):
        if weight > 0:
            load, value = conjugate(price / weight, power, limit)
            total += float(np.where(alone, price * limit, weight * value).sum())
            load = np.where(alone, limit, load)
        else:
            load = limit.copy()
            total += float((price * limit).sum())
        loads.append(load)
    total += float(prices.memory.sum() + prices.accelerators.sum())
    return total, Prices(loads[0], np.ones_like(prices.memory), np.ones_like(prices.accelerators), loads[1], prices.fraction)
