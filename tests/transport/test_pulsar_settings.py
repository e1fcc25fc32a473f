"""What a `pulsar://` URL says."""

from __future__ import annotations

import pytest

from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import parse


@pytest.mark.parametrize(
    ("url", "admin"),
    [
        ("pulsar://h:6650", "http://h:8080"),
        ("pulsar://h", "http://h:8080"),
        ("pulsar://a.example:6650,b.example:6650/public/default?token=x", "http://a.example:8080"),
        ("pulsar+ssl://h:6651", "https://h:8443"),
        ("pulsar+ssl://h:6651?admin=https://other:443/", "https://other:443"),
    ],
)
def test_where_the_admin_api_is(url: str, admin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGESERVE_PULSAR_ADMIN", raising=False)
    assert settings_from(parse(url)).admin == admin
