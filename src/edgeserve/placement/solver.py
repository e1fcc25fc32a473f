"""`solve`, and what it is compared with: greed, local search alone. All take the same arguments."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from edgeserve.placement.bound import ascend, prices_of
from edgeserve.placement.branch import Search, site_lists
from edgeserve.placement.check import argument, shown
from edgeserve.placement.errors import BadValue
from edgeserve.placement.evaluation import Assignment, Routing, mapping, read_assignment, read_routing, site_names
from edgeserve.placement.model import TOLERANCE, Flags, Model, Site
from edgeserve.placement.plan import Plan, make_plan
from edgeserve.placement.problem import Problem
from edgeserve.placement.queueing import Array
from edgeserve.placement.relaxation import FAR, Prices, Relaxation, Restriction, Solution, worth
from edgeserve.placement.room import check_room, unplaceable
from edgeserve.placement.search import Pricer, flip_modes, greedy_state, improve, place, settle
from edgeserve.placement.state import State

Heuristic: TypeAlias = Callable[[Problem], Assignment | tuple[Assignment, Routing]]
"""A way of your own to place a problem: from the problem to an assignment, or to an assignment and a routing."""

_ROUNDS = 150
_TRY_EVERY = 10
_STALE = 12
_SMALL_CORES = 2
_MENDED = 0.97
_ASCENDED = 0.6
_CROWDED, _DEAR = 0.95, 1.0


class Run:
    """One call: the problem in numbers, the clock, the best placement so far."""

    def __init__(
        self,
        problem: Problem,
        time_limit_s: float,
        seed: int,
        incumbent: Plan | Assignment | None,
        previous: Plan | Assignment | None,
        move_cost: float,
        clock: Callable[[], float],
    ) -> None:
        self.time_limit_s: float = argument("time_limit_s", time_limit_s, most=math.inf)
        self.seed: int = argument("seed", seed, int)
        self.move_cost: float = argument("move_cost", move_cost)
        self.clock, self.began = clock, clock()
        self.rng = random.Random(self.seed)
        self.model = Model(problem)
        self.previous = None if previous is None else self._known(previous)
        self.pricer = Pricer(self.model)
        self.best: State | None = None
        self.nearest: State | None = None
        self._parts: list[Relaxation] | None = None
        self._alone: Flags | None = None
        check_room(self.model)
        if incumbent is not None:
            self.take(self.read(incumbent, incumbent.routing if isinstance(incumbent, Plan) else "lazy", "incumbent"))

    def elapsed(self) -> float:
        return self.clock() - self.began

    def late(self, part: float = 1.0) -> bool:
        return self.elapsed() > self.time_limit_s * part

    def _known(self, previous: Plan | Assignment) -> list[Site]:
        """The sites of before, as far as their nodes are still there."""
        model, given = self.model, previous.assignment if isinstance(previous, Plan) else previous
        mapping(given, "previous", "a Plan, or a dict from task to node")
        sites: list[Site] = [()] * len(model.groups)
        for number, task in enumerate(model.tasks):
            names = site_names(given.get(task.name, ()), f"previous[{task.name!r}]")
            site = tuple(sorted(model.node_number[name] for name in names if name in model.node_number))
            sites[model.group_of[number]] = sites[model.group_of[number]] or site
        return sites

    def read(self, given: Plan | Assignment, routing: Routing, what: str) -> State:
        assignment = given.assignment if isinstance(given, Plan) else given
        sites, _ = read_assignment(self.model, assignment, what)
        return self.make(sites, read_routing(self.model, routing))

    def make(self, sites: Sequence[Site], lazy: Sequence[bool]) -> State:
        return State(self.model, sites, lazy, previous=self.previous, move_cost=self.move_cost)

    def greedy(self) -> State:
        return greedy_state(self.model, previous=self.previous, move_cost=self.move_cost)

    def kept(self, routing: Routing) -> State:
        """What was before, with what has lost its node placed anew."""
        model, before = self.model, self.previous or []
        lazy = [True] * len(model.edges)
        if not isinstance(routing, str):
            for key, mode in routing.items():
                if key in model.edge_number:
                    lazy[model.edge_number[key]] = mode == "lazy"
        state = self.make([self._usable(group, site) for group, site in enumerate(before)], lazy)
        for component in model.components:
            for task in component.tasks:
                if not state.sites[model.group_of[task]]:
                    place(state, self.pricer, model.group_of[task])
        return state

    def _usable(self, group: int, site: Site) -> Site:
        return site if len(site) >= self.model.groups[group].least and all(self.model.allowed[group, node] for node in site) else ()

    def start(self) -> State:
        """The best placement, or the one that breaks least."""
        found = self.best or self.nearest
        assert found is not None
        return found

    def alone(self) -> Flags:
        """Small nodes that run one group at most in the placement found first."""
        if self._alone is None:
            count = np.bincount([node for site in self.start().sites for node in site], minlength=len(self.model.nodes))
            self._alone = (count <= 1) & (self.model.cores <= _SMALL_CORES)
        return self._alone

    def parts(self) -> list[Relaxation]:
        """The relaxed problem of each application."""
        if self._parts is None:
            make = partial(Relaxation, self.model, alone=self.alone(), previous=self.previous, move_cost=self.move_cost)
            self._parts = [make(component.groups) for component in self.model.components]
        return self._parts

    def take(self, state: State) -> None:
        """Keeps it if it is the best so far."""
        if self.nearest is None or (state.excess, state.cost) < (self.nearest.excess, self.nearest.cost):
            self.nearest = state.copy()
        if state.feasible and (self.best is None or state.cost < self.best.cost - 1e-12 * abs(self.best.cost)):
            self.best = state.copy()

    def plan(self, bound: float, method: str, proven_none: bool = False) -> Plan:
        if self.best is None:
            raise unplaceable(self._as_wished(), self.elapsed(), proven_none)
        return make_plan(self.best, bound, method, self.elapsed())

    def _as_wished(self) -> State:
        """The placement that breaks least, with tasks that pins and zones keep away from their nodes put where they let them be."""
        assert self.nearest is not None
        state, model = self.nearest.copy(), self.model
        for group, site in enumerate(state.sites):
            if not all(model.wished[group][node] for node in site):
                sites = [_widened(model, group, int(node)) for node in np.flatnonzero(model.allowed[group])]
                state.apply(min((state.trial({group: site}, {}) for site in sites), key=lambda change: (change.excess, change.cost)))
        flip_modes(state, range(len(model.edges)))
        return state.copy()


def solve(
    problem: Problem,
    *,
    time_limit_s: float = 10.0,
    seed: int = 0,
    incumbent: Plan | Assignment | None = None,
    previous: Plan | Assignment | None = None,
    move_cost: float = 0.0,
    gap: float = 1e-6,
    heuristics: Sequence[Heuristic] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Places a problem as well as it can be told in the time, and says how far from the best that may be.

    Args:
        problem: what to place.
        time_limit_s: when to stop, in seconds; what has been found by then is returned.
        seed: a whole number, not negative; the same seed gives the same plan, unless the time limit cuts in.
        incumbent: a plan to begin with.
        previous: where tasks run now. Those whose node is still there stay unless a move pays for `move_cost`.
        move_cost: what each replica that has to start on another node costs, in units of the objective; not negative.
        gap: stop when the plan is proven to be within this part of the best, from 0 to 1.
        heuristics: your own ways to place; what they return is improved and competes.
        clock: seconds, for the time limit.

    Raises:
        Unplaceable: capacities or wishes cannot be kept; it names which, by how much, and for which tasks.
        BadValue: a number is negative, NaN or out of its range, or something is not of its type.
        InvalidPlan: `incumbent`, `previous` or what a heuristic returns is no assignment of this problem.
        InvalidProblem: a node cannot be reached.

    Example:
        >>> from edgeserve.placement import Link, Node, Problem, Sink, Source, Task
        >>> problem = Problem(
        ...     nodes=(Node(name="camera", speed=0.2), Node(name="server", cores=8)),
        ...     links=(Link(name="wifi", ends=("camera", "server"), bandwidth_bytes_s=2.5e6, latency_ms=3),),
        ...     broker="server",
        ...     sources=(Source(name="frames", node="camera", rate_hz=10, bytes=100_000),),
        ...     tasks=(Task(name="detect", inputs=("frames",), cpu_s=0.01, output_bytes=500),),
        ...     sinks=(Sink(name="alarm", input="detect", node="server"),),
        ... )
        >>> plan = solve(problem)
        >>> plan.assignment["detect"], plan.routing["frames", "detect"], plan.gap < 1e-6
        (('server',), 'eager', True)
    """
    gap = argument("gap", gap, most=1.0)
    if not isinstance(heuristics, Sequence) or not all(callable(heuristic) for heuristic in heuristics):
        raise BadValue(f"heuristics is {shown(heuristics)}: give a list of functions, each from a problem to an assignment")
    run = Run(problem, time_limit_s, seed, incumbent, previous, move_cost, clock)
    _first(run, previous, heuristics)
    relaxation = Relaxation(run.model, alone=run.alone(), previous=run.previous, move_cost=run.move_cost)
    bound, prices = _ascend(run, relaxation, gap)
    _mend(run, prices, bound, gap)
    none_left = False
    if run.best is None or run.best.cost - bound > gap * abs(run.best.cost):
        bound, none_left = _finish(run, relaxation, prices, bound)
    return run.plan(bound, "solve", none_left)


def _first(run: Run, previous: Plan | Assignment | None, heuristics: Sequence[Heuristic]) -> None:
    """The placements to begin with."""
    starts: list[State] = [] if run.best is None else [run.best.copy()]
    if previous is not None:
        starts.append(run.kept(previous.routing if isinstance(previous, Plan) else "lazy"))
    for heuristic in heuristics:
        given = heuristic(run.model.problem)
        assignment, routing = given if isinstance(given, tuple) and len(given) == 2 else (given, "lazy")
        starts.append(run.read(assignment, routing, "a heuristic's assignment"))
    if not starts:
        starts.append(run.greedy())
    for state in starts:
        run.take(state)
        settle(state, run.rng, stop=run.late, pricer=run.pricer)
        run.take(state)


def _ascend(run: Run, relaxation: Relaxation, gap: float) -> tuple[float, Prices]:
    """The bound, and placements on the way to it."""
    model = run.model
    start = run.start()

    def seen(solution: Solution, at: list[int], number: int) -> float:
        if number % _TRY_EVERY == _TRY_EVERY - 1 and not run.late(_ASCENDED / 2):
            run.take(rebuilt(run, start, run.parts(), solution.prices))
        return run.best.cost if run.best is not None else (run.nearest.cost if run.nearest is not None else 1.0) * 1.5

    return ascend(relaxation, prices_of(model, start), start.cost, _ROUNDS, stop=lambda: run.late(_ASCENDED), seen=seen, enough=gap)


def _widened(model: Model, group: int, node: int) -> Site:
    """A site of the least size around a node."""
    others = [int(other) for other in np.flatnonzero(model.allowed[group]) if other != node]
    return tuple(sorted([node, *others[: model.groups[group].least - 1]]))


def _mend(run: Run, prices: Prices, bound: float, gap: float) -> None:
    """Places a few applications anew together, over and over: large neighbourhood search (Shaw, CP 1998), with the prices as its guide."""
    state, parts, stale = run.start(), run.parts(), 0
    while stale < _STALE * len(parts) and not run.late(_MENDED) and not (state.feasible and state.cost - bound <= gap * abs(state.cost)):
        tried = rebuilt(run, state, _neighbours(run, state, parts), prices)
        less = tried.excess < state.excess - TOLERANCE
        better = less or (tried.excess <= state.excess + TOLERANCE * 0.01 and tried.cost < state.cost - 1e-9 * abs(state.cost))
        stale = 0 if better else stale + 1
        if better:
            flip_modes(tried, range(len(tried.lazy)))
            state = tried.copy()
            run.take(state)


def _neighbours(run: Run, state: State, parts: Sequence[Relaxation]) -> list[Relaxation]:
    """An application, and at most three that share nodes or links with it."""
    first = run.rng.randrange(len(parts))
    wanted = run.rng.choice((0, 1, 1, 2, 3))
    if not wanted:
        return [parts[first]]
    touched = [_touched(state, part) for part in parts]
    others = [number for number in range(len(parts)) if number != first and touched[first] & touched[number]]
    run.rng.shuffle(others)
    return [parts[number] for number in (first, *others[:wanted])]


def _touched(state: State, part: Relaxation) -> set[int]:
    """Nodes that run something of an application, and links (as negative numbers) that carry its streams and are busy."""
    model = state.model
    nodes = {node for group in part.groups for node in state.sites[group] if state.cpu[node] > 0.3 * model.cores_of[node]}
    links = {link for group in part.groups for stream in model.groups[group].streams for link in state.flows[stream]}
    return nodes | {-1 - link for link in links if state.links[link] * model.per_byte_of[link] > 0.3}


def rebuilt(run: Run, state: State, parts: Sequence[Relaxation], prices: Prices) -> State:
    """A placement with some applications taken out and put back, one after the other."""
    model = run.model
    tried = state.twin()
    tried.apply(tried.trial({group: () for part in parts for group in part.groups}, {}))
    zero = np.zeros(len(model.edges))
    for part in run.rng.sample(parts, len(parts)):
        here = prices_of(model, tried)
        here.fraction = prices.fraction
        here.links += np.where(np.array(tried.links) * model.per_byte > _CROWDED * model.link_limit, _DEAR * abs(state.cost), 0.0)
        solution = part.solve(here.mixed(prices, run.rng.choice((0.0, 0.5, 1.0))), Restriction(_room(tried, part.groups), zero, zero))
        sites = {group: _widened(model, group, node) for group, node in zip(part.groups, solution.at, strict=True)}
        tried.apply(tried.trial(sites, solution.modes([site[0] for site in sites.values()])))
    groups = [group for part in parts for group in part.groups]
    improve(tried, run.rng, stop=run.late, groups=groups, pricer=run.pricer)
    return tried


def _room(state: State, groups: Sequence[int]) -> Array:
    """Nodes that have no room left for a group are far away."""
    model = state.model
    room = np.zeros((len(model.groups), len(model.nodes)))
    free = model.cores * model.cpu_limit - np.array(state.cpu)
    memory = model.memory - np.array(state.memory)
    for group in groups:
        demand = model.groups[group]
        full = (demand.cpu / (demand.most * model.speed) > free + TOLERANCE) | (demand.memory_at[-1] > memory * (1 + TOLERANCE) + TOLERANCE)
        for kind in range(len(model.kinds)):
            full |= model.demand[group, kind] > model.accelerators[kind] - np.array(state.accelerators[kind]) + TOLERANCE
        room[group, full] = FAR
    return room


def _finish(run: Run, relaxation: Relaxation, prices: Prices, bound: float) -> tuple[float, bool]:
    """Takes out what cannot be in a better placement, and searches the rest; the bound, and whether nothing at all was left."""
    model = run.model
    solution = relaxation.solve(prices)
    marginals = solution.marginals() - worth(relaxation, prices)[0]
    upper = run.best.cost if run.best is not None else math.inf
    replicas = np.array([group.most for group in model.groups], dtype=float)[:, None]
    least = solution.bound()
    keep = model.allowed & (least + (marginals - least) / replicas <= upper + 1e-9 * abs(upper) if math.isfinite(upper) else model.allowed)
    lists = site_lists(model, keep.astype(float))
    if lists is None:
        return bound, False
    search = Search(relaxation, prices, lists, run.best)
    search.run(lambda: run.late(_MENDED), run.make)
    if search.best is not None:
        run.take(search.best)
    return max(bound, search.bound), not math.isfinite(search.bound) and search.bound > 0


def greedy(
    problem: Problem,
    *,
    time_limit_s: float = 10.0,
    seed: int = 0,
    incumbent: Plan | Assignment | None = None,
    previous: Plan | Assignment | None = None,
    move_cost: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Each task in order of flow where it costs least at that moment; proves nothing. Arguments and errors as `solve`.

    If that breaks a capacity, tasks are moved until nothing does.
    """
    run = Run(problem, time_limit_s, seed, incumbent, previous, move_cost, clock)
    state = run.greedy()
    if not state.feasible:
        improve(state, run.rng, stop=lambda: run.late() or state.feasible, pricer=run.pricer)
    run.take(state)
    return run.plan(-math.inf, "greedy")


def local_search(
    problem: Problem,
    *,
    time_limit_s: float = 10.0,
    seed: int = 0,
    incumbent: Plan | Assignment | None = None,
    previous: Plan | Assignment | None = None,
    move_cost: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """`greedy`, then moves of one task at a time, from random placements too; proves nothing. Arguments and errors as `solve`."""
    run = Run(problem, time_limit_s, seed, incumbent, previous, move_cost, clock)
    state = run.kept("lazy") if run.previous is not None else run.greedy()
    stale = 0
    while True:
        settle(state, run.rng, stop=run.late, pricer=run.pricer)
        before = run.best.cost if run.best is not None else math.inf
        run.take(state)
        stale = 0 if run.best is not None and run.best.cost < before else stale + 1
        if run.late() or stale >= 5:
            return run.plan(-math.inf, "local search")
        state = _shaken(run)


def _shaken(run: Run) -> State:
    """The best placement with a tenth of the groups somewhere else."""
    state = run.start().copy()
    for group in run.rng.sample(range(len(state.sites)), max(len(state.sites) // 10, 1)):
        options = np.flatnonzero(run.model.allowed[group]).tolist()
        state.apply(state.trial({group: tuple(sorted(run.rng.sample(options, run.model.groups[group].least)))}, {}))
    flip_modes(state, range(len(run.model.edges)))
    return state
