"""What makes a problem unusable, found before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from edgeserve.placement.errors import (
    BadValue,
    CyclicGraph,
    DuplicateName,
    InvalidProblem,
    MissingValue,
    UnknownName,
    UnsupportedProblemVersion,
)
from edgeserve.placement.forest import set_of
from edgeserve.placement.problem import ALL, ANY, FORMAT_VERSION, Problem, Task

_POSITIVE = ("bandwidth_bytes_s", "rate_hz", "speed", "replicas_min", "replicas_max")
_NUMBERS = {
    "nodes": ("cores", "memory_bytes", "speed", "cost_per_core_s"),
    "links": ("bandwidth_bytes_s", "latency_ms", "cost_per_byte"),
    "sources": ("rate_hz", "bytes"),
    "tasks": ("cpu_s", "memory_bytes", "output_bytes", "outputs_per_run", "min_interval_ms", "replicas_min", "replicas_max"),
    "sinks": ("weight",),
}


def check(problem: Problem) -> None:
    """Raises what is wrong first with it; see `Problem`."""
    if problem.version != FORMAT_VERSION:
        raise UnsupportedProblemVersion(f"version={problem.version}: this installation makes problems of version {FORMAT_VERSION}")
    _names(problem)
    _numbers(problem)
    _references(problem)
    _tasks(problem)
    _sets(problem)
    _zones(problem)
    _acyclic(problem.tasks)


def _unique(names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise MissingValue(f"{where}: one has the empty name; give each a name of its own")
        if name in seen:
            raise DuplicateName(f"{where}: two are called {name!r}; give each a name of its own")
        seen.add(name)


def _names(problem: Problem) -> None:
    for where in ("nodes", "tasks", "sinks"):
        if not getattr(problem, where):
            raise MissingValue(f"{where}: there are none; a problem has at least one node, one task and one sink")
    _unique((node.name for node in problem.nodes), "nodes")
    _unique((link.name for link in problem.links), "links")
    _unique([source.name for source in problem.sources] + [task.name for task in problem.tasks], "sources and tasks")
    _unique([task.name for task in problem.tasks] + [sink.name for sink in problem.sinks], "tasks and sinks")
    for stream in problem.made:
        if stream.name in (ANY, ALL):
            raise DuplicateName(f"sources and tasks: {stream.name!r} is what a trigger may say; give it another name")


def _number(value: float, where: str, positive: bool = False) -> None:
    if not math.isfinite(value):
        raise BadValue(f"{where} is {value}: give a finite number")
    if value < 0 or (positive and value == 0):
        raise BadValue(f"{where} is {value}: give a {'positive number' if positive else 'number that is not negative'}")


def _numbers(problem: Problem) -> None:
    for where, fields in _NUMBERS.items():
        for item in getattr(problem, where):
            for name in fields:
                _number(getattr(item, name), f"{where}[{item.name!r}].{name}", name in _POSITIVE)
            for kind, count in getattr(item, "accelerators", {}).items():
                _number(count, f"{where}[{item.name!r}].accelerators[{kind!r}]")
    for where in ("nodes", "links"):
        for item in getattr(problem, where):
            if not 0 < item.max_utilisation < 1:
                raise BadValue(f"{where}[{item.name!r}].max_utilisation is {item.max_utilisation}: give a number above 0 and below 1")
    _number(problem.header_bytes, "header_bytes")
    for name in problem.weights.__struct_fields__:
        _number(getattr(problem.weights, name), f"weights.{name}")


def _known(name: str, known: Collection[str], where: str, what: str) -> None:
    if name not in known:
        close = get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"add it to the {what}s, or name one of {', '.join(sorted(known)[:8]) or 'none'}"
        raise UnknownName(f"{where}: there is no {what} {name!r}; {hint}")


def _references(problem: Problem) -> None:
    nodes = {node.name for node in problem.nodes}
    zones = {node.zone for node in problem.nodes}
    streams = {stream.name for stream in problem.made}
    links = {link.name for link in problem.links}
    _known(problem.broker, nodes, "broker", "node")
    for link in problem.links:
        for end in link.ends:
            _known(end, nodes, f"links[{link.name!r}].ends", "node")
        if link.ends[0] == link.ends[1]:
            raise BadValue(f"links[{link.name!r}].ends: both are {link.ends[0]!r}; a link connects two nodes")
    for source in problem.sources:
        _known(source.node, nodes, f"sources[{source.name!r}].node", "node")
    for sink in problem.sinks:
        _known(sink.node, nodes, f"sinks[{sink.name!r}].node", "node")
        _known(sink.input, streams, f"sinks[{sink.name!r}].input", "stream")
    for stream in problem.made:
        if stream.stays_in is not None:
            _known(stream.stays_in, zones, f"{stream.name!r}.stays_in", "zone")
    for task in problem.tasks:
        for name in task.inputs:
            _known(name, streams, f"tasks[{task.name!r}].inputs", "stream")
    pairs: set[tuple[str, str]] = set()
    for route in problem.routes:
        where = f"routes[{route.start!r} to {route.end!r}]"
        _known(route.start, nodes, where, "node")
        _known(route.end, nodes, where, "node")
        for name in route.links:
            _known(name, links, where, "link")
        if (route.start, route.end) in pairs:
            raise DuplicateName(f"{where}: there are two; keep one")
        if len(set(route.links)) < len(route.links):
            raise DuplicateName(f"{where}: it uses a link twice; name each link once")
        if route.start == route.end:
            raise BadValue(f"{where}: it leads from a node to itself; leave it out")
        pairs.add((route.start, route.end))


def _tasks(problem: Problem) -> None:
    kinds = {kind for node in problem.nodes for kind in node.accelerators}
    for task in problem.tasks:
        where = f"tasks[{task.name!r}]"
        if not task.inputs:
            raise MissingValue(f"{where}.inputs: there are none; name the sources or tasks that it takes")
        _unique(task.inputs, f"{where}.inputs")
        if task.trigger not in (ANY, ALL, *task.inputs):
            raise UnknownName(f"{where}.trigger is {task.trigger!r}: use 'any', 'all' or one of its inputs ({', '.join(task.inputs)})")
        if task.replicas_min > task.replicas_max:
            raise BadValue(f"{where}: replicas_min is {task.replicas_min} and replicas_max {task.replicas_max}; raise the second")
        for kind in task.accelerators:
            if task.accelerators[kind]:
                _known(kind, kinds, f"{where}.accelerators", "accelerator")


def _sets(problem: Problem) -> None:
    tasks = {task.name: task for task in problem.tasks}
    nodes = {node.name for node in problem.nodes}
    for name, allowed in problem.pins.items():
        _known(name, tasks, "pins", "task")
        if not allowed:
            raise MissingValue(f"pins[{name!r}]: no node is named; name at least one, or leave the pin out")
        _unique(allowed, f"pins[{name!r}]")
        for node in allowed:
            _known(node, nodes, f"pins[{name!r}]", "node")
    for what in ("colocate", "separate"):
        for number, names in enumerate(getattr(problem, what)):
            _unique(names, f"{what}[{number}]")
            for name in names:
                _known(name, tasks, f"{what}[{number}]", "task")
    together = colocated(problem)
    for first in set(together.values()):
        members = [task for task in problem.tasks if together[task.name] == first]
        if max(task.replicas_min for task in members) > min(task.replicas_max for task in members):
            names = ", ".join(task.name for task in members)
            raise BadValue(f"colocate: {names} have no number of replicas in common; change replicas_min or replicas_max")
    for number, names in enumerate(problem.separate):
        classes = [together[name] for name in names]
        if len(set(classes)) < len(classes):
            raise InvalidProblem(
                f"separate[{number}]: two of {', '.join(names)} are to run together by `colocate`; drop one of the two wishes"
            )


def _zones(problem: Problem) -> None:
    """What is bound to a zone begins there and ends there."""
    zone = {node.name: node.zone for node in problem.nodes}
    bound = {stream.name: stream.stays_in for stream in problem.made if stream.stays_in is not None}
    for source in problem.sources:
        if source.stays_in not in (None, zone[source.node]):
            raise BadValue(
                f"sources[{source.name!r}] stands in zone {zone[source.node]!r} and stays_in is {source.stays_in!r}; make them one"
            )
    for sink in problem.sinks:
        if bound.get(sink.input) not in (None, zone[sink.node]):
            raise BadValue(
                f"sinks[{sink.name!r}] stands in zone {zone[sink.node]!r}, and {sink.input!r} may not leave {bound[sink.input]!r}: "
                f"move the sink"
            )


def colocated(problem: Problem) -> dict[str, str]:
    """Task to the first task of those that it shares its nodes with."""
    first = {task.name: task.name for task in problem.tasks}

    order = {task.name: number for number, task in enumerate(problem.tasks)}
    for names in problem.colocate:
        for name in names[1:]:
            a, b = sorted((set_of(first, names[0]), set_of(first, name)), key=order.__getitem__)
            first[b] = a
    return {name: set_of(first, name) for name in first}


def _acyclic(tasks: tuple[Task, ...]) -> None:
    makers = {task.name: task for task in tasks}
    done: set[str] = set()
    for root in makers:
        path: list[str] = []
        stack = [(root, iter(makers[root].inputs))] if root not in done else []
        path.extend(name for name, _ in stack)
        while stack:
            name, inputs = stack[-1]
            for other in inputs:
                if other in path:
                    circle = " -> ".join([*path[path.index(other) :], other])
                    raise CyclicGraph(f"tasks: each of these waits for the next: {circle}; take one of the inputs out")
                if other in makers and other not in done:
                    stack.append((other, iter(makers[other].inputs)))
                    path.append(other)
                    break
            else:
                done.add(name)
                stack.pop()
                path.pop()
