"""Apache Pulsar, a real one, held to the transport contract."""

from __future__ import annotations

import pytest
from tests.servers import with_namespace

from edgeserve.testing.transport import TransportContract


class TestPulsar(TransportContract):
    @pytest.fixture
    def url(self, pulsar_url: str) -> str:
        """A namespace of its own."""
        return with_namespace(pulsar_url)
