"""The same graph over recorded files: sources that read them to their end, and files in place of sinks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeserve.pipeline.callables import parameters_of
from edgeserve.pipeline.declared import Declared, did_you_mean
from edgeserve.pipeline.errors import BadValue, MissingValue, UnknownName
from edgeserve.pipeline.pipeline import Pipeline
from edgeserve.sinks import JsonLinesSink, ParquetSink
from edgeserve.sources import CsvReplay, JsonLinesTail, ParquetReplay
from edgeserve.sources.base import Source

JSON_LINES = (".jsonl", ".ndjson", ".json")
# At once, from the first item to the last.
_AT_ONCE: dict[str, Any] = {"speed": None, "loop": False, "from_start": True, "follow": False}
_READERS: dict[str, type[Source]] = {".csv": CsvReplay, ".parquet": ParquetReplay, **dict.fromkeys(JSON_LINES, JsonLinesTail)}


def backfill(pipeline: Pipeline, recorded: Mapping[str, Path], out: Mapping[str, Path]) -> Pipeline:
    """A pipeline like this one, which ends with its files. Sources that are not named are as they were; other sinks are not there.

    Args:
        pipeline: what is to be run over files.
        recorded: source to the file that is read in its place: by the source itself, if it has a parameter `path`, else as its suffix says.
        out: sink to the file, or directory of Parquet files, that is written in its place.

    Raises:
        UnknownName: there is no such source or sink.
        BadValue: the suffix of a file is none that can be read or written.
        MissingValue: no sink is named.
    """
    made = Pipeline(pipeline.name, node=pipeline.url)
    made.where = pipeline.where
    declared = pipeline.declared
    _check_names(pipeline, "source", recorded, declared)
    _check_names(pipeline, "sink", out, declared)
    if not out:
        raise MissingValue(f"no sink of pipeline {pipeline.name!r} is to be written", pipeline.where, "name one, and its file")
    for each in declared:
        if each.kind == "source" and each.name in recorded:
            made.declare(_reading(each, recorded[each.name]))
        elif each.kind == "sink" and each.name in out:
            made.declare(_writing(each, out[each.name], pipeline))
        elif each.kind != "sink":
            made.declare(each)
    return made


def _check_names(pipeline: Pipeline, kind: str, given: Iterable[str], declared: Iterable[Declared]) -> None:
    known = [each.name for each in declared if each.kind == kind]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known, f"there is {', '.join(known) or 'none'}")
            raise UnknownName(f"pipeline {pipeline.name!r} has no {kind} {name!r}", pipeline.where, hint)


def _reading(source: Declared, path: Path) -> Declared:
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


def _writing(sink: Declared, path: Path, pipeline: Pipeline) -> Declared:
    inputs = next(part.inputs for part in pipeline.graph().parts if part.name == sink.name)
    if path.suffix not in (*JSON_LINES, ".parquet"):
        hint = f"end its name in {', '.join(JSON_LINES)} or .parquet (a directory)"
        raise BadValue(f"sink {sink.name!r}: nothing is known of how {path.name} is written", sink.where, hint)
    writer = ParquetSink if path.suffix == ".parquet" else JsonLinesSink
    return replace(sink, function=writer, args={"path": path}, inputs=inputs, replicas=1)


__all__ = ("JSON_LINES", "backfill")
