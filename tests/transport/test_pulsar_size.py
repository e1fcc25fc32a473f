"""What a broker takes at most it says itself; one message that is too large for it is that message's trouble alone."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
from tests.servers import Server, with_namespace

from edgeserve.core.errors import TooLarge
from edgeserve.testing.transport import drain, frames_of, publish
from edgeserve.transport import connect, disconnect
from edgeserve.transport.broker.engine import BrokerEngine
from edgeserve.transport.pulsar.probe import greet
from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import parse

MIB = 1 << 20
CONNECTED_WITH_3_MIB = bytes([0x08, 3, 0x1A, 9, 0x0A, 2, *b"4x", 0x18, *b"\x80\x80\xc0\x01"])


@pytest.fixture(scope="module")
def small_pulsar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Pulsar that takes messages of 1 MiB."""
    server = Server("pulsar", tmp_path_factory.mktemp("small"), settings={"maxMessageSize": str(MIB)})
    yield server.url
    server.stop()


def test_what_is_larger_than_the_broker_takes_goes_in_parts(small_pulsar: str) -> None:
    transport = connect(with_namespace(small_pulsar))
    sent = [os.urandom(size) for size in (10, MIB - 1, MIB, MIB + 1, 4 * MIB)]
    try:
        publish(transport, "a", sent, batch=1)
        assert [bytes(frame) for frame in frames_of(drain(transport.subscribe(["a"], "g"), len(sent)))] == sent
    finally:
        disconnect(transport)


def test_a_message_too_large_fails_alone(small_pulsar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = connect(with_namespace(small_pulsar))
    assert isinstance(transport, BrokerEngine)
    try:
        publisher = transport.publisher("a")
        publisher.publish([b"before"])
        monkeypatch.setattr(transport.driver, "max_bytes", 5 * MIB)  # what it took before it was configured anew
        with pytest.raises(TooLarge, match=r"'a': pulsar.* takes no message of .* was not sent"):
            publisher.publish([os.urandom(2 * MIB)])
        large = os.urandom(2 * MIB)
        publisher.publish([b"after"])
        publisher.publish([large])
        publisher.flush()
        assert frames_of(drain(transport.subscribe(["a"], "g"), 3)) == [b"before", b"after", large]
    finally:
        disconnect(transport)


def test_the_size_is_read_from_the_brokers_first_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                size = len(CONNECTED_WITH_3_MIB)
                connection.sendall((size + 4).to_bytes(4) + size.to_bytes(4) + CONNECTED_WITH_3_MIB)

        threading.Thread(target=answer, daemon=True).start()
        dead = "127.0.0.1:1"  # of several brokers any that answers will do
        found = greet(settings_from(parse(f"pulsar://{dead},127.0.0.1:{server.getsockname()[1]}")))
    assert found == (None, 3 * MIB, True)
