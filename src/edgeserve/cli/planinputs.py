"""From a pipeline's graph, its costs and a cluster to a placement problem, and the line of whatever is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgeserve.pipeline import errors
from edgeserve.pipeline.assignment import Assignment
from edgeserve.pipeline.costs import Costs
from edgeserve.pipeline.declared import did_you_mean
from edgeserve.pipeline.errors import BadValue, InvalidPipeline, MissingValue, UnknownName, Where
from edgeserve.pipeline.topology import FIELDS, Topology
from edgeserve.placement import CyclicGraph, InvalidProblem, Link, Node, Problem, Route, Sink, Source, Task, Weights

_PLACE = re.compile(r"(\w*)(?:\['?(.*?)'?\](?:\.(\w+))?)?")
_STREAM = re.compile(r"'(.*?)'\.(\w+)")


def maker(stream: str) -> str:
    """The source or task that a stream is of: a relay hands on that of another."""
    return stream.partition(">")[0]


def _stays(part: Mapping[str, Any], size: float) -> bool:
    """Whether a payload of such a size can stay where a part of the graph makes it."""
    return part["lazy_bytes"] is not None and size >= part["lazy_bytes"]


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
            reference_bytes=topology.reference_bytes,
            fetch_bytes=topology.fetch_bytes,
            settle_bytes=topology.settle_bytes,
            hop_ms=topology.hop_ms,
            variability=topology.variability,
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
        own = {**given, "node": self._place(part)}
        own |= {"rate_hz": cost.rate_hz, "bytes": cost.bytes, "phase_ms": cost.phase_ms}
        return Source(name=part["name"], lazy=_stays(part, cost.bytes), **own)

    def _task(self, part: Mapping[str, Any], inputs: Sequence[str], able: int) -> Task:
        cost, given = self._cost("task", part["name"]), self.topology.tasks.get(part["name"], {})
        most = min(part["replicas"], able)
        return Task(
            name=part["name"],
            inputs=tuple(inputs),
            cpu_s=cost.cpu_s,
            memory_bytes=cost.memory_bytes,
            output_bytes=cost.output_bytes,
            outputs_per_run=cost.outputs_per_run,
            trigger=part["trigger"],
            min_interval_ms=part["min_interval_ms"],
            replicas_min=most if part["places"] and part["name"] not in self.topology.pins else 1,
            replicas_max=most,
            processes=part["replicas"] if part["replicas"] > 1 else None,
            accelerators=given.get("accelerators", {}),
            stays_in=given.get("stays_in"),
            lazy=_stays(part, cost.output_bytes),
            shares_sets=part["shares_sets"],
        )

    def _relay(self, name: str, inputs: Sequence[str], made: Source | Task) -> Task:
        cost = self.costs.tasks.get(name)
        least, most, processes = (1, 1, None) if isinstance(made, Source) else (made.replicas_min, made.replicas_max, made.processes)
        return Task(
            name=name,
            inputs=tuple(inputs),
            cpu_s=0.0 if cost is None else cost.cpu_s,
            memory_bytes=0.0 if cost is None else cost.memory_bytes,
            output_bytes=made.bytes if isinstance(made, Source) else made.output_bytes,
            replicas_min=least,
            replicas_max=most,
            processes=processes,
            stays_in=made.stays_in,
            lazy=made.lazy,
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


__all__ = ("Inputs", "maker")
