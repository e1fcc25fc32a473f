"""Files on FTP servers: what is fetched, what is refused, and what a server may do."""

from __future__ import annotations

import contextlib
import socket
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ftp_server import Ftp, FTPHandler

from edgeserve.core.errors import ConfigurationError, FetchError
from edgeserve.payload import FtpFiles, Place, allowed_hosts, is_refusal, own_url, place_of

MOST = 1 << 20
PASSWORD = "hunter2"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Ftp]:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "é.txt").write_bytes(b"hello")
    served = Ftp(tmp_path)
    yield served
    served.close()


def read(files: FtpFiles, place: Place, most: int = MOST) -> bytes:
    blocks: list[bytes] = []
    files.fetch(place, blocks.append, most)
    return b"".join(blocks)


def test_a_file_is_fetched_and_deleted(server: Ftp, tmp_path: Path) -> None:
    files = FtpFiles()
    place = place_of(f"{server.url}/a%20b/%C3%A9.txt", ())
    assert read(files, place) == read(files, place) == b"hello"
    files.delete(place)
    assert not (tmp_path / "a b" / "é.txt").exists()
    files.delete(place)  # it is done with
    with pytest.raises(FetchError, match="550"):
        read(files, place)
    files.close()


def test_a_connection_that_the_server_has_ended_is_made_again(server: Ftp, tmp_path: Path) -> None:
    files = FtpFiles()
    place = place_of(f"{server.url}/a%20b/%C3%A9.txt", ())
    assert read(files, place) == b"hello"
    server.close()
    with pytest.raises(FetchError, match="no connection"):
        read(files, place)
    again = Ftp(tmp_path, server.port)
    assert read(files, place) == b"hello"
    again.close()
    again = Ftp(tmp_path, server.port)
    assert read(files, place) == b"hello"
    again.close()
    files.close()


@pytest.mark.parametrize(
    "url",
    [
        "ftp://other/x",
        "ftp://localhost.evil/x",
        "ftp://169.254.169.254/x",
        "http://localhost/x",
        "file:///etc/passwd",
        "ftp:///x",
        "ftp://localhost",
        "ftp://localhost/",
        "ftp://localhost/a/",
        "ftp://localhost//etc/passwd",
        "ftp://localhost/../x",
        "ftp://localhost/a/%2e%2e/x",
        "ftp://localhost/a%2fb",
        "ftp://localhost/a%0d%0aDELE%20x",
        "ftp://localhost/a%00",
        "ftp://localhost/a%5cb",
        "ftp://localhost:99999/x",
        "ftp://[::1/x",
        "ftp://localhost/a#b",
        "ftp://localhost/a?b",
        "ftp://localhost/a#",
        "ftp://localhost/a%1b[2J",
    ],
)
def test_what_is_not_allowed_is_refused(url: str) -> None:
    with pytest.raises(FetchError):
        place_of(url, {"edge-2"})


@pytest.mark.parametrize("url", ["ftp://me:hunter2/x@localhost/x", "ftp://me:hunter2@other/x", "ftp://me:hunter2@localhost/x#y"])
def test_what_is_refused_does_not_tell_the_password(url: str) -> None:
    with pytest.raises(FetchError) as raised:
        place_of(url, ())
    assert "hunter2" not in str(raised.value) and raised.value.__cause__ is None


def test_hosts_are_allowed_by_name() -> None:
    hosts = allowed_hosts({"EDGESERVE_FTP_HOSTS": "Edge-2, 10.0.0.7"})
    assert place_of("ftp://EDGE-2/x", hosts).host == "edge-2"
    assert place_of("ftp://me:pass%40word@10.0.0.7:2121/x", hosts) == Place("me", "pass@word", "10.0.0.7", 2121, ("x",))
    assert "pass" not in place_of("ftp://me:pass%40word@10.0.0.7:2121/x", hosts).shown
    assert place_of(f"ftp://{socket.gethostname()}/x", ()).is_here
    assert place_of("ftp://127.0.0.1/x", ()).is_here


@pytest.mark.parametrize("url", ["edge-1", "http://edge-1", "ftp://", "ftp://edge-1/files", "ftp://edge-1:x"])
def test_an_own_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="EDGESERVE_FTP_URL"):
        own_url({"EDGESERVE_FTP_URL": url})


def test_a_file_that_is_too_large_is_left(server: Ftp, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(3 * MOST))
    files, taken = FtpFiles(), list[int]()
    place = place_of(f"{server.url}/large", ())
    with pytest.raises(FetchError, match="more than 1,048,576 bytes"):
        files.fetch(place, lambda block: taken.append(len(block)), MOST)
    assert sum(taken) <= MOST
    assert read(files, place, 4 * MOST) == bytes(3 * MOST)
    files.close()


@pytest.mark.parametrize("more", [-1, 1])
def test_a_file_that_did_not_come_whole_is_none(server: Ftp, monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    def size(handler: FTPHandler, path: str) -> None:
        handler.respond(f"213 {len(b'hello') + more}")

    monkeypatch.setattr(FTPHandler, "ftp_SIZE", size)
    files = FtpFiles()
    with pytest.raises(FetchError, match="5 came"):
        read(files, place_of(f"{server.url}/a%20b/%C3%A9.txt", ()))
    files.close()


def test_a_file_that_may_not_be_deleted_is_no_file_that_is_gone(server: Ftp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FTPHandler, "ftp_DELE", lambda handler, path: handler.respond("550 no"))
    files = FtpFiles()
    with pytest.raises(FetchError, match="550") as raised:
        files.delete(place_of(f"{server.url}/a%20b/%C3%A9.txt", ()))
    assert is_refusal(raised.value)
    files.delete(place_of(f"{server.url}/none", ()))
    files.close()


def test_what_a_server_says_is_told_without_the_password() -> None:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError), listening.accept()[0] as peer:
                peer.sendall(b"220 hi\r\n")
                peer.recv(100)
                peer.sendall(b"331 password\r\n")
                peer.recv(100)
                peer.sendall(f"530 {PASSWORD} is\x1b[2Jwrong\r\n".encode())
                over.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(FetchError, match=r"530 \*\*\* is \[2Jwrong") as raised:
            read(FtpFiles(idle_s=5), place_of(f"ftp://me:{PASSWORD}@localhost:{listening.getsockname()[1]}/x", ()))
        over.set()
        thread.join()
    assert PASSWORD not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("says", [b"", b"220-a\r\n" * 5_000, b"220 hello\r\n", b"\xff\xfe\r\n", b"220-" + bytes(20_000), b"999 x\r\n"])
def test_a_server_that_is_none_fails_in_time(says: bytes) -> None:
    """Nothing, a reply without end, nothing more, nonsense, an endless line, a reply that there is not."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            listening.settimeout(0.1)
            while not over.is_set():
                try:
                    peer, _ = listening.accept()
                except TimeoutError:
                    continue
                peer.sendall(says)
                kept.append(peer)

        kept: list[socket.socket] = []
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(FetchError, match="more than 1000 lines" if says.count(b"\n") > 1 else "ftp://localhost"):
                read(FtpFiles(idle_s=0.3), place_of(f"ftp://localhost:{listening.getsockname()[1]}/x", ()))
        finally:
            over.set()
            thread.join()
            for peer in kept:
                peer.close()
