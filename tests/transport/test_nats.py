"""NATS JetStream, held to the contract of all engines."""

from __future__ import annotations

import uuid

import pytest

from edgeserve.testing.transport import TransportContract


class TestNats(TransportContract):
    @pytest.fixture
    def url(self, nats_url: str) -> str:
        """A prefix of its own."""
        return f"{nats_url}/{uuid.uuid4().hex}"
