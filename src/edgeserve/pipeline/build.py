"""The nodes of a graph: a `DataSource`, `Compute` or `Materialize` for each process."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from edgeserve.compute import Compute
from edgeserve.core.errors import ConfigurationError
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from edgeserve.pipeline.callables import Relay, make_stream, make_task, stand_in
from edgeserve.pipeline.declared import Node
from edgeserve.pipeline.errors import BadValue, InvalidPipeline
from edgeserve.pipeline.graph import Part
from edgeserve.sources.base import Source

_KEYWORD = re.compile(r"\b(\w+)=")


def build(part: Part, url: str, replica: int = 0) -> Node:
    """The node that one process of a part runs. What it runs is made now."""
    return _build(part, url, replica, made=True)


def look(part: Part, url: str, replica: int = 0) -> Node:
    """A node that is never run: it checks the keywords, and knows its topics.

    Raises:
        InvalidPipeline: what the node says to its keywords, with the line of the one that it names.
    """
    try:
        return _build(part, url, replica, made=False)
    except InvalidPipeline:
        raise
    except ConfigurationError as exc:
        declared = part.declared
        named = [match for match in _KEYWORD.findall(str(exc)) if match in declared.keywords]
        raise BadValue(f"{part.kind} {part.name!r}: {exc}", declared.at(*named), "correct it") from exc


def doubles(node: Node) -> bool:
    """Whether a node that is started again sends what it has sent once more, with other ids, so that nobody drops it."""
    if not isinstance(node, DataSource):
        return False
    stream = node._stream
    return node._message_id is None and not (isinstance(stream, Source) and stream.resumable)


def _build(part: Part, url: str, replica: int, *, made: bool) -> Node:
    keywords = {} if part.kind == "relay" else dict(part.declared.keywords)
    makers: dict[str, Callable[..., Node]] = {"source": _source, "task": _task, "relay": _relay, "sink": _sink}
    return makers[part.kind](part, url, replica, keywords, made)


def _source(part: Part, url: str, replica: int, keywords: dict[str, Any], made: bool) -> DataSource:
    stream = make_stream(part.declared, replica) if made else ()
    if isinstance(stream, Source):
        # A recording knows when its items were, and which they are, better than this program does.
        for name in ("event_time", "message_id"):
            if (own := getattr(stream, name, None)) is not None:
                keywords.setdefault(name, own)
    return DataSource(stream, url, **keywords | {"source_id": part.sends, "topic": part.topic_out})


def _task(part: Part, url: str, replica: int, keywords: dict[str, Any], made: bool) -> Compute:
    task = make_task(part.declared, part.inputs, replica) if made else stand_in(part.inputs)
    return _compute(part, url, replica, keywords, task)


def _relay(part: Part, url: str, replica: int, keywords: dict[str, Any], made: bool) -> Compute:
    # What stays in shared memory does so behind the relay, too, and what is to be safe is safe.
    own = {name: value for name, value in part.declared.keywords.items() if name in ("routing", "lazy_bytes", "durability")}
    return _compute(part, url, replica, own, Relay(part.sends))


def _compute(part: Part, url: str, replica: int, keywords: dict[str, Any], task: Any) -> Compute:
    worker = keywords.get("worker_id") or part.name
    own = {"output_id": part.sends, "topic_in": part.topic_in, "topic_out": part.topic_out, "group": part.group}
    return Compute(task, url, **keywords | own | {"worker_id": worker if part.replicas == 1 else f"{worker}-{replica}"})


def _sink(part: Part, url: str, replica: int, keywords: dict[str, Any], made: bool) -> Materialize:
    function = make_task(part.declared, part.inputs, replica) if made else stand_in(("value",))
    return Materialize(function, url, **keywords | {"topic": part.topic_in, "group": part.group})


__all__ = ("build", "doubles", "look")
