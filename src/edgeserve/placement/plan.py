"""A plan: where tasks run and how streams travel, what that costs, how far from the best it can be, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from edgeserve.placement.evaluation import Evaluation, Mode, report
from edgeserve.placement.search import Pricer, alternatives
from edgeserve.placement.state import State


@dataclass(frozen=True)
class Reason:
    """Why a task is where it is: what the next best place would be, and what it would add to the objective.

    Attributes:
        nodes: where it is.
        next_best: the nodes that come next when all else stays, or None when there are no others.
        extra: how much the objective would grow; infinite without others.
        limited_by: what stands against the place that looks cheapest of all, if a capacity or wish does: a `Violation` in words.
    """

    nodes: tuple[str, ...]
    next_best: tuple[str, ...] | None
    extra: float
    limited_by: str | None = None


@dataclass(frozen=True)
class Plan:
    """What `solve` returns.

    Attributes:
        assignment: task to the nodes of its replicas.
        routing: (stream, task or sink) to `eager` or `lazy`.
        objective: what it costs, with what the moves from `previous` cost.
        lower_bound: no plan costs less. Minus infinity when nothing is proven.
        method: what made it.
        moved: tasks that have a node that they had not in `previous`.
        elapsed_s: how long it took.
    """

    assignment: Mapping[str, tuple[str, ...]]
    routing: Mapping[tuple[str, str], Mode]
    objective: float
    lower_bound: float
    method: str
    moved: tuple[str, ...]
    elapsed_s: float
    _state: State = field(repr=False, compare=False)

    @property
    def gap(self) -> float:
        """How far the objective can be above the best there is, as a part of it; 0 when it is the best."""
        return max(self.objective - self.lower_bound, 0.0) / max(abs(self.objective), 1e-12)

    @cached_property
    def evaluation(self) -> Evaluation:
        """What `evaluate` says of it."""
        return report(self._state)

    @cached_property
    def why(self) -> Mapping[str, Reason]:
        """For each task what keeps it where it is; computed when it is first asked for."""
        state, pricer = self._state, Pricer(self._state.model)
        reasons = {}
        for number, group in enumerate(state.model.groups):
            reason = _reason(state, pricer, number)
            reasons.update({state.model.tasks[task].name: reason for task in group.tasks})
        return reasons


def _reason(state: State, pricer: Pricer, group: int) -> Reason:
    model = state.model

    def names(site: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(model.nodes[node] for node in site)

    changes = alternatives(state, pricer, group)
    possible = [change for change in changes if change.excess <= state.excess + 1e-9]
    here = names(state.sites[group])
    blocked = min((c for c in changes if c not in possible), key=lambda c: c.cost, default=None)
    limited = None
    if blocked is not None and blocked.cost < state.cost:
        tried = state.copy()
        tried.apply(tried.trial(blocked.sites, blocked.lazy))
        limited = f"{', '.join(names(blocked.sites[group]))}: {report(tried).violations[0]}"
    if not possible:
        return Reason(here, None, float("inf"), limited)
    best = min(possible, key=lambda change: change.cost)
    return Reason(here, names(best.sites[group]), best.cost - state.cost, limited)


def make_plan(state: State, bound: float, method: str, elapsed_s: float) -> Plan:
    """The plan of a state."""
    model = state.model
    assignment, moved = {}, []
    for number, group in enumerate(model.groups):
        site = tuple(model.nodes[node] for node in state.sites[number])
        fresh = state.previous is not None and bool(set(state.sites[number]) - set(state.previous[number]))
        for task in group.tasks:
            assignment[model.tasks[task].name] = site
            if fresh:
                moved.append(model.tasks[task].name)
    modes: dict[bool, Mode] = {True: "lazy", False: "eager"}
    routing = {(model.streams[e.stream].name, e.consumer): modes[state.lazy[e.number] and not e.small] for e in model.edges}
    ordered = {task.name: assignment[task.name] for task in model.tasks}
    return Plan(ordered, routing, state.cost, min(bound, state.cost), method, tuple(moved), elapsed_s, state)
