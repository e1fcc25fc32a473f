"""Apache Pulsar, a real one, held to the transport contract."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence

import pytest

from edgeserve.testing.transport import TransportContract
from edgeserve.transport.pulsar.admin import Admin
from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import parse


@pytest.fixture
def pulsar_url() -> str:
    return os.environ.get("EDGESERVE_TEST_PULSAR", "pulsar://localhost:6650")


@pytest.mark.pulsar
class TestPulsar(TransportContract):
    @pytest.fixture
    def url(self, pulsar_url: str) -> str:
        """A namespace of its own."""
        space = f"public/{uuid.uuid4().hex}"
        Admin(settings_from(parse(pulsar_url))).call(f"namespaces/{space}", "PUT", {})
        return f"{pulsar_url}/{space}"

    @pytest.fixture
    def wrong_parameters(self) -> Sequence[str]:
        return ("bogus=1", "deadline_s=0", "deadline_s=-1", "deadline_s=many", "retention_mb=inf", "retention_s=nan", "size_mb=1")
