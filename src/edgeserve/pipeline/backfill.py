"""The same graph over recorded files: sources that read them to their end, and files in place of sinks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeserve.pipeline.callables import parameters_of
from edgeserve.pipeline.declared import Declared, did_you_mean
from edgeserve.pipeline.errors import BadValue, MissingValue, UnknownName
from edgeserve.pipeline.graph import Graph
from edgeserve.pipeline.pipeline import Pipeline
from edgeserve.sinks import JsonLinesSink, ParquetSink
from edgeserve.sources import CsvReplay, JsonLinesTail, ParquetReplay
from edgeserve.sources.base import Source

JSON_LINES = (".jsonl", ".ndjson", ".json")
# At once, from the first item to the last.
_AT_ONCE: dict[str, Any] = {"speed": None, "loop": False, "from_start": True, "follow": False}
_READERS: dict[str, type[Source]] = {".csv": CsvReplay, ".parquet": ParquetReplay, **dict.fromkeys(JSON_LINES, JsonLinesTail)}
# What depends on how fast files are read, and what reaches beyond the store.
BY_THE_CLOCK = ("min_interval_ms", "drop_if_older_than_ms")
_ELSEWHERE = ("ftp", "ftp_memory", "ftp_delete")
LOGS = ("log_path", "log_filename", "log_verbose")
# Files are not read in step: the one that is ahead is held. Memory is the bound, and not a number of messages.
HOLDS_ALL = {"max_held": 2**31, "overflow": "error"}


def backfill(pipeline: Pipeline, recorded: Mapping[str, Path], out: Mapping[str, Path], live: Collection[str] = ()) -> Pipeline:
    """A pipeline of what feeds these sinks, which ends with its files, and drops nothing because of how fast they are read.

    Args:
        pipeline: what is to be run over files.
        recorded: source to the file that is read in its place: by the source itself, if it has a parameter `path`, else as its suffix says.
        out: sink to the file, or directory of Parquet files, that is written in its place. See `partial`.
        live: sources that run as they are.

    Raises:
        UnknownName: there is no such source or sink, or the source feeds none of these sinks.
        BadValue: the suffix of a file is none that can be read or written, or a keyword goes by the clock or reaches for files elsewhere.
        MissingValue: no sink is named, or a source that feeds one has no file and is not said to be live.
    """
    made = pipeline.emptied()
    declared, graph = pipeline.declared, pipeline.graph()
    check_names(pipeline, "source", [*recorded, *live], declared)
    check_names(pipeline, "sink", out, declared)
    if not out:
        raise MissingValue(f"no sink of pipeline {pipeline.name!r} is to be written", pipeline.where, "name one, and its file")
    needed = _feeding(graph, out)
    for each in declared:
        given = (each.name in recorded) + (each.name in live)
        if each.name not in needed:
            if given:
                hint = f"leave it out: it feeds nothing that {', '.join(out)} takes"
                raise UnknownName(f"source {each.name!r} is not run", each.where, hint)
            continue
        if each.kind == "source" and given != 1:
            reason = f"source {each.name!r} feeds {', '.join(out)} and has {'a file and is live' if given else 'no file'}"
            raise MissingValue(reason, each.where, f"give --in {each.name}=FILE, or --live {each.name} for it to run as it is")
        each = _without_clock_or_files(each)
        if each.name in recorded:
            each = reading(each, recorded[each.name])
        elif each.kind == "sink":
            each = _writing(each, out[each.name], graph)
        made.declare(each)
    return made


def partial(path: Path) -> Path:
    """Where a sink writes what is to be `path` when it is whole."""
    return path.with_name(path.name + ".partial")


def _feeding(graph: Graph, sinks: Iterable[str]) -> set[str]:
    """The names of sinks and of all that feeds them."""
    found, rest = set[str](), [part for part in graph.parts if part.name in sinks]
    while rest:
        part = rest.pop()
        found.add(part.declared.name)
        rest += [other for other in graph.parts if other.sends in part.inputs and other.declared.name not in found]
    return found


def check_names(pipeline: Pipeline, kind: str, given: Iterable[str], declared: Iterable[Declared]) -> None:
    """Raises `UnknownName` unless each of these names is that of a source, or whatever kind it is, that is declared."""
    known = [each.name for each in declared if each.kind == kind]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known, f"there is {', '.join(known) or 'none'}")
            raise UnknownName(f"pipeline {pipeline.name!r} has no {kind} {name!r}", pipeline.where, hint)


def _without_clock_or_files(each: Declared) -> Declared:
    given = {name: value for name, value in each.keywords.items() if name not in LOGS}
    for name, why in (
        *((name, "goes by the clock, and files are read as fast as they can be") for name in BY_THE_CLOCK),
        ("backlog", "keeps what is newest, and files are read as fast as they can be"),
        *((name, "takes files from elsewhere, and a backfill reads and writes those that are named only") for name in _ELSEWHERE),
    ):
        if given.get(name) not in (None, False, 0, "all", "block"):
            raise BadValue(f"{each.kind} {each.name!r}: {name}={given[name]!r} {why}", each.at(name), "leave it out for a backfill")
    join = given.get("join")
    if getattr(join, "min_period_ns", 0):
        raise BadValue(f"{each.kind} {each.name!r}: the min_period_ns of its join goes by the clock", each.at("join"), "leave it out")
    if join == "exact" or given.get("by") is not None:
        given |= HOLDS_ALL
    return replace(each, keywords=given)


def reading(source: Declared, path: Path) -> Declared:
    """A source that reads a file to its end instead, at once."""
    function, args = source.function, dict(source.args or {})
    if "path" not in parameters_of(function):
        if path.suffix not in _READERS:
            hint = f"give it one of {', '.join(_READERS)}, or the source a parameter `path`"
            raise BadValue(f"source {source.name!r}: nothing is known of how {path.name} is read", source.where, hint)
        function, args = _READERS[path.suffix], {"time": 0} if path.suffix == ".parquet" else {}
    if isinstance(function, type) and issubclass(function, Source):
        args |= {name: value for name, value in _AT_ONCE.items() if name in parameters_of(function)}
        args.pop("position", None)  # of the live file
    return replace(source, function=function, args=args | {"path": path}, replicas=1)


def _writing(sink: Declared, path: Path, graph: Graph) -> Declared:
    inputs = next(part.inputs for part in graph.parts if part.name == sink.name)
    if path.suffix not in (*JSON_LINES, ".parquet"):
        hint = f"end its name in {', '.join(JSON_LINES)} or .parquet (a directory)"
        raise BadValue(f"sink {sink.name!r}: nothing is known of how {path.name} is written", sink.where, hint)
    writer = ParquetSink if path.suffix == ".parquet" else JsonLinesSink
    return replace(sink, function=writer, args={"path": partial(path)}, inputs=inputs, replicas=1)


__all__ = ("BY_THE_CLOCK", "HOLDS_ALL", "JSON_LINES", "LOGS", "backfill", "check_names", "partial", "reading")
