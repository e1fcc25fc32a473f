"""In a cluster a broker sends who asks about a topic to the broker that owns it."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from edgeserve.core.errors import TransportError
from edgeserve.transport.pulsar.admin import Admin, _Redirects
from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import parse

TOPIC = "persistent://public/default/t"


class Broker(http.server.ThreadingHTTPServer):
    """Sends everything on to `owner`; without one it takes everything."""

    def __init__(self, owner: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner, self.url = owner, f"http://127.0.0.1:{self.server_port}"
        self.seen: list[tuple[str, str, Any, str | None]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Broker

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.owner:
            self.send_response(307)
            self.send_header("Location", self.server.owner + self.path)
        else:
            self.server.seen.append(
                (self.command, self.path.rpartition("/")[2], json.loads(body or b"null"), self.headers.get("Authorization"))
            )
            self.send_response(204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_DELETE = do_PUT = _do

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def brokers() -> Iterator[tuple[Broker, Broker]]:
    owner = Broker()
    other = Broker(owner.url)
    yield owner, other
    for broker in (owner, other):
        broker.shutdown()
        broker.server_close()


def admin_of(url: str) -> Admin:
    return Admin(settings_from(parse(f"pulsar://host:6650?token=secret&admin={url}")))


def test_what_is_asked_of_another_broker_is_asked_of_the_owner(brokers: tuple[Broker, Broker]) -> None:
    owner, other = brokers
    admin = admin_of(other.url)
    admin.keep(TOPIC, 64, None)
    admin.delete_subscription(TOPIC, "g")
    admin.delete_topic(TOPIC)
    assert admin.subscriptions(TOPIC) == {}
    limits = {"retentionSizeInMB": 64, "retentionTimeInMinutes": -1}
    assert [seen[:3] for seen in owner.seen] == [
        ("POST", "retention", limits),
        ("DELETE", "g?force=true", None),
        ("DELETE", "t?force=true", None),
        ("GET", "stats", None),
    ]
    assert {seen[3] for seen in owner.seen} == {"Bearer secret"}


def redirected(source: str, target: str) -> Any:
    request = urllib.request.Request(source, b"{}", {"Authorization": "Bearer secret", "Content-Type": "application/json"}, method="POST")
    return _Redirects().redirect_request(request, None, 307, "", None, target)


def test_a_token_goes_to_no_other_scheme() -> None:
    assert redirected("https://a/x", "https://b/x").get_header("Authorization") == "Bearer secret"
    asked = redirected("http://a/x", "https://b/x")
    assert asked.get_header("Authorization") is None
    assert (asked.get_method(), asked.data, asked.get_header("Content-type")) == ("POST", b"{}", "application/json")


@pytest.mark.parametrize("target", ["http://b/x", "ftp://b/x"])
def test_what_was_asked_in_secret_is_not_asked_in_the_open(target: str) -> None:
    with pytest.raises(TransportError, match=f"sends to {target.removesuffix('/x')}, which is no https"):
        redirected("https://a/x", target)


@pytest.mark.parametrize(
    ("url", "admin", "addresses"),
    [
        ("pulsar://[::1]:6650", "http://[::1]:8080", [("::1", 6650)]),
        ("pulsar+ssl://[2001:db8::1]", "https://[2001:db8::1]:8443", [("2001:db8::1", 6651)]),
        ("pulsar://a:1,[::1],b:2/public/x", "http://a:8080", [("a", 1), ("::1", 6650), ("b", 2)]),
    ],
)
def test_addresses(url: str, admin: str, addresses: list[tuple[str, int]]) -> None:
    settings = settings_from(parse(url))
    assert (settings.admin, settings.addresses) == (admin, addresses)
