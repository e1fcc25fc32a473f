"""YAML as plain values with their lines, read by a safe loader and within bounds that no pipeline comes near."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgeserve.core.errors import MissingExtra
from edgeserve.pipeline.errors import DuplicateName, InvalidDocument, UnsafeDocument, Where

MOST_BYTES, MOST_NODES, MOST_LEVELS, MOST_SCALAR_BYTES = 1_000_000, 20_000, 20, 4096
_TAGS = "tag:yaml.org,2002:"


class Mapped(dict[str, Any]):
    """A mapping of YAML.

    Attributes:
        line: where it begins.
        lines: the line of each key, and as `key[0]` of each item of a list that a key has.
    """

    line: int = 0
    lines: Mapping[str, int] = MappingProxyType({})


def read(path: Path, what: str = "pipeline", begin: str = "`pipeline: NAME`, then sources, tasks and sinks") -> Mapped:
    """The mapping that a file holds.

    Args:
        path: the file.
        what: what it describes, for messages.
        begin: what such a file begins with.

    Raises:
        InvalidDocument: it is no YAML, or no mapping.
        UnsafeDocument: it or one of its values is too large, it is too deep, or it has anchors, aliases or tags.
        DuplicateName: a key comes twice.
        MissingExtra: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as exc:
        raise MissingExtra(f"a {what} in YAML needs PyYAML: pip install 'edgeserve-streams[pipeline]'") from exc
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UnsafeDocument(
            f"the file has more than {MOST_BYTES} bytes", Where(str(path), 0), f"a {what} has far fewer: is it the right file?"
        )
    # The one in C is twenty times faster, and the same otherwise.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml, yaml.parse(data, Loader=loader), str(path), what)
        document = yaml.compose(data, Loader=loader)
        found = _Reader(yaml, str(path)).value(document) if document is not None else None
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line = 0 if mark is None else mark.line + 1
        raise InvalidDocument(
            f"this is no YAML: {exc.problem or exc.context}", Where(str(path), line), "correct the line, or the one above"
        ) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        what = " ".join(str(exc).split())
        raise InvalidDocument(f"this is no YAML: {what:.200}", Where(str(path), 0), "write it as UTF-8 text") from exc
    if not isinstance(found, Mapped):
        raise InvalidDocument("this is no mapping", Where(str(path), 1), f"begin it with {begin}")
    return found


def _check_events(yaml: Any, events: Any, file: str, what: str) -> None:
    """Looks through a document before anything is made of it."""
    level = nodes = documents = 0
    for event in events:
        where = Where(file, event.start_mark.line + 1)
        if getattr(event, "anchor", None) is not None:
            mark = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise UnsafeDocument(f"{mark}{event.anchor}: anchors and aliases are not taken", where, "write out what it stands for")
        if getattr(event, "tag", None) not in (None, "!"):
            raise UnsafeDocument(
                f"the tag {event.tag!r} is not taken", where, "write a plain value, or 'module:name' for something of Python"
            )
        if isinstance(event, yaml.ScalarEvent) and len(event.value.encode(errors="replace")) > MOST_SCALAR_BYTES:
            raise UnsafeDocument(f"a value has more than {MOST_SCALAR_BYTES} bytes", where, "put it into a file, and name that")
        nodes += isinstance(event, yaml.NodeEvent)
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if nodes > MOST_NODES or level > MOST_LEVELS:
            reason = f"it has more than {MOST_NODES} values" if nodes > MOST_NODES else f"it has more than {MOST_LEVELS} levels"
            raise UnsafeDocument(reason, where, f"a {what} has far fewer: is it the right file?")
        if documents > 1:
            raise InvalidDocument("a second document begins", where, f"write one {what} in a file")


class _Reader:
    def __init__(self, yaml: Any, file: str) -> None:
        self._yaml, self._file = yaml, file
        self._plain = yaml.constructor.SafeConstructor()

    def value(self, node: Any) -> Any:
        if isinstance(node, self._yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, self._yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        where = Where(self._file, node.start_mark.line + 1)
        try:
            found = self._plain.construct_object(node)
        except (ValueError, self._yaml.constructor.ConstructorError) as exc:
            reason = f"{str(node.value)[:60]!r} is no {node.tag.removeprefix(_TAGS)}"
            raise InvalidDocument(reason, where, "put quotes around it, or correct it") from exc
        if isinstance(found, int) and not -(2**63) <= found < 2**63:
            raise UnsafeDocument(f"{node.value[:60]!r} does not fit into 64 bits", where, "put quotes around it, or correct it")
        return found

    def _mapping(self, node: Any) -> Mapped:
        found, lines = Mapped(), dict[str, int]()
        for key_node, value_node in node.value:
            key, line = self.value(key_node), key_node.start_mark.line + 1
            where = Where(self._file, line)
            if not isinstance(key, str):
                raise InvalidDocument(f"the key {key!r:.60} is no text", where, "put quotes around it")
            if key in found:
                raise DuplicateName(
                    f"the key {key!r} is there twice, first in line {lines[key]}", where, "take one of them out, or rename it"
                )
            found[key], lines[key] = self.value(value_node), line
            if isinstance(value_node, self._yaml.SequenceNode):
                lines |= {f"{key}[{i}]": item.start_mark.line + 1 for i, item in enumerate(value_node.value)}
        found.line, found.lines = node.start_mark.line + 1, lines
        return found


__all__ = ("MOST_BYTES", "MOST_LEVELS", "MOST_NODES", "MOST_SCALAR_BYTES", "Mapped", "read")
