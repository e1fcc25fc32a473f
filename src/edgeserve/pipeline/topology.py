"""A cluster in YAML: its nodes and links, what stands where, and what placements are wished for. Numbers have their units."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from edgeserve.pipeline.declared import did_you_mean
from edgeserve.pipeline.errors import BadValue, InvalidDocument, MissingValue, UnknownKeyword, Where
from edgeserve.pipeline.yamlfile import Mapped, read

_QUANTITY = re.compile(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*(\S.*?)?\s*")
_SCALES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {f"{k}B": v for k, v in _SCALES.items()} | {f"{k}iB": 1024.0**n for n, k in enumerate("KMGT", start=1)}
_RATES = {f"{k}/s": v for k, v in _BYTES.items()} | {f"{k}bit/s": v / 8 for k, v in _SCALES.items()}
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class _Wrong(Exception):
    """What is wrong with a value, and what to write."""


def _quantity(units: Mapping[str, float], such_as: str) -> Callable[[Any], float]:
    def convert(given: Any) -> float:
        found = _QUANTITY.fullmatch(str(given)) if isinstance(given, str | int | float) and not isinstance(given, bool) else None
        if found is None:
            raise _Wrong("is no number with a unit", f"write it as in {such_as}")
        unit = found[2]
        if unit is None:
            raise _Wrong("has no unit", f"write it as in {such_as}")
        if unit not in units:
            raise _Wrong(f"has the unit {unit!r}, which is none of {', '.join(units)}", f"write it as in {such_as}")
        try:
            return _number(float(found[1])) * units[unit]
        except ValueError:
            raise _Wrong("is no number with a unit", f"write it as in {such_as}") from None

    return convert


def _number(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise _Wrong("is no number", "write a plain number, such as 0.5")
    if given < 0:
        raise _Wrong("is negative", "give a number from 0 on")
    return given


def _whether(given: Any) -> bool:
    if not isinstance(given, bool):
        raise _Wrong("is neither true nor false", "write one of these")
    return given


def _count(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise _Wrong("is no whole number", "write one, such as 4")
    return int(_number(given))


def _counts(given: Any) -> dict[str, int]:
    if not isinstance(given, Mapped):
        raise _Wrong("is no mapping", "write the kind and how many, as in {gpu: 1}")
    return {kind: _count(count) for kind, count in given.items()}


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise _Wrong("is no text", "write a name, in quotes if it looks like a number")
    return given


def _texts(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list):
        raise _Wrong("is no list", "write a list of names, as in [a, b]")
    return tuple(map(_text, given))


def _ends(given: Any) -> tuple[str, ...]:
    if len(found := _texts(given)) != 2:
        raise _Wrong("is no pair", "name the two nodes that it connects, as in [roof, cellar]")
    return found


def _nodes(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else _texts(given)


_Field: TypeAlias = tuple[str, Callable[[Any], Any]]
_size, _rate, _time = _quantity(_BYTES, "8 GB"), _quantity(_RATES, "100 Mbit/s or 12.5 MB/s"), _quantity(_TIMES, "5 ms")
_ACCELERATORS: _Field = ("accelerators", _counts)
# Section to what an entry may say: the key in the file, the field of a placement problem, and how the value becomes that.
FIELDS: dict[str, dict[str, _Field]] = {
    "nodes": {
        "cores": ("cores", _count),
        "memory": ("memory_bytes", _size),
        "accelerators": _ACCELERATORS,
        "speed": ("speed", _number),
        "zone": ("zone", _text),
        "max_utilisation": ("max_utilisation", _number),
        "cost_per_core_s": ("cost_per_core_s", _number),
    },
    "links": {
        "ends": ("ends", _ends),
        "bandwidth": ("bandwidth_bytes_s", _rate),
        "latency": ("latency_ms", _time),
        "max_utilisation": ("max_utilisation", _number),
        "cost_per_byte": ("cost_per_byte", _number),
        "duplex": ("duplex", _whether),
    },
    "routes": {"start": ("start", _text), "end": ("end", _text), "links": ("links", _texts)},
    "sources": {"node": ("node", _text), "stays_in": ("stays_in", _text)},
    "tasks": {"accelerators": _ACCELERATORS, "stays_in": ("stays_in", _text)},
    "sinks": {"node": ("node", _text), "weight": ("weight", _number)},
    "weights": {name: (name, _number) for name in ("latency", "waiting", "bytes", "cost")},
}
_REQUIRED: dict[str, tuple[str, ...]] = {"nodes": ("cores",), "links": ("ends",), "routes": ("start", "end", "links")}
_PLACED = ("sources", "sinks")  # an entry may be the node alone
KEYS = (*FIELDS, "broker", "header", "reference", "fetch", "settle", "hop", "variability", "pins", "colocate", "separate")


@dataclass(frozen=True)
class Topology:
    """A cluster, in the fields and units of a placement problem.

    Attributes:
        file: where it is from.
        nodes, links, sources, tasks, sinks: name to the fields that are given.
        routes: the fields of each.
        weights: those that are given.
        pins: task to the nodes that it may run on.
        colocate, separate: sets of tasks.
        broker: the node of the broker.
        header_bytes: size of a header.
        reference_bytes: what it is longer by when the payload stays.
        fetch_bytes: what asking for such a payload takes beside it.
        settle_bytes: what noting runs as done takes.
        hop_ms: what a message through the broker takes beside its way over links.
        variability: how irregularly messages come.
        lines: the line of a section, an entry, or a field of one.
    """

    file: str
    nodes: Mapping[str, dict[str, Any]]
    links: Mapping[str, dict[str, Any]]
    sources: Mapping[str, dict[str, Any]]
    tasks: Mapping[str, dict[str, Any]]
    sinks: Mapping[str, dict[str, Any]]
    routes: tuple[dict[str, Any], ...]
    weights: dict[str, float]
    pins: Mapping[str, tuple[str, ...]]
    colocate: tuple[tuple[str, ...], ...]
    separate: tuple[tuple[str, ...], ...]
    broker: str
    header_bytes: float
    reference_bytes: float
    fetch_bytes: float
    settle_bytes: float
    hop_ms: float
    variability: float
    lines: Mapping[tuple[str, ...], int]

    def at(self, *path: str) -> Where:
        """The line of a section, an entry or a field; of what is not in the file that of what it would be in."""
        while path and path not in self.lines:
            path = path[:-1]
        return Where(self.file, self.lines.get(path, 0))


def read_topology(path: Path) -> Topology:
    """The cluster that a YAML file describes. Whether its names fit together, a placement problem says that is made of it.

    Raises:
        InvalidPipeline: one of its subclasses, with the line.
        MissingExtra: PyYAML is not installed.
    """
    return _Reader(path).topology()


class _Reader:
    def __init__(self, path: Path) -> None:
        self._file = str(path)
        self._document = read(path, "topology", "`nodes:`, then links and broker")
        self._lines: dict[tuple[str, ...], int] = {(key,): line for key, line in self._document.lines.items()}

    def topology(self) -> Topology:
        document = self._document
        for key in document:
            if key not in KEYS:
                raise UnknownKeyword(f"a topology has no {key!r}", self._where(key), did_you_mean(key, list(KEYS)))
        for key in ("nodes", "broker"):
            if not document.get(key):
                hint = "name the node of the broker" if key == "broker" else "name the machines, each with its cores and memory"
                raise MissingValue(f"the topology has no {key}", Where(self._file, self._lines.get((key,), document.line)), hint)
        nodes = self._section("nodes")
        for name, fields in nodes.items():
            if fields["cores"] and "memory_bytes" not in fields:
                reason = f"node {name!r} has no memory"
                raise MissingValue(reason, self._where("nodes", name), "write it, as in memory: 8 GB; who only forwards has cores: 0")
        return Topology(
            file=self._file,
            nodes=nodes,
            links=self._section("links"),
            sources=self._section("sources"),
            tasks=self._section("tasks"),
            sinks=self._section("sinks"),
            routes=tuple(self._routes()),
            weights=self._entry(self._mapping("weights"), "weights"),
            pins={task: self._value(given, _nodes, "pins", task) for task, given in self._mapping("pins").items()},
            colocate=tuple(self._groups("colocate")),
            separate=tuple(self._groups("separate")),
            broker=self._value(document["broker"], _text, "broker"),
            header_bytes=self._value(document.get("header", "200 B"), _size, "header"),
            reference_bytes=self._value(document.get("reference", "160 B"), _size, "reference"),
            fetch_bytes=self._value(document.get("fetch", "500 B"), _size, "fetch"),
            settle_bytes=self._value(document.get("settle", "0 B"), _size, "settle"),
            hop_ms=self._value(document.get("hop", "0 ms"), _time, "hop"),
            variability=self._value(document.get("variability", 1), _number, "variability"),
            lines=self._lines,
        )

    def _where(self, *path: str) -> Where:
        return Where(self._file, self._lines[path])

    def _mapping(self, section: str) -> Mapped:
        found = self._document.get(section)
        if found is None:
            return Mapped()
        if not isinstance(found, Mapped):
            raise InvalidDocument(f"{section} are no mapping", self._where(section), f"write NAME: and what it is, under {section}:")
        self._lines |= {(section, name): line for name, line in found.lines.items()}
        return found

    def _section(self, section: str) -> dict[str, dict[str, Any]]:
        return {
            name: {"node": entry} if section in _PLACED and isinstance(entry, str) else self._entry(entry, section, name)
            for name, entry in self._mapping(section).items()
        }

    def _routes(self) -> list[dict[str, Any]]:
        found = []
        for i, entry in enumerate(self._list("routes")):
            route = self._entry(entry, "routes", str(i))
            self._lines[("routes", f"{route['start']}' to '{route['end']}")] = self._lines[("routes", str(i))]
            found.append(route)
        return found

    def _groups(self, section: str) -> list[tuple[str, ...]]:
        return [self._value(group, _texts, section, str(i)) for i, group in enumerate(self._list(section))]

    def _list(self, section: str) -> list[Any]:
        found = self._document.get(section)
        if found is None:
            return []
        if not isinstance(found, list):
            raise InvalidDocument(f"{section} are no list", self._where(section), f"write each after a dash, under {section}:")
        self._lines |= {(section, str(i)): self._document.lines[f"{section}[{i}]"] for i in range(len(found))}
        return found

    def _entry(self, entry: Any, *path: str) -> dict[str, Any]:
        section, what, known = path[0], _called(*path), FIELDS[path[0]]
        if not isinstance(entry, Mapped):
            raise InvalidDocument(f"{what} is no mapping", self._where(*path), f"write what it has under it: {', '.join(known)}")
        found = {}
        for key, given in entry.items():
            if key not in known:
                raise UnknownKeyword(f"{what} has no {key!r}", Where(self._file, entry.lines[key]), did_you_mean(key, list(known)))
            name, convert = known[key]
            self._lines[(*path, name)] = entry.lines[key]
            found[name] = self._value(given, convert, *path, name, key=key)
        for key in _REQUIRED.get(section, ()):
            if known[key][0] not in found:
                raise MissingValue(f"{what} has no {key}", self._where(*path), f"write {key}: under it")
        return found

    def _value(self, given: Any, convert: Callable[[Any], Any], *path: str, key: str = "") -> Any:
        try:
            return convert(given)
        except _Wrong as exc:
            reason, hint = exc.args
            place = _called(*(path[:-1] if key else path))
            raise BadValue(f"{place}{f': {key}' if key else ''}: {given!r:.60} {reason}", self._where(*path), hint) from None


def _called(section: str, *names: str) -> str:
    """What a section, or an entry of it, is called in messages."""
    return " ".join((section.removesuffix("s"), *map(repr, names))) if names else section


__all__ = ("FIELDS", "KEYS", "Topology", "read_topology")
