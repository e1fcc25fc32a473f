"""`edgeserve backfill`: what a pipeline makes of recorded files."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import click
import msgspec

from edgeserve.cli.messages import dead_letter
from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output
from edgeserve.cli.pipelines import APP, look_at
from edgeserve.cli.run import launch, tell
from edgeserve.core.metrics import Reason
from edgeserve.transport import connect, disconnect

# What joins, gates and ids are there for is no loss.
NO_LOSS = {Reason.DUPLICATE, Reason.GATE, Reason.SUPERSEDED, Reason.THROTTLED, Reason.UNMATCHED}
_WHY = {
    Reason.LATE: "they are older than their source's watermark: raise its max_lateness_ms",
    Reason.OVERFLOW: "the join holds too many that wait for partners: give it more max_held",
}


def named(_context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """`NAME=FILE` options as a dict; FILE alone is named ""."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        name, file = (name, file) if equals else ("", text)
        if name in found or not file:
            raise click.BadParameter(f"{text!r}: give each name once, as NAME=FILE", param=parameter)
        found[name] = str(Path(file).absolute())
    return found


@command("backfill", "{app}")
@click.argument("app", type=APP)
@click.option("--in", "recorded", multiple=True, callback=named, metavar="SOURCE=FILE", help="Read this file in place of a source.")
@click.option("--live", multiple=True, metavar="SOURCE", help="Run this source as it is: it has to end by itself.")
@click.option("--out", "written", multiple=True, required=True, callback=named, metavar="[SINK=]FILE", help="Write a sink's results to it.")
def backfill(out: Output, app: Path, recorded: dict[str, str], live: tuple[str, ...], written: dict[str, str]) -> None:
    """Run what feeds the named sinks of the pipeline in APP over recorded files, to their end, in a store of its own that is removed.

    Results go to new files, JSON lines or (a directory of) Parquet, each called FILE.partial until all are whole: then the status is 0.
    It is 1 when a node fails or a message is lost, with a line that says how many and why, and 130 or 143 when a signal ends it.
    """
    # Here: no other command needs what a pipeline does.
    from edgeserve.pipeline.backfill import partial

    _, drawn = look_at(app)
    sinks = [node["name"] for node in drawn.json["nodes"] if node["kind"] == "sink"]
    if "" in written:
        if len(sinks) != 1:
            raise click.UsageError(f"--out {written['']}: say which sink, as SINK=FILE: there is {', '.join(sinks) or 'none'}")
        written = {sinks[0] if name == "" else name: file for name, file in written.items()}
    files = [Path(file) for file in written.values()]
    if len(set(files)) < len(files):
        raise click.UsageError("--out: give each sink a file of its own")
    letters, begun = Path(f"{files[0]}.dead-letters"), {partial(file): file for file in files}
    for file in (*files, *begun, letters):
        if file.exists():
            raise CommandError(f"{file} is there already", str(app), "name a new file, or move that one away")
    with tempfile.TemporaryDirectory(prefix="edgeserve-backfill-") as folder:
        os.environ["EDGESERVE_STATE_DIR"] = str(Path(folder, "state"))
        node, counts = f"local://{folder}/store", Path(folder, "counts")
        counts.mkdir()
        options = ["--node", node, "--counts", str(counts), "--out", msgspec.json.encode(written).decode()]
        options += ["--recorded", msgspec.json.encode(recorded).decode(), "--live", msgspec.json.encode(live).decode()]
        declared, _ = look_at(app, *options)
        whole = False
        try:
            # Nothing is started again: what a source sends twice may not be known as such.
            outcome = launch(out, app, declared, options, until_end=True, grace=10.0, restarts=0)
            lost = _lost(counts)
            whole = not outcome.stopped_by and not lost
        finally:
            _finish(out, begun, whole=whole)
            _keep_dead_letters(out, node, letters)
        if outcome.stopped_by:
            raise click.exceptions.Exit(128 + signal.Signals[outcome.stopped_by])
        if lost:
            raise CommandError(
                f"messages were lost: {'; '.join(lost)}", str(app), "correct it, and run it again: what was written is partial"
            )


def _lost(counts: Path) -> list[str]:
    """How many messages were dropped that no join, gate or id is there to drop, of each kind, where, and why."""
    found: dict[str, Counter[str]] = {}
    for file in sorted(counts.iterdir()):
        for reason, count in msgspec.json.decode(file.read_bytes(), type=dict[str, int]).items():
            if count and reason in set(Reason) - NO_LOSS:
                found.setdefault(reason, Counter())[file.name] += count
    return [
        f"{where.total():,} {reason} ({', '.join(where)}): {_WHY.get(Reason(reason), 'see the dead letters')}"
        for reason, where in found.items()
    ]


def _keep_dead_letters(out: Output, node: str, file: Path) -> None:
    """Writes the dead letters of all groups to a file, if there are any."""
    transport = connect(node)
    try:
        found = [
            dead_letter(name, frame, at, published_ns)
            for name in transport.topics()
            if name.endswith(".dead-letters")
            for frame, at, published_ns in transport.read(name)
        ]
    finally:
        disconnect(transport)
    if found:
        file.write_bytes(b"".join(msgspec.json.encode(letter) + b"\n" for letter in found))
        tell(out, f"dead letters: {len(found)} in {file}", event="dead-letters", count=len(found), file=str(file))


def _finish(out: Output, files: Mapping[Path, Path], *, whole: bool) -> None:
    """Gives files that are whole their names, and says which are not."""
    for begun, file in files.items():
        # The ids of what was written are of use to whoever goes on writing only.
        Path(f"{begun}.ids").unlink(missing_ok=True)
        if whole:
            begun.rename(file)
            if not out.as_json:
                out.line(f"written: {file}")
        elif begun.exists():
            tell(out, f"not whole: {begun}", event="partial", file=str(begun))


__all__ = ("NO_LOSS", "backfill", "named")
