"""`edgeserve routes`: how the large payloads of routing='auto' travel, and why, for each group that takes them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from edgeserve.cli.options import command, node_option
from edgeserve.cli.output import CommandError, Output
from edgeserve.cli.topic import connected
from edgeserve.payload import Route
from edgeserve.stage.routes import ROUTES, SAY_S, read_record, routes_topic
from edgeserve.transport import Transport
from edgeserve.transport.url import without_secrets

_LIVES_S = 6 * SAY_S
"""A producer that has said nothing for so long is gone."""

_COLUMNS = ("TOPIC", "SOURCE", "PRODUCER", "GROUP", "MODE", "SINCE", "SIZE", "RATE", "USED", "EAGER", "LAZY", "SAVED", "WHY")
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@command("routes", "edgeserve {command} --node {node}")
@click.argument("topic", required=False)
@node_option
def routes(out: Output, topic: str | None, node: str) -> None:
    """Show how large payloads of routing='auto' travel, and why: on all topics, or on one."""
    with connected(node) as transport:
        there = transport.topics()
        if topic is not None and topic not in there:
            raise CommandError(
                f"there is no topic {topic!r}", f"edgeserve routes --node {without_secrets(node)}", "see: edgeserve topic list"
            )
        topics = [name.removesuffix(ROUTES) for name in there if name.endswith(ROUTES)] if topic is None else [topic]
        found = [row for name in topics for row in _of_topic(transport, name, there)]
    if out.as_json:
        out.document(found)
    elif found:
        out.table(_COLUMNS, [_row(each) for each in found])
    else:
        where = without_secrets(node) if topic is None else f"topic {topic}"
        out.line(f"no node with routing='auto' that runs now has sent a payload of 64 KiB or more to {where}")


def _of_topic(transport: Transport, topic: str, there: list[str]) -> Iterator[dict[str, Any]]:
    """One document for each producer and group; what no group has said anything of has none."""
    records = routes_topic(topic)
    if records is None or records not in there:
        return
    now_ns, newest = time.time_ns(), dict[str, Route]()
    for frame, _, _ in transport.read(records, now_ns - int(_LIVES_S * 1e9)):
        record = read_record(frame)
        if isinstance(record, Route):
            newest[record.producer] = record
    for route in sorted(newest.values(), key=lambda route: (route.source, route.producer)):
        if route.ended:
            continue
        common = {
            "topic": topic,
            "source": route.source,
            "producer": route.producer,
            "mode": route.mode,
            "since_ns": route.since_ns,
            "mean_bytes": route.mean_bytes,
            "rate_hz": route.rate_hz,
            "why": route.reason,
        }
        for edge in route.edges:
            yield common | {
                "group": edge.group,
                "share_used": edge.share,
                "eager_bytes_s": edge.eager_bytes_s,
                "lazy_bytes_s": edge.lazy_bytes_s,
                "saved_bytes": edge.saved_bytes,
            }
        if not route.edges:
            yield common | dict.fromkeys(("group", "share_used", "eager_bytes_s", "lazy_bytes_s", "saved_bytes"))


def _row(each: dict[str, Any]) -> tuple[object, ...]:
    since = datetime.fromtimestamp(each["since_ns"] / 1e9, UTC)
    used = None if each["share_used"] is None else f"{each['share_used']:.0%}"
    rates = [None if each[key] is None else f"{_bytes(each[key])}/s" for key in ("eager_bytes_s", "lazy_bytes_s")]
    return (
        *(each[key] for key in ("topic", "source", "producer", "group", "mode")),
        f"{since:%Y-%m-%dT%H:%M:%SZ}",
        _bytes(each["mean_bytes"]),
        f"{each['rate_hz']:.3g}/s",
        used,
        *rates,
        None if each["saved_bytes"] is None else _bytes(each["saved_bytes"]),
        each["why"],
    )


def _bytes(count: float) -> str:
    power = min(int(math.log(abs(count), 1000)), len(_UNITS) - 1) if abs(count) >= 1 else 0
    return f"{count / 1000**power:.3g} {_UNITS[power]}"


__all__ = ("routes",)
