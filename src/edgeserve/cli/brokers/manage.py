"""Starts a broker in the background, tells how it is, and stops it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from edgeserve.cli.brokers import docker
from edgeserve.cli.brokers.engine import HOST, Engine, Launch, Progress, Wish
from edgeserve.cli.brokers.nats import Nats
from edgeserve.cli.brokers.pulsar import Pulsar
from edgeserve.cli.brokers.record import Record, Shelf, resident_bytes
from edgeserve.cli.output import CommandError
from edgeserve.core.process import born
from edgeserve.core.settings import state_directory

ENGINES: dict[str, Engine] = {"pulsar": Pulsar(), "nats": Nats()}
_LOOK_S = 0.1
_children: dict[int, subprocess.Popen[bytes]] = {}
"""Servers that this very process started: it has to wait for them when they have ended."""
_TELLING = re.compile(r"error|exception|\[FTL\]|fatal", re.IGNORECASE)


@dataclass(frozen=True)
class Status:
    """How a broker is.

    `pid` is the server's, in a container, too; `trouble` says why it is not healthy; `record` is None where none was started.
    """

    engine: str
    running: bool
    trouble: str
    record: Record | None
    pid: int = 0
    resident_bytes: int | None = None
    already: bool = False

    @property
    def healthy(self) -> bool:
        """It runs, answers, and can be used."""
        return self.running and not self.trouble

    def as_json(self) -> dict[str, Any]:
        """What `--json` shows."""
        shown: dict[str, Any] = {"broker": self.engine, "running": self.running, "healthy": self.healthy, "trouble": self.trouble or None}
        if self.running and self.record is not None:
            record = self.record
            shown |= {
                "url": record.url,
                "pid": self.pid,
                "since": datetime.fromtimestamp(record.since_ns / 1e9, UTC).isoformat(timespec="seconds"),
                "data": record.data,
                "log": record.log,
                "resident_bytes": self.resident_bytes,
                "source": record.source,
            }
        return shown


def shelf_of(engine: str) -> Shelf:
    """The directory of the user's broker of this kind."""
    return Shelf(state_directory() / "brokers" / engine)


def _runs(record: Record | None) -> bool:
    if record is None:
        return False
    if record.container:
        return docker.runs(record.container)
    return born(record.pid) == record.born


def _up(name: str, record: Record, trouble: str = "", *, already: bool = False) -> Status:
    pid = docker.process(record.container) if record.container else record.pid
    return Status(name, True, trouble, record, pid, resident_bytes(pid), already)


def status(name: str, shelf: Shelf) -> Status:
    """How the broker in this directory is."""
    record = shelf.record()
    if record is None or not _runs(record):
        return Status(name, False, "not running", record)
    return _up(name, record, ENGINES[name].trouble(record.port, record.admin_port) or "")


def start(name: str, shelf: Shelf, wish: Wish, progress: Progress = lambda _: None) -> Status:
    """Starts the broker unless it runs already, and returns when it can be used."""
    engine = ENGINES[name]
    engine.check(wish)
    with shelf.alone():
        record = shelf.record()
        if record is not None and _runs(record):
            _refuse_other(engine, record, wish)
            _await_health(engine, shelf, record, None, progress)
            return _up(name, record, already=True)
        if record is not None:
            _forget_child(record)
        shelf.forget()
        port = wish.port or engine.port
        admin_port = (wish.admin_port or engine.admin_port) if engine.admin_port else 0
        for each, option in ((port, "--port"), (admin_port, "--admin-port")):
            if each:
                _refuse_taken(engine, each, option)
        data = (wish.data or shelf.directory / "data").absolute()
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        again = any(data.iterdir())
        launch = engine.prepare(wish, shelf, port, admin_port, data, progress)
        while True:
            progress(f"starting {engine.title} from {launch.source}; log: {shelf.log}")
            process = _spawn(launch, shelf)
            _children[process.pid] = process
            record = Record(
                name,
                process.pid,
                born(process.pid) or "ended",
                time.time_ns(),
                engine.url(port, admin_port),
                port,
                admin_port,
                str(data),
                str(shelf.log),
                launch.source,
                launch.container,
            )
            shelf.put(record)
            try:
                _await_health(engine, shelf, record, process, progress)
                return _up(name, record)
            except BaseException as exc:
                # Nobody would know of one that came up later; Ctrl-C means that it isn't wanted.
                _end(engine, record)
                shelf.forget()
                # On what a kill left behind Pulsar may end while it starts, and not the next time.
                if not (again and isinstance(exc, CommandError)):
                    raise
                again = False
                progress("it ended while it started; once more")


def stop(name: str, shelf: Shelf, progress: Progress = lambda _: None, *, kill: bool = False) -> bool:
    """Stops the broker; False where none runs. `kill` gives it no time to end by itself."""
    if not shelf.directory.is_dir():
        return False
    with shelf.alone():
        record = shelf.record()
        running = record is not None and _runs(record)
        if record is not None and running:
            progress(f"stopping {ENGINES[name].title}, process {record.pid}")
            _end(ENGINES[name], record, kill=kill)
        elif record is not None:
            _forget_child(record)
        shelf.forget()
        return running


def _refuse_other(engine: Engine, record: Record, wish: Wish) -> None:
    """Refuses to pass a broker that runs for one that was asked for otherwise."""
    for option, asked, runs in (
        ("--port", wish.port, record.port),
        ("--admin-port", wish.admin_port, record.admin_port),
        ("--data", wish.data and str(wish.data.absolute()), record.data),
        ("--home", wish.home and str(wish.home.absolute()), record.source),
        ("--with", None if wish.source == "auto" else wish.source, "docker" if record.container else "maven"),
    ):
        if asked and asked != runs:
            raise _other(engine, record, f"with {option} {runs}, not {asked}")
    if wish.only_at_start:
        raise _other(engine, record, f"and {', '.join(wish.only_at_start)} cannot be told to one that runs")


def _other(engine: Engine, record: Record, how: str) -> CommandError:
    stop_it = f"edgeserve broker stop {engine.name}"
    what = f"{engine.title} runs already, process {record.pid}, {how}"
    return CommandError(what, record.url, f"use it as it is, without these options; or stop it first: {stop_it}")


def _refuse_taken(engine: Engine, port: int, option: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            raise CommandError(
                f"port {port} cannot be used for {engine.title}: {exc.strerror or exc}",
                f"{HOST}:{port}",
                f"stop what listens there, or name another port: {option} {port + 1}",
            ) from exc


def _spawn(launch: Launch, shelf: Shelf) -> subprocess.Popen[bytes]:
    """A session of its own: neither a terminal that closes nor Ctrl-C in it reaches the server."""
    with contextlib.suppress(FileNotFoundError):
        shelf.log.replace(shelf.log.with_suffix(".log.1"))
    with open(shelf.log, "ab") as log:
        return subprocess.Popen(
            launch.command,
            cwd=launch.directory,
            env=os.environ | dict(launch.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _await_health(engine: Engine, shelf: Shelf, record: Record, process: subprocess.Popen[bytes] | None, progress: Progress) -> None:
    until = time.monotonic() + engine.start_s
    while True:
        trouble = engine.trouble(record.port, record.admin_port)
        # Whoever else may answer on the port: it counts only while our own process is there.
        ended = process.poll() is not None if process is not None else not _runs(record)
        if trouble is None and not ended:
            return
        if ended or time.monotonic() > until:
            lines = shelf.tail()
            for line in lines:
                progress(f"    {line}")
            status = "" if process is None or process.returncode is None else f", status {process.returncode}"
            what = (
                f"{engine.title} ended while starting{status}"
                if ended
                else f"{engine.title} was not ready in {engine.start_s:g} s: {trouble}"
            )
            telling = [line for line in lines if _TELLING.search(line)] or lines
            raise CommandError(what + (f": {telling[-1].strip()}" if telling else ""), str(shelf.log), _hint("\n".join(lines), engine))
        time.sleep(_LOOK_S)


def _hint(text: str, engine: Engine) -> str:
    if "ddress already in use" in text:
        return "name other ports by --port" + (" and --admin-port" if engine.admin_port else "")
    if "lock" in text.lower():
        return "another server seems to use the data directory: stop that one, or name another directory by --data"
    return "the log says why; data of another version: name an empty directory by --data"


def _end(engine: Engine, record: Record, *, kill: bool = False) -> None:
    if record.container:
        docker.remove(record.container, 0 if kill else engine.stop_s)
        _forget_child(record)
        return
    for number, wait_s in ((signal.SIGTERM, engine.stop_s), (signal.SIGKILL, 10.0)):
        if kill and number is signal.SIGTERM:
            continue
        if born(record.pid) != record.born:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(record.pid, number)
        until = time.monotonic() + wait_s
        while time.monotonic() < until and born(record.pid) == record.born:
            time.sleep(_LOOK_S / 2)
    _forget_child(record)


def _forget_child(record: Record) -> None:
    child = _children.pop(record.pid, None)
    if child is not None:
        child.wait()


def free_port() -> int:
    """A port of the loopback interface that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


__all__ = ("ENGINES", "Status", "free_port", "shelf_of", "start", "status", "stop")
