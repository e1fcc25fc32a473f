"""A real NATS server for tests."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path


def binary() -> str | None:
    """Where the server's program is."""
    beside = Path(sys.executable).parent / "nats-server"
    return str(beside) if beside.exists() else shutil.which("nats-server")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A server on a port of its own, with JetStream in a directory."""

    def __init__(
        self, directory: Path, *options: str, config: str = "", port: int = 0, jetstream: bool = True, greets: bool = True
    ) -> None:
        self.directory, self.port, self._options, self._jetstream = directory, port or free_port(), options, jetstream
        self._greets = greets
        self._config = directory / "server.conf"
        directory.mkdir(parents=True, exist_ok=True)
        self._config.write_text(config)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        program = binary()
        assert program is not None
        store = ("-js", "-sd", str(self.directory / "js")) if self._jetstream else ()
        command = [program, "-a", "127.0.0.1", "-p", str(self.port), "-c", str(self._config), *store, *self._options]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as s:
                if not self._greets or s.recv(4) == b"INFO":
                    return
            assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(10)

    def url(self, namespace: str = "", scheme: str = "nats", host: str = "127.0.0.1") -> str:
        return f"{scheme}://{host}:{self.port}/{namespace}"
