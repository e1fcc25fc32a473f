"""Do the nodes of an app fit together? Names that a task waits for and nothing sends, names that are sent and no task takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

import msgspec

from edgeserve.stage.wiring import Wiring
from edgeserve.transport.url import parse

Place: TypeAlias = tuple[str, str]
"""Scheme and path of a node URL: what follows the question mark is how to use the place, not which one it is."""


class Listed(msgspec.Struct, frozen=True):
    """A node as its app's file defines it, without what only its own process can have."""

    name: str
    kind: str
    url: str
    wiring: Wiring


class Drawn(msgspec.Struct, frozen=True):
    """A pipeline's graph, in every form that it can be shown in."""

    json: dict[str, Any]
    mermaid: str
    svg: str


class Found(msgspec.Struct, frozen=True):
    """What an app's file declares, or `error`: why it cannot be told. `graph` is None of nodes at its top level."""

    nodes: list[Listed] = []
    graph: Drawn | None = None
    error: dict[str, str] = {}


def mismatches(nodes: Sequence[Listed], app: str, *, until_end: bool = False) -> list[str]:
    """A line for each parameter that nothing in `app` sends, and for each source id that no task in it takes.

    Another program may send or read, too, so each line is true whether it does or not. With `until_end` it says what waits for it.
    """
    topics = dict.fromkeys((_place(node.url), node.wiring.topic_in) for node in nodes if node.wiring.topic_in is not None)
    found: list[str] = []
    for place, topic in topics:
        there = [node for node in nodes if _place(node.url) == place]
        readers = [node for node in there if node.wiring.topic_in == topic]
        writers = [node for node in there if node.wiring.topic_out == topic]
        if writers:
            found += _names_that_differ(readers, writers, topic, app, until_end)
        else:
            written = [node.wiring.topic_out for node in there if node.wiring.topic_out is not None]
            found += _without_writer(readers, topic, written, app, until_end)
    return found


def feeders(nodes: Sequence[Listed]) -> dict[str, set[str]]:
    """For each node the names of those whose messages come to it, through other nodes too. Without those that it feeds itself: of a circle
    nobody can wait for another."""
    direct = {node.name: {other.name for other in nodes if _feeds(other, node)} for node in nodes}
    found: dict[str, set[str]] = {}
    for name, names in direct.items():
        reached, rest = set[str](), set(names)
        while rest:
            reached.add(other := rest.pop())
            rest |= direct[other] - reached
        found[name] = reached
    return {name: {other for other in reached if name not in found[other]} for name, reached in found.items()}


def _feeds(writer: Listed, reader: Listed) -> bool:
    there, wanted = reader.wiring.topic_in, reader.wiring.takes
    return (
        there is not None
        and writer.wiring.topic_out == there
        and (wanted is None or writer.wiring.sends in wanted)
        and _place(writer.url) == _place(reader.url)
    )


def _place(url: str) -> Place:
    parsed = parse(url)
    return parsed.scheme, parsed.path.rpartition("@")[2].rstrip("/")


def _names_that_differ(readers: Sequence[Listed], writers: Sequence[Listed], topic: str, app: str, until_end: bool) -> Iterator[str]:
    sent = list(dict.fromkeys(node.wiring.sends for node in writers))
    taken = list(dict.fromkeys(name for node in readers for name in node.wiring.takes or ()))
    unsent = [name for name in taken if name not in sent]
    untaken = [name for name in sent if name not in taken]
    for name in unsent:
        close = get_close_matches(name, untaken, n=1)
        who = _names(node for node in readers if name in (node.wiring.takes or ()))
        yield (
            f"parameter {name!r} of {who}: nothing in {app} sends it on topic {topic!r} (sent there: {_quoted(sent)}); "
            f"{_hint(close)} right only if another program sends it{_waiting(who) if until_end else ''}"
        )
        # One slip of the pen, one line.
        untaken = [other for other in untaken if other not in close]
    if any(node.wiring.takes is None for node in readers):
        return  # a sink takes them
    for name in untaken:
        senders = [node for node in writers if node.wiring.sends == name]
        keyword = "source_id" if any(node.wiring.topic_in is None for node in senders) else "output_id"
        yield (
            f"{keyword} {name!r} of {_names(senders)}: no task in {app} takes it from topic {topic!r} (taken there: {_quoted(taken)}); "
            f"{_names(readers)} will put its messages aside as dead letters"
        )


def _without_writer(readers: Sequence[Listed], topic: str, written: Sequence[str], app: str, until_end: bool) -> Iterator[str]:
    waiting = [node for node in readers if node.wiring.takes is not None]
    if not waiting:
        return  # sinks take what comes; a program of sinks only is a usual one
    close = get_close_matches(topic, written, n=1)
    wanted = dict.fromkeys(name for node in waiting for name in node.wiring.takes or ())
    who = _names(waiting)
    yield (
        f"topic_in {topic!r} of {who}: nothing in {app} sends to it (wanted there: {_quoted(wanted)}); "
        f"{_hint(close)} right only if another program does{_waiting(who) if until_end else ''}"
    )


def _waiting(who: str) -> str:
    return f": with --until-end {who} waits until its end is there, for ever if none comes"


def _hint(close: Sequence[str]) -> str:
    return f"did you mean {close[0]!r}? It is" if close else "this is"


def _names(nodes: Iterable[Listed]) -> str:
    return ", ".join(node.name for node in nodes)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


__all__ = ("Drawn", "Found", "Listed", "feeders", "mismatches")
