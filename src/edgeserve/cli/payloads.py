"""`edgeserve payloads serve`: a host's payloads stay to be had when those who sent them have ended."""

from __future__ import annotations

import signal
import threading

import click

from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output
from edgeserve.core.errors import EdgeServeError
from edgeserve.payload import Serving


def cannot_serve(error: EdgeServeError) -> CommandError:
    """Payloads cannot be served as the settings say."""
    return CommandError(str(error), "EDGESERVE_ADVERTISE", "name the address and port of this machine that others reach it under")


@click.group()
def payloads() -> None:
    """Large payloads that stay on the host of their sender (routing='lazy')."""


@command("serve", "edgeserve {command}")
def serve(out: Output) -> None:
    """Serve this host's payloads to others until interrupted.

    Nodes that send with routing='lazy' serve them, too, for as long as they are open. EDGESERVE_ADVERTISE says under which address.
    """
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        serving = Serving()
    except EdgeServeError as exc:
        raise cannot_serve(exc) from exc
    if not serving.origin:
        raise CommandError("no address for others is set", "EDGESERVE_ADVERTISE", "set it to host or host:port of this machine")
    try:
        if out.as_json:
            out.document({"origin": serving.origin})
        else:
            out.line(f"serves payloads at {serving.origin}")
        ended.wait()
    finally:
        serving.close()


payloads.add_command(serve)

__all__ = ("cannot_serve", "payloads")
