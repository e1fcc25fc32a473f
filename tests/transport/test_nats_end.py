"""A connection to NATS with much to write, and whose server ends or stands still."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from queue import SimpleQueue

from tests import servers

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.driver import Outlet
from edgeserve.transport.nats.driver import NatsDriver
from edgeserve.transport.nats.loop import Connection
from edgeserve.transport.nats.settings import settings_from
from edgeserve.transport.url import parse


def test_a_connection_that_ends_with_much_to_write_is_noticed_and_made_again(new_nats: servers.NewServer) -> None:
    """What is sent fails by name at its deadline, and arrives when the server is back."""
    server = new_nats()
    driver = NatsDriver(settings_from(parse(f"{server.url}/?deadline_s=1")))
    outlets = [driver.outlet(f"t{n}") for n in range(30)]
    failed, stored, over = SimpleQueue[Exception](), SimpleQueue[int](), threading.Event()

    def done(outlet: Outlet, at: int | None, error: Exception | None) -> None:
        if error is not None:
            failed.put(error)
        elif at is not None:
            stored.put(at)
            if not over.is_set():
                outlet.send(bytes(20_000), partial(done, outlet))

    try:
        for outlet in outlets:
            for _ in range(20):
                outlet.send(bytes(20_000), partial(done, outlet))
        for _ in range(3_000):
            stored.get(timeout=30)
        server.kill()
        error = failed.get(timeout=30)
        assert isinstance(error, TransportError)
        assert "no NATS server for" in str(error)
        over.set()
        server.start()
        last = SimpleQueue[int | None]()
        outlets[0].send(b"x", lambda at, _: last.put(at))
        assert last.get(timeout=30) is not None
    finally:
        over.set()
        driver.close()


def test_an_answer_that_comes_after_its_time_does_not_end_the_connection(new_nats: servers.NewServer) -> None:
    """A server stands still for longer than is waited for its word, and goes on."""
    server = new_nats()
    connection = Connection(settings_from(parse(server.url)))
    try:
        before = connection.client
        os.kill(server.pid, signal.SIGSTOP)
        connection.call(connection.sent)
        os.kill(server.pid, signal.SIGCONT)
        assert connection.call(lambda: connection.api("INFO"))
        assert connection.client is before
    finally:
        connection.close()


def test_what_the_network_does_not_take_is_bounded(new_nats: servers.NewServer) -> None:
    """A server that reads nothing: each topic may have some MB on their way, all of them together too."""
    server = new_nats()
    driver = NatsDriver(settings_from(parse(server.url)))
    outlets = [driver.outlet(f"t{n}") for n in range(10)]
    stored = SimpleQueue[int | None]()
    try:
        os.kill(server.pid, signal.SIGSTOP)
        for outlet in outlets:
            for _ in range(7):
                outlet.send(bytes(900_000), lambda at, _: stored.put(at))
        connection = driver._connection

        async def unwritten() -> int:
            return connection.client.unwritten if connection.client is not None else 0

        assert 4 << 20 < connection.call(unwritten) < 10 << 20
        os.kill(server.pid, signal.SIGCONT)
        assert all(stored.get(timeout=30) is not None for _ in range(70))
    finally:
        os.kill(server.pid, signal.SIGCONT)
        driver.close()
