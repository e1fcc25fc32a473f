"""`edgeserve.context()`: what a task may ask about the inputs that it is running on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from edgeserve.core.errors import ConfigurationError
from edgeserve.core.message import Header, Key


@dataclass(frozen=True)
class TaskContext:
    """What is known of the inputs of the call that asks.

    Attributes:
        event_ns: event time of the newest input.
        event_times_ns: event time of each input, by source id.
        ages_ms: how long ago each input's event was, by source id, on this node's clock.
        missing: source ids whose input is absent from a partial set.
        join_id: id of the set; of a one-parameter task, the input's id.
        ids: id of each input, by source id.
        keys: key of each input that has one, by source id.
        redelivered: whether the call may be a repeat of one that a crash cut short.
        source_id: the input's source id; of a set, its first one's.
    """

    event_ns: int
    event_times_ns: dict[str, int]
    ages_ms: dict[str, float]
    missing: tuple[str, ...]
    join_id: bytes
    ids: dict[str, bytes]
    keys: dict[str, Key]
    redelivered: bool
    source_id: str


class Current:
    """What a stage works on. One per stage: the loop only stores references here, `context()` builds the rest when asked."""

    __slots__ = ("headers", "join_id", "missing", "redelivered")

    def __init__(self) -> None:
        self.headers: Sequence[Header] | Header = ()
        self.join_id = b""
        self.missing: tuple[str, ...] = ()
        self.redelivered = False


CURRENT: ContextVar[Current] = ContextVar("edgeserve_current")


def context() -> TaskContext:
    """The context of the call that is running.

    Returns:
        Event times, ages, ids and keys of the inputs.

    Raises:
        ConfigurationError: called outside of a task, gate or sink, or from a thread that the task has started.
    """
    current = CURRENT.get(None)
    headers = () if current is None else current.headers
    if isinstance(headers, Header):
        headers = (headers,)
    if current is None or not headers:
        raise ConfigurationError(
            "edgeserve.context() was called outside of a task: call it in the task's own thread and pass on what you need of it"
        )
    now = time.time_ns()
    return TaskContext(
        event_ns=max(h.event_ns for h in headers),
        event_times_ns={h.source_id: h.event_ns for h in headers},
        ages_ms={h.source_id: (now - h.event_ns) / 1e6 for h in headers},
        missing=current.missing,
        join_id=current.join_id or headers[0].id,
        ids={h.source_id: h.id for h in headers},
        keys={h.source_id: h.key for h in headers if h.key is not None},
        redelivered=current.redelivered,
        source_id=headers[0].source_id,
    )


__all__ = ("CURRENT", "Current", "TaskContext", "context")
