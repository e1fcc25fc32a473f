"""The server of payloads: what it gives, what it refuses, what it does not let peers do to it."""

from __future__ import annotations

import http.client
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.payload.origins import BIG, MB, TOKEN, Store, payload
from tests.waiting import until

from edgeserve.core.errors import ClosedError, ConfigurationError, TransportError, UsedAfterFork
from edgeserve.payload import Reference
from edgeserve.payload import server as module
from edgeserve.payload.leases import Table, key_of, leased
from edgeserve.payload.server import PayloadServer

AUTH = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "base")


@pytest.fixture
def server(store: Store) -> Iterator[PayloadServer]:
    with PayloadServer(store.base, token=TOKEN) as server:
        yield server


def path_of(reference: Reference, **other: object) -> str:
    parts = {name: other.get(name, getattr(reference, name)) for name in ("store", "segment", "slot", "generation", "size")}
    return "/v1/" + "/".join(map(str, parts.values()))


class Client:
    """One connection that is kept."""

    def __init__(self, server: PayloadServer) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def get(self, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        self.connection.request(method, path, headers=AUTH | (headers or {}))
        response = self.connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


@pytest.fixture
def client(server: PayloadServer) -> Iterator[Client]:
    with Client(server) as client:
        yield client


def raw(server: PayloadServer, sent: bytes) -> bytes:
    """All that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(sent)
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    parts = []
    try:
        while part := sock.recv(1 << 20):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def asking(reference: Reference) -> bytes:
    return f"GET {path_of(reference)} HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()


@pytest.mark.parametrize("size", [1, MB, 6 * MB])
def test_a_payload_is_given_whole_and_in_parts_over_one_connection(store: Store, client: Client, size: int) -> None:
    whole = payload(1, size)
    store.put(payload(0, size))
    path = path_of(store.put(whole))
    assert client.get(path)[::2] == (200, whole)
    sock = client.connection.sock
    for asked, first, behind in (("0-", 0, size), (f"{size - 1}-", size - 1, size), (f"{size // 2}-{size - 1}", size // 2, size)):
        status, fields, body = client.get(path, headers={"Range": f"bytes={asked}"})
        assert (status, body) == (206, whole[first:behind])
        assert fields["content-range"] == f"bytes {first}-{behind - 1}/{size}"
    assert client.get(path, headers={"Range": "bytes=0-0"})[::2] == (206, whole[:1])
    assert client.get(path, headers={"Range": f"bytes=0-{size + 5}"})[::2] == (206, whole)
    status, fields, body = client.get(path, "HEAD")
    assert (status, fields["content-length"], body) == (200, str(size), b"")
    assert client.connection.sock is sock


def test_a_part_that_is_not_there_is_refused(store: Store, client: Client) -> None:
    path = path_of(store.put(payload(1, MB)))
    for asked, status in ((f"{MB}-", 416), ("5-4", 416), ("-5", 400), ("0-1,3-4", 400), ("x-", 400)):
        assert client.get(path, headers={"Range": f"bytes={asked}"})[0] == status
    assert client.get(path)[0] == 200


@pytest.mark.parametrize(
    ("other", "status"),
    [
        ({"store": "another"}, 404),
        ({"store": ".."}, 400),
        ({"store": "."}, 400),
        ({"store": "store/../store"}, 400),
        ({"store": "%2e%2e"}, 400),
        ({"store": "Store"}, 400),
        ({"segment": ".."}, 400),
        ({"segment": "leases"}, 404),
        ({"segment": "0123456789abcdef.0123456789abcdef.payloads"}, 404),
        ({"segment": "a" * 101}, 400),
        ({"slot": 9999}, 404),
        ({"slot": 2**32}, 400),
        ({"slot": "-1"}, 400),
        ({"slot": "\u0661"}, 400),
        ({"generation": 2}, 410),
        ({"generation": 0}, 400),
        ({"generation": 2**62}, 400),
        ({"size": MB - 1}, 400),
        ({"size": MB + 1}, 400),
        ({"size": 100 * MB}, 404),
        ({"size": f"{MB}?a=b"}, 400),
    ],
)
def test_what_is_not_there_or_no_name_is_refused(store: Store, server: PayloadServer, other: dict[str, object], status: int) -> None:
    reference = store.put(payload(1, MB))
    (store.base / "0123456789abcdef.0123456789abcdef.payloads").write_bytes(b"above")
    sent = f"GET {path_of(reference, **other)} HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n".encode()
    assert raw(server, sent).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("given", [None, "Bearer ", "Bearer another-token", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"])
def test_without_the_token_nothing_is_looked_at(store: Store, server: PayloadServer, given: str | None) -> None:
    reference = store.put(payload(1, MB))
    field = "" if given is None else f"Authorization: {given}\r\n"
    firsts = f"GET {path_of(reference)} HTTP/1.1", "GET /v1/../x HTTP/1.1", "POST / HTTP/1.1", "GET /v1/a/b/1/1/1 HTTP/1.1"
    answers = [raw(server, f"{first}\r\n{field}\r\n".encode("latin-1")) for first in firsts]
    assert {answer.partition(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 401 Unauthorized"}


def test_two_tokens_are_none(store: Store, server: PayloadServer) -> None:
    field = f"Authorization: Bearer {TOKEN}\r\n"
    assert raw(server, f"GET {path_of(store.put(payload(1, MB)))} HTTP/1.1\r\n{field}{field}\r\n".encode()).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer %b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nAuthorization: Bearer %b\r\n\r\n", 405),
        (b"GET / HTTP/2\r\nAuthorization: Bearer %b\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\r\nAuthorization: Bearer %b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer %b\r\nX : y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer %b\r\nX: a\nY: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer %b\r\nX: a\r\n b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer %b\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 431),
        (b"X" * 100_000 + b"%b", 431),
    ],
)
def test_what_is_no_request_is_refused(server: PayloadServer, sent: bytes, status: int) -> None:
    assert raw(server, sent % TOKEN.encode()).startswith(b"HTTP/1.1 %d " % status)


def test_a_request_with_a_body_is_refused(store: Store, server: PayloadServer) -> None:
    head = asking(store.put(payload(1, MB)))[:-2]
    for field in (b"Content-Length: 5", b"Transfer-Encoding: chunked"):
        assert raw(server, head + field + b"\r\n\r\nGET /").startswith(b"HTTP/1.1 400 ")


def test_requests_that_come_together_are_answered_in_turn(store: Store, server: PayloadServer) -> None:
    one, two = store.put(payload(1, 1000)), store.put(payload(2, 1000))
    got = raw(server, asking(one) + asking(two)[:-2] + b"Connection: close\r\n\r\n")
    assert got.count(b"HTTP/1.1 200 ") == 2 and got.find(payload(1, 1000)) < got.find(payload(2, 1000)) and got.endswith(payload(2, 1000))


def test_a_file_that_is_no_segment_is_not_served(store: Store, client: Client) -> None:
    reference = store.put(payload(1, MB))
    other = store.directory / "0123456789abcdef.0123456789abcdef.payloads"
    other.write_bytes(b"x" * 10_000)
    assert client.get(path_of(reference, segment=other.name))[0] == 404
    other.unlink()
    other.symlink_to(store.directory / reference.segment)
    assert client.get(path_of(reference, segment=other.name))[0] == 404


def test_a_slot_is_not_used_again_while_its_payload_is_sent(tmp_path: Path) -> None:
    store = Store(tmp_path / "base", BIG)
    first = payload(1, BIG)
    reference = store.put(first)
    with PayloadServer(store.base, token=TOKEN) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(asking(reference))
        head = sock.recv(20)
        store.done = [(0, 1)]
        assert leased(store.directory) == {key_of(reference.segment, reference.slot, reference.generation)}
        assert store.put_or_none(payload(2, BIG)) is None
        while len(head) < BIG:
            head += sock.recv(1 << 20)
        rest = len(head.partition(b"\r\n\r\n")[2])
        while rest < BIG:
            came = sock.recv(1 << 20)
            head += came
            rest += len(came)
        assert head.endswith(first)
        until(lambda: not leased(store.directory))  # although the connection is kept
        assert store.put_or_none(payload(2, BIG)) is not None
        sock.sendall(asking(reference))
        assert sock.recv(100).startswith(b"HTTP/1.1 410 ")


def test_a_slot_that_is_used_again_while_it_is_sent_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Table, "enter", lambda self, key: None)
    store = Store(tmp_path / "base", BIG)
    reference = store.put(payload(1, BIG))
    with PayloadServer(store.base, token=TOKEN) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(asking(reference))
        came = sock.recv(20)
        store.done = [(0, 1)]
        assert store.put_or_none(payload(2, BIG)) is not None
        came += read_all(sock)
        assert len(came.partition(b"\r\n\r\n")[2]) < BIG


def test_who_takes_nothing_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STALL_S", 0.2)
    store = Store(tmp_path / "base", BIG)
    with PayloadServer(store.base, token=TOKEN) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(asking(store.put(payload(1, BIG))))
        came = sock.recv(20)
        until(lambda: not leased(store.directory))
        assert len(came + read_all(sock)) < BIG


def test_who_takes_little_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLACK_S", 0.2)
    monkeypatch.setattr(module, "_SLOWEST_BYTES_PER_S", 1 << 40)
    store, stop = Store(tmp_path / "base", BIG), threading.Event()
    with PayloadServer(store.base, token=TOKEN) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(asking(store.put(payload(1, BIG))))
        taken = 0
        while taken < BIG and (leased(store.directory) or not taken):
            taken += len(sock.recv(1 << 13))
            stop.wait(0.01)
        assert taken < BIG
        sock.settimeout(60)
        assert taken + len(read_all(sock)) < BIG


def test_who_says_nothing_stalls_nobody_and_is_cut(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEAD_S", 0.3)
    reference = store.put(payload(1, MB))
    with PayloadServer(store.base, token=TOKEN) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(5)]
        for sock in slow:
            sock.sendall(b"GET /v1/st")
        with Client(server) as client:
            assert client.get(path_of(reference))[::2] == (200, payload(1, MB))
        stop = threading.Event()
        with pytest.raises(OSError):  # however its bytes trickle in
            while True:
                slow[0].sendall(b"o")
                stop.wait(0.02)
        for sock in slow:
            assert read_all(sock) == b""
            sock.close()


def test_one_that_is_idle_is_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.1)
    with PayloadServer(store.base, token=TOKEN) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(asking(store.put(payload(1, 1000))))
        assert read_all(sock).endswith(payload(1, 1000))


def test_more_than_it_serves_are_told_so_and_those_who_wait_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CONNECTIONS", 2)
    monkeypatch.setattr(module, "_GRACE_S", 0.0)
    store = Store(tmp_path / "base")
    reference = store.put(payload(1, BIG))
    small = store.put(payload(2, 1000))
    with PayloadServer(store.base, token=TOKEN) as server:
        one, two = (socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(2))
        one.sendall(asking(reference))
        assert one.recv(12) == b"HTTP/1.1 200"
        assert raw(server, asking(small)[:-2] + b"Connection: close\r\n\r\n").endswith(payload(2, 1000))
        assert read_all(two) == b""  # it gave way
        three = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        three.sendall(asking(reference))
        assert three.recv(12) == b"HTTP/1.1 200"
        assert raw(server, b"").startswith(b"HTTP/1.1 503 ")
        for sock in (one, two, three):
            sock.close()
        with Client(server) as client:
            until(lambda: _status(client, small) == 200)


def _status(client: Client, reference: Reference) -> int:
    try:
        return client.get(path_of(reference))[0]
    except (OSError, http.client.HTTPException):
        client.connection.close()
        return 0


def test_nothing_is_left_open(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_open() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    reference = store.put(payload(1, MB))
    before = all_open()
    server = PayloadServer(store.base, token=TOKEN)
    server.start()
    with Client(server) as client, socket.create_connection(("127.0.0.1", server.port)) as idle:
        assert client.get(path_of(reference))[0] == 200
        assert all_open() != before
        server.close()
        server.close()
        assert idle.recv(1) == b""
    assert all_open() == before
    assert os.listdir(store.directory / "leases") == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    with pytest.raises(ClosedError):
        server.start()


def test_what_is_gone_is_let_go_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TICK_S", 0.01)
    monkeypatch.setattr(module, "_LEASES_REST_S", 0.0)
    reference = store.put(payload(1, MB))
    segment = store.directory / reference.segment

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(segment.name)

    before = mapped()
    with PayloadServer(store.base, token=TOKEN) as server, Client(server) as client:
        assert client.get(path_of(reference))[0] == 200
        assert mapped() == before + 1
        # Else the store's directory could not be removed.
        until(lambda: os.listdir(store.directory / "leases") == [])
        segment.unlink()
        until(lambda: mapped() == before)
        assert client.get(path_of(reference))[0] == 404


def test_a_fork_keeps_neither_port_nor_connections(store: Store) -> None:
    reference = store.put(payload(1, MB))
    with PayloadServer(store.base, token=TOKEN) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(asking(reference))
        assert sock.recv(12) == b"HTTP/1.1 200"
        here, there = os.pipe()
        told, tells = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(there)
            try:
                server.start()
            except UsedAfterFork:
                server.close()  # the parent's goes on
                sock.close()
                os.write(tells, b"x")
                os.read(here, 1)
                os._exit(0)
            os._exit(1)
        os.close(here)
        os.close(tells)
        assert os.read(told, 1) == b"x"  # it has run
        os.close(told)
        with Client(server) as client:
            assert client.get(path_of(reference))[0] == 200
        server.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        os.close(there)
        assert os.waitpid(child, 0)[1] == 0


def test_warnings_name_the_peer_are_few_and_tell_no_token(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with PayloadServer(store.base, token=TOKEN) as server:
        assert TOKEN not in repr(server)
        with caplog.at_level(logging.DEBUG, "edgeserve"):
            for _ in range(20):
                raw(server, b"GET /v1/\x1b[31m HTTP/1.1\r\nAuthorization: Bearer not-the-token\r\n\r\n")
            raw(server, f"GET /{TOKEN} HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert "127.0.0.1:" in caplog.text and "token" in caplog.text
    assert TOKEN not in caplog.text and "not-the-token" not in caplog.text and "\x1b" not in caplog.text


def test_what_cannot_work_is_refused(store: Store, server: PayloadServer) -> None:
    for token in ("", "short", "with space in it", "with\r\nline", "\xe9" * 10):
        with pytest.raises(ConfigurationError) as caught:
            PayloadServer(store.base, token=token)
        assert not token or token not in str(caught.value)
    with pytest.raises(TransportError, match=str(server.port)):
        PayloadServer(store.base, port=server.port, token=TOKEN).start()


def certificate(folder: Path) -> tuple[Path, Path]:
    """One for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, to make a certificate")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_over_tls(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    reference = store.put(payload(1, 6 * MB))
    monkeypatch.setattr(module, "_HEAD_S", 0.5)
    with PayloadServer(store.base, token=TOKEN, tls=tls) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as silent:  # one that begins no handshake
            context = ssl.create_default_context(cafile=str(cert))
            connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=60)
            for asked, expected in ((None, payload(1, 6 * MB)), ("bytes=5000000-", payload(1, 6 * MB)[5000000:])):
                connection.request("GET", path_of(reference), headers=AUTH | ({} if asked is None else {"Range": asked}))
                assert connection.getresponse().read() == expected
            connection.close()
            assert read_all(silent) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as plain:
            plain.sendall(asking(reference))
            assert not read_all(plain).startswith(b"HTTP")


def test_who_only_looks_whether_somebody_is_there_is_no_trouble(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    for each in (tls, None):
        with PayloadServer(store.base, token=TOKEN, tls=each) as server:
            socket.create_connection(("127.0.0.1", server.port), timeout=60).close()
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as last:
                last.shutdown(socket.SHUT_WR)
                assert read_all(last) == b""
    assert caplog.text == ""
