"""Where everything of a pipeline runs, and how what it sends travels: the file that `edgeserve plan --apply` writes and `run` obeys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from edgeserve.pipeline.declared import did_you_mean
from edgeserve.pipeline.errors import BadValue, InvalidDocument, MissingValue, UnknownName, Where
from edgeserve.pipeline.pipeline import Pipeline
from edgeserve.pipeline.wholefile import write_whole

FORMAT_VERSION = 1
"""The version of the format that this installation writes, and the newest that it reads."""


class Assignment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A placement of a pipeline.

    Args:
        pipeline: its name.
        places: source, task or sink to the hosts that its replicas run on in turn.
        routing: source or task to how its payloads travel: to all who take them the same way.
        version: of the format.
    """

    pipeline: str
    places: dict[str, tuple[str, ...]]
    routing: dict[str, Literal["eager", "lazy", "auto"]]
    version: int = FORMAT_VERSION


def read_assignment(path: Path) -> Assignment:
    """The assignment in a file.

    Raises:
        InvalidDocument: it is none, or of a version that this installation does not read.
    """
    where, anew = Where(str(path), 0), "write it anew: edgeserve plan --apply"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Assignment)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidDocument(f"this is no assignment: {exc}", where, anew) from exc
    if not 1 <= found.version <= FORMAT_VERSION:
        reason = f"the assignment is in version {found.version} of the format, and this installation reads 1 to {FORMAT_VERSION}"
        raise InvalidDocument(reason, where, f"upgrade edgeserve, or {anew}")
    return found


def write_assignment(path: Path, assignment: Assignment) -> None:
    """Writes an assignment to a file, whole or not at all."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(assignment), indent=2) + b"\n")


def check_assignment(assignment: Assignment, pipeline: str, names: Iterable[str], file: str) -> None:
    """Raises what makes an assignment one of another pipeline than that with this name, and these sources, tasks and sinks."""
    where, known = Where(file, 0), list(names)
    if assignment.pipeline != pipeline:
        reason = f"the assignment is of the pipeline {assignment.pipeline!r}, and this is {pipeline!r}"
        raise BadValue(reason, where, f"name the one that was written for {pipeline!r}")
    for name in (*assignment.places, *assignment.routing):
        if name not in known:
            hint = did_you_mean(name, known, "the pipeline has changed: plan it anew")
            raise UnknownName(f"pipeline {pipeline!r} has no {name!r}", where, hint)
    for name in known:
        if not assignment.places.get(name):
            raise MissingValue(f"the assignment gives {name!r} no place", where, "the pipeline has changed: plan it anew")


def apply(pipeline: Pipeline, assignment: Assignment, file: str) -> Pipeline:
    """The pipeline with everything where an assignment puts it; what its declarations say of places and routing does not count.

    Raises:
        InvalidPipeline: one of its subclasses: the assignment is of another pipeline.
    """
    check_assignment(assignment, pipeline.name, [each.name for each in pipeline.declared], file)
    made = pipeline.emptied()
    for each in pipeline.declared:
        routing = {"routing": assignment.routing[each.name]} if each.name in assignment.routing and each.kind != "sink" else {}
        made.declare(replace(each, places=assignment.places[each.name], keywords={**each.keywords, **routing}))
    return made


__all__ = ("FORMAT_VERSION", "Assignment", "apply", "check_assignment", "read_assignment", "write_assignment")
