"""Apache Pulsar, a real one, held to the transport contract."""

from __future__ import annotations

import uuid

import pytest

from edgeserve.testing.transport import TransportContract
from edgeserve.transport.pulsar.admin import Admin
from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import parse


class TestPulsar(TransportContract):
    @pytest.fixture
    def url(self, pulsar_url: str) -> str:
        """A namespace of its own."""
        space = f"public/{uuid.uuid4().hex}"
        Admin(settings_from(parse(pulsar_url))).call(f"namespaces/{space}", "PUT", {})
        server, mark, parameters = pulsar_url.partition("?")
        return f"{server}/{space}{mark}{parameters}"
