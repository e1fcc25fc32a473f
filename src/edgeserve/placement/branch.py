"""Branch and bound: sites of groups first, modes of edges next, each branch bounded by the relaxation at one set of prices."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from edgeserve.placement.model import TOLERANCE, Model, Site
from edgeserve.placement.queueing import Array
from edgeserve.placement.relaxation import FAR, Prices, Relaxation, Restriction, worth
from edgeserve.placement.state import State

_MOST_SITES = 5_000
_ENUMERATED = 6
_CLOSE = 1e-10

Decided = tuple[tuple[int, Site], ...]
Modes = tuple[tuple[int, bool], ...]


def site_lists(model: Model, keep: Array) -> list[list[Site]] | None:
    """All sites of each group over the nodes that are kept, or None when these are too many."""
    lists = []
    for number, group in enumerate(model.groups):
        nodes = [int(node) for node in np.flatnonzero(keep[number])]
        if sum(math.comb(len(nodes), size) for size in range(group.least, group.most + 1)) > _MOST_SITES:
            return None
        lists.append([site for size in range(group.least, group.most + 1) for site in itertools.combinations(nodes, size)])
    return lists


class Search:
    """A search over what is left of all placements.

    Attributes:
        best: the best placement known, None as long as there is none.
        bound: no placement is better than this.
    """

    def __init__(self, relaxation: Relaxation, prices: Prices, lists: Sequence[Sequence[Site]], best: State | None) -> None:
        self.relaxation, self.model, self.prices, self.lists = relaxation, relaxation.model, prices, lists
        self.best = best
        self.bound = -math.inf
        self._worth = worth(relaxation, prices)[0]
        self._count = itertools.count()
        self._heap: list[tuple[float, int, Decided, Modes]] = []

    @property
    def upper(self) -> float:
        """The best objective known."""
        return self.best.cost if self.best is not None else math.inf

    def run(self, stop: Callable[[], bool], make: Callable[[Sequence[Site], Sequence[bool]], State]) -> None:
        """Searches until nothing is left that could be better, or until `stop`."""
        self._make = make
        heapq.heappush(self._heap, (-math.inf, next(self._count), (), ()))
        while self._heap:
            self.bound = min(self._heap[0][0], self.upper)
            if self._done(self._heap[0][0]):
                break
            if stop():
                return
            _, _, sites, modes = heapq.heappop(self._heap)
            self._branch(dict(sites), dict(modes))
        self.bound = self.upper

    def _done(self, bound: float) -> bool:
        return bound >= self.upper - _CLOSE * (1.0 + abs(self.upper))

    def _branch(self, sites: dict[int, Site], modes: dict[int, bool]) -> None:
        solution = self.relaxation.solve(self.prices, self._restriction(sites, modes))
        bound = solution.value - self._worth
        if self._done(bound) or bound > FAR / 2:
            return
        if len(sites) < len(self.lists):
            self._branch_site(sites, modes, solution.marginals() - self._worth)
            return
        free = [e.number for e in self.model.edges if e.number not in modes and (e.rate or e.weight or e.more > 0)]
        if len(free) <= _ENUMERATED:
            self._enumerate(sites, modes, free)
            return
        for lazy in (True, False):
            self._push(bound, sites, {**modes, free[0]: lazy})

    def _branch_site(self, sites: dict[int, Site], modes: dict[int, bool], marginals: Array) -> None:
        choices: list[tuple[float, Site]] | None = None
        chosen = -1
        for group, options in enumerate(self.lists):
            if group in sites:
                continue
            row = marginals[group]
            left = [(float(row[list(site)].mean()), site) for site in options]
            left = [(cost, site) for cost, site in left if not self._done(cost) and cost < FAR / 2 and self._fits(sites, group, site)]
            if choices is None or len(left) < len(choices):
                choices, chosen = left, group
        for cost, site in choices or ():
            self._push(cost, {**sites, chosen: site}, modes)

    def _push(self, bound: float, sites: dict[int, Site], modes: dict[int, bool]) -> None:
        heapq.heappush(self._heap, (bound, next(self._count), tuple(sites.items()), tuple(modes.items())))

    def _fits(self, sites: dict[int, Site], group: int, site: Site) -> bool:
        """Whether the nodes of a site have room beside what is decided, and no one there has to be apart."""
        model = self.model
        if any(set(site) & set(sites.get(other, ())) for other in model.groups[group].apart):
            return False
        for node in site:
            here = [(group, len(site)), *((other, len(there)) for other, there in sites.items() if node in there)]
            cpu = sum(model.groups[g].cpu / (count * model.speed_of[node]) for g, count in here)
            memory = sum(model.groups[g].memory_at[count] for g, count in here)
            slack = 1 + TOLERANCE
            if cpu > model.cores_of[node] * model.cpu_limit_of[node] * slack or memory > model.memory_of[node] * slack:
                return False
            held = np.sum([model.groups[g].held_at[count] for g, count in here], axis=0)
            if model.kinds and any(held > model.accelerators[:, node] + TOLERANCE):
                return False
        return True

    def _restriction(self, sites: dict[int, Site], modes: dict[int, bool]) -> Restriction:
        model = self.model
        nodes = np.full((len(model.groups), len(model.nodes)), FAR)
        for group, options in enumerate(self.lists):
            for site in (sites[group],) if group in sites else options:
                nodes[group, list(site)] = 0.0
        eager, lazy = np.zeros(len(model.edges)), np.zeros(len(model.edges))
        for edge, is_lazy in modes.items():
            (eager if is_lazy else lazy)[edge] = FAR
        return Restriction(nodes, eager, lazy)

    def _enumerate(self, sites: dict[int, Site], modes: dict[int, bool], free: list[int]) -> None:
        """All modes that are left, in the order of a Gray code: each differs from the one before in one edge."""
        lazy = [modes.get(e.number, True) for e in self.model.edges]
        state = self._make([sites[group] for group in range(len(self.lists))], lazy)
        self._keep(state)
        for step in range(1, 2 ** len(free)):
            edge = free[(step & -step).bit_length() - 1]
            state.apply(state.trial({}, {edge: not state.lazy[edge]}))
            self._keep(state)

    def _keep(self, state: State) -> None:
        if state.feasible and state.cost < self.upper:
            self.best = state.copy()
