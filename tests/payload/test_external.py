"""Files that messages name by a URL: what is allowed, and what a hostile server or path can do."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import os
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ftp_server import Ftp
from tests.payload.origins import MB, payload
from tests.payload.test_server import certificate
from tests.relays import Relay, Scripted, answering, end

from edgeserve import External
from edgeserve.core.errors import ConfigurationError, CorruptMessage, EdgeServeError, FetchError, NotAllowed, PayloadGone
from edgeserve.payload import ExternalFiles
from edgeserve.payload.location import Allowed, location_of

SECRET = "sesame"
Answer = Callable[[socket.socket, bytes], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served" / "a b").mkdir(parents=True)
    (tmp_path / "served" / "a b" / "1.bin").write_bytes(payload(1, MB))
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path / "served"


@pytest.fixture
def web(folder: Path) -> Iterator[int]:
    """A web server's port."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def make(*answers: Answer) -> Scripted:
        made.append(Scripted(*answers))
        return made[-1]

    yield make
    for each in made:
        each.close()


def got(url: str | External, *allowed: str, most_bytes: int = 2 * MB, timeout_s: float = 60.0) -> bytes:
    """What is fetched, by a node that allows this."""
    files = ExternalFiles(allowed, most_bytes=most_bytes, timeout_s=timeout_s)
    try:
        file = io.BytesIO()
        files.fetch(External(url) if isinstance(url, str) else url, file)
        return file.getvalue()
    finally:
        files.close()


def says(*parts: bytes, for_ever: bytes = b"", every: threading.Event | None = None) -> Answer:
    """Sends the parts, then something for ever: at once, or as slowly as it can without standing still."""

    def answer(sock: socket.socket, _: bytes) -> None:
        for part in parts:
            sock.sendall(part)
        while for_ever:
            sock.sendall(for_ever)
            if every is not None:
                every.wait(0.02)
        end(sock)

    return answer


def head(*fields: str, status: str = "200 OK") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *fields, "", "")).encode()


# --- what is allowed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://data.example.org/frames/1.jpg", None),
        ("HTTPS://Data.example.org:443/frames/a%20b/1.jpg?v=2", None),
        ("s3://bucket/x/1", None),
        ("file:///srv/frames/1.jpg", None),
        ("file://localhost/srv/frames/1.jpg", None),
        ("https://data.example.org/framesets/1.jpg", "is not allowed"),
        ("https://data.example.org/", "is not allowed"),
        ("https://data.example.org:8443/frames/1.jpg", "is not allowed"),
        ("http://data.example.org/frames/1.jpg", "is not allowed"),
        ("https://data.example.org.evil.example/frames/1.jpg", "is not allowed"),
        ("https://evil.example/frames/1.jpg#@data.example.org/frames/", "is not allowed"),
        ("https://127.0.0.1/frames/1.jpg", "is not allowed"),
        ("http://169.254.169.254/latest/meta-data/", "is not allowed"),
        ("s3://bucket2/x/1", "is not allowed"),
        ("s3://Bucket/x/1", "is not allowed"),
        ("file:///etc/passwd", "is not allowed"),
        ("file://data.example.org/srv/frames/1.jpg", "names no host"),
        ("gopher://data.example.org/frames/", "nothing is fetched by that scheme"),
        ("data.example.org://x", "nothing is fetched by that scheme"),
        ("https://me:sesame@data.example.org/frames/1.jpg", "a user or a password"),
        ("https://data.example.org\\@evil.example/frames/1.jpg", "characters that no URL has"),
        ("https://data.example.org/frames/1.jpg\r\nX: y", "characters that no URL has"),
        ("https://data.example.org/frames/\u0661.jpg", "characters that no URL has"),
        ("https://data.example.org:0/frames/1", "a port that is none"),
        ("https://data.example.org:99999/frames/1", "a port that is none"),
        ("s3://bucket:80/x", "a port that is none"),
        ("https:///frames/1", "names no host"),
        ("file:///srv/frames/../../etc/passwd", "not plain"),
        ("file:///srv/frames/%2e%2e/%2e%2e/etc/passwd", "not plain"),
        ("file:///srv/frames/%252e%252e/x", "not plain"),
        ("file:///srv/frames/..%2f..%2fetc/passwd", "not plain"),
        ("file:///srv/frames/%2e%2e%5cx", "not plain"),
        ("file:///srv/frames//etc/passwd", "not plain"),
        ("file:///srv/frames/x%00.jpg", "not plain"),
        ("file:///srv/frames/x.jpg?y", "%3F"),
        ("https://data.example.org/frames/../secret", "not plain"),
        ("https://data.example.org/frames/.%2e/secret", "not plain"),
        ("https://data.example.org/frames/..;a=b/secret", "not plain"),
        ("https://data.example.org/frames/%25252525252e", "not plain"),
    ],
)
def test_a_url_is_read_strictly(url: str, says: str | None) -> None:
    allowed = Allowed(["https://data.example.org/frames/", "s3://bucket", "file:///srv/frames"])
    if says is None:
        allowed.check(location_of(url))
        return
    with pytest.raises(NotAllowed, match=says) as caught:
        allowed.check(location_of(url))
    assert SECRET not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url", ["data.example.org", "file:///", "https://", "s3://", "https://me:sesame@x/", "https://x/?y", "gopher://x/", "https://x/../y"]
)
def test_a_list_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="fetch=") as caught:
        Allowed([url])
    assert SECRET not in str(caught.value)


@given(st.one_of(st.text(), st.from_regex(r"(https?|s3|ftp|file)://[a-z@:/.%2fe\\?#;\[\]]*")))
def test_whatever_a_message_names_it_is_below_what_is_allowed_or_refused(url: str) -> None:
    try:
        found = location_of(url)
    except NotAllowed as exc:
        assert str(exc).isprintable()
        return
    assert found.host.lower() in url.lower() and not {b"..", b"."} & set(found.path)
    with pytest.raises(NotAllowed):
        Allowed(["https://data.example.org/", "file:///srv/frames/"]).check(found)


def test_nothing_is_allowed_without_a_list(web: int) -> None:
    with pytest.raises(NotAllowed):
        got(f"http://127.0.0.1:{web}/a%20b/1.bin")


# --- files of this machine --------------------------------------------------------------------------------------


def test_a_file_of_this_machine(folder: Path) -> None:
    allowed = f"file://{folder}/"
    checksum = hashlib.sha256(payload(1, MB)).hexdigest()
    file = External(f"{allowed}a%20b/1.bin", size=MB, checksum=f"sha256:{checksum}")
    assert got(file, allowed) == payload(1, MB)
    files = ExternalFiles([allowed], most_bytes=MB, timeout_s=60)
    assert files.local(file) == folder / "a b" / "1.bin"
    with pytest.raises(CorruptMessage, match="checksum"):
        files.local(External(file.url, checksum=f"md5:{0:032}"))
    with pytest.raises(NotAllowed, match="fetch_max_bytes=100"):
        ExternalFiles([allowed], most_bytes=100, timeout_s=60).local(file)


def test_a_link_leads_nowhere_else(folder: Path, tmp_path: Path) -> None:
    allowed = f"file://{folder}/"
    (folder / "out").symlink_to(tmp_path)
    (folder / "secret").symlink_to(tmp_path / "secret")
    (folder / "in").symlink_to(folder / "a b")
    (tmp_path / "served2").mkdir()
    (folder / "beside").symlink_to(tmp_path / "served2")
    (tmp_path / "served2" / "x").touch()
    os.mkfifo(folder / "pipe")
    assert got(f"{allowed}in/1.bin", allowed) == payload(1, MB)
    for name in ("out/secret", "secret", "beside/x"):
        with pytest.raises(NotAllowed, match="is a link"):
            got(f"{allowed}{name}", allowed)
    for name in ("pipe", "a%20b", "a%20b/"):
        with pytest.raises(NotAllowed, match="is no file"):
            got(f"{allowed}{name}", allowed)
    for name in ("none", "a%20b/1.bin/x"):
        with pytest.raises(PayloadGone):
            got(f"{allowed}{name}", allowed)


# --- web servers ------------------------------------------------------------------------------------------------


def test_a_file_of_a_web_server(web: int) -> None:
    allowed = f"http://127.0.0.1:{web}/a%20b/"
    files = ExternalFiles([allowed], most_bytes=MB, timeout_s=60)
    for _ in range(3):
        file = io.BytesIO()
        files.fetch(External(f"{allowed}1.bin?x=y"), file)
        assert file.getvalue() == payload(1, MB)
    files.close()
    with pytest.raises(PayloadGone, match="404"):
        got(f"{allowed}none", allowed)


def test_a_web_server_with_tls(folder: Path, tmp_path: Path, scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # who does not trust it leaves

    with Server(("127.0.0.1", 0), handler) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = f"https://127.0.0.1:{server.server_port}/"
            with pytest.raises(FetchError, match="not trusted"):
                got(f"{base}a%20b/1.bin?token={SECRET}", base)
            monkeypatch.setenv("SSL_CERT_FILE", str(cert))
            assert got(f"{base}a%20b/1.bin", base) == payload(1, MB)
            other = base.replace("127.0.0.1", "localhost")
            with pytest.raises(FetchError, match="not trusted"):
                got(f"{other}a%20b/1.bin", other)
        finally:
            server.shutdown()
            thread.join()
    plain = scripted(says(b"220 ftp.example.org\r\n"))
    with pytest.raises(FetchError, match="did not come whole"):
        got(f"https://127.0.0.1:{plain.port}/x", f"https://127.0.0.1:{plain.port}/", timeout_s=0.5)


WHOLE = payload(2, 100_000)
CHUNKED = head("Transfer-Encoding: chunked") + b"186A0;x=y\r\n" + WHOLE + b"\r\n0\r\nT: x\r\n\r\n"
NO_LENGTH = head("Connection: close") + WHOLE


def test_lengths_that_are_told_in_other_ways(scripted: Callable[..., Scripted]) -> None:
    server = scripted(says(CHUNKED), says(b"HTTP/1.1 103 Early Hints\r\n\r\n", CHUNKED), says(NO_LENGTH))
    url = f"{server.url}/x"
    assert got(url, server.url) == WHOLE
    assert got(url, server.url) == WHOLE
    assert got(External(url, size=100_000), server.url) == WHOLE
    with pytest.raises(FetchError, match="without its length"):
        got(url, server.url)


@pytest.mark.parametrize(
    ("answer", "error", "what"),
    [
        (says(head("Content-Length: 4000000000"), for_ever=WHOLE), NotAllowed, "more than fetch_max_bytes=2000000"),
        (says(head("Transfer-Encoding: chunked"), for_ever=b"186A0\r\n" + WHOLE + b"\r\n"), NotAllowed, "more than fetch_max_bytes"),
        (says(head("Transfer-Encoding: chunked"), b"-1\r\n", for_ever=WHOLE), FetchError, "a chunk without its length"),
        (says(head("Transfer-Encoding: chunked"), b"1\r\n", for_ever=b"123\r\n"), FetchError, "longer than it says"),
        (says(head("Transfer-Encoding: chunked"), for_ever=b"1" * 5_000), FetchError, "a line that does not end"),
        (says(head("Transfer-Encoding: chunked"), b"0\r\n", for_ever=b"a: b\r\n"), FetchError, "trailers"),
        (says(head("Transfer-Encoding: gzip, chunked"), for_ever=WHOLE), FetchError, "how long"),
        (says(head("Transfer-Encoding: chunked", "Content-Length: 5"), for_ever=WHOLE), FetchError, "how long"),
        (says(head("Content-Length: 5", "Content-Length: 6"), for_ever=WHOLE), FetchError, "how long"),
        (says(head("Content-Length: -1"), for_ever=WHOLE), FetchError, "how long"),
        (says(head("Content-Encoding: gzip", "Content-Length: 5"), b"12345"), FetchError, "encoding"),
        (says(b"HTTP/1.1 200 OK\r\n", for_ever=b"X: y\r\n" * 500), FetchError, "more than 8192"),
        (says(for_ever=b"HTTP/1.1 100 Continue\r\n\r\n"), FetchError, "no final answer"),
        (says(b"220 ready\r\n\r\n"), FetchError, "no status"),
        (says(head("Content-Length: 5"), b"123"), FetchError, "did not come whole, 3 bytes"),
        (says(), FetchError, "without an answer"),
        (says(head("Content-Length: 0", status="404 Not Found")), PayloadGone, "404"),
        (says(head("Content-Length: 0", status="403 Forbidden")), FetchError, "does not let"),
        (says(head("Content-Length: 0", status="503 Busy")), FetchError, "status 503"),
        (says(head("Content-Length: 5", "Content-Range: bytes 0-4/5", status="206 Part"), b"12345"), FetchError, "status 206"),
        (says(head("Location: file:///etc/passwd", status="302 Found")), NotAllowed, "no redirect to file"),
        (says(head("Location: http://169.254.169.254/latest/", status="307 T")), NotAllowed, "169.254.169.254/latest/ is not allowed"),
        (says(head("Location: //evil.example/", status="301 Moved")), NotAllowed, "evil.example/ is not allowed"),
        (says(head("Location: http://a:sesame@127.0.0.1/", status="302 Found")), NotAllowed, "a user or a password"),
        (says(head("Location: http://[::1/", status="302 Found")), NotAllowed, "redirected"),
        (says(head("Location: /%2e%2e/x", status="302 Found")), NotAllowed, "not plain"),
        (says(head("Location: /x", status="302 Found")), FetchError, "again and again"),
    ],
)
def test_a_hostile_server_is_refused_by_name_in_bounded_memory(
    scripted: Callable[..., Scripted], answer: Answer, error: type[EdgeServeError], what: str
) -> None:
    server = scripted(answer)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=what) as caught:
            got(f"{server.url}/x?token={SECRET}", server.url)
        assert tracemalloc.get_traced_memory()[1] < 8 * MB
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    assert SECRET not in str(caught.value) and caught.value.__cause__ is None
    assert str(caught.value).isprintable()


def test_what_trickles_or_stands_still_ends_by_the_deadline(scripted: Callable[..., Scripted]) -> None:
    never = threading.Event()
    slow = [says(head("Content-Length: 5000"), for_ever=b"x", every=never), says(b"HTTP/1.1 200 OK\r\nX: ", for_ever=b"x", every=never)]
    for each in (*slow, lambda sock, _: sock.recv(1)):
        server = scripted(each)
        with pytest.raises(FetchError, match="did not come whole"):
            got(f"{server.url}/x", server.url, timeout_s=0.3)


def test_a_redirect_to_what_is_allowed_is_followed(web: int, scripted: Callable[..., Scripted]) -> None:
    server = scripted(says(head(f"Location: http://127.0.0.1:{web}/a%20b/1.bin", status="302 Found")))
    with pytest.raises(NotAllowed, match="redirected"):
        got(f"{server.url}/x", server.url)
    assert got(f"{server.url}/x", server.url, f"http://127.0.0.1:{web}/a%20b") == payload(1, MB)


def test_a_redirect_from_https_to_http_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with tls.wrap_socket(listener.accept()[0], server_side=True) as sock:
                sock.recv(65536)
                sock.sendall(head("Location: http://127.0.0.1:1/x", status="302 Found"))

        thread = threading.Thread(target=serve)
        thread.start()
        base = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(NotAllowed, match="from https no redirect to http"):
            got(f"{base}/x", base, "http://127.0.0.1:1/")
        thread.join()


def ranged(whole: bytes, tag: str = '"1"', *, then: str | None = None) -> Answer:
    """A server that knows ranges, and has another version from the second request on."""
    asked = 0

    def answer(sock: socket.socket, request: bytes) -> None:
        nonlocal asked
        asked += 1
        now = tag if then is None or asked == 1 else then
        fields = dict(line.decode().split(": ", 1) for line in request.split(b"\r\n")[1:])
        begin = int(fields["Range"][6:-1]) if "Range" in fields and fields["If-Range"] == now else 0
        about = (f"ETag: {now}", f"Content-Length: {len(whole) - begin}")
        if begin:
            sock.sendall(head(*about, f"Content-Range: bytes {begin}-{len(whole) - 1}/{len(whole)}", status="206 Partial") + whole[begin:])
        else:
            sock.sendall(head(*about) + whole)

    return answer


def test_a_broken_connection_goes_on_where_it_was(scripted: Callable[..., Scripted]) -> None:
    relay = Relay(scripted(ranged(payload(1, MB))).port)
    relay.cuts = [200_000, 300_000]
    try:
        assert got(f"{relay.url}/x", relay.url) == payload(1, MB)
    finally:
        relay.close()
    ranges = [line for each in relay.heads for line in each.split(b"\r\n") if line.startswith(b"Range")]
    assert len(relay.heads) == 3 and len(ranges) == 2 and all(not line.endswith(b"=0-") for line in ranges)


def test_what_was_changed_meanwhile_is_fetched_anew_or_not_at_all(scripted: Callable[..., Scripted]) -> None:
    relay = Relay(scripted(ranged(payload(1, MB), then='"2"')).port)
    relay.cuts = [200_000]
    try:
        assert got(f"{relay.url}/x", relay.url) == payload(1, MB)
        relay.to = scripted(ranged(payload(1, MB), tag='W/"1"')).port
        relay.cuts = [200_000]
        with pytest.raises(FetchError, match="did not come whole"):
            got(f"{relay.url}/x", relay.url)
    finally:
        relay.close()
    lies = head("Content-Length: 5", 'ETag: "2"', "Content-Range: bytes 5-9/10", status="206 Partial") + b"67890"
    server = scripted(says(head("Content-Length: 10", 'ETag: "1"'), b"12345"), says(lies))
    with pytest.raises(FetchError, match="changed"):
        got(f"{server.url}/x", server.url)


def test_what_its_message_says_of_it_must_hold(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answering("200 OK", b"12345"))
    right, wrong = hashlib.sha512(b"12345").hexdigest(), hashlib.sha512(b"").hexdigest()
    assert got(External(f"{server.url}/x", size=5, checksum=f"sha512:{right}"), server.url) == b"12345"
    for other in (External(f"{server.url}/x", size=4), External(f"{server.url}/x", checksum=f"sha512:{wrong}")):
        with pytest.raises(CorruptMessage):
            got(other, server.url)


# --- FTP servers ------------------------------------------------------------------------------------------------


def test_a_file_of_an_ftp_server(folder: Path) -> None:
    server = Ftp(folder)
    base = f"{server.url}/a%20b/"
    try:
        assert got(External(f"{base}1.bin", size=MB), base) == payload(1, MB)
        with pytest.raises(PayloadGone, match="550"):
            got(f"{base}none", base)
        with pytest.raises(NotAllowed, match="is not allowed"):
            got(f"{server.url}/x", base)
        with pytest.raises(CorruptMessage, match="its message says 5"):
            got(External(f"{base}1.bin", size=5), base)
        with pytest.raises(NotAllowed, match="fetch_max_bytes"):
            got(f"{base}1.bin", base, most_bytes=1_000)
    finally:
        server.close()


@pytest.mark.parametrize("begins", [b"22", b"220 ready\r\n33"])
def test_an_ftp_server_that_trickles_ends_by_the_deadline(begins: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        never = threading.Event()

        def serve() -> None:
            with listener.accept()[0] as sock, contextlib.suppress(OSError):
                sock.sendall(begins)
                while True:
                    sock.sendall(b"x")
                    never.wait(0.02)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"ftp://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises(FetchError, match=r"within 0\.3 s"):
            got(f"{url}x", url, timeout_s=0.3)
        thread.join()
