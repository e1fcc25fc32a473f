"""A broker of one's own, by `edgeserve broker`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TRIES = 3


class Broker:
    """Started when made.

    Attributes:
        engine: "pulsar" or "nats".
        url: where clients reach it.
        pid: its process, the newest.
    """

    def __init__(self, engine: str, data: Path, state: Path, settings: Mapping[str, str] | None = None) -> None:
        self.engine, self._state = engine, state
        self._begin = ["start", engine, "--data", str(data), "--port", str(free_port())]
        if engine == "pulsar":
            self._begin += ["--admin-port", str(free_port())]
        for name, value in (settings or {}).items():
            self._begin += ["--set", f"{name}={value}"]
        self.url, self.pid = "", 0
        self.start()

    def start(self) -> None:
        """Starts it where it was. Pulsar's standalone mode may end while it starts on what a kill left behind: once more, then."""
        for tries_left in reversed(range(_TRIES)):
            try:
                found = self._command(*self._begin)
                break
            except RuntimeError:
                if not tries_left:
                    raise
        self.url, self.pid = str(found["url"]), int(found["pid"])

    def stop(self) -> None:
        """Stops it; its data stays."""
        self._command("stop", self.engine)

    def _command(self, *arguments: str) -> dict[str, Any]:
        command = [str(Path(sys.executable).with_name("edgeserve")), "broker", *arguments, "--json"]
        environment = os.environ | {"EDGESERVE_STATE_DIR": str(self._state)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__ = ("Broker", "free_port")
