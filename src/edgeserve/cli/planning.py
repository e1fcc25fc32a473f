"""From a pipeline's graph, its costs and a cluster to a placement problem; and what the plan for it is compared with."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from edgeserve.pipeline import errors
from edgeserve.pipeline.assignment import Assignment
from edgeserve.pipeline.costs import Costs
from edgeserve.pipeline.declared import did_you_mean
from edgeserve.pipeline.errors import BadValue, InvalidPipeline, MissingValue, UnknownName, Where
from edgeserve.pipeline.topology import FIELDS, Topology
from edgeserve.placement import (
    CyclicGraph,
    Evaluation,
    InvalidProblem,
    Link,
    Node,
    Plan,
    Problem,
    Route,
    Sink,
    Source,
    Task,
    Weights,
    evaluate,
    solve,
)
from edgeserve.placement.check import colocated
from edgeserve.placement.evaluation import Mode
from edgeserve.stage.payloads import LAZY_BYTES

Edge = tuple[str, str]
_PLACE = re.compile(r"(\w*)(?:\['?(.*?)'?\](?:\.(\w+))?)?")
_STREAM = re.compile(r"'(.*?)'\.(\w+)")
_BUSY = 0.5
_MOST_LINKS = 3


def maker(stream: str) -> str:
    """The source or task that a stream is of: a relay hands on that of another."""
    return stream.partition(">")[0]


# --- the problem --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a plan is made of, and where that is from.

    Attributes:
        graph: as `edgeserve graph --format json` writes it.
        app, costs_file: the files.
    """

    graph: Mapping[str, Any]
    app: str
    costs: Costs
    costs_file: str
    topology: Topology

    def problem(self) -> Problem:
        """The placement problem.

        Raises:
            InvalidPipeline: one of its subclasses, with the line.
        """
        if self.costs.pipeline != self.graph["pipeline"]:
            reason = f"these are the costs of {self.costs.pipeline!r}, and the pipeline is {self.graph['pipeline']!r}"
            raise BadValue(reason, Where(self.costs_file, 0), "name the costs of this one, or measure them: edgeserve profile")
        self._check_names()
        with self.located():
            return self._problem()

    def on_nodes(self, assignment: Assignment, file: str) -> Assignment:
        """An assignment, if its places are nodes of the topology."""
        for name, places in assignment.places.items():
            for place in places:
                if place not in self.topology.nodes:
                    hint = did_you_mean(place, list(self.topology.nodes), "add it to the nodes, or leave --current out")
                    raise UnknownName(f"{name!r} runs on {place!r}, and {self.topology.file} has no such node", Where(file, 0), hint)
        return assignment

    @contextmanager
    def located(self) -> Iterator[None]:
        """Says of what is wrong with a problem in which line it stands."""
        try:
            yield
        except InvalidProblem as exc:
            reason, split, hint = str(exc).rpartition("; " if "; " in str(exc) else ": ")
            kind = errors.CyclicPipeline if isinstance(exc, CyclicGraph) else getattr(errors, type(exc).__name__, InvalidPipeline)
            raise kind(reason if split else hint, self._where(str(exc)), hint if split else "correct it") from exc

    def _where(self, said: str) -> Where:
        if found := _STREAM.match(said):  # which is a source or a task
            return self.topology.at("sources" if found[1] in self.topology.sources else "tasks", *found.groups())
        section, name, field = _PLACE.match(said).groups()  # type: ignore[union-attr]
        measured = section in ("sources", "tasks") and field not in (None, *(fields for fields, _ in FIELDS[section].values()))
        return Where(self.costs_file, 0) if measured else self.topology.at(*(each for each in (section, name, field) if each))

    def _check_names(self) -> None:
        for kind in ("source", "task", "sink"):
            known = [part["name"] for part in self.graph["nodes"] if part["kind"] == kind]
            for name in getattr(self.topology, f"{kind}s"):
                if name not in known:
                    hint = did_you_mean(name, known, f"there is {', '.join(known)}")
                    raise UnknownName(f"the pipeline has no {kind} {name!r}", self.topology.at(f"{kind}s", name), hint)

    def _problem(self) -> Problem:
        topology, parts = self.topology, self.graph["nodes"]
        nodes = tuple(Node(name=name, **fields) for name, fields in topology.nodes.items())
        takes = {part["name"]: [edge["from"] for edge in self.graph["edges"] if edge["to"] == part["name"]] for part in parts}
        sources = {part["name"]: self._source(part) for part in parts if part["kind"] == "source"}
        tasks: dict[str, Task] = {}
        pins, together = dict(topology.pins), []
        for part in parts:
            name, made_by = part["name"], maker(part["name"])
            if part["kind"] == "task":
                if part["places"] and name not in pins:
                    pins[name] = tuple(dict.fromkeys(self._known(place, part) for place in part["places"]))
                able = pins.get(name) or [node.name for node in nodes if node.cores]
                tasks[name] = self._task(part, takes[name], max(len(able), 1))
            elif part["kind"] == "relay":
                made = sources.get(made_by) or tasks[made_by]
                tasks[name] = self._relay(name, takes[name], made)
                if isinstance(made, Source):
                    pins[name] = (made.node,)
                else:
                    together.append((made_by, name))
        return Problem(
            nodes=nodes,
            links=tuple(self._link(name, fields) for name, fields in topology.links.items()),
            routes=tuple(Route(**fields) for fields in topology.routes),
            broker=topology.broker,
            sources=tuple(sources.values()),
            tasks=tuple(tasks.values()),
            sinks=tuple(sink for part in parts if part["kind"] == "sink" for sink in self._sinks(part, takes[part["name"]])),
            pins=pins,
            colocate=(*topology.colocate, *together),
            separate=topology.separate,
            weights=Weights(**topology.weights),
            header_bytes=topology.header_bytes,
        )

    def _known(self, place: str, part: Mapping[str, Any]) -> str:
        if place not in self.topology.nodes:
            reason = f"{part['kind']} {part['name']!r} has place={place!r}, and {self.topology.file} no such node"
            raise UnknownName(reason, Where(self.app, 0), did_you_mean(place, list(self.topology.nodes), "add it to the nodes"))
        return place

    def _place(self, part: Mapping[str, Any]) -> str:
        section, name = f"{part['kind']}s", part["name"]
        if given := getattr(self.topology, section).get(name, {}).get("node"):
            return str(given)
        places = sorted({self._known(place, part) for place in part["places"]})
        where = self.topology.at(section, name)
        if not places:
            raise MissingValue(f"{part['kind']} {name!r} has no place", where, f"write `{name}: NODE` under {section}:, or give it place=")
        if len(places) > 1:
            reason = f"the replicas of {part['kind']} {name!r} stand on {', '.join(places)}, and a plan knows one place of each"
            raise BadValue(reason, where, f"declare one for each place, or write `{name}: NODE` under {section}:")
        return places[0]

    def _cost(self, kind: str, name: str) -> Any:
        found = getattr(self.costs, f"{kind}s").get(name)
        if found is None:
            reason = f"the costs say nothing of {kind} {name!r}"
            raise MissingValue(reason, Where(self.costs_file, 0), "the pipeline has changed: measure it anew, edgeserve profile")
        return found

    def _source(self, part: Mapping[str, Any]) -> Source:
        cost, given = self._cost("source", part["name"]), self.topology.sources.get(part["name"], {})
        place = self._place(part)
        return Source(name=part["name"], rate_hz=cost.rate_hz, bytes=cost.bytes, **{**given, "node": place})

    def _task(self, part: Mapping[str, Any], inputs: Sequence[str], able: int) -> Task:
        cost, given = self._cost("task", part["name"]), self.topology.tasks.get(part["name"], {})
        replicas = min(part["replicas"], able)
        on_each = math.ceil(part["replicas"] / replicas)
        return Task(
            name=part["name"],
            inputs=tuple(inputs),
            cpu_s=cost.cpu_s,
            memory_bytes=cost.memory_bytes * on_each,
            output_bytes=cost.output_bytes,
            outputs_per_run=cost.outputs_per_run,
            trigger=part["trigger"],
            min_interval_ms=part["min_interval_ms"],
            replicas_min=replicas,
            replicas_max=replicas,
            accelerators={kind: count * on_each for kind, count in given.get("accelerators", {}).items()},
            stays_in=given.get("stays_in"),
        )

    def _relay(self, name: str, inputs: Sequence[str], made: Source | Task) -> Task:
        cost, replicas = self.costs.tasks.get(name), 1 if isinstance(made, Source) else made.replicas_min
        return Task(
            name=name,
            inputs=tuple(inputs),
            cpu_s=0.0 if cost is None else cost.cpu_s,
            memory_bytes=0.0 if cost is None else cost.memory_bytes,
            output_bytes=_size(made),
            replicas_min=replicas,
            replicas_max=replicas,
            stays_in=made.stays_in,
        )

    def _sinks(self, part: Mapping[str, Any], inputs: Sequence[str]) -> list[Sink]:
        weight = self.topology.sinks.get(part["name"], {}).get("weight", 1.0)
        names = [part["name"] if len(inputs) == 1 else f"{part['name']} of {maker(stream)}" for stream in inputs]
        place = self._place(part)
        return [Sink(name=name, input=stream, node=place, weight=weight) for name, stream in zip(names, inputs, strict=True)]

    def _link(self, name: str, fields: Mapping[str, Any]) -> Link:
        for measured in self.costs.links:
            if set(measured.ends) == set(fields["ends"]):
                fields = {"bandwidth_bytes_s": measured.bandwidth_bytes_s, "latency_ms": measured.latency_ms, **fields}
        if "bandwidth_bytes_s" not in fields:
            reason = f"link {name!r} has no bandwidth, and the costs have none between {' and '.join(fields['ends'])}"
            raise MissingValue(reason, self.topology.at("links", name), "write it, as in bandwidth: 100 Mbit/s")
        return Link(name=name, **fields)


# --- placements ---------------------------------------------------------------------------------------------------


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


def _size(stream: Source | Task) -> float:
    return stream.bytes if isinstance(stream, Source) else stream.output_bytes


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
    sizes = {stream.name: _size(stream) for stream in problem.made}
    of: dict[str, list[Edge]] = {}
    for edge in edges(problem):
        of.setdefault(maker(edge[0]), []).append(edge)
    modes: dict[str, Mode] = {}
    choices: list[str] = []
    for made_by, taken in of.items():
        wishes = {"eager"} if wanted is None else {wanted.get(edge, "lazy") for edge in taken}
        small = sizes[made_by] < LAZY_BYTES
        modes[made_by] = "eager" if small or "eager" in wishes else "lazy"
        if not small and (wanted is None or len(wishes) > 1 or made_by in free):
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
    modes = {edge: assignment.routing.get(maker(edge[0]), "eager") for edge in edges(problem)}
    return as_run("current", problem, _with_relays(problem, places), modes)


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
