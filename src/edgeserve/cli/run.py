"""`edgeserve run`: the nodes found in a file, each in a process of its own."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.text import Text

from edgeserve.cli.hostpayloads import LINGER_S, HostPayloads, lazy_topics
from edgeserve.cli.messages import plain
from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output
from edgeserve.cli.payloads import cannot_serve
from edgeserve.cli.supervisor import Outcome, Stays, Supervisor
from edgeserve.cli.wiring import Found, Listed, feeders, mismatches
from edgeserve.core.errors import EdgeServeError

# -P: a file called edgeserve.py in the current directory is not what is meant.
_CHILD = [sys.executable, "-P", "-m", "edgeserve.cli.child"]
_CORRECT_IT = "correct it: python must be able to run the file"
_RESTARTS = 3
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_red", "bright_cyan", "bright_magenta")


def look_into(app: Path, *options: str, invalid: int = 1) -> Found:
    """What an app declares. Its file runs in a process of its own for this.

    Args:
        options: of that process, which say more of what it is to look at.
        invalid: the exit status when the file cannot be run, or what it declares does not fit together.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader) as pipe:
        process = subprocess.Popen(
            [*_CHILD, str(app), "--list-to", str(writer), *options],
            pass_fds=(writer,),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
        )
        os.close(writer)
        text = pipe.read()
    status = process.wait()
    found = msgspec.json.decode(text, type=Found) if text else None
    if found is not None and found.error:
        raise CommandError(**{"to_do": f"{_CORRECT_IT}; --verbose shows the traceback"} | found.error, exit_code=invalid)
    if status != 0 or found is None:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        raise CommandError(f"{app.name} {how} before any node ran", str(app), _CORRECT_IT, exit_code=invalid)
    return found


def find_nodes(app: Path) -> list[Listed]:
    """The nodes in an app, in the order of their definition, if they can be run as processes."""
    return _as_processes(app, look_into(app).nodes)


def _as_processes(app: Path, found: list[Listed]) -> list[Listed]:
    """The nodes that were found, unless they could do nothing as processes."""
    alone = [node.name for node in found if node.url.startswith("memory://")]
    if alone and len(found) > 1:
        raise CommandError(
            f"{', '.join(alone)} of {app.name} would see nothing of the others: memory:// is the memory of one process, "
            "and each node gets a process of its own",
            str(app),
            "name a store that processes share, for example local://",
        )
    if alone and found[0].wiring.topic_in is not None:
        raise CommandError(
            f"{alone[0]} of {app.name} would wait for ever: memory:// is the memory of one process, and nothing else in its process sends",
            str(app),
            "name a store that processes share, for example local://",
        )
    if not found:
        raise CommandError(
            f"no nodes in {app.name}",
            str(app),
            "declare a Pipeline, or define nodes at its top level, without `with`: camera = DataSource(...), detector = Compute(...)",
        )
    return found


class _Log:
    """Writes the nodes' lines, each after its node's name; in colour on a terminal, as JSON when asked to."""

    def __init__(self, out: Output, names: list[str]) -> None:
        self._out = out
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self._width = max(map(len, names))
        self._colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}

    def line(self, name: str, stream: str, text: str) -> None:
        """Writes one line; standard error stays standard error."""
        if self._out.as_json:
            self._out.json_line({"node": name, "stream": stream, "line": text})
        elif self._out.rich:
            start = Text(f"{name:{self._width}} | ", style=self._colours[name])
            (self._errors if stream == "stderr" else self._out.console).print(start + Text(plain(text)))
        else:
            click.echo(f"{name:{self._width}} | {plain(text)}", err=stream == "stderr")


def tell(out: Output, text: str, **event: object) -> None:
    """Says something about the run itself: to people on standard error, to programs among the other lines."""
    if out.as_json:
        out.json_line(event)
    else:
        click.echo(text, err=True)


def _warn_of_mismatches(out: Output, app: Path, found: list[Listed], *, until_end: bool) -> None:
    label = click.style("warning:", fg="yellow", bold=True)
    for line in mismatches(found, app.name, until_end=until_end):
        tell(out, f"{label} {line}", event="warning", what=line)


def _report(out: Output, app: Path, outcome: Outcome) -> None:
    if out.as_json:
        failures = [{"node": f.name, "how": f.how, "stderr": list(f.tail)} for f in outcome.failures]
        out.json_line({"event": "end", "stopped_by": outcome.stopped_by or None, "failures": failures, "killed": outcome.killed})
    if outcome.killed:
        click.echo(f"did not end in time and had to be killed: {', '.join(outcome.killed)}", err=True)
    if outcome.failures:
        whys = [f", and is not started again: {failure.why}" if failure.why else "" for failure in outcome.failures]
        what = "; ".join(f"{failure.name} failed ({failure.how}){why}" for failure, why in zip(outcome.failures, whys, strict=True))
        others = "" if len(outcome.failures) > 1 else "; all other nodes were stopped"
        raise CommandError(what + others, str(app), f"its last lines stand above, after `{outcome.failures[0].name} |`")
    if outcome.killed and outcome.stopped_by:
        raise click.exceptions.Exit(128 + signal.Signals[outcome.stopped_by])


@command("run", "{app}")
@click.argument("app", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--until-end", is_flag=True, help="End when all sources have ended and everything they sent is processed.")
@click.option(
    "--grace", type=click.FloatRange(min=0), default=10.0, show_default=True, metavar="SECONDS", help="Time to end in after Ctrl-C."
)
@click.option(
    "--node", metavar="URL", help="Run a pipeline on this node. Default: the one that it names, else EDGESERVE_NODE, else local://."
)
@click.option("--host", metavar="NAME", help="Run what a pipeline places on this host only.")
@click.option(
    "--assignment",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Place a pipeline as this file says, which `edgeserve plan --apply` has written.",
)
@click.option(
    "--linger",
    type=click.FloatRange(min=0),
    default=LINGER_S,
    show_default=True,
    metavar="SECONDS",
    help="When all nodes have ended: how long other hosts may take to settle one more of the payloads that are kept here for them.",
)
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    metavar="N",
    help=f"How often a node that fails is started again before all are stopped. Default: {_RESTARTS} in a pipeline, else 0.",
)
def run(
    out: Output,
    app: Path,
    until_end: bool,
    grace: float,
    node: str | None,
    host: str | None,
    assignment: Path | None,
    linger: float,
    restarts: int | None,
) -> None:
    """Run the pipeline or the nodes at the top level of the Python file APP, or the pipeline of a YAML file, each node as its own process.

    Ctrl-C (or SIGTERM) lets each node finish the message in hand, and ends with status 0; a second one kills what still runs, and the
    status is 130 (143). When a node fails, and is not started again, the others are stopped, and the status is 1.
    """
    if until_end and host is not None:
        raise click.UsageError(
            "--until-end with --host: one host does not know when those have ended that feed it from others; leave one out"
        )
    options = ["--node", node] if node is not None else []
    options += ["--assignment", str(assignment.resolve())] if assignment is not None else []
    declared = look_into(app.resolve(), *options, *(["--host", host] if host is not None else []))
    # A pipeline's replicas are there so that one may fail.
    most = (0 if declared.graph is None else _RESTARTS) if restarts is None else restarts

    def left(text: str, count: int | None, groups: list[str]) -> None:
        tell(out, text, event="payloads", left=count, groups=groups)

    read = set() if declared.graph is None else {node["topic_in"] for node in declared.graph.json["nodes"]}
    with contextlib.ExitStack() as stack:
        try:
            payloads = stack.enter_context(HostPayloads(lazy_topics(declared.nodes), read, linger, left))
        except EdgeServeError as exc:
            raise cannot_serve(exc) from exc
        launch(out, app, declared, options, until_end=until_end, grace=grace, restarts=most, stays=payloads.wanted)


def launch(
    out: Output,
    app: Path,
    declared: Found,
    options: list[str],
    *,
    until_end: bool,
    grace: float,
    restarts: int,
    most_s: float = math.inf,
    stays: Stays = lambda: False,
) -> Outcome:
    """Runs what an app declares, each node as a process, until all have ended. Returns how they did, unless one failed.

    Args:
        options: of these processes, which say more of what they are to run.
        most_s: how long after all were ready they are asked to end.
        stays: see `Supervisor`.

    Raises:
        CommandError: a node failed.
    """
    path = app.resolve()
    found = _as_processes(path, declared.nodes)
    upstream = {name: names for name, names in feeders(found).items() if names} if until_end else {}
    # Not as {braces}: the supervisor fills in one of its own.
    common = ["--parent", "{parent}", "--progress", "{progress}", *["--until-end"] * until_end, *["--verbose"] * out.verbose]
    common += map(_verbatim, options)
    commands = {
        each.name: [*_CHILD, _verbatim(str(path)), _verbatim(each.name), *common, *["--fed"] * (each.name in upstream)] for each in found
    }
    if not out.as_json:
        out.line(f"running {len(found)} nodes of {app}: {', '.join(f'{each.name} ({each.kind})' for each in found)}", "dim")
    if declared.graph is None:
        _warn_of_mismatches(out, path, found, until_end=until_end)

    def waiting(names: list[str]) -> None:
        tell(out, f"waiting for {', '.join(names)}; Ctrl-C once more kills what still runs", event="waiting", nodes=names)

    def again(name: str, how: str) -> None:
        tell(out, f"{name} failed ({how}) and is started again", event="restart", node=name, how=how)

    # Who reads is there before anything is sent: a broker takes all that it is given, and a join would begin far behind.
    sources = {each.name for each in found if each.wiring.topic_in is None}
    line = _Log(out, list(commands)).line
    supervisor = Supervisor(
        commands,
        line,
        waiting,
        grace_s=grace,
        last=sources,
        most_s=most_s,
        upstream=upstream,
        restarts=restarts,
        forgets=not until_end,
        again=again,
        stays=stays,
    )
    outcome = supervisor.run()
    _report(out, app, outcome)
    return outcome


def _verbatim(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


__all__ = ("find_nodes", "launch", "look_into", "run", "tell")
