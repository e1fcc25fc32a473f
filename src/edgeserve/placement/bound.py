"""Prices that make the lower bound large: ascent along subgradients of the dual.

Loads of nodes and of links differ in how far they swing, so each price has a step of its own: the mean direction over the root of its mean
square (RMSProp, Tieleman and Hinton, 2012), and all steps shrink geometrically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from edgeserve.placement.model import Model
from edgeserve.placement.queueing import Array, slope
from edgeserve.placement.relaxation import Prices, Relaxation, Solution, no_prices, worth
from edgeserve.placement.state import State

_FIRST_STEP = 0.012
_SHRINK = 0.975
_MEAN, _SQUARE = 0.5, 0.95
"""How much of the means over past directions and their squares is kept each round."""


def prices_of(model: Model, state: State) -> Prices:
    """What one more load costs in a placement; hard capacities cost nothing here."""
    prices = no_prices(model)
    cpu = np.divide(np.array(state.cpu), model.cores, out=np.zeros(len(state.cpu)), where=model.cores > 0)
    prices.cpu = model.waiting_weight * slope(np.minimum(cpu, model.cpu_limit), model.cpu_power)
    prices.links = model.waiting_weight * slope(np.minimum(np.array(state.links) * model.per_byte, model.link_limit), model.link_power)
    return prices


def ascend(
    relaxation: Relaxation,
    prices: Prices,
    upper: float,
    rounds: int,
    *,
    stop: Callable[[], bool] = lambda: False,
    seen: Callable[[Solution, list[int], int], float] | None = None,
    enough: float = 0.0,
) -> tuple[float, Prices]:
    """The largest bound found, and the prices that give it.

    `seen` is told each choice, and returns the best known objective; the ascent ends when the bound is within `enough` of it (as a part).
    """
    model = relaxation.model
    prices = replace(prices, cpu=np.where(relaxation.alone, 0.0, prices.cpu))
    best, best_prices = -math.inf, prices
    mean = square = np.zeros(0)
    for number in range(rounds):
        solution = relaxation.solve(prices)
        value, loads = worth(relaxation, prices)
        at = solution.at
        if solution.value - value > best:
            best, best_prices = solution.value - value, prices
        if seen is not None:
            upper = seen(solution, at, number)
        if stop() or upper - best <= enough * abs(upper):
            break
        used, ways = relaxed_loads(solution, at)
        direction = _less(used, loads, prices).flat()
        if not number:
            mean, square = np.zeros_like(direction), np.zeros_like(direction)
        mean = _MEAN * mean + (1 - _MEAN) * direction
        square = _SQUARE * square + (1 - _SQUARE) * direction * direction
        shrunk = _SHRINK**number
        fraction = _tilted(model, prices.fraction, ways, max(shrunk, 0.02)) if model.latest else prices.fraction
        step = _FIRST_STEP * abs(upper) * shrunk * mean / np.sqrt(square + 1e-8)
        prices = prices.shaped(np.maximum(prices.flat() + step, 0.0), fraction)
    return best, best_prices


def _less(used: Prices, loads: Prices, prices: Prices) -> Prices:
    """Used less loads, where that can change a price."""

    def part(mine: Array, other: Array, price: Array) -> Array:
        result: Array = np.where((price <= 0) & (mine < other), 0.0, mine - other)
        return result

    return Prices(
        part(used.cpu, loads.cpu, prices.cpu),
        part(used.memory, loads.memory, prices.memory),
        part(used.accelerators, loads.accelerators, prices.accelerators),
        part(used.links, loads.links, prices.links),
        prices.fraction,
    )


def _tilted(model: Model, fraction: Array, ways: Sequence[float], step: float) -> Array:
    """Weights of inputs of which the latest counts, moved towards those that were late (exponentiated gradient)."""
    result = fraction.copy()
    for task in model.latest:
        edges = model.inputs[task]
        late = np.array([ways[edge] for edge in edges])
        spread = float(late.max() - late.min())
        if spread > 0:
            moved = fraction[edges] * np.exp(0.5 * step * (late - late.mean()) / float(late.max()))
            result[edges] = np.maximum(moved / moved.sum(), 1e-4)
            result[edges] /= result[edges].sum()
    return result


def relaxed_loads(solution: Solution, at: Sequence[int]) -> tuple[Prices, list[float]]:
    """Loads of a relaxed choice as parts of the capacities, and per edge the seconds from the event to its arrival."""
    own, model = solution.relaxation, solution.relaxation.model
    links = [0.0] * len(model.routes.link_of)
    modes = solution.modes(at)
    delay = [0.0] * len(model.edges)
    dropped = set(own._dropped)
    path, broker = model.routes.path, model.broker
    for k, edge in enumerate(own.edges):
        a = at[own.row[edge.maker_group]] if edge.maker_group >= 0 else edge.maker_node
        b = at[own.row[edge.taker_group]] if edge.taker_group >= 0 else edge.taker_node
        lazy = modes[edge.number]
        free = k in dropped
        size = edge.header + (0.0 if lazy or free else edge.more)
        delay[edge.number] = model.hop_s + model.transfer_s(a, broker, size) + model.transfer_s(broker, b, size)
        for link in path(a, broker):
            links[link] += edge.rate * size / edge.sharing
        for link in path(broker, b):
            links[link] += edge.rate * (size + edge.settle)
        if lazy and a != b and k not in dropped:
            delay[edge.number] += model.pair(b, a)[0] + model.transfer_s(a, b, edge.bytes)
            for link in path(a, b):
                links[link] += edge.rate * edge.share * edge.bytes / edge.sharing
    used = no_prices(model)
    used.links = np.array(links) * model.per_byte
    for row, group in enumerate(own.groups):
        demand, node = model.groups[group], at[row]
        if model.cores_of[node]:
            used.cpu[node] += demand.cpu / (model.speed_of[node] * model.cores_of[node])
        used.memory[node] += demand.memory_at[-1] / max(model.memory_of[node], 1.0)
        for kind in range(len(model.kinds)):
            used.accelerators[kind, node] += model.demand[group, kind] / max(float(model.accelerators[kind, node]), 1.0)
    return used, _ways(model, own, at, delay)


def _ways(model: Model, own: Relaxation, at: Sequence[int], delay: list[float]) -> list[float]:
    if not model.latest:
        return delay
    spent = [0.0] * len(model.tasks)
    for task, group in enumerate(model.group_of):
        if group in own.row:
            spent[task] = model.tasks[task].cpu_s / model.speed_of[at[own.row[group]]]
    ways = list(delay)
    for component in model.components:
        done = model.arrival(component, delay, spent)
        for task in component.tasks:
            for edge in model.inputs[task]:
                maker = model.edges[edge].maker
                ways[edge] = delay[edge] + (done[maker] if maker >= 0 else 0.0)
    return ways
