"""What every command has: `--json`, `--verbose`, errors in three lines, and where it takes a node, `--node`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from edgeserve.cli.output import Output, guarded
from edgeserve.transport.url import parse, without_secrets

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_NODE = "local://"
BROKERS = ("pulsar", "pulsar+ssl", "nats", "nats+tls")
_DEADLINE_S = 8


def node_option(function: F) -> F:
    """`--node URL`: the engine that a command talks to."""
    return click.option(
        "--node",
        metavar="URL",
        default=lambda: os.environ.get("EDGESERVE_NODE") or DEFAULT_NODE,
        help="Node URL. Default: the environment variable EDGESERVE_NODE, else local://.",
    )(function)


def with_deadline(node: str) -> str:
    """The URL with a deadline where it gives none: a pipeline waits for a broker that is away, who looks at it wants to be told."""
    url = parse(node)
    if url.scheme not in BROKERS or "deadline_s" in url.parameters:
        return node
    return f"{node}{'&' if '?' in node else '?'}deadline_s={_DEADLINE_S}"


def command(
    name: str, where: str = "edgeserve {command}", context: dict[str, Any] | None = None
) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a command of a function `f(out, **options)`: adds `--json` and `--verbose`, and turns errors into three lines.

    `where` is what the second line of an error says; the command's options stand in it in braces. `context`: click's settings.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Write JSON.")
        @click.option("--verbose", is_flag=True, help="Show the traceback of an error, too.")
        @functools.wraps(function)
        def wrapper(as_json: bool, verbose: bool, **options: Any) -> None:
            out = Output(as_json=as_json, verbose=verbose)
            path = click.get_current_context().command_path.partition(" ")[2]
            place = {name: without_secrets(value) if name == "node" and value else value for name, value in options.items()}
            guarded(path, out, where.format(command=path, **place), lambda: function(out, **options))

        return click.command(name, context_settings=context)(wrapper)

    return decorate


__all__ = ("DEFAULT_NODE", "command", "node_option", "with_deadline")
