"""The end of a connection to NATS that still has much to write."""

from __future__ import annotations

import threading
from functools import partial
from queue import SimpleQueue

from tests import servers

from edgeserve.core.errors import TransportError
from edgeserve.transport.broker.driver import Outlet
from edgeserve.transport.nats.driver import NatsDriver
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
