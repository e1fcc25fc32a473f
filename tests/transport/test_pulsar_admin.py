"""An admin API that is silent, or none at all, stops no node."""

from __future__ import annotations

import http.server
import os
import socket
import struct
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator

import pytest
from tests.servers import with_namespace

from edgeserve.core.errors import ConfigurationError, TransportError
from edgeserve.testing.transport import drain, publish
from edgeserve.testing.transport.cases import collect, numbered
from edgeserve.transport import connect, disconnect
from edgeserve.transport.base import Subscription, Transport
from edgeserve.transport.broker import grouplog
from edgeserve.transport.broker.reception import Reception
from edgeserve.transport.pulsar import admin


class FakeAdmin(http.server.ThreadingHTTPServer):
    """Gives one answer to everything, once it may; tells when it was asked first."""

    def __init__(self, answer: bytes, *, silent: bool = False, status: int = 200, missing: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.status, self.missing = answer, status, missing
        self.asked, self.may_answer = threading.Event(), threading.Event()
        if not silent:
            self.may_answer.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeAdmin

    def do_GET(self) -> None:
        self.server.asked.set()
        self.server.may_answer.wait()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.answer) + self.server.missing))
        self.end_headers()
        self.wfile.write(self.server.answer)
        if self.server.missing:  # the server is killed
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def fakes() -> Iterator[list[FakeAdmin]]:
    made: list[FakeAdmin] = []
    yield made
    for fake in made:
        fake.may_answer.set()
        fake.shutdown()
        fake.server_close()


def settle_many(transport: Transport, members: list[Subscription]) -> None:
    """Settles so many ids that a snapshot of the group's log is due."""
    publish(transport, "a", numbered(20))
    for member, found in zip(members, collect(members, 20, settle=False), strict=True):
        member.settle({"a": [d[1] for d in found]}, ids=[os.urandom(16) for _ in found])


@pytest.mark.parametrize("answer", [None, b"<html>sign in</html>", b'{"ledgers": 5}', b"[]"], ids=["silent", "html", "another", "a list"])
def test_a_member_goes_on_without_the_admin_api(
    pulsar_url: str, answer: bytes | None, fakes: list[FakeAdmin], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouplog, "SNAPSHOT_EVERY_IDS", 10)
    monkeypatch.setattr(admin, "_TIMEOUT_S", 600.0)
    fakes.append(FakeAdmin(answer or b"", silent=answer is None))
    transport = connect(f"{with_namespace(pulsar_url).partition('?')[0]}?admin={fakes[0].url}")
    try:
        # Where there are two members, how far their group is only the broker knows.
        members = [transport.subscribe(["a"], "g") for _ in range(2)]
        settle_many(transport, members)
        assert fakes[0].asked.wait(10)
        for _ in range(3):
            settle_many(transport, members)
            for member in members:
                member.flush()
        members[0].flush()  # what the other has settled after the first one's flush is known to that one by now
        assert len(members[0].settled_ids()) == 80
    finally:
        fakes[0].may_answer.set()
        disconnect(transport)


def test_a_floor_that_the_broker_cannot_tell_now_is_the_one_that_was_known(
    pulsar_url: str, fakes: list[FakeAdmin], caplog: pytest.LogCaptureFixture
) -> None:
    fakes.append(FakeAdmin(b"not enough non-faulty bookies", status=500))
    transport = connect(f"{with_namespace(pulsar_url).partition('?')[0]}?admin={fakes[0].url}")
    try:
        members = [transport.subscribe(["a"], "g") for _ in range(2)]
        settle_many(transport, members)
        assert [member.floor("a") for member in members] == [0, 0]
        assert fakes[0].asked.is_set()
        assert "not enough non-faulty bookies" in caplog.text
    finally:
        disconnect(transport)


def test_what_answers_in_place_of_the_admin_api_is_named(fakes: list[FakeAdmin]) -> None:
    fakes.append(FakeAdmin(b"<html>sign in</html>"))
    transport = connect(f"pulsar://127.0.0.1:1?admin={fakes[0].url}")
    try:
        with pytest.raises(TransportError, match=f"{fakes[0].url} is not Pulsar's admin API.*<html>"):
            transport.topics()
    finally:
        disconnect(transport)


@pytest.mark.parametrize("status", [200, 500, 503])
def test_an_answer_that_is_cut_short_is_an_error_of_ours(fakes: list[FakeAdmin], status: int) -> None:
    fakes.append(FakeAdmin(b"[", status=status, missing=100))
    transport = connect(f"pulsar://127.0.0.1:1?admin={fakes[0].url}")
    try:
        with pytest.raises(TransportError, match=f"{fakes[0].url}"):
            transport.topics()
    finally:
        disconnect(transport)


def test_a_message_in_parts_needs_no_admin_api(pulsar_url: str) -> None:
    transport = connect(f"{with_namespace(pulsar_url).partition('?')[0]}?admin=http://127.0.0.1:1")
    try:
        large = os.urandom(6 << 20)
        publish(transport, "a", [large])
        assert bytes(drain(transport.subscribe(["a"], "g"), 1)[0][0]) == large
    finally:
        disconnect(transport)


def test_a_member_that_cannot_go_on_says_so(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reception, "take_back", lambda *_: 1 / 0)
    transport = connect(f"{nats_url}/{uuid.uuid4().hex}")
    try:
        member = transport.subscribe(["a"], "g")
        with pytest.raises(TransportError, match="member of group 'g' cannot go on: ZeroDivisionError"):
            member.receive(1)
    finally:
        disconnect(transport)


@pytest.mark.parametrize("use", [lambda t: t.publisher("parted"), lambda t: t.subscribe(["parted"], "g")], ids=["write", "read"])
def test_a_partitioned_topic_is_refused_by_name(pulsar_url: str, use: Callable[[Transport], object]) -> None:
    url = with_namespace(pulsar_url)
    transport = connect(url)
    try:
        publish(transport, "other", [b"1"])
        place = transport.driver.settings  # type: ignore[attr-defined]
        request = urllib.request.Request(
            f"{place.admin}/admin/v2/persistent/{place.space}/parted/partitions", b"3", {"Content-Type": "application/json"}, method="PUT"
        )
        urllib.request.urlopen(request, timeout=60).close()
        with pytest.raises(ConfigurationError, match=r"'parted' .* is partitioned \(3\).*without partitions"):
            use(transport)
    finally:
        disconnect(transport)
