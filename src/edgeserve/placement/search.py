"""Placements found by greed and by moving one task at a time, each move tried by the full objective."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from edgeserve.placement.model import TOLERANCE, Flags, Model, Site, split
from edgeserve.placement.queueing import Array, slope, waiting_all
from edgeserve.placement.relaxation import FAR
from edgeserve.placement.state import Change, State

_OVER = 1e4
_TRIES = 5
_SLACK = 0.005


class Pricer:
    """Guesses what each node would cost a group while all others stay: the order in which moves are tried."""

    def __init__(self, model: Model) -> None:
        self.model = model
        routes = model.routes
        fields = np.concatenate([model.latency[None], model.per_byte[None], model.per_byte[None], model.zone_fields[1:]])
        single = routes.sums(fields)
        self._sums = single.copy()
        self._sums[:1] = routes.round_trip(single[:1])
        # In front of the sums: the slowest link.
        self._up = np.concatenate([routes.slowest_up[None], routes.to_broker(single)])
        self._down = np.concatenate([routes.slowest_down[None], routes.from_broker(single)])

    def refresh(self, state: State, group: int) -> None:
        """Takes the prices of bytes from what the links carry without a group; those that have no room for it are dear."""
        model = self.model
        carried = np.array(state.links)
        for stream in model.groups[group].streams:
            for link, rate in state.flows[stream].items():
                carried[link] -= rate
        load = carried * model.per_byte
        price = model.waiting_weight * slope(np.minimum(load, model.link_limit), model.link_power)
        more = max((model.edges[e].rate * model.edges[e].share * model.edges[e].bytes for e in model.groups[group].edges), default=0.0)
        price += np.where(load + more * model.per_byte > model.link_limit, _OVER, 0.0)
        summed = model.routes.sums((model.byte_price + price * model.per_byte)[None])
        self._sums[2] = summed[0]
        self._up[3], self._down[3] = model.routes.to_broker(summed)[0], model.routes.from_broker(summed)[0]

    def costs(self, state: State, group: int, fraction: Array, *, hard: bool = True) -> tuple[Array, dict[int, Flags]]:
        """Per node the guess, and per edge where lazy is cheaper. `hard`: full nodes count as far away."""
        model = self.model
        demand = model.groups[group]
        weights, task_weight = model.spread_weights(fraction, model.components[demand.component])
        total = np.where(model.allowed[group], 0.0, FAR)
        total += sum(task_weight[t] * model.tasks[t].cpu_s for t in demand.tasks) / model.speed
        total += self._node_costs(state, group, hard)
        if state.previous is not None and state.move_cost:
            moved = np.full(len(model.nodes), state.move_cost)
            moved[list(state.previous[group])] = 0.0
            total += moved
        lazy: dict[int, Flags] = {}
        for number in demand.edges:
            ways = self._edge_costs(state, group, number, weights[number])
            if ways is not None:
                total += np.minimum(*ways)
                lazy[number] = ways[1] <= ways[0]
        return total, lazy

    def _node_costs(self, state: State, group: int, hard: bool) -> Array:
        model, demand = self.model, self.model.groups[group]
        site = state.sites[group]
        cores = np.maximum(model.cores, 1.0)
        busy, memory = np.array(state.cpu), np.array(state.memory)
        replicas = max(len(site), demand.least)
        for node in site:
            busy[node] -= demand.cpu / (replicas * model.speed_of[node])
            memory[node] -= demand.memory_at[len(site)]
        wanted, held = demand.memory_at[min(replicas, demand.most)], demand.held_at[min(replicas, demand.most)]
        more = demand.cpu / (replicas * model.speed)
        before = np.minimum(np.maximum(busy, 0.0) / cores, model.cpu_limit)
        after = np.maximum(busy, 0.0) + more
        load = after / cores
        kept = np.minimum(load, model.cpu_limit)
        cost: Array = model.waiting_weight * (waiting_all(kept, model.cpu_power) - waiting_all(before, model.cpu_power))
        cost = cost + more * model.core_price
        if hard:
            cost += _OVER * np.maximum(load - model.cpu_limit * (1 + TOLERANCE), 0.0)
            cost += np.where(memory + wanted > model.memory * (1 + TOLERANCE), _OVER, 0.0)
            for kind, row in enumerate(state.accelerators):
                if held[kind]:
                    used = np.array(row)
                    used[list(site)] -= demand.held_at[len(site)][kind]
                    cost += np.where(used + held[kind] > model.accelerators[kind] + TOLERANCE, _OVER, 0.0)
            for other in demand.apart:
                cost[list(state.sites[other])] += _OVER
        return cost

    def _edge_costs(self, state: State, group: int, number: int, weight: float) -> tuple[Array, Array] | None:
        """Eager and lazy, per node of the group; None when the other end is not placed."""
        model, edge = self.model, self.model.edges[number]
        header, size, rate = edge.header, edge.bytes, edge.rate
        (packet, rest), (all_packet, all_rest), (own, own_rest) = split(header), split(header + edge.more), split(size)
        zones = np.zeros(len(model.zone_fields) - 1)
        if edge.zone:
            zones[edge.zone - 1] = FAR
        lazy = np.concatenate([[weight, weight * own, rate * size * edge.share / edge.sharing], zones])
        up = np.array([weight * rest, weight, weight * packet, rate * header])
        down = np.array([weight * rest, weight, weight * packet, rate * (header + edge.settle)])
        eager = np.concatenate([[weight * (all_rest - rest), 0.0, weight * (all_packet - packet), rate * edge.more], zones])
        if edge.zone and not model.in_zone[edge.zone, model.broker]:
            eager[4:] += FAR
        if edge.maker_group == edge.taker_group:
            headers = up @ self._up[:4] + down @ self._down[:4]
            return headers + eager @ self._up + eager @ self._down, headers
        making = edge.maker_group == group
        mine, theirs = (self._up, self._down) if making else (self._down, self._up)
        own_head, other_head = (up, down) if making else (down, up)
        others = (
            model.site(edge.taker_group, edge.taker_node, state.sites)
            if making
            else model.site(edge.maker_group, edge.maker_node, state.sites)
        )
        if not others:
            return None
        headers = own_head @ mine[:4] + float(np.mean(other_head @ theirs[:4][:, list(others)]))
        sent = headers + eager @ mine + float(np.mean(eager @ theirs[:, list(others)]))
        ways = model.routes.rows(
            self._sums, np.repeat(lazy[None], len(others), axis=0), np.full(len(others), weight * own_rest), others, reverse=making
        )
        return sent, headers + ways.mean(axis=0)


def better(change: Change, state: State) -> bool:
    """Whether a change is worth making: less excess, or as much and a lower cost."""
    if change.excess < state.excess - TOLERANCE:
        return True
    return change.excess <= state.excess + TOLERANCE * 0.01 and change.cost < state.cost - 1e-10 * (1.0 + abs(state.cost))


def best_of(changes: Iterable[Change], state: State) -> Change | None:
    """The best change that is better than nothing."""
    best: Change | None = None
    for change in changes:
        if better(change, state) and (
            best is None
            or (change.excess + TOLERANCE * 0.1 < best.excess)
            or (change.excess <= best.excess + TOLERANCE * 0.1 and change.cost < best.cost)
        ):
            best = change
    return best


def _sites(model: Model, state: State, group: int, cost: Array, tries: int) -> list[Site]:
    """Sites to try for a group: a replica moved, added or taken away."""
    demand, old = model.groups[group], state.sites[group]
    count = min(tries, int(model.allowed[group].sum()))
    if not count:
        return []
    ranked = np.argpartition(cost, count - 1)[:count] if count < len(cost) else np.arange(len(cost))
    ranked = ranked[np.argsort(cost[ranked], kind="stable")]
    nodes = [int(node) for node in ranked if model.allowed[group, node]]
    if demand.most == 1:
        return [(node,) for node in nodes if (node,) != old]
    found = {tuple(sorted((set(old) - {gone}) | {node})) for gone in old for node in nodes if node not in old}
    if len(old) < demand.most:
        found |= {tuple(sorted({*old, node})) for node in nodes if node not in old}
    if len(old) > demand.least:
        found |= {tuple(sorted(set(old) - {gone})) for gone in old}
    return sorted(site for site in found if site != old and len(site) >= min(demand.least, len(old) + 1))


def _modes(state: State, lazy: Mapping[int, Flags], site: Site) -> dict[int, bool]:
    """The edges whose other mode is cheaper at a site, with that mode."""
    return {edge: bool(row[site[0]]) for edge, row in lazy.items() if bool(row[site[0]]) != state.lazy[edge]}


def fractions(state: State, group: int) -> Array:
    """The weights of inputs as they are in a placement, for the application of a group: of the latest, the one that is latest."""
    model = state.model
    component = model.components[model.groups[group].component]
    if not any(task in model.waits_for_all for task in component.tasks):
        return model.fraction
    result = model.fraction.copy()
    done = model.arrival(component, state.delay, state.service)
    for task in component.tasks:
        if task in model.waits_for_all:
            edges = model.inputs[task]
            ways = [state.delay[e] + (done[model.edges[e].maker] if model.edges[e].maker >= 0 else 0.0) for e in edges]
            result[edges] = 0.0
            result[edges[ways.index(max(ways))]] = 1.0
    return result


def move_group(state: State, pricer: Pricer, group: int, *, tries: int = _TRIES) -> bool:
    """Moves a group to the best of the sites that look best, with the modes that fit; True when that was better."""
    pricer.refresh(state, group)
    cost, lazy = pricer.costs(state, group, fractions(state, group))
    old = state.sites[group]
    # A guess is good enough to leave out what is surely worse, unless a capacity is broken and all that helps is welcome.
    most = float(cost[list(old)].mean()) * (1 + _SLACK) if old and state.feasible and len(old) == 1 else np.inf
    changes = []
    for site in (old, *_sites(state.model, state, group, cost, tries)):
        if site and cost[list(site)].mean() <= most:
            modes = _modes(state, lazy, site)
            if modes or site != old:
                changes.append(state.trial({group: site} if site != old else {}, modes))
    best = best_of(changes, state)
    if best is None:
        return False
    state.apply(best)
    return True


def flip_modes(state: State, edges: Iterable[int]) -> bool:
    """Turns eager to lazy or back where that is better."""
    turned = False
    for edge in edges:
        change = state.trial({}, {edge: not state.lazy[edge]})
        if better(change, state):
            state.apply(change)
            turned = True
    return turned


def improve(
    state: State, rng: random.Random, *, stop: Callable[[], bool], groups: Iterable[int] | None = None, pricer: Pricer | None = None
) -> None:
    """Moves one group at a time until none gets better by itself."""
    model = state.model
    pricer = pricer or Pricer(model)
    waiting = list(range(len(model.groups)) if groups is None else groups)
    rng.shuffle(waiting)
    queued = set(waiting)
    while waiting and not stop():
        group = waiting.pop()
        queued.discard(group)
        if move_group(state, pricer, group):
            for number in model.groups[group].edges:
                edge = model.edges[number]
                for other in (edge.maker_group, edge.taker_group):
                    if other >= 0 and other not in queued:
                        queued.add(other)
                        waiting.insert(0, other)


def settle(state: State, rng: random.Random, *, stop: Callable[[], bool], pricer: Pricer | None = None, rounds: int = 4) -> None:
    """`improve` again and again, since a move of one may open a place for another."""
    pricer = pricer or Pricer(state.model)
    for _ in range(rounds):
        before = (state.excess, state.cost)
        improve(state, rng, stop=stop, pricer=pricer)
        flip_modes(state, () if stop() else range(len(state.lazy)))
        if stop() or not (state.excess < before[0] - TOLERANCE or state.cost < before[1] - 1e-7 * abs(before[1])):
            return


def greedy_state(model: Model, *, previous: list[Site] | None = None, move_cost: float = 0.0) -> State:
    """Each task in order of flow where it costs least at that moment."""
    state = State(model, [()] * len(model.groups), [True] * len(model.edges), previous=previous, move_cost=move_cost)
    pricer = Pricer(model)
    for component in model.components:
        for task in component.tasks:
            group = model.group_of[task]
            if not state.sites[group]:
                place(state, pricer, group)
    return state


def place(state: State, pricer: Pricer, group: int) -> None:
    """Places a group that is not, with its least number of replicas, where it is cheapest and breaks least."""
    demand = state.model.groups[group]
    pricer.refresh(state, group)
    cost, lazy = pricer.costs(state, group, fractions(state, group))
    ranked = [int(node) for node in np.argsort(cost, kind="stable")[: _TRIES + demand.most]]
    best: Change | None = None
    for replicas in range(demand.least, demand.most + 1):
        starts = range(max(len(ranked) - replicas + 1, 1))
        for site in (tuple(sorted(ranked[start : start + replicas])) for start in starts):
            modes = _modes(state, lazy, site)
            change = state.trial({group: site}, modes)
            if (
                best is None
                or (change.excess, change.cost) < (best.excess - TOLERANCE, best.cost)
                or (abs(change.excess - best.excess) <= TOLERANCE and change.cost < best.cost)
            ):
                best = change
        if best is not None and best.excess <= state.excess - demand.least + TOLERANCE:
            break
    if best is not None:
        state.apply(best)


def alternatives(state: State, pricer: Pricer, group: int, *, tries: int = 6) -> list[Change]:
    """Other sites for a group, those that look best with and without a view to capacities, with the modes that fit."""
    pricer.refresh(state, group)
    changes: dict[Site, Change] = {}
    for hard in (True, False):
        cost, lazy = pricer.costs(state, group, fractions(state, group), hard=hard)
        for site in _sites(state.model, state, group, cost, tries):
            if site not in changes:
                modes = _modes(state, lazy, site)
                both = (state.trial({group: site}, modes), state.trial({group: site}, {}))
                changes[site] = min(both, key=lambda change: (change.excess > state.excess + TOLERANCE, change.cost))
    return list(changes.values())
