"""The whole problem as a mixed-integer linear program, for HiGHS: what `solve` is compared with.

A binary variable says which site a group has; a variable per edge, pair of sites and mode says how the edge travels (the
standard linearisation of a product, Adams and Sherali, 1986). The number waiting is convex in the load, so tangents bound it from below:
the program's bound is one of the problem, and what it finds is priced by `evaluate`'s model.
"""

from __future__ import annotations

import importlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgeserve.core.errors import MissingExtra
from edgeserve.placement.branch import site_lists
from edgeserve.placement.evaluation import Assignment
from edgeserve.placement.model import Edge, Model, Site
from edgeserve.placement.plan import Plan
from edgeserve.placement.problem import Problem
from edgeserve.placement.queueing import slope, waiting_all
from edgeserve.placement.search import flip_modes
from edgeserve.placement.solver import Run
from edgeserve.placement.state import State, leaves, pair_delay, service_on

_TANGENTS = 24
_MOST_PAIRS = 400_000


def highs() -> Any:
    """The solver's Python module.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module("highspy")
    except ImportError as exc:
        raise MissingExtra("a mixed-integer program needs HiGHS: pip install 'edgeserve-streams[placement]'") from exc


class _Program:
    """Variables and rows as they come."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.upper: list[float] = []
        self.whole: list[bool] = []
        self.rows: list[tuple[float, float, dict[int, float]]] = []

    def variable(self, cost: float = 0.0, upper: float = math.inf, whole: bool = False) -> int:
        self.cost.append(cost)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.cost) - 1

    def row(self, terms: dict[int, float], lower: float = -math.inf, upper: float = math.inf) -> None:
        self.rows.append((lower, upper, terms))

    def run(self, time_limit_s: float, seed: int, start: Sequence[float] | None = None) -> tuple[list[float] | None, float]:
        """Values of the variables, if any were found, and the bound."""
        module = highs()
        base: Any = module.Highs

        class Quiet(base):  # type: ignore[misc]
            def enableCallbacks(self) -> None:
                """Called by the constructor: the first call that prints the banner, unless the option was set before."""
                self.setOptionValue("output_flag", False)
                super().enableCallbacks()

        solver = Quiet()
        for option, value in (
            ("time_limit", time_limit_s),
            ("random_seed", seed % 2**31),
            ("threads", 1),
            ("mip_rel_gap", 1e-7),
        ):
            solver.setOptionValue(option, value)
        program = module.HighsLp()
        program.num_col_, program.num_row_ = len(self.cost), len(self.rows)
        program.col_cost_, program.col_lower_, program.col_upper_ = np.array(self.cost), np.zeros(len(self.cost)), np.array(self.upper)
        program.row_lower_ = np.array([lower for lower, _, _ in self.rows])
        program.row_upper_ = np.array([upper for _, upper, _ in self.rows])
        program.a_matrix_.format_ = module.MatrixFormat.kRowwise
        program.a_matrix_.start_ = np.cumsum([0, *(len(terms) for _, _, terms in self.rows)])
        program.a_matrix_.index_ = np.array([column for _, _, terms in self.rows for column in terms])
        program.a_matrix_.value_ = np.array([value for _, _, terms in self.rows for value in terms.values()])
        kinds = module.HighsVarType
        program.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in self.whole]
        solver.passModel(program)
        solver.run()
        info = solver.getInfo()
        found = info.primal_solution_status == module.SolutionStatus.kSolutionStatusFeasible
        empty = solver.getModelStatus() == module.HighsModelStatus.kInfeasible
        return (list(solver.getSolution().col_value) if found else None), math.inf if empty else float(info.mip_dual_bound)


class _Builder:
    """The program of a model over lists of sites."""

    def __init__(self, model: Model, lists: Sequence[Sequence[Site]], previous: Sequence[Site] | None, move_cost: float) -> None:
        self.model, self.lists, self.program = model, lists, _Program()
        self.links: list[dict[int, float]] = [defaultdict(float) for _ in model.routes.link_of]
        self.cpu: list[dict[int, float]] = [defaultdict(float) for _ in model.nodes]
        self.site: list[list[int]] = []
        self.pairs: dict[tuple[int, int, int, bool], int] = {}
        self.weight, self.task_weight = model.spread_weights(model.fraction)
        exact = {c for c, component in enumerate(model.components) if any(task in model.latest for task in component.tasks)}
        self._timed = {g for c in exact for g in model.components[c].groups}
        self._delay: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._add_sites(previous, move_cost)
        for edge in model.edges:
            self._add_edge(edge)
        for stream in range(len(model.streams)):
            self._add_stream(stream)
        for c in sorted(exact):
            self._add_times(c)
        self._add_capacities()
        self._add_waiting()

    def _add_sites(self, previous: Sequence[Site] | None, move_cost: float) -> None:
        model, program = self.model, self.program
        for number, group in enumerate(model.groups):
            columns = []
            for site in self.lists[number]:
                cost = 0.0
                if number not in self._timed:
                    cost = sum(self.task_weight[t] * service_on(model, t, site) for t in group.tasks)
                if previous is not None:
                    cost += move_cost * len(set(site) - set(previous[number]))
                columns.append(program.variable(cost, 1.0, whole=True))
                for node in site:
                    self.cpu[node][columns[-1]] += group.cpu / (len(site) * model.speed_of[node])
                for task in group.tasks:
                    rate = float(model.runs[task]) * model.handed_bytes(task, len(site)) / len(site)
                    for node in site:
                        self._flow(node, model.broker, columns[-1], rate)
                        self._flow(model.broker, node, columns[-1], rate)
            program.row(dict.fromkeys(columns, 1.0), 1.0, 1.0)
            self.site.append(columns)

    def _ends(self, edge: Edge) -> tuple[Sequence[Site], Sequence[Site]]:
        makers = self.lists[edge.maker_group] if edge.maker_group >= 0 else [(edge.maker_node,)]
        takers = self.lists[edge.taker_group] if edge.taker_group >= 0 else [(edge.taker_node,)]
        return makers, takers

    def _add_edge(self, edge: Edge) -> None:
        """A variable per pair of sites and mode; each site's add up to whether it is taken."""
        model, program = self.model, self.program
        makers, takers = self._ends(edge)
        timed = edge.maker_group in self._timed or edge.taker_group in self._timed
        by_maker: list[dict[int, float]] = [{} for _ in makers]
        by_taker: list[dict[int, float]] = [{} for _ in takers]
        for i, maker in enumerate(makers):
            for j, taker in enumerate(takers):
                if edge.maker_group == edge.taker_group >= 0 and i != j:
                    continue
                for lazy in (False, True):
                    if (lazy and edge.small) or (edge.zone and leaves(model, _fixed(edge), [maker, taker], lazy)):
                        continue
                    delay = sum(pair_delay(model, edge, a, b, lazy) for a in maker for b in taker) / (len(maker) * len(taker))
                    column = program.variable(0.0 if timed else self.weight[edge.number] * delay, 1.0)
                    self.pairs[edge.number, i, j, lazy] = column
                    by_maker[i][column] = by_taker[j][column] = 1.0
                    if timed:
                        self._delay[edge.number][column] = delay
        for group, sums in ((edge.maker_group, by_maker), (edge.taker_group, by_taker)):
            for position, terms in enumerate(sums):
                if group >= 0:
                    program.row({**terms, self.site[group][position]: -1.0}, 0.0, 0.0)
                else:
                    program.row(terms, 1.0, 1.0)

    def _flow(self, a: int, b: int, column: int, rate: float) -> None:
        if rate:
            for link in self.model.routes.path(a, b):
                self.links[link][column] += rate

    def _add_stream(self, number: int) -> None:
        model, program = self.model, self.program
        stream = model.streams[number]
        if not stream.edges:
            return
        makers = self._ends(model.edges[stream.edges[0]])[0]
        constant = program.variable(0.0, 1.0) if stream.group < 0 else -1
        if constant >= 0:
            program.row({constant: 1.0}, 1.0, 1.0)
        for i, maker in enumerate(makers):
            chosen = self.site[stream.group][i] if stream.group >= 0 else constant
            pushed = program.variable(0.0, 1.0)
            for a in maker:
                self._flow(a, model.broker, chosen, stream.rate * stream.header / len(maker))
                self._flow(a, model.broker, pushed, stream.rate * stream.more / len(maker))
            used: dict[int, list[dict[int, float]]] = defaultdict(list)
            for e in stream.edges:
                self._add_taker(model.edges[e], i, maker, pushed, used)
            for b, terms in used.items():
                fetched = program.variable(0.0, 1.0)
                for each in terms:
                    program.row({**each, fetched: -1.0}, upper=0.0)
                for a in maker:
                    if a != b:
                        self._flow(a, b, fetched, stream.rate * stream.bytes / len(maker))

    def _add_taker(self, edge: Edge, i: int, maker: Site, pushed: int, used: dict[int, list[dict[int, float]]]) -> None:
        eager: dict[int, float] = {}
        fetched: dict[int, dict[int, float]] = defaultdict(dict)
        for j, taker in enumerate(self._ends(edge)[1]):
            for lazy in (False, True):
                column = self.pairs.get((edge.number, i, j, lazy))
                if column is None:
                    continue
                for b in taker:
                    size = edge.header + edge.settle + (0.0 if lazy else edge.more)
                    self._flow(self.model.broker, b, column, edge.rate * size / len(taker))
                    if lazy:
                        fetched[b][column] = edge.share / len(taker)
                if not lazy:
                    eager[column] = 1.0
        self.program.row({**eager, pushed: -1.0}, upper=0.0)
        for b, terms in fetched.items():
            used[b].append(terms)

    def _add_times(self, number: int) -> None:
        """Seconds from the event to each task's result, where a join of the latest makes them more than a sum."""
        model, program, component = self.model, self.program, self.model.components[number]
        done: dict[int, int] = {}
        for task in component.tasks:
            group = model.group_of[task]
            done[task] = program.variable()
            spent = {c: -service_on(model, task, site) for c, site in zip(self.site[group], self.lists[group], strict=True)}
            mean = {done[task]: 1.0, **spent}
            for e in model.inputs[task]:
                maker = model.edges[e].maker
                part = 1.0 if task in model.latest else float(model.fraction[e])
                terms = {column: -part * delay for column, delay in self._delay[e].items()}
                if maker >= 0:
                    terms[done[maker]] = -part
                if task in model.latest:
                    program.row({done[task]: 1.0, **spent, **terms}, lower=0.0)
                else:
                    mean.update(terms)
            if task not in model.latest:
                program.row(mean, lower=0.0)
        for e in component.sinks:
            weight = model.edges[e].weight
            program.cost[done[model.edges[e].maker]] += weight
            for column, delay in self._delay[e].items():
                program.cost[column] += weight * delay

    def _add_capacities(self) -> None:
        model, program = self.model, self.program
        hard: list[tuple[dict[int, float], float]] = []
        users: list[list[tuple[int, int, int]]] = [[] for _ in model.nodes]
        for number, columns in enumerate(self.site):
            for column, site in zip(columns, self.lists[number], strict=True):
                for node in site:
                    users[node].append((column, number, len(site)))
        for node, using in enumerate(users):
            hard.append(({c: used for c, g, n in using if (used := model.groups[g].memory_at[n])}, model.memory_of[node]))
            hard.extend(
                ({c: held for c, g, n in using if (held := model.groups[g].held_at[n][kind])}, float(model.accelerators[kind, node]))
                for kind in range(len(model.kinds))
            )
            pairs = [(g, other) for g, group in enumerate(model.groups) for other in group.apart if g < other]
            hard.extend(({c: 1.0 for c, h, _ in using if h in pair}, 1.0) for pair in pairs)
        for terms, capacity in hard:
            if terms:
                program.row(terms, upper=capacity)

    def _add_waiting(self) -> None:
        model = self.model
        for link, terms in enumerate(self.links):
            rate = {column: value * model.per_byte_of[link] for column, value in terms.items()}
            self._wait(rate, model.link_limit_of[link], 2.0, model.byte_price_of[link] / model.per_byte_of[link])
        for node, terms in enumerate(self.cpu):
            cores = model.cores_of[node]
            if cores:
                busy = {column: value / cores for column, value in terms.items()}
                self._wait(busy, model.cpu_limit_of[node], model.cpu_power_of[node], model.core_price_of[node] * cores)

    def _wait(self, terms: dict[int, float], limit: float, power: float, price: float) -> None:
        if not terms:
            return
        program = self.program
        load = program.variable(price, limit)
        program.row({**terms, load: -1.0}, 0.0, 0.0)
        if not self.model.waiting_weight:
            return
        count = program.variable(self.model.waiting_weight)
        at = np.linspace(0.0, limit, _TANGENTS + 1)[1:]
        powers = np.full_like(at, power)
        for where, value, rise in zip(at, waiting_all(at, powers), slope(at, powers), strict=True):
            program.row({count: 1.0, load: -float(rise)}, lower=float(value - rise * where))

    def read(self, values: Sequence[float]) -> tuple[list[Site], list[bool]]:
        """Sites and modes of a solution."""
        chosen = [max(range(len(columns)), key=lambda k: values[columns[k]]) for columns in self.site]
        lazy = [True] * len(self.model.edges)
        for (edge, i, j, mode), column in self.pairs.items():
            found = self.model.edges[edge]
            if (found.maker_group < 0 or chosen[found.maker_group] == i) and (found.taker_group < 0 or chosen[found.taker_group] == j):
                if not mode:
                    lazy[edge] = values[column] < 0.5
        return [self.lists[group][k] for group, k in enumerate(chosen)], lazy


def _fixed(edge: Edge) -> Edge:
    """The edge with its ends at the first and second of two sites."""
    return replace(edge, maker_group=0, maker_node=-1, taker_group=1, taker_node=-1)


def pair_count(model: Model, lists: Sequence[Sequence[Site]]) -> int:
    """How many pairs of sites the program has a variable for."""
    return sum(
        (len(lists[e.maker_group]) if e.maker_group >= 0 else 1) * (len(lists[e.taker_group]) if e.taker_group >= 0 else 1)
        for e in model.edges
    )


def milp_bound(
    model: Model, lists: Sequence[Sequence[Site]], time_limit_s: float, seed: int, make: Callable[[Sequence[Site], Sequence[bool]], State]
) -> tuple[State | None, float]:
    """The best placement that HiGHS finds over lists of sites, and its bound over these."""
    sample = make([options[0] for options in lists], [True] * len(model.edges))
    builder = _Builder(model, lists, sample.previous, sample.move_cost)
    values, bound = builder.program.run(time_limit_s, seed)
    if values is None:
        return None, bound
    state = make(*builder.read(values))
    if state.feasible:
        flip_modes(state, range(len(model.edges)))
    return state, bound


def milp(
    problem: Problem,
    *,
    time_limit_s: float = 10.0,
    seed: int = 0,
    incumbent: Plan | Assignment | None = None,
    previous: Plan | Assignment | None = None,
    move_cost: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """The whole problem given to HiGHS as it is. Arguments and errors as `solve`.

    Raises:
        MissingExtra: HiGHS is not installed.
        MemoryError: the program would have too many variables to be written down.
    """
    run = Run(problem, time_limit_s, seed, incumbent, previous, move_cost, clock)
    highs()
    lists = site_lists(run.model, run.model.allowed.astype(float))
    if lists is None or pair_count(run.model, lists) > _MOST_PAIRS:
        raise MemoryError(f"the program would have more than {_MOST_PAIRS} pairs of nodes: give `solve` this one")
    state, bound = milp_bound(run.model, lists, max(run.time_limit_s - run.elapsed(), 0.1), run.seed, run.make)
    if state is not None:
        run.take(state)
    if run.nearest is None:
        run.take(run.greedy())
        if bound < math.inf and run.best is not None:
            return run.plan(bound, "milp (greedy's plan: none found)")
    return run.plan(bound, "milp", bound == math.inf)
