"""What a Pulsar answers whose backlog quota is reached is an answer to wait for, not an end."""

from __future__ import annotations

import pytest

pulsar = pytest.importorskip("pulsar", reason="no Pulsar client: pip install 'edgeserve-streams[pulsar]'")

from edgeserve.core.errors import StoreFull  # noqa: E402
from edgeserve.transport.pulsar.errors import failed  # noqa: E402
from edgeserve.transport.pulsar.settings import settings_from  # noqa: E402
from edgeserve.transport.url import parse  # noqa: E402


@pytest.mark.parametrize("name", ["ProducerBlockedQuotaExceededError", "ProducerBlockedQuotaExceededException"])
def test_a_backlog_quota_is_no_room(name: str) -> None:
    error = failed(settings_from(parse("pulsar://127.0.0.1:1")), getattr(pulsar.Result, name), "in")
    assert isinstance(error, StoreFull) and "quota" in str(error)
