"""Whether what is declared can work together: the types of what is sent and taken, its keys, the files of sinks. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgeserve.align import Exact
from edgeserve.pipeline.callables import Signature, contradict, made_type, parameters_of, plain_class
from edgeserve.pipeline.declared import Declared
from edgeserve.pipeline.errors import BadValue, TypeConflict
from edgeserve.sinks.base import FileSink
from edgeserve.stage.fuse import name_of


def check_types(declared: Iterable[Declared], inputs: Mapping[str, tuple[str, ...]], makers: Mapping[str, Declared]) -> None:
    """Raises `TypeConflict` where nothing that is sent can be taken as it is annotated.

    Args:
        declared: all there is.
        inputs: what each task and sink takes, by its name: source ids.
        makers: source id to who sends it.
    """
    for each in declared:
        _check_stages(each)
        # A gate makes what the function gets of what was sent, and so does what fetches what a message names.
        changed = each.keywords.get("gate_in" if each.kind == "task" else "gate") is not None
        if each.kind == "source" or changed or each.keywords.get("fetch") or each.keywords.get("ftp"):
            continue
        signature, taken = Signature(each), inputs[each.name]
        # A sink has one parameter, however many it takes from.
        parameters = (signature.parameters or ()) if each.kind == "task" else (signature.parameters or ())[:1] * len(taken)
        for name, parameter in zip(taken, parameters, strict=False):
            maker = makers[name]
            sent, wanted = made_type(maker), plain_class(signature.annotations.get(parameter))
            if sent is not None and wanted is not None and contradict(sent, wanted):
                taking = f"{each.kind} {each.name!r} takes {name!r} as {wanted.__qualname__}"
                sending = f"{maker.kind} {maker.name!r} sends {sent.__qualname__} (line {maker.where.line})"
                raise TypeConflict(f"{taking}, and {sending}", each.where, "correct one of the annotations, or give a gate that converts")


def _check_stages(task: Declared) -> None:
    """Whether each stage can be called with what the one before it returns."""
    for before, stage in itertools.pairwise(task.stages):
        annotations = Signature(stage, named=False).annotations.values()
        sent, wanted = made_type(before), next(map(plain_class, annotations), None)
        if sent is not None and wanted is not None and contradict(sent, wanted, untouched=True):
            takes = f"stage {name_of(stage.function)!r} of task {task.name!r} takes {wanted.__qualname__}"
            reason = f"{takes}, and {name_of(before.function)!r} before it makes {sent.__qualname__}, which is handed over as it is"
            raise TypeConflict(reason, stage.where, "correct one of the annotations, or fuse a stage between them that converts")


def check_keys(ordered: Iterable[Declared], inputs: Mapping[str, tuple[str, ...]], makers: Mapping[str, Declared]) -> None:
    """Raises `BadValue` where a join is by the key in the messages' headers, and those of an input never have one.

    Args:
        ordered: all there is, each behind what it takes.
        inputs: what each task and sink takes, by its name: source ids.
        makers: source id to who sends it.
    """
    without = set[str]()
    for each in ordered:
        taken, by, join = inputs.get(each.name, ()), each.keywords.get("by"), each.keywords.get("join", "latest")
        keyless = [name for name in taken if name in without]
        if keyless and (by is True or (by is None and isinstance(join, Exact) and join.on != "time")):
            maker = makers[keyless[0]]
            reason = f"task {each.name!r} joins by the key in each message's header, and {maker.kind} {maker.name!r} sends none"
            hint = "give it key=" if maker.kind == "source" else "it hands on the key that all its inputs have: give these keys"
            where = each.at("by", "join")
            raise BadValue(f"{reason} (line {maker.where.line})", where, f"{hint}, or {each.name!r} a function of the payload as by=")
        # A policy of one's own may make sets of some of the inputs.
        handed_on = len(keyless) < len(taken) if not isinstance(join, str) else not keyless
        if not (each.keywords.get("key") is not None if each.kind == "source" else callable(by) or handed_on):
            without.add(each.sends)


def check_files(declared: Iterable[Declared]) -> None:
    """Raises `BadValue` where two processes on one host would write to one file, as far as it is known before they run."""
    writers: dict[tuple[str | None, Path], Declared] = {}
    for each in declared:
        if (path := _written(each)) is None:
            continue
        for replica in range(each.replicas):
            at = (each.places[replica % len(each.places)] if each.places else None, path)
            if at in writers:
                raise _both(writers[at], each, path)
            writers[at] = each


def _both(one: Declared, other: Declared, path: Path) -> BadValue:
    busy = f"would write to {path}, and one process at a time may"
    if one is not other:
        reason = f"sinks {other.name!r} and {one.name!r} (line {one.where.line}) {busy}"
        return BadValue(reason, other.at("args", "sink"), "give each a path of its own")
    hint = "leave replicas out, or give with args= a function that makes a sink of another path from its parameter `replica`"
    return BadValue(f"sink {one.name!r}: its {one.replicas} replicas {busy}", one.at("replicas"), hint)


def _written(declared: Declared) -> Path | None:
    """Where all replicas of a sink write to; None: it is not known, or each may have a path of its own."""
    function, path = declared.function, (declared.args or {}).get("path")
    if isinstance(function, FileSink):
        return function.path
    if not isinstance(function, type) or not issubclass(function, FileSink) or "replica" in parameters_of(function):
        return None
    return Path(path).absolute() if isinstance(path, str | Path) else None


__all__ = ("check_files", "check_keys", "check_types")
