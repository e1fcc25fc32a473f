"""`edgeserve validate` and `graph`: what a pipeline is before it runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output
from edgeserve.cli.run import look_into
from edgeserve.cli.wiring import Drawn, Found

_INVALID = 2
APP = click.Path(exists=True, dir_okay=False, path_type=Path)


def look_at(app: Path, *options: str) -> tuple[Found, Drawn]:
    """What an app declares, and its pipeline's graph."""
    found = look_into(app.resolve(), *options, invalid=_INVALID)
    if found.graph is None:
        to_do = "declare one: app = Pipeline(...); `edgeserve run` runs nodes at the top level as they are"
        raise CommandError(f"no pipeline in {app.name}", str(app), to_do, exit_code=_INVALID)
    return found, found.graph


@command("validate", "{app}")
@click.argument("app", type=APP, required=False)
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
    graph = look_at(app)[1].json
    if out.as_json:
        out.document({"valid": True, **graph})
        return
    kinds = Counter(node["kind"] for node in graph["nodes"])
    parts = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.items())
    processes = sum(node["replicas"] for node in graph["nodes"])
    out.line(f"{app} is a pipeline, {graph['pipeline']!r}: {parts}, in {processes} process{'es' if processes > 1 else ''}")


@command("graph", "{app}")
@click.argument("app", type=APP)
@click.option(
    "--format", "form", type=click.Choice(["mermaid", "json", "svg"]), default="mermaid", show_default=True, help="How it is written."
)
def graph(out: Output, app: Path, form: str) -> None:
    """Show who feeds whom in the pipeline in APP. The status is 2 when it is not one that can run."""
    _, drawn = look_at(app)
    if out.as_json or form == "json":
        out.document(drawn.json)
    else:
        click.echo(drawn.svg if form == "svg" else drawn.mermaid, nl=False)


__all__ = ("APP", "graph", "look_at", "validate")
