"""`edgeserve profile`: what the sources and tasks of a pipeline cost, measured by running them."""

from __future__ import annotations

import math
import os
import resource
import secrets
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

from edgeserve.cli.backfill import NO_LOSS, named
from edgeserve.cli.links import Address, listen, measure
from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output
from edgeserve.cli.pipelines import APP, look_at
from edgeserve.cli.run import launch, tell
from edgeserve.core.codec import decode_frame
from edgeserve.core.message import Kind
from edgeserve.core.metrics import Reason
from edgeserve.transport import connect, disconnect

if TYPE_CHECKING:
    # Not otherwise: no other command needs what a pipeline does.
    from edgeserve.pipeline.costs import Costs, LinkCost
    from edgeserve.pipeline.measure import Report, Sent

_LIVE_S, _GRACE_S = 10.0, 10.0
_FEW = 10
_TOKEN = "EDGESERVE_PROFILE_TOKEN"
_BUSY, _DISTURBED = 0.9, 0.1
_LONGER = "give it a longer recording, or more --seconds or --messages"


def _address(text: str, parameter: click.Parameter) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"{text!r}: give a host and a port, as HOST:PORT", param=parameter)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _listened(_context: click.Context, parameter: click.Parameter, given: str | None) -> Address | None:
    return None if given is None else _address(given, parameter)


def _linked(_context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, Address]:
    """`NAME=HOST:PORT` options as a dict."""
    found: dict[str, Address] = {}
    for text in given:
        name, _, address = text.partition("=")
        if name in found or not name:
            raise click.BadParameter(f"{text!r}: give each name once, as NAME=HOST:PORT", param=parameter)
        found[name] = _address(address, parameter)
    return found


@command("profile", "{app}")
@click.argument("app", type=APP, required=False)
@click.option(
    "--in", "recorded", multiple=True, callback=named, metavar="SOURCE=FILE", help="Read this file in place of a source; others are live."
)
@click.option("--messages", type=click.IntRange(min=2), metavar="N", help="Each process of a source ends after so many.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help=f"Stop so long after all are ready. Default: {_LIVE_S:g} with live sources and without --messages, else when all is processed.",
)
@click.option(
    "--warm-up", type=click.IntRange(min=0), default=5, show_default=True, metavar="N", help="Leave out the first runs of each process."
)
@click.option(
    "--out",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("costs.json"),
    show_default=True,
    help="The file of costs to write.",
)
@click.option("--host", default=lambda: os.uname().nodename, metavar="NAME", help="What this machine is called. Default: its host name.")
@click.option(
    "--links",
    multiple=True,
    callback=_linked,
    metavar="NAME=HOST:PORT",
    help="Measure the link to the machine NAME, on which --listen runs. Without APP: into the file that is there.",
)
@click.option(
    "--listen",
    "address",
    is_flag=False,
    flag_value="127.0.0.1:0",
    callback=_listened,
    metavar="[HOST:PORT]",
    help="Only answer --links of other machines, until Ctrl-C. Default: a free port of 127.0.0.1.",
)
def profile(
    out: Output,
    app: Path | None,
    recorded: dict[str, str],
    messages: int | None,
    seconds: float | None,
    warm_up: int,
    file: Path,
    host: str,
    links: dict[str, Address],
    address: Address | None,
) -> None:
    """Measure what the pipeline in APP costs, by running it without its sinks in a store of its own that is removed.

    Cpu-seconds per run and memory of each task, rate and size of what is sent. The status is 1, and nothing is written, when a node fails
    or something could not be measured, with a line that says what to do; 2 when the pipeline cannot run; 130 or 143 when a signal ends it.
    """
    # Here: no other command needs what a pipeline does.
    from edgeserve.pipeline.costs import write_costs

    if address is not None:
        if app is not None or links:
            raise click.UsageError("--listen only answers other machines: leave out APP and --links")
        _listen(out, address)
    if app is None and not links:
        raise click.UsageError("Missing argument 'APP'.")
    before = _before(file, needed=app is None)
    known = {frozenset(link.ends): link for link in ([] if before is None else before.links)}
    # While nothing runs here.
    known |= {frozenset(link.ends): link for link in _measured_links(host, links)}
    costs = before if app is None else _run(out, app, recorded, messages, seconds, warm_up)
    assert costs is not None
    costs = msgspec.structs.replace(costs, links=[*known.values()], host=costs.host or host)
    write_costs(file, costs)
    _show(out, costs, file)


def _before(file: Path, *, needed: bool) -> Costs | None:
    """What the file says that is to be written, whose links stay. Nothing else is ever written over."""
    from edgeserve.pipeline.costs import InvalidCosts, read_costs

    if not file.absolute().parent.is_dir():
        raise CommandError(f"there is no directory {file.absolute().parent}", str(file), "make it, or name another --out")
    if not file.exists():
        if needed:
            raise CommandError(f"there is no {file} to write links to", str(file), "measure the pipeline first, or with them: name APP")
        return None
    try:
        return read_costs(file)
    except InvalidCosts as exc:
        raise CommandError(
            f"{file} is there already, and is no file of costs: {exc}", str(file), "move it away, or name another --out"
        ) from exc


def _listen(out: Output, address: Address) -> NoReturn:
    own = os.environ.get(_TOKEN)
    token = own or secrets.token_hex(16)

    def ready(at: Address) -> None:
        shown = f"[{at[0]}]:{at[1]}" if ":" in at[0] else f"{at[0]}:{at[1]}"
        if out.as_json:
            out.json_line({"event": "listening", "at": shown} | ({} if own else {"token": token}))
        else:
            out.line(f"listening on {shown}; on the other machine, with NAME for this one:")
            out.line(f"{_TOKEN}={'...' if own else token} edgeserve profile --links NAME={shown}")

    listen(address, token, ready)


def _measured_links(host: str, links: Mapping[str, Address]) -> list[LinkCost]:
    from edgeserve.pipeline.costs import LinkCost

    token = os.environ.get(_TOKEN)
    if links and not token:
        raise CommandError("no token is given", f"--links {next(iter(links))}=...", f"set {_TOKEN} to what --listen says there")
    found = []
    for name, address in links.items():
        bandwidth_bytes_s, latency_ms = measure(address, token or "")
        found.append(LinkCost(ends=(host, name), bandwidth_bytes_s=bandwidth_bytes_s, latency_ms=latency_ms))
    return found


def _run(out: Output, app: Path, recorded: dict[str, str], messages: int | None, seconds: float | None, warm_up: int) -> Costs:
    """The costs of the pipeline in an app, without links."""
    from edgeserve.pipeline.costs import Costs
    from edgeserve.pipeline.measure import source_cost, task_cost

    look_at(app)  # so that what is wrong with it is not said of what measures it
    with tempfile.TemporaryDirectory(prefix="edgeserve-profile-") as folder:
        os.environ["EDGESERVE_STATE_DIR"] = str(Path(folder, "state"))
        node, counts, reports = f"local://{folder}/store", Path(folder, "counts"), Path(folder, "reports")
        counts.mkdir()
        reports.mkdir()
        options = ["--node", node, "--recorded", msgspec.json.encode(recorded).decode(), "--measure", str(reports), "--counts", str(counts)]
        options += [] if messages is None else ["--messages", str(messages)]
        declared, drawn = look_at(app, *options)
        sources = [each["name"] for each in drawn.json["nodes"] if each["kind"] == "source"]
        tasks = [each["name"] for each in drawn.json["nodes"] if each["kind"] == "task"]
        if not tasks:
            raise CommandError(f"pipeline {drawn.json['pipeline']!r} has no task to measure", str(app), "declare one")
        if seconds is None:
            seconds = _LIVE_S if messages is None and set(sources) - set(recorded) else math.inf
        before = _processor()
        # Nothing is started again: what it did before would be missing.
        outcome = launch(out, app, declared, options, until_end=True, grace=_GRACE_S, restarts=0, most_s=seconds)
        disturbed = others(before, _processor())
        if outcome.stopped_by:
            raise click.exceptions.Exit(128 + signal.Signals[outcome.stopped_by])
        if outcome.killed:
            what = f"{', '.join(outcome.killed)} did not end when it was time to"
            raise CommandError(what, str(app), "a run that takes longer than 20 seconds needs --messages, and no --seconds")
        ran = Ran(str(app), recorded, warm_up, _sent(node, drawn.json["nodes"]), _reports(reports), _counted(counts), disturbed)
    ran.check()
    first_ns = min((sent.oldest_ns for name in sources for sent in ran.sent[name].values()), default=0)
    costs = Costs(
        pipeline=drawn.json["pipeline"],
        sources={name: source_cost(ran.sent[name].values(), first_ns) or ran.no_rate(name) for name in sources},
        tasks={name: task_cost(ran.reports[name], ran.sent[name].values(), warm_up) or ran.no_run(name) for name in tasks},
    )
    for line in ran.doubts(costs):
        tell(out, f"{click.style('warning:', fg='yellow', bold=True)} {line}", event="warning", what=line)
    return costs


@dataclass(frozen=True)
class Ran:
    """What a run has left, by the name of the source or task."""

    app: str
    recorded: Collection[str]
    warm_up: int
    sent: Mapping[str, Mapping[str, Sent]]
    reports: Mapping[str, list[Report]]
    counts: Mapping[str, Counter[str]]
    disturbed: float

    def no_rate(self, name: str) -> NoReturn:
        """Says why nothing is known of a source."""
        messages = sum(sent.messages for sent in self.sent[name].values())
        what = (
            f"source {name!r} sent {_counting(messages, 'message')}, and a rate takes two, of different times, from each of its processes"
        )
        raise CommandError(what, self.app, _LONGER)

    def no_run(self, name: str) -> NoReturn:
        """Says why nothing is known of a task."""
        runs = sum(report.runs for report in self.reports[name])
        if runs:
            what = f"task {name!r} had {_counting(runs, 'run')}, and the first {self.warm_up} and the last of each process are left out"
            raise CommandError(what, self.app, f"{_LONGER}, or give a lower --warm-up")
        became = ", ".join(f"{count} {word}" for word, count in sorted(self.counts[name].items()) if count) or "none received"
        what = f"task {name!r} had no run: of its messages {became}"
        raise CommandError(what, self.app, f"{_LONGER}, or correct what its inputs are joined by")

    def check(self) -> None:
        """Refuses what a rate or a cost could be read from, but a wrong one."""
        for name in self.recorded:
            if not all(sent.timed for sent in self.sent.get(name, {}).values()):
                what = f"source {name!r} has no event times, and without them a recording does not say how often its messages come"
                raise CommandError(what, self.app, f"give the source event_time=, or measure it live: without --in {name}=...")
        for name, counts in self.counts.items():
            if name in self.reports and (failed := counts[Reason.DEAD_LETTER]) * 2 >= counts["received"] > 0:
                what = f"task {name!r} failed on {failed} of {counts['received']} messages"
                raise CommandError(what, self.app, "correct it, or its inputs: edgeserve run shows the errors")

    def doubts(self, costs: Costs) -> Iterator[str]:
        """Why a figure may be wrong."""
        for name, source in costs.sources.items():
            if source.messages < _FEW:
                yield f"source {name!r} sent only {_counting(source.messages, 'message')}, so its rate is a rough one: {_LONGER}"
            elif (moments := sum(sent.moments for sent in self.sent[name].values())) < _FEW:
                sent = f"{_counting(source.messages, 'message')}, but of only {_counting(moments, 'event time')}"
                yield f"source {name!r} sent {sent}, so its rate is a rough one: {_LONGER}"
        for name, task in costs.tasks.items():
            if task.runs < _FEW:
                yield f"task {name!r} was measured on only {_counting(task.runs, 'run')}, so its quantiles say little: {_LONGER}"
            if not task.outputs_per_run:
                yield f"task {name!r} made no result, so the size of one is not known"
            if lost := [f"{count} {word}" for word, count in self.counts[name].items() if count and word in set(Reason) - NO_LOSS]:
                yield f"task {name!r} lost messages ({', '.join(lost)}), so its figures are not those of a run where all is well"
        held = [name for name, sent in self.sent.items() if name in costs.sources and not all(each.timed for each in sent.values())]
        busy = [name for name in costs.tasks if any(sum(r.cpu_ns) >= _BUSY * r.wall_ns > 0 for r in self.reports[name])]
        if held and busy:
            yield (
                f"{', '.join(busy)} may not have kept up, so {', '.join(held)} may have been held back below the rate of its own: "
                f"give {', '.join(busy)} more replicas, and measure anew"
            )
        if self.disturbed >= _DISTURBED:
            yield (
                f"the machine was too busy: other processes took {self.disturbed:.0%} of its cores, so that cpu-seconds come out higher: "
                "measure anew on a quiet machine"
            )


def _counting(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'s' * (count != 1)}"


def _sent(node: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Sent]]:
    """What each source and task sent, by producer."""
    from edgeserve.pipeline.measure import Sent

    found = {part["name"]: dict[str, Sent]() for part in parts if part["kind"] in ("source", "task")}
    of = {(part["topic_out"], part["sends"]): found[part["name"]] for part in parts if part["name"] in found}
    transport = connect(node)
    try:
        for topic in {topic for topic, _ in of}.intersection(transport.topics()):
            for frame, _, _ in transport.read(topic):
                header = decode_frame(frame)[0]
                producers = of.get((topic, header.source_id))
                if producers is not None and header.kind == Kind.DATA:
                    producers.setdefault(header.producer, Sent()).add(header)
    finally:
        disconnect(transport)
    return found


def _reports(folder: Path) -> dict[str, list[Report]]:
    from edgeserve.pipeline.measure import Report

    found = defaultdict[str, list["Report"]](list)
    for file in folder.iterdir():
        report = msgspec.msgpack.decode(file.read_bytes(), type=Report)
        found[report.task].append(report)
    return found


def _counted(folder: Path) -> dict[str, Counter[str]]:
    """What nodes did with their messages; replicas together."""
    found = defaultdict[str, Counter[str]](Counter)
    for file in folder.iterdir():
        found[file.name.partition("[")[0]].update(msgspec.json.decode(file.read_bytes(), type=dict[str, int]))
    return found


# --- the machine ------------------------------------------------------------------------------------------------------


def _processor() -> tuple[float, float, float]:
    """Seconds that this machine's cores have had, that they were idle, and that this process and those it has waited for have used."""
    *spent, _guest, _guest_nice = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = os.sysconf("SC_CLK_TCK")
    return sum(spent) / ticks, (spent[3] + spent[4]) / ticks, sum(usage.ru_utime + usage.ru_stime for usage in used)


def others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """The part of the machine's cores that others took meanwhile."""
    had, idle, own = (now - then for then, now in zip(before, after, strict=True))
    return (had - idle - own) / had if had > 0 else 0.0


# --- what is shown ----------------------------------------------------------------------------------------------------


def _show(out: Output, costs: Costs, file: Path) -> None:
    if out.as_json:
        out.json_line({"event": "costs", "file": str(file), "costs": msgspec.to_builtins(costs)})
        return
    links = [(*link.ends, round(link.bandwidth_bytes_s / 1e6, 3), round(link.latency_ms, 3)) for link in costs.links]
    sources = [(name, each.messages, round(each.rate_hz, 3), round(each.bytes)) for name, each in costs.sources.items()]
    out.table(("source", "messages", "rate_hz", "bytes"), sources)
    out.line("")
    tasks = []
    for name, each in costs.tasks.items():
        cpu_ms = [round(cpu_s * 1e3, 3) for cpu_s in (each.cpu_s, *each.cpu_s_quantiles.values())]
        rest = (round(each.memory_bytes / 2**20), round(each.output_bytes), round(each.outputs_per_run, 3))
        tasks.append((name, each.runs, *cpu_ms, *rest))
    out.table(("task", "runs", "cpu_ms", "p50", "p90", "p99", "memory_mib", "output_bytes", "outputs_per_run"), tasks)
    if links:
        out.line("")
        out.table(("from", "to", "mb_s", "latency_ms"), links)
    out.line(f"written: {file}")


__all__ = ("Ran", "others", "profile")
