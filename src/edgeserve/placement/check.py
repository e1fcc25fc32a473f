"""What makes a problem or an argument unusable, found before anything is computed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from functools import cache
from itertools import islice
from reprlib import Repr
from typing import Any

import msgspec
import numpy as np

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

LARGEST = 1e18
"""No number of a problem is larger, and none that divides is smaller than its inverse: so no product of some of them is infinite."""

_POSITIVE = ("bandwidth_bytes_s", "rate_hz", "speed", "replicas_min", "replicas_max")
_NUMBERS = {
    "nodes": ("cores", "memory_bytes", "speed", "cost_per_core_s"),
    "links": ("bandwidth_bytes_s", "latency_ms", "cost_per_byte"),
    "sources": ("rate_hz", "bytes", "phase_ms"),
    "tasks": ("cpu_s", "memory_bytes", "output_bytes", "outputs_per_run", "min_interval_ms", "replicas_min", "replicas_max"),
    "sinks": ("weight",),
}
_ADD = {
    "node": "add it to `nodes`",
    "link": "add it to `links`",
    "stream": "add it to `sources` or `tasks`",
    "task": "add it to `tasks`",
    "zone": "give it to a node as its `zone`",
    "accelerator": "give it to a node in its `accelerators`",
}
_LISTED, _HINTED, _LONGEST = 8, 2_000, 1_000
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """The value as a message shows it: not at full length."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def listed(names: Collection[str]) -> str:
    """The first names, as a message shows them."""
    more = len(names) - _LISTED
    return ", ".join(islice(names, _LISTED)) + (f" and {more} more" if more > 0 else "")


def close_to(name: str, known: Collection[str]) -> str | None:
    """The known name that is most like another one, if any is."""
    return next(iter(get_close_matches(name[:100], known if len(known) <= _HINTED else (), 1)), None)


def fitting(value: object, kind: Any, where: str) -> Any:
    """The value as its annotation wants it: a list as a tuple, a number of NumPy as a plain one.

    Raises:
        BadValue: it cannot be that.
    """
    try:
        return msgspec.convert(value.item() if isinstance(value, np.generic) else value, kind)
    except msgspec.ValidationError as exc:
        if isinstance(exc.__cause__, InvalidProblem):
            raise exc.__cause__ from None
        wanted = kind.__name__ if isinstance(kind, type) else re.sub(r"[\w.]+\.(?=[A-Z])", "", str(kind))
        said = str(exc).replace("`array`", "`tuple`").replace("`null`", "`None`")
        single = f", as ({shown(value)},)" if isinstance(value, str) and kind == tuple[str, ...] else ""
        raise BadValue(f"{where} is {shown(value)}: {said}; give a value of type {wanted}{single}") from exc


@cache
def _fields(kind: type[msgspec.Struct]) -> list[tuple[str, Any]]:
    return [(found.name, found.type) for found in msgspec.structs.fields(kind)]


def typed(part: msgspec.Struct) -> None:
    """Makes all fields of a problem, or of a part of it, what they are annotated with; raises `BadValue` where that cannot be."""
    name = getattr(part, "name", None)
    where = type(part).__name__ + (f"({shown(name)})" if name is not None else "")
    for field, kind in _fields(type(part)):
        msgspec.structs.force_setattr(part, field, fitting(getattr(part, field), kind, f"{where}.{field}"))


def argument(name: str, value: object, kind: type[float] = float, most: float = LARGEST) -> Any:
    """A function's argument, as a number of a kind from 0 to `most`; raises `BadValue` where that cannot be."""
    found = fitting(value, kind, name)
    _number(found, name, most=most)
    return found


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
        if len(name) > _LONGEST:
            raise BadValue(f"{where}: {shown(name)} has {len(name)} characters; give names of at most {_LONGEST}")
        if name in seen:
            raise DuplicateName(f"{where}: two are called {shown(name)}; give each a name of its own")
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


def _number(value: float, where: str, positive: bool = False, most: float = LARGEST) -> None:
    least = 1 / LARGEST if positive else 0.0
    if not least <= value <= most:
        raise BadValue(f"{where} is {shown(value)}: give a {'positive ' if positive else ''}number from {least:g} to {most:g}")


def _numbers(problem: Problem) -> None:
    for where, fields in _NUMBERS.items():
        for item in getattr(problem, where):
            for name in fields:
                if (value := getattr(item, name)) is not None:
                    _number(value, f"{where}[{item.name!r}].{name}", name in _POSITIVE)
            for kind, count in getattr(item, "accelerators", {}).items():
                _number(count, f"{where}[{item.name!r}].accelerators[{kind!r}]")
    for where in ("nodes", "links"):
        for item in getattr(problem, where):
            if not 0 < item.max_utilisation < 1:
                raise BadValue(f"{where}[{item.name!r}].max_utilisation is {item.max_utilisation}: give a number above 0 and below 1")
    for name in ("header_bytes", "reference_bytes", "fetch_bytes", "settle_bytes", "hop_ms", "variability"):
        _number(getattr(problem, name), name)
    for name in problem.weights.__struct_fields__:
        _number(getattr(problem.weights, name), f"weights.{name}")


def _known(name: str, known: Collection[str], where: str, what: str) -> None:
    if name not in known:
        close = close_to(name, known)
        hint = f"did you mean {close!r}?" if close else f"{_ADD[what]}" + (f", or name one of {listed(sorted(known))}" if known else "")
        raise UnknownName(f"{where}: there is no {what} {shown(name)}; {hint}")


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
            raise UnknownName(f"{where}.trigger is {shown(task.trigger)}: use 'any', 'all' or one of its inputs ({listed(task.inputs)})")
        if task.processes is not None and task.processes < task.replicas_max:
            raise BadValue(f"{where}: processes is {task.processes} and replicas_max {task.replicas_max}: no node is without one; lower it")
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
    groups: dict[str, list[Task]] = defaultdict(list)
    for task in problem.tasks:
        groups[together[task.name]].append(task)
    for members in groups.values():
        if max(task.replicas_min for task in members) > min(task.replicas_max for task in members):
            names = listed([task.name for task in members])
            raise BadValue(f"colocate: {names} have no number of replicas in common; change replicas_min or replicas_max")
    for number, names in enumerate(problem.separate):
        classes = [together[name] for name in names]
        if len(set(classes)) < len(classes):
            raise InvalidProblem(
                f"separate[{number}]: two of {listed(names)} are to run together by `colocate`; drop one of the two wishes"
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
        stack = [(root, iter(makers[root].inputs))] if root not in done else []
        path = {name: None for name, _ in stack}
        while stack:
            name, inputs = stack[-1]
            for other in inputs:
                if other in path:
                    circle = [*path][[*path].index(other) :]
                    around = " -> ".join([*circle[:_LISTED], *(["..."] if len(circle) > _LISTED else []), other])
                    raise CyclicGraph(f"tasks: each of these waits for the next: {around}; take one of the inputs out")
                if other in makers and other not in done:
                    stack.append((other, iter(makers[other].inputs)))
                    path[other] = None
                    break
            else:
                done.add(name)
                stack.pop()
                del path[name]
