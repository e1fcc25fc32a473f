"""Placements as nodes run them, with their prices: the plan, what it is compared with, and what would change it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edgeserve.cli.planinputs import Inputs, maker
from edgeserve.pipeline.assignment import Assignment
from edgeserve.placement import Evaluation, Link, Node, Plan, Problem, evaluate, solve
from edgeserve.placement.check import colocated
from edgeserve.placement.evaluation import Mode

Edge = tuple[str, str]
_BUSY = 0.5
_MOST_LINKS = 3


@dataclass(frozen=True)
class Case:
    """A placement as nodes run it, with its price.

    Attributes:
        name: what it is called.
        assignment: task to its nodes, relays too.
        routing: source or task to how what it makes travels.
    """

    name: str
    assignment: Mapping[str, tuple[str, ...]]
    routing: Mapping[str, Mode]
    evaluation: Evaluation

    def modes(self, problem: Problem) -> dict[Edge, Mode]:
        """The routing of each edge of a problem with these streams."""
        return {edge: self.routing[maker(edge[0])] for edge in edges(problem)}

    def rank(self) -> tuple[int, float]:
        """The less the better: what can be run comes first."""
        return len(self.evaluation.violations), self.evaluation.objective


def edges(problem: Problem) -> list[Edge]:
    """(stream, task or sink that takes it), all of them."""
    return [*((name, task.name) for task in problem.tasks for name in task.inputs), *((sink.input, sink.name) for sink in problem.sinks)]


def as_run(
    name: str,
    problem: Problem,
    assignment: Mapping[str, Sequence[str]],
    wanted: Mapping[Edge, Mode] | None = None,
    free: Collection[str] = (),
) -> Case:
    """A placement with a routing that nodes have: what a source or a task makes travels one way to all who take it, and what is small
    with its header. Where no routing is wanted, a wanted one has both ways, or what makes the stream is `free`, the cheaper is taken."""
    small = {stream.name for stream in problem.made if not stream.lazy}
    of: dict[str, list[Edge]] = {}
    for edge in edges(problem):
        of.setdefault(maker(edge[0]), []).append(edge)
    modes: dict[str, Mode] = {}
    choices: list[str] = []
    for made_by, taken in of.items():
        wishes = {"eager"} if wanted is None else {wanted.get(edge, "lazy") for edge in taken}
        modes[made_by] = "eager" if made_by in small or "eager" in wishes else "lazy"
        if made_by not in small and (wanted is None or len(wishes) > 1 or made_by in free):
            choices.append(made_by)

    def priced(modes: Mapping[str, Mode]) -> Case:
        each = {edge: modes[maker(edge[0])] for edge in edges(problem)}
        return Case(name, {task: tuple(nodes) for task, nodes in assignment.items()}, modes, evaluate(problem, assignment, each))

    best = priced(modes)
    for made_by in choices * 2:  # the second time with the others as the first one has left them
        turned: Mode = "lazy" if best.routing[made_by] == "eager" else "eager"
        best = min(best, priced({**best.routing, made_by: turned}), key=Case.rank)
    return best


def largest(problem: Problem) -> Node:
    """The node that gets most done."""
    return max(problem.nodes, key=lambda node: (node.cores * node.speed, node.memory_bytes))


def centralised(problem: Problem) -> Case:
    """All tasks on the broker's node; on the largest if that runs none."""
    broker = next(node for node in problem.nodes if node.name == problem.broker)
    centre = (broker if broker.cores else largest(problem)).name
    return as_run("centralised", problem, _with_relays(problem, {task.name: centre for task in problem.tasks}))


def at_source(problem: Problem) -> Case:
    """Each task where most of the bytes come from that it is made of."""
    bytes_s = {source.name: {source.node: source.rate_hz * source.bytes} for source in problem.sources}
    places: dict[str, str] = {}
    for task in problem.tasks:  # behind what feeds it
        sent: dict[str, float] = {}
        for name in task.inputs:
            for node, rate in bytes_s[name].items():
                sent[node] = sent.get(node, 0.0) + rate
        bytes_s[task.name], places[task.name] = sent, max(sent, key=sent.__getitem__)
    return as_run("all at source", problem, _with_relays(problem, places))


def current(problem: Problem, assignment: Assignment) -> Case:
    """What runs now."""
    places = {task.name: assignment.places[task.name] for task in problem.tasks if ">" not in task.name}
    routing = assignment.routing
    auto = {made_by for made_by, mode in routing.items() if mode == "auto"}
    modes: dict[Edge, Mode] = {}
    for edge in edges(problem):
        mode = routing.get(maker(edge[0]), "eager")
        modes[edge] = "lazy" if mode == "auto" else mode
    return as_run("current", problem, _with_relays(problem, places), modes, auto)


def _with_relays(problem: Problem, places: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Relays run where what they hand on is made."""
    nodes = {source.name: source.node for source in problem.sources}
    found = {task.name: nodes.get(maker(task.name)) or places[maker(task.name)] for task in problem.tasks}
    return {name: (place,) if isinstance(place, str) else tuple(place) for name, place in found.items()}


def elsewhere(problem: Problem, case: Case, task: str, nodes: Sequence[str]) -> Case:
    """A plan with one task, and what is to run beside it, on other nodes."""
    together = colocated(problem)
    moved = {name: tuple(nodes) for name in case.assignment if together[name] == together[task]}
    near = {maker(name) for task in problem.tasks if task.name in moved for name in (task.name, *task.inputs)}
    return as_run(case.name, problem, {**case.assignment, **moved}, case.modes(problem), near)


def to_apply(inputs: Inputs, problem: Problem, case: Case) -> Assignment:
    """The assignment of a plan: tasks where it puts them, sources and sinks where they are."""
    ends = {source.name: (source.node,) for source in problem.sources}
    for part in inputs.graph["nodes"]:
        if part["kind"] == "sink":
            ends[part["name"]] = (next(sink.node for sink in problem.sinks if sink.name.partition(" of ")[0] == part["name"]),)
    tasks = {name: nodes for name, nodes in case.assignment.items() if ">" not in name}
    return Assignment(pipeline=inputs.graph["pipeline"], places={**ends, **tasks}, routing=dict(case.routing))


# --- what would change it -----------------------------------------------------------------------------------------


def what_ifs(problem: Problem, plan: Plan, case: Case, *, time_limit_s: float, seed: int) -> Iterator[Case]:
    """The best placements if each link that counts had twice its bandwidth, and if there were one more node like the largest."""
    changed = [(f"twice the bandwidth of {link.name}", _twice(problem, link)) for link in _limiting(problem, plan, case)]
    changed += [(f"one more node like {largest(problem).name}", _one_more(problem))] if problem.links else []
    for name, other in changed:
        found = solve(other, time_limit_s=time_limit_s, seed=seed, incumbent=plan)
        as_it_is = as_run(name, other, case.assignment, case.modes(other))
        yield min(as_it_is, as_run(name, other, found.assignment, found.routing), key=Case.rank)


def _limiting(problem: Problem, plan: Plan, case: Case) -> list[Link]:
    """The links that are used most, and those that keep a task from where it would be cheaper."""
    used = case.evaluation.link_utilisation
    busiest = sorted((link for link in problem.links if used[link.name] > 0), key=lambda link: -used[link.name] / link.max_utilisation)
    found = [link for i, link in enumerate(busiest) if i == 0 or used[link.name] > _BUSY * link.max_utilisation][:_MOST_LINKS]
    said = " ".join(reason.limited_by or "" for reason in plan.why.values())
    return found + [link for link in problem.links if link not in found and f"link of {link.name}: " in said]


def _twice(problem: Problem, link: Link) -> Problem:
    wider = msgspec.structs.replace(link, bandwidth_bytes_s=2 * link.bandwidth_bytes_s)
    return msgspec.structs.replace(problem, links=tuple(wider if each is link else each for each in problem.links))


def _one_more(problem: Problem) -> Problem:
    """With links of its own to where those of the largest lead."""
    like = largest(problem)
    name = _new(like.name, {node.name for node in problem.nodes})
    names = {link.name for link in problem.links}
    links = [
        msgspec.structs.replace(link, name=_new(link.name, names), ends=tuple(name if end == like.name else end for end in link.ends))
        for link in problem.links
        if like.name in link.ends
    ]
    more = msgspec.structs.replace(like, name=name)
    return msgspec.structs.replace(problem, nodes=(*problem.nodes, more), links=(*problem.links, *links))


def _new(name: str, taken: set[str]) -> str:
    return next(found for i in range(2, len(taken) + 3) if (found := f"{name}-{i}") not in taken)


__all__ = (
    "Case",
    "Inputs",
    "as_run",
    "at_source",
    "centralised",
    "current",
    "edges",
    "elsewhere",
    "largest",
    "maker",
    "to_apply",
    "what_ifs",
)
