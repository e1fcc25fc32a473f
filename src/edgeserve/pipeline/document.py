"""A pipeline in YAML: its schema, made of the nodes' own signatures, and how it becomes a `Pipeline`."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec

from edgeserve.pipeline.declared import DERIVED, MOST_REPLICAS, NODES, Kind, check_pipeline_name, did_you_mean, keywords_of
from edgeserve.pipeline.errors import BadValue, InvalidDocument, MissingValue, UnknownKeyword, Where
from edgeserve.pipeline.pipeline import Pipeline
from edgeserve.pipeline.references import PATTERN, resolve
from edgeserve.pipeline.yamlfile import Mapped, read

_SECTIONS: dict[str, Kind] = {"sources": "source", "tasks": "task", "sinks": "sink"}
_WHAT_RUNS: dict[Kind, tuple[str, str]] = {
    "source": ("stream", "What returns the stream, or an iterable."),
    "task": ("task", "The task: a function; or a class, or with `args` whatever is called with them to make it."),
    "sink": ("sink", "What takes the results: a function; or a class, or with `args` whatever is called with them to make it."),
}
_INPUTS: dict[Kind, tuple[str, str]] = {
    "task": ("inputs", "What it takes, in the order of its parameters. Default: its parameters are called so."),
    "sink": ("of", "What it takes. Default: its parameter is called so."),
}
_STAGES = "In place of `task`: its stages, in order. Each takes what the one before it returns, or yields, as the same object."
Reference = Annotated[str, msgspec.Meta(pattern=PATTERN, description="'module:name', or 'file.py:name' for a file beside this one")]
_PLAIN = (bool, int, float, str, type(None))
_TEXTS = Sequence[str]
_PATH_IN_ERROR = re.compile(r" - at `\$\.(\w+)(\[\d+\])?")
_TO_DO = {"args": "name each parameter that it is for, as in args: {path: frames.csv}"}
_MISSING = re.compile(r"missing required field `(\w+)`")


def load_yaml(path: Path) -> Pipeline:
    """The pipeline that a YAML file declares. What it names of Python is imported, from beside the file first.

    Raises:
        InvalidPipeline: one of its subclasses, with the line. What does not fit together `Pipeline.graph` says.
        MissingExtra: PyYAML is not installed.
    """
    document = read(path)
    file = str(path)
    for key in document:
        if key not in (known := ["pipeline", "node", *_SECTIONS]):
            raise UnknownKeyword(f"a pipeline has no {key!r}", Where(file, document.lines[key]), did_you_mean(key, known))
    where = Where(file, document.lines.get("pipeline", document.line))
    if "pipeline" not in document:
        raise MissingValue("the pipeline has no name", where, "write it: pipeline: NAME")
    check_pipeline_name(document["pipeline"], where)
    node = document.get("node")
    if not isinstance(node, str | None):
        raise BadValue(f"node: {node!r:.60}", Where(file, document.lines["node"]), "give the URL of a node, such as local://")
    pipeline = Pipeline(document["pipeline"], node=node)
    pipeline.where = where
    for section, kind in _SECTIONS.items():
        entries = document.get(section)
        if entries is None:
            continue
        if not isinstance(entries, Mapped):
            raise InvalidDocument(
                f"{section} are no mapping", Where(file, document.lines[section]), f"write NAME: and what it is, under {section}:"
            )
        for name in entries:
            _declare(pipeline, kind, name, entries[name], Where(file, entries.lines[name]), path)
    return pipeline


def _declare(pipeline: Pipeline, kind: Kind, name: str, entry: Any, where: Where, path: Path) -> None:
    key, _ = _WHAT_RUNS[kind]
    if not isinstance(entry, Mapped):
        raise InvalidDocument(f"{kind} {name!r} is no mapping", where, f"write {key}: module:name under it")
    shape = entries_of()[kind]
    for keyword in entry:
        if keyword not in shape.__struct_fields__:
            at = Where(where.file, entry.lines[keyword])
            raise UnknownKeyword(f"{kind} {name!r} takes no {keyword!r}", at, did_you_mean(keyword, [*shape.__struct_fields__]))
    try:
        msgspec.convert(entry, shape)
    except msgspec.ValidationError as exc:
        _refuse(kind, name, str(exc), entry, where)
    given = {
        keyword: resolve(value, path.parent, Where(where.file, entry.lines[keyword])) if _names_python(kind, keyword, value) else value
        for keyword, value in entry.items()
    }
    if "fuse" in given:
        given["fuse"] = [resolve(each, path.parent, Where(where.file, entry.lines[f"fuse[{i}]"])) for i, each in enumerate(given["fuse"])]
    own = {own: given.pop(own, default) for own, default in (("args", None), ("replicas", 1), ("place", None), ("fuse", None))}
    inputs = given.pop(_INPUTS[kind][0], None) if kind in _INPUTS else None
    pipeline._add(kind, name, given.pop(key, None), where, inputs=inputs, **own, keywords=given, lines=entry.lines)


def _refuse(kind: Kind, name: str, said: str, entry: Mapped, where: Where) -> NoReturn:
    """Raises what msgspec has said, with the line of what it says it of."""
    if missing := _MISSING.search(said):
        keyword = missing[1]
        raise MissingValue(f"{kind} {name!r} has no {keyword!r}", where, f"write {keyword}: module:name under it")
    at = _PATH_IN_ERROR.search(said)
    keyword, item = (at[1], at[2] or "") if at else ("", "")
    what = said.partition(" - at `")[0]
    hint = _TO_DO.get(keyword, "correct it; edgeserve validate --schema says what is taken")
    if "regex" in what:
        value = entry[keyword][int(item[1:-1])] if item else entry[keyword]
        what, hint = f"{value!r:.60} is no reference to something of Python", "write 'module:name'"
    raise BadValue(f"{kind} {name!r}: {keyword}{item}: {what}", Where(where.file, entry.lines.get(keyword + item, where.line)), hint)


# --- the schema ---------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The JSON schema of the YAML."""
    entries = entries_of()
    fields: list[Any] = [
        ("pipeline", _described(str, "Its name, which begins the names of its topics.")),
        ("node", _described(str | None, "The URL of its node. Default: EDGESERVE_NODE, else local://."), None),
    ]
    fields += [(section, dict[str, entries[kind]], msgspec.field(default_factory=dict)) for section, kind in _SECTIONS.items()]  # type: ignore[valid-type]
    document = msgspec.defstruct("Pipeline", fields, kw_only=True, forbid_unknown_fields=True)
    made = msgspec.json.schema(document)
    made["$defs"]["Task"]["oneOf"] = [{"required": ["task"]}, {"required": ["fuse"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A pipeline of edgeserve", **made}


@cache
def entries_of() -> Mapping[Kind, type[msgspec.Struct]]:
    """What an entry of each section holds."""
    return {kind: _entry(kind) for kind in _SECTIONS.values()}


def _entry(kind: Kind) -> type[msgspec.Struct]:
    """The keywords of a node's own signature, and what the pipeline adds to them."""
    key, meaning = _WHAT_RUNS[kind]
    fields: list[Any] = [(key, _described(Reference, meaning))]
    if kind == "task":  # one of both
        stages = Annotated[list[Reference], msgspec.Meta(min_length=1, description=_STAGES)]
        fields = [(key, fields[0][1] | msgspec.UnsetType, msgspec.UNSET), ("fuse", stages | msgspec.UnsetType, msgspec.UNSET)]
    if kind in _INPUTS:
        name, meaning = _INPUTS[kind]
        fields.append((name, _described(str | list[str] | None, meaning), None))
    fields += [
        ("args", _described(dict[str, Any] | None, "What it is called with to make it."), None),
        ("replicas", Annotated[int, msgspec.Meta(ge=1, le=MOST_REPLICAS, description="How many processes run it.")], 1),
        ("place", _described(str | list[str] | None, "The host that it runs on, or one for each replica in turn."), None),
    ]
    hints, meanings = typing.get_type_hints(NODES[kind].__init__), _meanings(NODES[kind])
    for name, parameter in keywords_of(kind).items():
        hint, meaning, default = _in_yaml(hints[name]), meanings.get(name, ""), parameter.default
        if name in DERIVED:
            hint, meaning, default = str | None, f"{meaning} Derived unless it is given.", None
        fields.append((name, _described(hint, meaning), default))
    return msgspec.defstruct(kind.capitalize(), fields, kw_only=True, forbid_unknown_fields=True)


def _described(hint: Any, meaning: str) -> Any:
    return Annotated[hint, msgspec.Meta(description=meaning)] if meaning else hint


def _meanings(node: type) -> dict[str, str]:
    """What the docstring of a class says of its arguments."""
    text = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(node) or "", re.MULTILINE | re.DOTALL)
    return {
        name: " ".join(said.split())
        for name, said in re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", text[1] if text else "", re.MULTILINE | re.DOTALL)
    }


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _in_yaml(hint: Any) -> Any:
    """The type that YAML has for an annotation: what is no plain value is named by a reference."""
    found: dict[Any, None] = {}
    for each in _alternatives(hint):
        if each in _PLAIN:
            found[each] = None
        elif typing.get_origin(each) is Literal:
            words = typing.get_args(each)
            found[bool if all(isinstance(word, bool) for word in words) else each] = None
        elif each == _TEXTS:
            found[list[str]] = None
        else:
            found[str if _is_path(each) else Reference] = None
    texts = [each for each in found if each in (str, Reference) or typing.get_origin(each) is Literal]
    if len(texts) > 1:
        found = {each: None for each in found if each not in texts} | {str: None}
    return typing.Union[tuple(found)]  # noqa: UP007


def _is_path(hint: Any) -> bool:
    return getattr(typing.get_origin(hint) or hint, "__name__", "") == "PathLike"


@cache
def _may_name_python(kind: Kind) -> frozenset[str]:
    """The keywords that take something which YAML has no value for."""
    hints = typing.get_type_hints(NODES[kind].__init__)
    beyond = {
        name
        for name in keywords_of(kind)
        if not all(
            each in _PLAIN or each == _TEXTS or typing.get_origin(each) is Literal or _is_path(each) for each in _alternatives(hints[name])
        )
    }
    return frozenset(beyond | {_WHAT_RUNS[kind][0]})


def _names_python(kind: Kind, keyword: str, value: Any) -> bool:
    return isinstance(value, str) and ":" in value and keyword in _may_name_python(kind)


__all__ = ("entries_of", "load_yaml", "schema")
