"""`edgeserve topic`: what a node's topics hold, seen without joining any group."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click

from edgeserve.cli.messages import Seen, dead_letter, look, plain
from edgeserve.cli.options import command, node_option, with_deadline
from edgeserve.cli.output import CommandError, Output, one_line
from edgeserve.stage.assignment import whole_of
from edgeserve.stage.decisions import decision_topic, roster_topic, work_topic
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.routes import routes_topic
from edgeserve.transport import TopicInfo, Transport, connect, disconnect
from edgeserve.transport.local.engine import directory_of
from edgeserve.transport.local.lmdbkv import DATA
from edgeserve.transport.url import parse, without_secrets

_WHERE = "edgeserve {command} --node {node}"
_FOLLOW_S = 0.1
_AT_A_TIME = 8
_DEAD_LETTERS = ".dead-letters"


@click.group("topic")
def topic() -> None:
    """See what topics hold, send to them, delete them."""


def _refuse_memory(node: str) -> None:
    if parse(node).scheme == "memory":
        raise CommandError(
            f"{without_secrets(node)} is the memory of one process, and this command is another: there is nothing to see of it from here",
            without_secrets(node),
            "name a store that processes share, for example --node local://",
        )


@contextmanager
def connected(node: str) -> Iterator[Transport]:
    """A connection for looking: it makes no store where there is none."""
    _refuse_memory(node)
    if (url := parse(node)).scheme == "local" and not ((root := directory_of(url)) / DATA).is_dir():
        raise CommandError(
            f"there is no store in {root}", url.shown, "check the path; a store is made by the first node that connects to it"
        )
    transport = connect(with_deadline(node))
    transport.url = url.shown  # as messages are to show it
    try:
        yield transport
    finally:
        disconnect(transport)


class _AtLeast(int):
    """A count that goes on."""

    def __str__(self) -> str:
        return f"{int(self)}+"


def _summary(info: TopicInfo) -> dict[str, Any]:
    return {
        "topic": info.name,
        "messages": info.messages,
        "more": info.more,
        "first": info.first,
        "next": info.next,
        "stored_bytes": info.stored_bytes,
    }


def _group_summaries(info: TopicInfo) -> dict[str, Any]:
    return {
        name: {
            "kind": str(group.kind),
            "members": list(group.members),
            "active": group.active,
            "backlog": group.backlog,
            "more": group.more,
            "claimed": group.claimed,
        }
        for name, group in sorted(info.groups.items())
    }


def topic_infos(transport: Transport, *, groups: bool) -> list[TopicInfo]:
    """What is known of all topics, asked for several at a time: a broker's answers take long, and seldom its work."""
    pool = ThreadPoolExecutor(_AT_A_TIME, "edgeserve-look")
    try:
        return list(pool.map(lambda name: transport.topic_info(name, groups=groups), transport.topics()))
    finally:
        # After an error, or Ctrl-C, nobody waits for the others: they end with the connection.
        pool.shutdown(wait=False, cancel_futures=True)


@command("list", _WHERE)
@click.option("--groups", is_flag=True, help="Tell how many groups each topic has, and how far the one furthest behind is.")
@node_option
def list_topics(out: Output, groups: bool, node: str) -> None:
    """List all topics of a node."""
    with connected(node) as transport:
        found = topic_infos(transport, groups=groups)
    if out.as_json:
        out.document([_summary(info) | ({"groups": _group_summaries(info)} if groups else {}) for info in found])
    elif not found:
        out.line(f"no topics on {without_secrets(node)}")
    else:
        columns = ("TOPIC", "MESSAGES", "BYTES") + (("GROUPS", "BACKLOG") if groups else ())
        out.table(columns, [_row(info, groups=groups) for info in found])


def _row(info: TopicInfo, *, groups: bool) -> tuple[object, ...]:
    row = info.name, shown_count(info.messages, more=info.more), info.stored_bytes
    backlogs = [(group.backlog, group.more) for group in info.groups.values()]
    backlog, more = max(backlogs, default=(0, False))
    return (*row, len(backlogs), shown_count(backlog, more=more)) if groups else row


def shown_count(count: int, *, more: bool) -> int:
    """A count as it is shown: with a + where there is more."""
    return _AtLeast(count) if more else count


@command("info", _WHERE)
@click.argument("topic")
@node_option
def info(out: Output, topic: str, node: str) -> None:
    """Show a topic: what it keeps, and how far each group is."""
    with connected(node) as transport:
        found = transport.topic_info(topic)
    if out.as_json:
        out.document(_summary(found) | {"groups": _group_summaries(found)})
        return
    count = f"at least {found.messages}" if found.more else str(found.messages)
    out.line(f"topic     {one_line(found.name)}")
    out.line(f"messages  {count} (positions {found.first} to {found.next}, the last one not included)")
    out.line(f"bytes     {found.stored_bytes}")
    rows = [
        (name, str(group.kind), len(group.members), group.active, shown_count(group.backlog, more=group.more), group.claimed)
        for name, group in sorted(found.groups.items())
    ]
    if rows:
        out.line("")
        out.table(("GROUP", "KIND", "MEMBERS", "ACTIVE", "BACKLOG", "CLAIMED"), rows)
    else:
        out.line("groups    none")


def _stored(transport: Transport, topic: str, start: str, *, follow: bool) -> Iterator[Seen]:
    """The messages of a topic in stored order.

    Following looks again every 100 ms: a group would be told at once, but its members hold back the publishers that they cannot
    keep up with, and looking at a pipeline must not slow it down.
    """
    payloads = Payloads("topic echo", "eager", None)
    payloads.open(transport)
    position: int | None = None
    if start == "latest":
        position = transport.topic_info(topic).next if topic in transport.topics() else 0
    elif not follow:
        transport.topic_info(topic)
    while True:
        if topic in transport.topics():
            for frame, at, published_ns in transport.read(topic, None if position else "earliest", position=position):
                position = at + 1
                yield look(frame, at, published_ns, payloads.copy)
        if not follow:
            return
        time.sleep(_FOLLOW_S)


@command("echo", _WHERE)
@click.argument("topic")
@click.option("--start", type=click.Choice(["earliest", "latest"]), default="earliest", help="Begin at the oldest message kept, or now.")
@click.option("--count", type=click.IntRange(min=1), default=None, help="End after so many messages.")
@click.option("--follow", is_flag=True, help="Wait for more at the end. Implied by --start latest.")
@node_option
def echo(out: Output, topic: str, start: str, count: int | None, follow: bool, node: str) -> None:
    """Print a topic's messages. Groups are not touched."""
    with connected(node) as transport:
        for seen in itertools.islice(_stored(transport, topic, start, follow=follow or start == "latest"), count):
            if out.as_json:
                out.json_line(seen.as_json())
            else:
                out.line(seen.as_text(), "red" if seen.error else "")
            sys.stdout.flush()


def _no_constant(text: str) -> None:
    raise ValueError(f"JSON has no {text}")


def _values(given: Iterable[str], file: str | None, *, as_json: bool) -> Iterator[Any]:
    if file is not None:
        yield Path(file).read_bytes()
        return
    texts = list(given)
    for text in (line.rstrip("\n") for line in sys.stdin) if texts in ([], ["-"]) else texts:
        if not as_json:
            yield text
            continue
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except ValueError as exc:
            raise CommandError(f"not JSON: {text!r} ({exc})", "a VALUE with --json-value", "quote it for the shell: '{\"a\": 1}'") from exc
        if value is None:
            raise CommandError(
                "null cannot be sent: it stands for no message", "a VALUE with --json-value", "put it into a list or an object"
            )
        yield value


@command("pub", _WHERE)
@click.argument("topic")
@click.argument("values", nargs=-1, metavar="[VALUE]...")
@click.option("--source-id", required=True, help="The source id that the messages carry.")
@click.option("--json-value", is_flag=True, help="Read every VALUE as JSON; else it is sent as text.")
@click.option("--file", type=click.Path(exists=True, dir_okay=False), default=None, help="Send this file's bytes as one message.")
@node_option
def pub(out: Output, topic: str, values: tuple[str, ...], source_id: str, json_value: bool, file: str | None, node: str) -> None:
    """Send messages to a topic: each VALUE, or each line of standard input where there is none (or it is -)."""
    from edgeserve.data_source import DataSource

    _refuse_memory(node)
    if file is not None and (values or json_value):
        raise click.UsageError("--file goes without VALUE and --json-value")
    # All are read before the first is sent: a VALUE that is not JSON sends nothing.
    ready = list(_values(values, file, as_json=json_value))
    with DataSource(iter(ready), with_deadline(node), source_id=source_id, topic=topic) as source:
        for _ in ready:
            next(source)
    if out.as_json:
        out.document({"topic": topic, "source_id": source_id, "sent": len(ready)})
    else:
        out.line(f"sent {len(ready)} to {one_line(topic)} as {one_line(source_id)}")


def _dead_letter_topics(transport: Transport, topic: str) -> list[str]:
    if topic.endswith(_DEAD_LETTERS):
        transport.topic_info(topic)
        return [topic]
    names = transport.topics()
    found = [name for name in names if name.startswith(f"{topic}.") and name.endswith(_DEAD_LETTERS)]
    if not found and topic not in names:
        transport.topic_info(topic)
    return found


@command("dead-letters", _WHERE)
@click.argument("topic")
@click.option("--count", type=click.IntRange(min=1), default=None, help="Show the newest so many.")
@node_option
def dead_letters(out: Output, topic: str, count: int | None, node: str) -> None:
    """Show what the tasks on TOPIC could not process: reason, error, traceback, and the ids of the inputs."""
    with connected(node) as transport:
        found = [
            dead_letter(name, frame, at, published_ns)
            for name in _dead_letter_topics(transport, topic)
            for frame, at, published_ns in transport.read(name)
        ]
    found.sort(key=lambda letter: letter["time_ns"])
    shown = found if count is None else found[-count:]
    if out.as_json:
        out.document(shown)
        return
    out.line(
        f"{len(found)} dead letter{'' if len(found) == 1 else 's'} of {topic}"
        + (f", the newest {len(shown)}:" if len(shown) < len(found) else "")
    )
    for letter in shown:
        moment = datetime.fromtimestamp(letter["time_ns"] / 1e9, UTC)
        out.line("")
        out.line(f"{moment:%Y-%m-%d %H:%M:%S}  {plain(letter['reason'] + ': ' + letter['error'])}", "bold")
        out.line(f"  stored    {letter['dead_letter_topic']} position {letter['position']}")
        out.line(f"  attempts  {letter['attempts']}")
        out.line(f"  inputs    {' '.join(letter['input_ids']) or 'none that could be read'}")
        for line in plain(letter["traceback"]).splitlines():
            out.line(f"  {line}")


@command("forget", _WHERE)
@click.argument("topic")
@click.argument("group")
@node_option
def forget(out: Output, topic: str, group: str, node: str) -> None:
    """Forget GROUP on TOPIC, so that what it has not settled no longer holds space. Refused while it has live members.

    The partitions of a join are forgotten together, whether GROUP names one of them or the whole.
    """
    with connected(node) as transport:
        group, _ = whole_of(group)
        there = transport.topic_info(topic).groups
        names = [name for name in there if whole_of(name)[0] == group]
        roster = roster_topic(topic, group)
        has_roster = roster in transport.topics()
        if live := next((name for name in names if there[name].members), None if names or has_roster else group):
            transport.delete_group(topic, live)  # the engine says why not, and nothing is forgotten
            names = [name for name in names if name != live]
        # The roster says how far the partitions are, so it must not outlive them; what is left of a group must not be the next one's.
        if has_roster:
            transport.delete_topic(roster)
        for name in names:
            transport.delete_group(topic, name)
        for left in transport.topics():
            of = unquote(left.removeprefix(f"{topic}.").rpartition(".")[0])
            if whole_of(of)[0] == group and left in (decision_topic(topic, of), work_topic(topic, of)):
                transport.delete_topic(left)
    if out.as_json:
        out.document({"topic": topic, "group": group, "forgotten": True})
    else:
        out.line(f"forgot group {one_line(group)} of {one_line(topic)}")


def _of_its_own(transport: Transport, topic: str) -> list[str]:
    """The decision logs of the groups on a topic, the topics of their shared sets, and those where their members find each other; and
    where is told how its payloads travel."""
    there = set(transport.topics())
    names = [make(topic, group) for group in transport.topic_info(topic).groups for make in (decision_topic, work_topic, roster_topic)]
    names += [name for name in [routes_topic(topic)] if name is not None]
    return [name for name in dict.fromkeys(names) if name in there]


def _refuse_log_in_use(transport: Transport, log: str) -> None:
    """The holder of a join's log is no member of a group on it, so that no engine knows that it is in use."""
    for topic in transport.topics():
        if not log.startswith(f"{topic}.") or log == topic:
            continue
        for group, found in transport.topic_info(topic).groups.items():
            if found.members and decision_topic(topic, group) == log:
                members = ", ".join(found.members)
                raise CommandError(
                    f"{log!r} is the decision log of group {group!r} on topic {topic!r}, which has live members: {members}",
                    log,
                    f"stop them first; it goes with its topic: edgeserve topic delete {topic}",
                )


def _asked(infos: Sequence[TopicInfo], node: str) -> bool:
    """What the user answers."""
    if not sys.stdin.isatty():
        raise CommandError("nobody is there who could be asked", "standard input", "say --yes, if it is to be done without asking")
    for info in infos:
        count = shown_count(info.messages, more=info.more)
        click.echo(f"{one_line(info.name)}: {count} messages, {len(info.groups)} groups", err=True)
    these = "this topic" if len(infos) == 1 else f"these {len(infos)} topics"
    return click.confirm(f"delete {these} of {without_secrets(node)}?", err=True)


@command("delete", _WHERE)
@click.argument("topics", nargs=-1, required=True, metavar="TOPIC...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@node_option
def delete(out: Output, topics: tuple[str, ...], yes: bool, node: str) -> None:
    """Delete each TOPIC with its messages, its groups and the logs of their joins. Refused while a group has live members."""
    with connected(node) as transport:
        logs = {topic: _of_its_own(transport, topic) for topic in dict.fromkeys(topics)}
        for topic in logs:
            _refuse_log_in_use(transport, topic)
        doomed = list(dict.fromkeys(name for topic, its in logs.items() for name in (topic, *its)))
        if not yes and not _asked([transport.topic_info(name) for name in doomed], node):
            raise CommandError("nothing was deleted", "your answer", "answer y, or say --yes")
        for name in doomed:
            # A topic before its groups' logs: one that is in use keeps both.
            transport.delete_topic(name)
            if not out.as_json:
                out.line(f"deleted {one_line(name)}")
        kept = [name for topic in logs for name in transport.topics() if name.startswith(f"{topic}.") and name.endswith(_DEAD_LETTERS)]
    if out.as_json:
        out.document({"deleted": doomed, "kept": kept})
    for name in kept if not out.as_json else ():
        out.line(f"kept {one_line(name)}, what could not be processed; to delete it: edgeserve topic delete {one_line(name)}")


for _command in (list_topics, info, echo, pub, dead_letters, forget, delete):
    topic.add_command(_command)

__all__ = ("connected", "shown_count", "topic", "topic_infos")
