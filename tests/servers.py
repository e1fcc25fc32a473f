"""Real brokers for tests, started as `edgeserve broker start` does it, on free ports, with data of their own."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from edgeserve.cli.brokers.engine import Wish
from edgeserve.cli.brokers.manage import ENGINES, free_port, start, status, stop
from edgeserve.cli.brokers.record import Shelf
from edgeserve.cli.output import CommandError
from edgeserve.transport.pulsar.admin import Admin
from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import parse

NewServer = Callable[..., "Server"]


def are_required() -> bool:
    """In continuous integration a broker that cannot be had is a failure; elsewhere its tests are skipped."""
    return os.environ.get("CI") == "true" or os.environ.get("EDGESERVE_REQUIRE_BROKERS") == "1"


def given(engine: str) -> str | None:
    """The URL of a server to use in place of one of our own."""
    return os.environ.get(f"EDGESERVE_TEST_{engine.upper()}") or None


def fetch(engine: str) -> None:
    """Brings a server to this machine ahead of the first test that needs it, which has a timeout. What goes wrong shows when it starts."""
    try:
        with tempfile.TemporaryDirectory() as place:
            ENGINES[engine].prepare(Wish(), Shelf(Path(place)), free_port(), free_port(), Path(place), print)
    except CommandError:
        return


class Server:
    """A broker of a test's own: it keeps its ports and its data over `stop`, `kill` and `start`."""

    def __init__(
        self, engine: str, directory: Path, *, token: str | None = None, plain: bool = False, settings: Mapping[str, str] | None = None
    ) -> None:
        self._engine, self._shelf = engine, Shelf(directory)
        ports = free_port(), free_port() if ENGINES[engine].admin_port else None
        self._wish = Wish(*ports, plain=plain, token=token, settings=settings or {})
        self.start()

    @property
    def url(self) -> str:
        """The node URL; the same from the first start on."""
        assert self._wish.port is not None
        return ENGINES[self._engine].url(self._wish.port, self._wish.admin_port or 0)

    @property
    def pid(self) -> int:
        """The server's process, to be stopped and continued by signals."""
        found = status(self._engine, self._shelf)
        assert found.running
        return found.pid

    def start(self) -> None:
        """Starts it, and returns when it can be used."""
        try:
            start(self._engine, self._shelf, self._wish)
        except CommandError as exc:
            reason = f"{exc.what} ({exc.where}); {exc.to_do}"
            if are_required():
                pytest.fail(f"a broker is required here, and {reason}", pytrace=False)
            pytest.skip(f"no {ENGINES[self._engine].title}: {reason}")

    def stop(self) -> None:
        """Asks it to end, and waits until it has."""
        stop(self._engine, self._shelf)

    def kill(self) -> None:
        """Kills it, as a crash would."""
        stop(self._engine, self._shelf, kill=True)


def with_namespace(url: str) -> str:
    """The URL of a new Pulsar namespace: nothing was sent to it yet."""
    space = f"public/{uuid.uuid4().hex}"
    Admin(settings_from(parse(url))).call(f"namespaces/{space}", "PUT", {})
    server, mark, parameters = url.partition("?")
    return f"{server}/{space}{mark}{parameters}"


__all__ = ("NewServer", "Server", "are_required", "fetch", "given", "with_namespace")
