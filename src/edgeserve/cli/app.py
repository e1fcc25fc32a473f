"""The command line's root."""

from __future__ import annotations

import sys

import click

from edgeserve import __version__
from edgeserve.cli.backfill import backfill
from edgeserve.cli.broker import broker
from edgeserve.cli.demo import demo
from edgeserve.cli.doctor import doctor
from edgeserve.cli.groups import groups
from edgeserve.cli.logs import log
from edgeserve.cli.output import CommandError, show_error
from edgeserve.cli.payloads import payloads
from edgeserve.cli.pipelines import graph, validate
from edgeserve.cli.plan import plan
from edgeserve.cli.profile import profile
from edgeserve.cli.routes import routes
from edgeserve.cli.run import run
from edgeserve.cli.topic import topic


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgeserve", message="%(prog)s %(version)s")
def root() -> None:
    """Streams from many nodes, aligned in time, joined, and served."""


for _command in (demo, run, validate, graph, profile, plan, backfill, doctor, topic, groups, routes, log, broker, payloads):
    root.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Runs the `edgeserve` command and ends the process with its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        status = root.main(given, prog_name="edgeserve", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        status = 2
    except click.UsageError as exc:
        path = exc.ctx.command_path if exc.ctx is not None else "edgeserve"
        show_error(CommandError(exc.format_message(), path, f"see: {path} --help"), as_json="--json" in given)
        status = exc.exit_code
    except click.exceptions.Abort:
        status = 130
    sys.exit(status)


__all__ = ("main", "root")
