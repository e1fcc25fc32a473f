"""`edgeserve validate`, `graph` and `backfill`: what a pipeline is before it runs, and what it makes of recorded files."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import click
import msgspec

from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output
from edgeserve.cli.run import launch, look_into
from edgeserve.cli.wiring import Drawn, Found

_INVALID = 2
_APP = click.Path(exists=True, dir_okay=False, path_type=Path)


def _look(app: Path, *options: str) -> tuple[Found, Drawn]:
    """What an app declares, and its pipeline's graph."""
    found = look_into(app.resolve(), *options, invalid=_INVALID)
    if found.graph is None:
        to_do = "declare one: app = Pipeline(...); `edgeserve run` runs nodes at the top level as they are"
        raise CommandError(f"no pipeline in {app.name}", str(app), to_do, exit_code=_INVALID)
    return found, found.graph


@command("validate", "{app}")
@click.argument("app", type=_APP, required=False)
@click.option("--schema", "show_schema", is_flag=True, help="Write the JSON schema of a pipeline in YAML, for editors and other programs.")
def validate(out: Output, app: Path | None, show_schema: bool) -> None:
    """Check the pipeline in APP, a Python or YAML file, without running any of it.

    The status is 0 when it can run, and 2 when not: what is wrong is said with its line.
    """
    if show_schema:
        # Here: no other command needs what a pipeline does.
        from edgeserve.pipeline import schema

        out.document(schema())
        return
    if app is None:
        raise click.UsageError("Missing argument 'APP'.")
    graph = _look(app)[1].json
    if out.as_json:
        out.document({"valid": True, **graph})
        return
    kinds = Counter(node["kind"] for node in graph["nodes"])
    parts = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.items())
    processes = sum(node["replicas"] for node in graph["nodes"])
    out.line(f"{app} is a pipeline, {graph['pipeline']!r}: {parts}, in {processes} process{'es' if processes > 1 else ''}")


@command("graph", "{app}")
@click.argument("app", type=_APP)
@click.option(
    "--format", "form", type=click.Choice(["mermaid", "json", "svg"]), default="mermaid", show_default=True, help="How it is written."
)
def graph(out: Output, app: Path, form: str) -> None:
    """Show who feeds whom in the pipeline in APP. The status is 2 when it is not one that can run."""
    _, drawn = _look(app)
    if out.as_json or form == "json":
        out.document(drawn.json)
    else:
        click.echo(drawn.svg if form == "svg" else drawn.mermaid, nl=False)


def _named(_context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
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
@click.argument("app", type=_APP)
@click.option("--in", "recorded", multiple=True, callback=_named, metavar="SOURCE=FILE", help="Read this file in place of a source.")
@click.option(
    "--out", "written", multiple=True, required=True, callback=_named, metavar="[SINK=]FILE", help="Write a sink's results to it."
)
def backfill(out: Output, app: Path, recorded: dict[str, str], written: dict[str, str]) -> None:
    """Run the pipeline in APP over recorded files, to their end, in a store of its own that is removed afterwards.

    Results go to new files, JSON lines or (a directory of) Parquet. Sinks without one do not run, sources without a file run as they are.
    """
    _, drawn = _look(app)
    sinks = [node["name"] for node in drawn.json["nodes"] if node["kind"] == "sink"]
    if "" in written:
        if len(sinks) != 1:
            raise click.UsageError(f"--out {written['']}: say which sink, as SINK=FILE: there is {', '.join(sinks) or 'none'}")
        written = {sinks[0] if name == "" else name: file for name, file in written.items()}
    for file in written.values():
        if Path(file).exists():
            raise CommandError(f"{file} is there already", str(app), "name a new file, or move that one away")
    with tempfile.TemporaryDirectory(prefix="edgeserve-backfill-") as folder:
        os.environ["EDGESERVE_STATE_DIR"] = str(Path(folder, "state"))
        options = ["--node", f"local://{folder}/store"]
        options += ["--recorded", msgspec.json.encode(recorded).decode(), "--out", msgspec.json.encode(written).decode()]
        # Nothing is started again: what a source sends twice may not be known as such.
        launch(out, app, _look(app, *options)[0], options, until_end=True, grace=10.0, restarts=0)
    for file in written.values():
        # The ids of what was written are of use to whoever goes on writing only.
        Path(f"{file}.ids").unlink(missing_ok=True)
        if not out.as_json:
            out.line(f"written: {file}")


__all__ = ("backfill", "graph", "validate")
