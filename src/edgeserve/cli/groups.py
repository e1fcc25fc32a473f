"""`edgeserve groups`: who shares which topic, who holds its join, how far they are, and what was dropped."""

from __future__ import annotations

from typing import Any

import click

from edgeserve.cli.options import command, node_option
from edgeserve.cli.output import Output
from edgeserve.cli.topic import connected, shown_count, topic_infos
from edgeserve.stage.decisions import read_drops, read_held, roster_topic, work_topic
from edgeserve.transport import GroupInfo, TopicInfo
from edgeserve.transport.url import without_secrets


def _document(topic: str, name: str, group: GroupInfo, sets: GroupInfo | None) -> dict[str, Any]:
    return {
        "topic": topic,
        "group": name,
        "kind": str(group.kind),
        "members": [{"name": member, "version": group.versions.get(member, "")} for member in group.members],
        "holder": group.active or None,
        "held": read_held(group.attributes) if group.active else None,
        "backlog": group.backlog,
        "more": group.more,
        "claimed": group.claimed,
        "sets": None if sets is None else sets.backlog,
        "dropped": dict(read_drops(group.attributes)),
    }


def _described(infos: list[TopicInfo]) -> list[dict[str, Any]]:
    """One document per group; the groups of the topics where sets wait are part of their join's, and so are those of rosters."""
    by_name = {info.name: info for info in infos}
    parts = {topic for info in infos for group in info.groups for topic in (work_topic(info.name, group), roster_topic(info.name, group))}
    found = []
    for info in infos:
        for name, group in sorted(info.groups.items()):
            if info.name in parts:
                continue
            work = by_name.get(work_topic(info.name, name))
            found.append(_document(info.name, name, group, None if work is None else work.groups.get(name)))
    return found


@command("groups", "edgeserve {command} --node {node}")
@click.argument("topic", required=False)
@node_option
def groups(out: Output, topic: str | None, node: str) -> None:
    """Show the groups of all topics, or the groups of one and their members."""
    with connected(node) as transport:
        if topic is None:
            infos = topic_infos(transport, groups=True)
        else:
            info, there = transport.topic_info(topic), set(transport.topics())
            infos = [info, *(transport.topic_info(work) for name in info.groups if (work := work_topic(topic, name)) in there)]
    found = _described(infos)
    if out.as_json:
        out.document(found)
        return
    if not found:
        out.line(f"no groups on {without_secrets(node)}" if topic is None else f"no groups on topic {topic}")
        return
    columns = ("TOPIC", "GROUP", "KIND", "MEMBERS", "HOLDER", "HELD", "BACKLOG", "SETS", "DROPPED")
    out.table(columns, [_row(each) for each in found])
    if topic is not None:
        out.line("")
        members = [(each["group"], m["name"], m["version"] or None, _role(each, m["name"])) for each in found for m in each["members"]]
        out.table(("GROUP", "MEMBER", "VERSION", "ROLE"), members) if members else out.line("no members")


def _row(each: dict[str, Any]) -> tuple[object, ...]:
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(each["dropped"].items())) or None
    backlog = shown_count(each["backlog"], more=each["more"])
    return each["topic"], each["group"], each["kind"], len(each["members"]), each["holder"], each["held"], backlog, each["sets"], dropped


def _role(each: dict[str, Any], member: str) -> str | None:
    if each["kind"] != "failover":
        return None
    return "holds the join" if member == each["holder"] else "runs sets"


__all__ = ("groups",)
