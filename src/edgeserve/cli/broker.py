"""`edgeserve broker`: a real broker on a developer's machine, started, watched and stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from edgeserve.cli.brokers.engine import Progress, Wish
from edgeserve.cli.brokers.manage import ENGINES, Status, shelf_of, start, status, stop
from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output

_WHERE = "edgeserve {command} {engine}"
_KINDS = click.Choice(tuple(ENGINES))
_MIB = 1024 * 1024


@click.group("broker")
def broker() -> None:
    """Start a real Pulsar or NATS on this machine, see how it is, and stop it."""


@contextmanager
def _progress(out: Output) -> Iterator[Progress]:
    """Lines on standard error, which leaves standard output to the result; on a terminal with a sign that something goes on."""
    if out.as_json:
        yield lambda _: None
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not (out.rich and console.is_terminal):
        yield lambda text: click.echo(text, err=True)
        return
    with console.status("", spinner="dots") as wheel:

        def show(text: str) -> None:
            console.print(text, style="dim", markup=False)
            wheel.update(text.partition(";")[0].strip())

        yield show


def _show(out: Output, found: Status) -> None:
    record = found.record
    if record is None or not found.running:
        out.line(f"{found.engine}: not running")
        return
    resident = "unknown" if found.resident_bytes is None else f"{found.resident_bytes / _MIB:.0f} MiB"
    out.line(f"{found.engine}: {'healthy' if found.healthy else f'not healthy: {found.trouble}'}", "green" if found.healthy else "bold red")
    since = datetime.fromtimestamp(record.since_ns / 1e9).astimezone()
    for name, value in (
        ("node", record.url),
        ("pid", found.pid),
        ("since", f"{since:%Y-%m-%d %H:%M:%S}"),
        ("memory", resident),
        ("data", record.data),
        ("log", record.log),
        ("from", record.source),
    ):
        out.line(f"  {name:<7} {value}")


@command("start", _WHERE)
@click.argument("engine", type=_KINDS, default="pulsar", metavar="[BROKER]")
@click.option("--port", type=click.IntRange(1, 65535), default=None, help="Where clients connect: 6650 for Pulsar, 4222 for NATS.")
@click.option("--admin-port", type=click.IntRange(1, 65535), default=None, help="Pulsar's HTTP port (8080).")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), default=None, help="Where it keeps its data.")
@click.option("--with", "source", type=click.Choice(["auto", "docker", "maven"]), default="auto", help="Where Pulsar comes from.")
@click.option("--home", type=click.Path(path_type=Path), default=None, help="An unpacked Pulsar distribution to run.")
@click.option("--plain", is_flag=True, help="Leave Pulsar's settings as they ship.")
@click.option("--set", "set_", multiple=True, metavar="NAME=VALUE", help="A setting of Pulsar's, by its name; may be repeated.")
@click.option("--token", envvar="EDGESERVE_NATS_TOKEN", default=None, help="Token that clients of NATS must show. Default: none.")
def start_broker(
    out: Output,
    engine: str,
    port: int | None,
    admin_port: int | None,
    data: Path | None,
    source: Literal["auto", "docker", "maven"],
    home: Path | None,
    plain: bool,
    set_: tuple[str, ...],
    token: str | None,
) -> None:
    """Start BROKER, pulsar or nats, in the background, and wait until it can be used.

    One that runs already is left as it is; where it was asked for with other options, that is an error.
    """
    # The variable is the clients'; it means nothing to Pulsar.
    own_token = token if engine == "nats" or _given("token") else None
    settings = dict(_setting(each) for each in set_)
    only_at_start = tuple(f"--{name.strip('_')}" for name in ("token", "plain", "set_") if _given(name))
    wish = Wish(port, admin_port, data, source, home, plain, own_token, settings, only_at_start)
    began = time.monotonic()
    with _progress(out) as progress:
        found = start(engine, shelf_of(engine), wish, progress)
    assert found.record is not None
    if out.as_json:
        out.document(found.as_json() | {"already": found.already})
        return
    how = "runs already" if found.already else f"is ready after {time.monotonic() - began:.1f} s"
    out.line(f"{ENGINES[engine].title} {how}, process {found.pid}", "green")
    out.line(f"node: {found.record.url}")
    if token is not None and engine == "nats" and not found.already:
        out.line("clients need the token, too: set EDGESERVE_NATS_TOKEN, or write token= into the node URL")


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise CommandError(
            f"--set {text}: a setting is NAME=VALUE", "edgeserve broker start pulsar", f"write: --set {text or 'NAME'}=VALUE"
        )
    return name, value


def _given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


@command("stop", _WHERE)
@click.argument("engine", type=_KINDS, required=False, metavar="[BROKER]")
def stop_broker(out: Output, engine: str | None) -> None:
    """Stop BROKER, or all that `broker start` has started. Data stays."""
    with _progress(out) as progress:
        stopped = [name for name in _asked(engine) if stop(name, shelf_of(name), progress)]
    if out.as_json:
        out.document({"stopped": stopped})
    elif stopped:
        out.line(f"stopped {' and '.join(stopped)}")
    else:
        out.line(f"{engine or 'no broker'}: not running" if engine else "no broker is running")


@command("status", _WHERE)
@click.argument("engine", type=_KINDS, required=False, metavar="[BROKER]")
def show_status(out: Output, engine: str | None) -> None:
    """Tell how BROKER is, or each. Ends with status 1 where it is not running or not healthy; without BROKER where none is healthy."""
    found = [status(name, shelf_of(name)) for name in _asked(engine)]
    if out.as_json:
        out.document({"brokers": [each.as_json() for each in found]})
    else:
        for each in found:
            _show(out, each)
    if not any(each.healthy for each in found):
        raise click.exceptions.Exit(1)


def _asked(engine: str | None) -> list[str]:
    return list(ENGINES) if engine is None else [engine]


for _command in (start_broker, stop_broker, show_status):
    broker.add_command(_command)

__all__ = ("broker",)
